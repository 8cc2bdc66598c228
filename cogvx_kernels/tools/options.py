"""Command-line options of the tools; without torch, so that --help and typos return at once."""

import argparse

# Copies of `testing.OPS`, `aot.TARGETS`, `_opinfo.SIZES`, and of `ARCHES` and `DTYPES` of the tool
# ptx, which need torch; tests compare them.
OPS = (
    "rope3d",
    "qk_norm_rope3d",
    "expert_adaln",
    "gated_residual",
    "gated_residual_adaln",
    "expert_ffn",
    "spatial_norm_silu",
    "residual_moments",
    "temporal_conv",
    "frame_cache_join",
)
ARCHES = ("sm_80", "sm_90")  # whose PTX is executed
DTYPES = ("bf16", "fp16", "fp32")
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100", "gfx1201")
COUNTED = ("sm_90", "sm_80", "sm_89")
SIZES = (
    "2b-480x720-49f",
    "5b-480x720-49f",
    "1.5-5b-768x1360-81f",
    "1.5-5b-768x1360-161f",
    "card-480x720-49f",
    "tiny",
)


def verify(argv: list[str]) -> argparse.Namespace:
    parser = _parser("verify", "Compare every op's kernel with its reference, and both with fp64.")
    parser.add_argument("--op", choices=OPS, action="append", help="default: all")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: a GPU if there is one")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--quick", action="store_true", help="every fourth sample of each op")
    parser.add_argument("--all-rows", action="store_true", help="print a row for each case")
    parser.add_argument("--again", action="store_true",
                        help="compare what has passed before too, as --json and --all-rows "
                        "do")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs; default 0")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="processes; default: 1 on a GPU, else one for each core, 8 at most",
    )
    return _with_jobs(parser, argv)


def ptx(argv: list[str]) -> argparse.Namespace:
    parser = _parser(
        "ptx",
        "Execute the kernels' compiled code (PTX) on a CPU, on the samples of the ops: check every "
        "access, barrier, wait and fence, and compare the results with the references.",
    )
    parser.add_argument("--op", choices=OPS, action="append", help="default: all with Triton")
    parser.add_argument("--arch", choices=ARCHES, action="append", help="default: sm_90")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all")
    parser.add_argument("--sample", metavar="WORDS", action="append",
                        help="samples whose description contains these; default: all")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="a few samples of each op, which launch every kernel")  # fmt: skip
    parser.add_argument("--all-rows", action="store_true", help="print a row for each case")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there ('-': only)")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes; default: one for each core, 8 at most"
    )
    return _with_jobs(parser, argv)


def _with_jobs(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    options = parser.parse_args(argv)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"argument --jobs: must be 1 or more; got {options.jobs}")
    return options


def doctor(argv: list[str]) -> argparse.Namespace:
    parser = _parser(
        "doctor", "Print what is installed, which backend runs each op, and what is missing."
    )
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument("--short", action="store_true", help="print a few lines")
    return parser.parse_args(argv)


def aot(argv: list[str]) -> argparse.Namespace:
    parser = _parser(
        "aot", "Compile every kernel ahead of time for several GPUs; check its budget."
    )
    parser.add_argument("--op", choices=OPS, action="append", help="default: all")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--size", choices=SIZES, action="append", help="default: all")
    parser.add_argument("--samples", action="store_true", help="every small sample instead")
    parser.add_argument("--json", metavar="FILE", help="also write the reports there ('-': only)")
    return parser.parse_args(argv)


def counters(argv: list[str]) -> argparse.Namespace:
    parser = _parser(
        "counters", "Count what compiled kernels ask of a GPU at a model's size; check budgets."
    )
    parser.add_argument("--op", choices=OPS, action="append", help="default: all")
    parser.add_argument("--target", choices=COUNTED, action="append", help="default: all")
    parser.add_argument("--write", action="store_true", help="write the budgets instead")
    parser.add_argument("--table", action="store_true",
                        help="print the kept counters and predicted times as Markdown")  # fmt: skip
    return parser.parse_args(argv)


def _parser(tool: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"cogvx-kernels {tool}", description=description)
