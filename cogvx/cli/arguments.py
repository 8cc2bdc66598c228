"""Option types, and options shared by several commands. Imports no torch."""

import argparse
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from ..generation import CHOICES, GenerationParams
from ..validation import did_you_mean

# Copies of the library's constants, because it imports torch; a test compares them.
BACKENDS = ("auto", "kernel", "reference")
SHELLS = ("bash", "zsh", "fish")
STAGES = ("vae", "transformer")
FPS_LIMIT = 1000
SAMPLING_STEPS, SAMPLING_GUIDANCE = 30, 1.0  # of models of the procedural clips

DTYPES = {
    "float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
    "fp32": "float32", "bf16": "bfloat16", "fp16": "float16",
}  # fmt: skip
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
TILE = (240, 360)


class Parser(argparse.ArgumentParser):
    """ArgumentParser that suggests the nearest option, command or choice after a typo."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Report an unknown option before missing ones; argparse does the opposite."""
        if self._subparsers is None:
            for word in args:
                if word == "--":
                    break
                name = word.split("=")[0]
                option = re.fullmatch(r"--?[A-Za-z][\w-]*", name)
                if option and not any(
                    known.startswith(name) for known in self._option_string_actions
                ):
                    self.error(f"unknown option {name}{did_you_mean(name, self.names)}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"must be one of {', '.join(names)}; got {value!r}"
                f"{did_you_mean(str(value), names)}"
            )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        """Exit with usage and message, which torchrun's report has too; its first rank prints."""
        if "TORCHELASTIC_RUN_ID" in os.environ:
            errors = importlib.import_module("torch.distributed.elastic.multiprocessing.errors")
            with suppress(ValueError):
                errors.record(_raise)(ValueError(message))
            if os.environ.get("RANK", "0") != "0":
                self.exit(2)
        super().error(message)

    @property
    def names(self) -> list[str]:
        """Option strings, such as --out; none of deprecated options."""
        actions = self._option_string_actions.items()
        return [name for name, action in actions if action.help != argparse.SUPPRESS]


def _raise(error: Exception) -> None:
    raise error


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return int(text)


def between(low: int, high: int) -> Callable[[str], int]:
    """A whole number in [low, high]."""

    def whole(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to {high}; got {text!r}"
            )
        return int(text)

    return whole


def seed(text: str) -> int:
    """A seed of a torch.Generator."""
    if not re.fullmatch(r"\d{1,19}", text) or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"must be a whole number below 2^63; got {text!r}")
    return int(text)


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number; got {text!r}")
    return value


def rate(text: str) -> float:
    """Frames a second."""
    value = number(text)
    if not 0 < value <= FPS_LIMIT:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most {FPS_LIMIT}; got {text}")
    return value


def part(text: str) -> float:
    """A number above 0 and at most 1."""
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1; got {text}")
    return value


def size_in_bytes(text: str) -> int:
    """10G, 10GiB, 512M, 1.5G, or plain bytes."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?)(?:iB|B)?", text, re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"must be bytes, such as 10G or 512M; got {text!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def tile(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH of a tile, in pixels."""
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if not found or 0 in (int(found[1]), int(found[2])):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH, such as 240x360; got {text!r}")
    return int(found[1]), int(found[2])


def add_model(parser: Any, default: str | None = None, required: bool = True) -> None:
    """Add `--model` to a parser or a group."""
    usual = f"; default {default}" if default else ""
    parser.add_argument(
        "--model", metavar="NAME", default=default, required=required and default is None,
        help="a model's folder; a name on the Hugging Face hub, such as THUDM/CogVideoX-5b, which "
        f"is downloaded once; or tiny, which comes with the package{usual}",
    )  # fmt: skip


def add_hub(parser: argparse.ArgumentParser) -> None:
    """Add options of a model on the Hugging Face hub."""
    group = parser.add_argument_group(
        "Hugging Face hub", "A gated model needs `hf auth login` once."
    )
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit; default main")
    group.add_argument(
        "--variant", metavar="NAME", help="variant of the weights, such as fp16; by default none"
    )


def add_param(parser: Any, name: str, **settings: Any) -> None:
    """Option of a field of `GenerationParams`, with its default and choices."""
    default = getattr(GenerationParams, name)
    kind = {"action": "store_true"} if default is False else {"choices": CHOICES.get(name)}
    option = f"--{name.replace('_', '-')}"
    parser.add_argument(option, **{"default": default, **kind, **settings})


class Deprecated(argparse.Action):
    """Old name of an option: hidden, and warns."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        new = self.dest.replace("_", "-")
        print(f"cogvx: warning: {option} is deprecated; use --{new}", file=sys.stderr)
        setattr(namespace, self.dest, values)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add sampling options of models of the procedural clips."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--steps", type=count, default=SAMPLING_STEPS, metavar="N",
                       help="denoising steps; default %(default)s")  # fmt: skip
    group.add_argument("--guidance", type=number, default=SAMPLING_GUIDANCE, metavar="SCALE",
                       help="guidance scale; 1: without guidance; default "
                       "%(default)s")  # fmt: skip
    group.add_argument("--seed", type=seed, default=0, metavar="N",
                       help="random seed of the first clip; default %(default)s")  # fmt: skip


def add_size(parser: argparse.ArgumentParser, usual: str, fps: str | None = None) -> None:
    """Add `--frames`, `--height`, `--width` and, with its help, `--fps`; `usual`: the defaults."""
    group = parser.add_argument_group("video size")
    group.add_argument("--frames", type=count, metavar="N",
                       help=f"number of frames; by default {usual}")  # fmt: skip
    for side in ("height", "width"):
        group.add_argument(f"--{side}", type=count, metavar="PIXELS",
                           help=f"in pixels; by default {usual}")  # fmt: skip
    if fps is not None:
        add_fps(group, fps)


def add_fps(parser: Any, what: str) -> None:
    parser.add_argument("--fps", type=rate, metavar="RATE", help=f"frames a second; {what}")


def add_machine(parser: argparse.ArgumentParser, tiles: bool = True) -> None:
    group = parser.add_argument_group("device and precision")
    add_device(group)
    add_dtype(group, "by default float32 on a CPU; on a GPU float16 for CogVideoX-2B, bfloat16 for "
              "all others")  # fmt: skip
    if tiles:
        add_tiling(group)


def add_device(parser: Any) -> None:
    parser.add_argument(
        "--device", metavar="NAME",
        help="cpu, cuda (or gpu), cuda:1, mps; by default cuda if there is a GPU, else cpu",
    )  # fmt: skip


def add_dtype(parser: Any, usual: str, default: str | None = None) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default=default,
                        help=f"dtype of the weights; {usual}")  # fmt: skip


def add_backend(parser: Any) -> None:
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto",
        help="backend of the ops: auto takes kernels if they can run, kernel fails if they cannot, "
        "reference is plain torch; default %(default)s",
    )  # fmt: skip


def add_tiling(parser: Any) -> None:
    parser.add_argument(
        "--tiling", nargs="?", const=TILE, type=tile, metavar="HxW",
        help="run the VAE in tiles of this size in pixels, 240x360 if none is given: less memory, "
        "slightly different result; by default no tiles",
    )  # fmt: skip


def add_vae(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("VAE")
    which = group.add_mutually_exclusive_group(required=True)
    add_model(which, required=False)
    which.add_argument(
        "--vae", metavar="DIR|random",
        help="a VAE's folder instead; random: an untrained factorised VAE",
    )  # fmt: skip
    group.add_argument("--base-channels", type=count, default=16, metavar="N",
                       help="width of a random VAE; default %(default)s")  # fmt: skip
    group.add_argument("--seed", type=seed, default=0, metavar="N",
                       help="random seed of the VAE and of --sample; default "
                       "%(default)s")  # fmt: skip
    add_backend(group)
    add_hub(parser)


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=what)
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")


def one_of(names: Iterable[str]) -> str:
    """Format choices as argparse does: {a,b}."""
    return "{" + ",".join(names) + "}"
