"""The file of `cogvx generate --prompts`: the options of each line."""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from .arguments import Parser
from .parser import add_video


class _LineParser(Parser):
    """Parser of the options of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument (--\S+): ", r"\1 ", message))


def read_lines(options: argparse.Namespace) -> list[argparse.Namespace]:
    """Options of each line of `--prompts`: those of the command, replaced by those of the line.

    A line is a JSON object: "prompt", any option of a video by its name on the command line, and
    "out", the name of its file, by default its number, 00001.mp4. The seeds are `--seed`, which
    counts up by line, unless a line has its own.

    Raises ValueError naming file and line.
    """
    parser = _LineParser(prog="line", add_help=False)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out")
    add_video(parser)
    lines: list[argparse.Namespace] = []
    for number, text in enumerate(_texts(options), 1):
        try:
            lines.append(_line(parser, options, number, text))
        except ValueError as error:
            raise ValueError(f"{options.prompts}, line {number}: {error}") from error
    first: dict[Path, int] = {}
    for number, line in enumerate(lines, 1):
        if (other := first.setdefault(line.out, number)) != number:
            raise ValueError(
                f"{options.prompts}, line {number}: out must be another file than that of line "
                f"{other}; got {line.out.name}"
            )
    return lines


def _texts(options: argparse.Namespace) -> Iterable[str]:
    if options.force or options.resume:
        given = "--force" if options.force else "--resume"
        raise ValueError(
            f"{given} must come with --prompt; with --prompts the same command goes on, and makes "
            "anew what is removed"
        )
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out must be a folder, with --prompts; got the file {options.out}")
    if not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out must be a folder in a folder that exists; got {options.out}")
    try:
        texts = options.prompts.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.prompts}: must be text in UTF-8; {error}") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{options.prompts}: must have a line for each video; it has none")
    return texts


def _line(
    parser: Parser, options: argparse.Namespace, number: int, text: str
) -> argparse.Namespace:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be a JSON object; {error.msg} at column {error.colno}") from error
    if not isinstance(found, dict):
        raise ValueError(f"must be a JSON object; got {text[:60]}")
    usual = {**vars(options), "out": f"{number:05}.mp4"}
    if options.seed is not None:
        usual["seed"] = options.seed + number - 1
    if "image" in found or "video" in found:
        usual |= {"image": None, "video": None}
    words: list[str] = []
    for name, value in found.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif isinstance(value, str | int | float) and value is not False:
            words.append(f"{option}={value}")
        else:
            raise ValueError(f"{name} must be a text, a number or true; got {json.dumps(value)}")
    line = parser.parse_args(words, argparse.Namespace(**usual))
    if Path(line.out).name != line.out:
        raise ValueError(f"out must be the name of a file in --out; got {line.out!r}")
    line.out = options.out / line.out
    return line
