"""Find words of this project's former private language, for which the field has other words.

`python -m tests.lint_words` fails on them in prose, comments and names of tracked files.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".md", ".cpp", ".cu", ".h", ".toml", ".sh", ".yaml"}
SKIPPED = {"tests/lint_words.py", "CHANGELOG.md"}  # the list, and history

# Pattern of a word, and what to write instead. `a_name` and `AName` are read as words too.
WORDS = {
    r"laws?": "reference, property",
    r"doors?": "public API, entry point",
    r"knock(s|ed)?": "call",
    r"rooms?": "op package, space",
    r"furniture": "files of an op package",
    r"promise[sd]?": "spec, metadata, budget",
    r"strangers?": "untrusted",
    r"yardsticks?": "baseline",
    r"truths?": "fp64 reference",
    r"judge[sd]?|judging": "compare",
    r"verdicts?": "result",
    r"walk(s|ed|ing)?": "iterate, run over",
    r"told": "given, documented",
    r"said": "documented, passed, output",
    r"asked": "requested, passed",
    r"floors?": "layer, lower bound",
    r"ways?": "kernel, backend, path",
    r"fact sheet": "docs/model.md",
    r"design card": "docs/",
}
# Names of libraries, arithmetic, and phrases of ordinary English.
ALLOWED = re.compile(
    r"\b(ast|os)\.walk\b|\bfloor\(|[\"']floor[\"']|floor[_ ]div\w+|\broom for\b|"
    r"\b(half|either|on the|in the|in a|by) way\b",
    re.IGNORECASE,
)


def lines(path: Path) -> list[str]:
    """The lines of a file, with names split into words and allowed phrases left out."""
    text = ALLOWED.sub("", path.read_text(encoding="utf-8"))
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", text).splitlines()


def files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True)
    names = set(listed.stdout.decode().splitlines()) - SKIPPED
    paths = [ROOT / name for name in sorted(names)]
    return [path for path in paths if path.suffix in SUFFIXES and path.is_file()]


def main() -> int:
    patterns = {word: re.compile(rf"\b({word})\b", re.IGNORECASE) for word in WORDS}
    found = False
    for path in files():
        for number, line in enumerate(lines(path), 1):
            for word, pattern in patterns.items():
                for match in pattern.finditer(line):
                    found = True
                    place = f"{path.relative_to(ROOT)}:{number}"
                    print(f"{place}: {match[0]!r}; instead write: {WORDS[word]}")
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
