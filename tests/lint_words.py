"""Find words of this project's former private language, which the field has other words for.

`python -m tests.lint_words` fails on `WORDS`, in prose, comments and names of tracked files;
`--count` prints how often each occurs, those of `PENDING` as well.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".md", ".cpp", ".cu", ".h", ".toml", ".sh", ".yaml"}
OWN = {"tests/lint_words.py", "CHANGELOG.md"}

# Pattern of a word, and what to write instead. `a_name` and `AName` are read as words too.
WORDS = {
    r"yardsticks?": "baseline",
    r"verdicts?": "result",
    r"laws?": "reference, property",
    r"judge[sd]?": "compare",
    r"design card": "docs/",
    r"furniture": "files of an op package",
    r"knock(s|ed)?": "call",
}
PENDING = {
    r"fact sheet": "docs/model.md",
    r"doors?": "public API, entry point",
    r"rooms?": "op package",
    r"promise[sd]?": "spec, metadata, budget",
    r"strangers?": "untrusted",
    r"truths?": "fp64 reference",
    r"walk(s|ed|ing)?": "iterate, run over",
    r"told": "given, documented",
    r"said": "documented, passed, output",
    r"asked": "requested, passed",
    r"floors?": "layer",
    r"ways?": "kernel, backend, path",
}
# Names of libraries, and words of arithmetic.
ALLOWED = re.compile(
    r"\b(ast|os|self|tree)\.walk\b|\bos\.walk|(math|torch|tl|np|libdevice)\.floor|"
    r"room for|\.floor\(|floor\(|rounding_mode=.floor.|\"floor\"|floor_divide|floor divi\w+",
    re.IGNORECASE,
)


def lines(path: Path) -> list[str]:
    """The lines of a file, names split into words, what is allowed left out."""
    text = ALLOWED.sub("", path.read_text(encoding="utf-8"))
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", text).splitlines()


def files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True)
    paths = [Path(name) for name in listed.stdout.decode().splitlines()]
    return [
        ROOT / path
        for path in paths
        if path.suffix in SUFFIXES and path.as_posix() not in OWN and (ROOT / path).is_file()
    ]


def main(argv: list[str]) -> int:
    words = WORDS | PENDING if "--count" in argv else WORDS
    patterns = {word: re.compile(rf"\b{word}\b", re.IGNORECASE) for word in words}
    counts: Counter[str] = Counter()
    for path in files():
        for number, line in enumerate(lines(path), 1):
            for word, pattern in patterns.items():
                found = sum(1 for _ in pattern.finditer(line))
                counts[word] += found
                if found and word in WORDS:
                    place = f"{path.relative_to(ROOT)}:{number}"
                    print(f"{place}: instead of {word!r} write: {words[word]}")
    if "--count" in argv:
        for word in words:
            print(f"{counts[word]:5}  {word}")
    return int(any(counts[word] for word in WORDS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
