"""Install the wheel with one extra at a time into a new environment, and do that extra's job there.

    python -m tests.install.check            no extra, text, video, train, bench, ray, generate
    python -m tests.install.check text       these alone

"generate" is no extra but text and video together, with diffusers, as for a released model.

An extra that is only tried where all of them are lacks a package sooner or later, unnoticed. Each
environment sees what its extra declares and nothing else. What all share, torch and the other
dependencies of the package itself, is installed once and linked into each, as hard links, not as a
path to it. Versions are those of constraints.txt. Exit status 0 if every job was done.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "tests" / "install" / "jobs.py"
EXTRAS = ("text", "video", "train", "bench", "ray", "generate")
TOGETHER = {"generate": ("text,video", "diffusers")}  # extras, and what else is installed
NONE = "none"
AT_ONCE = 2  # environments; pip and Python use one core each


class Failed(Exception):
    """A command of a check failed; its output is the message."""


def main(names: Sequence[str]) -> int:
    unknown = set(names) - {NONE, *EXTRAS}
    if unknown:
        print(f"no extra {', '.join(sorted(unknown))}; there are {', '.join((NONE, *EXTRAS))}")
        return 2
    extras = [name for name in EXTRAS if name in (names or EXTRAS)]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cogvx-install-") as temporary:
        folder = Path(temporary)
        try:
            wheel = build(folder)
            _say("wheel", begin, wheel.name)
            base = folder / "base"
            venv.create(base)  # without pip: that of this environment installs
            check(base, NONE, wheel)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                jobs = [pool.submit(_in_a_copy, base, name, wheel) for name in extras]
                for job in jobs:
                    job.result()
        except Failed as failure:
            print(failure)
            return 1
    print(f"install checks: all done in {time.monotonic() - begin:.0f} s")
    return 0


def build(folder: Path) -> Path:
    """The wheel of the working tree, against the torch of this environment."""
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", str(folder))
    _remove_packed()
    _run(sys.executable, "-m", "pip", "wheel", "-q", *options, str(ROOT), cwd=folder)
    _remove_packed()
    [wheel] = folder.glob("cogvx-*.whl")
    return wheel


def _remove_packed() -> None:
    """Modules of an earlier build, which setuptools would pack again when they are gone."""
    for old in (ROOT / "build").glob("lib*"):
        shutil.rmtree(old)


def _in_a_copy(base: Path, extra: str, wheel: Path) -> None:
    environment = base.with_name(extra)
    shutil.copytree(base, environment, symlinks=True, copy_function=os.link)
    for command in (environment / "bin").glob("cogvx*"):
        command.unlink()  # its first line names the Python of `base`
    check(environment, extra, wheel)


def check(environment: Path, extra: str, wheel: Path) -> None:
    """Install the wheel with an extra into an environment, and run the extra's job."""
    begin = time.monotonic()
    python = environment / "bin" / "python"
    extras, *others = TOGETHER.get(extra, (extra,))
    wanted = f"cogvx{'' if extra == NONE else f'[{extras}]'} @ {wheel.as_uri()}"
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    # bytecode of what is imported is written then; that of all of torch would take minutes
    options = ("-q", "--no-compile", "-c", str(ROOT / "constraints.txt"))
    _run(*pip, "install", *options, wanted, *others, cwd=environment)
    _run(*pip, "check", cwd=environment)
    work = environment / "work"
    work.mkdir(exist_ok=True)
    _run(str(python), "-I", str(JOBS), extra, cwd=work)
    _say(extra, begin, "done")


def _run(*command: str, cwd: Path) -> None:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    settings.pop("PYTHONPATH", None)
    ran = subprocess.run(
        command, cwd=cwd, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if ran.returncode:
        raise Failed(f"{ran.stdout}\nfailed, status {ran.returncode}: {' '.join(command)}")


def _say(what: str, begin: float, how: str) -> None:
    print(f"install check  {what:<8} {time.monotonic() - begin:5.0f} s  {how}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
