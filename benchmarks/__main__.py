"""`python -m benchmarks`: correctness at the timed size, then speed, side by side.

Exit status 0 if all was right, 1 if a result was wrong (of ours: nothing of that benchmark is
timed; of others: they get no row), 2 for wrong arguments.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from . import conditions, conv, model, ops, report
from .registry import BENCHMARKS, MODEL_SIZE, PASSES, PROVIDERS, Benchmark, Options, named
from .run import Wrong, run
from .timing import copy_rate

DTYPES = ("bfloat16", "float16", "float32")
GROUPS = {"op": ops, "model": model, "conv": conv}


def main(argv: Sequence[str] | None = None, group: str = "op") -> int:
    parser = make_parser(group)
    words = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(words)
    if arguments.list:
        print(_list())
        return 0
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this torch sees no CUDA device; there is cpu")
    on_cpu = device.type == "cpu"
    names = arguments.names or (named(group)[:1] if group == "op" else named(group))
    benchmarks = [BENCHMARKS[name] for name in names]
    for benchmark in benchmarks:
        conventions = benchmark.conventions()
        numbers = [str(i) for i in range(len(conventions))]
        _known(parser, "providers", arguments.providers, benchmark.entries())
        _known(parser, "conventions", arguments.conventions, conventions, numbers)
        _known(parser, "size", arguments.size and [arguments.size], benchmark.sizes)
    if on_cpu:
        torch.set_num_threads(1)  # two of them waiting for each other is no measure of an op
    prog = "benchmarks" if group == "op" else f"benchmarks.{group}"
    command = re.sub(r" --out[ =]\S+", "", " ".join((f"python -m {prog}", *words)))
    found = conditions.conditions(device, command)
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
    wrong = False
    for benchmark in benchmarks:
        options = _options(arguments, benchmark, device)
        wrong |= publish(benchmark, options, found, arguments.out)
    return 1 if wrong else 0


def publish(
    benchmark: Benchmark, options: Options, found: report.Conditions, out: Path | None
) -> bool:
    """Run, print, write; True if a result was wrong."""
    title, on_cpu = f"{benchmark.name} at {options.size}", options.device.type == "cpu"
    try:
        outcome = run(benchmark, options)
    except Wrong as wrong:
        print(f"{title}: outside the rule of numerics; nothing was timed.\n{wrong}")
        return True
    except torch.OutOfMemoryError as error:
        print(f"{title}: the reference does not fit, so nothing was timed.\n{error}")
        return True
    found = {**found, "sm_clock_mhz": conditions.clock(options.device)}
    found["copy_gb_per_s"] = None if on_cpu else copy_rate(options.device) / 1e9
    print(report.table(outcome.rows), end="\n\n")
    for line in outcome.compared:
        print(f"compared first, {line}")
    for name, reason in outcome.left_out.items():
        print(f"left out: {name}, {reason}")
    for name, reason in outcome.refused.items():
        print(f"refused, its results are wrong: {name}, {reason}")
    if on_cpu:
        print("on a CPU no kernel is timed, and times mean little: these are ratios of one run")
    print(report.small_print(found))
    if out and outcome.rows:
        dtype = str(options.dtype).removeprefix("torch.")
        stem = f"{benchmark.name}-{options.size}-{dtype}-{options.device.type}"
        more = {name: getattr(outcome, name) for name in ("compared", "left_out", "refused")}
        print(report.write(out, stem, outcome.rows, found, **more))
    return bool(outcome.refused)


def _options(arguments: argparse.Namespace, benchmark: Benchmark, device: torch.device) -> Options:
    on_cpu, given = device.type == "cpu", vars(arguments)
    small = "small" if "small" in benchmark.sizes else "tiny"
    return Options(
        dtype=getattr(torch, arguments.dtype or ("float32" if on_cpu else "bfloat16")),
        device=device,
        size=arguments.size or (small if on_cpu else MODEL_SIZE),
        passes=PASSES if arguments.which == "both" else (arguments.which,),
        providers=tuple(arguments.providers or ()),
        conventions=tuple(arguments.conventions or ()),
        budget=(arguments.budget or benchmark.budget) / (5 if arguments.quick else 1),
        **{name: given[name] for name in ("max_autotune", "repeats", "layers", "frames")},
    )


def _known(
    parser: argparse.ArgumentParser,
    option: str,
    given: Iterable[str] | None,
    names: Iterable[str],
    also: Iterable[str] = (),
) -> None:
    names = list(names)
    for name in given or ():
        if name not in names and name not in also:
            parser.error(f"argument --{option}: no {name!r}; there are {', '.join(names)}")


def make_parser(group: str) -> argparse.ArgumentParser:
    module = GROUPS[group]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks" if group == "op" else f"python -m benchmarks.{group}",
        description=__doc__ if group == "op" else module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    sizes = dict.fromkeys(size for some in BENCHMARKS.values() for size in some.sizes)
    add("--op", "--part", action="append", dest="names", choices=tuple(BENCHMARKS), metavar="NAME",
        help=f"may be repeated: {', '.join(BENCHMARKS)}")  # fmt: skip
    add("--size", choices=tuple(sizes), help=f"default: {MODEL_SIZE}, on a CPU a small one")
    add("--dtype", choices=DTYPES, help="default: bfloat16, on a CPU float32")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    add("--pass", dest="which", choices=(*PASSES, "both"), default="both", help="of an op")
    add("--providers", nargs="+", metavar="NAME", help="beside the baseline; see --list")
    add("--conventions", nargs="+", metavar="NAME", help="of the calls, by name or number")
    add("--max-autotune", action="store_true", help="compile with max-autotune as well; slow")
    add("--layers", type=int, metavar="N", help="blocks of the transformer; default: all")
    add("--frames", type=int, metavar="N", help="of the clip, 8n + 1; default: the size's")
    add("--budget", type=float, help="seconds of timing for each entry and pass")
    add("--repeats", type=int, choices=(2, 4, 6, 8), help="turns of each entry, forth and back")
    add("--quick", action="store_true", help="a fifth of the time; for a first look")
    add("--cudnn-benchmark", action="store_true", help="let cuDNN try its algorithms first")
    add("--out", type=Path, metavar="DIR", help="write JSON and a plot there, add to results.csv")
    add("--list", action="store_true", help="list all names, and stop")
    return parser


def _list() -> str:
    """Benchmarks with their calls, sizes, providers."""
    lines = ["benchmarks, and their calls"]
    lines += [f"  {name:<23}{'; '.join(b.conventions())}" for name, b in BENCHMARKS.items()]
    lines.append("sizes of ops")
    for name, s in ops.SIZES.items():
        tokens = f"{s.batch} x ({s.text_len} + {s.video_len}) tokens"
        lines.append(f"  {name:<23}{tokens}, {s.nheads} heads of {s.headdim}")
    lines.append("providers of ops")
    lines += [f"  {p.name:<23}{p.note}{' (only by name)' * p.optional}" for p in PROVIDERS]
    return "\n".join([*lines, "entries of parts of the model", f"  {', '.join(model.ENTRIES)}"])


if __name__ == "__main__":
    sys.exit(main())
