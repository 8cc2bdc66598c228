"""`python -m benchmarks`: correctness at the timed size, then speed, side by side.

Exit status 0 if all was right, 1 if a result was outside the rule (ours: nothing is timed; others:
they get no row), 2 if the question was wrong.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cogvx_kernels.testing import OPS, SIZES

from . import conditions, inputs, picture, report
from .providers import PROVIDERS, providers_of
from .race import PASSES
from .suite import Options, Outcome, Wrong, run
from .timing import copy_rate

DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.list:
        print(_list())
        return 0
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this torch sees no CUDA device; there is cpu")
    on_cpu = device.type == "cpu"
    size = arguments.size or ("tiny" if on_cpu else "5b-480x720-49f")
    info = OPS[arguments.op]
    names = arguments.providers or []
    there_are = [provider.name for provider in providers_of(info)]
    for name in names:
        if name not in there_are:
            parser.error(f"argument --providers: no {name!r}; there are {', '.join(there_are)}")
    calls = inputs.conventions(info, SIZES[size])
    for name in arguments.conventions or []:
        if name not in calls:
            parser.error(f"argument --conventions: no {name!r}; there are {', '.join(calls)}")
    options = Options(
        dtype=getattr(torch, arguments.dtype or ("float32" if on_cpu else "bfloat16")),
        device=device,
        passes=PASSES if arguments.which == "both" else (arguments.which,),
        names=tuple(names),
        also=("compile-max-autotune",) if arguments.max_autotune else (),
        conventions=tuple(arguments.conventions or ()),
        budget=0.1 if arguments.quick else 0.5,
    )
    if on_cpu:
        torch.set_num_threads(1)  # two of them waiting for each other is no measure of an op
    found = conditions.conditions(device, _command(sys.argv[1:] if argv is None else argv))
    try:
        outcome = run(info, size, options)
    except Wrong as wrong:
        print(f"{info.name} at {size}: outside the rule of numerics; nothing was timed.\n{wrong}")
        return 1
    except torch.OutOfMemoryError as error:
        print(f"{info.name} at {size}: the reference does not fit, so nothing was timed.\n{error}")
        return 1
    found["sm_clock_mhz"] = conditions.clock(device)
    found["copy_gb_per_s"] = None if on_cpu else copy_rate(device, options.budget) / 1e9
    _print(outcome, found, on_cpu)
    if arguments.out:
        dtype = str(options.dtype).removeprefix("torch.")
        _write(arguments.out, f"{info.name}-{size}-{dtype}-{device.type}", outcome, found)
    return 1 if outcome.refused else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="An op against eager torch, torch.compile and whoever else is installed.",
        epilog="On a CPU only ratios are shown. Exit status 1: a result was wrong; see the text.",
    )
    add = parser.add_argument
    add("--op", choices=tuple(OPS), default=next(iter(OPS)), help="default: %(default)s")
    add("--size", choices=tuple(SIZES), help="default: 5b-480x720-49f, on a CPU tiny")
    add("--dtype", choices=DTYPES, help="default: bfloat16, on a CPU float32")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    add("--pass", dest="which", choices=(*PASSES, "both"), default="both", help="default: both")
    add("--providers", nargs="+", metavar="NAME", help="who, besides eager; see --list")
    add("--conventions", nargs="+", metavar="NAME", help="which calls, of an op with several")
    add("--max-autotune", action="store_true", help="compile with max-autotune as well; slow")
    add("--out", type=Path, metavar="DIR", help="write JSON and a picture there, add to its CSV")
    add("--quick", action="store_true", help="a fifth of the time; for a first look")
    add("--list", action="store_true", help="say what there is, and stop")
    return parser


def _list() -> str:
    sizes = [
        f"  {name:<23}{s.batch} x ({s.text_len} + {s.video_len}) tokens, "
        f"{s.nheads} heads of {s.headdim}"
        for name, s in SIZES.items()
    ]
    providers = [
        f"  {p.name:<23}{p.note}{' (only if asked for by name)' if p.asked else ''}"
        for p in PROVIDERS
    ]
    ops = [
        f"  {name:<23}{', '.join(inputs.conventions(info, SIZES['tiny']))}"
        for name, info in OPS.items()
    ]
    return "\n".join(["ops, and their calls", *ops, "sizes", *sizes, "providers", *providers])


def _command(arguments: Sequence[str]) -> str:
    """The command line, without where its files went."""
    words = " ".join(("python -m benchmarks", *arguments))
    return re.sub(r" --out[ =]\S+", "", words)


def _print(outcome: Outcome, found: report.Conditions, on_cpu: bool) -> None:
    print(report.table(outcome.rows))
    print()
    for line in outcome.compared:
        print(f"checked first, {line}")
    for name, reason in outcome.left_out.items():
        print(f"left out: {name}, {reason}")
    for name, reason in outcome.refused.items():
        print(f"refused, its results are wrong: {name}, {reason}")
    if on_cpu:
        print("on a CPU no kernel is timed, and times mean little: these are ratios of one run")
    print(report.small_print(found))


def _write(folder: Path, stem: str, outcome: Outcome, found: report.Conditions) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report.add_to_csv(folder / "results.csv", outcome.rows, found)
    more = {name: getattr(outcome, name) for name in ("compared", "left_out", "refused")}
    report.write_json(folder / f"{stem}.json", outcome.rows, found, **more)
    missing = picture.draw(folder / f"{stem}.png", outcome.rows, found)
    print(missing or f"written to {folder}: results.csv, {stem}.json, {stem}.png")


if __name__ == "__main__":
    sys.exit(main())
