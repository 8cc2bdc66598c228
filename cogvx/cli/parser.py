"""Commands and options. Imports no torch: the module of a command is imported when it runs."""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogvx_kernels import __version__

from ..config import PRESETS
from ..generation import CHOICES
from . import arguments
from .arguments import Parser
from .console import Console

DESCRIPTION = "Generate, encode, decode and reconstruct video with CogVideoX, and train it."
EPILOG = """cogvx COMMAND --help explains a command, with an example.
eval "$(cogvx completion bash)" completes commands and options in this shell."""

FAMILY = {
    "hidden_size": (arguments.count, "width of the transformer"),
    "num_heads": (arguments.count, "attention heads"),
    "num_layers": (arguments.count, "transformer blocks"),
    "text_hidden_size": (arguments.count, "width of the prompt's embeddings"),
    "mlp_ratio": (arguments.number, "width of a feed-forward, in widths of the transformer"),
    "num_text_experts": (arguments.count, "feed-forward experts for text"),
    "num_video_experts": (arguments.count, "feed-forward experts for video"),
    "latent_channels": (arguments.count, "channels of the latents"),
}

Run = Callable[[argparse.Namespace, Console], None]


def make() -> Parser:
    """Build the parser. `options.run(options, console)` runs the parsed command."""
    parser = Parser(prog="cogvx", description=DESCRIPTION, epilog=EPILOG,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--version", action="version", version=f"cogvx {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for add in (_demo, _generate, _encode, _decode, _reconstruct, _plan, _params, _convert, _train,
                _score, _completion):  # fmt: skip
        add(commands)
    return parser


def _command(commands: Any, name: str, module: str, what: str, more: str, example: str) -> Parser:
    """Add a command that runs the function of its name in a module of cogvx.

    what, more  its line in the list of commands, and the rest of its description
    """
    parser: Parser = commands.add_parser(
        name,
        help=what[0].lower() + what[1:].rstrip("."),
        description=f"{what} {more}".rstrip(),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", help="no progress, no summary")
    group.add_argument("--json", action="store_true",
                       help="print the summary as one JSON object on stdout; an error is text on "
                       "stderr, and stdout stays empty")  # fmt: skip
    group.add_argument("--traceback", action="store_true", help="print the traceback of an error")
    parser.set_defaults(run=_later(module, name))
    return parser


def _later(module: str, function: str) -> Run:
    """Import a module of cogvx when its function is called."""

    def run(options: argparse.Namespace, console: Console) -> None:
        command = getattr(importlib.import_module(f"cogvx.{module}"), function)
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_torchelastic_launched():
            # so that torchrun's report has this rank's own error
            errors = importlib.import_module("torch.distributed.elastic.multiprocessing.errors")
            command = errors.record(command)
        command(options, console)

    return run


def _demo(commands: Any) -> None:
    parser = _command(
        commands, "demo", "shapes.commands", "Watch a model of the procedural clips.",
        "Each sentence becomes a video, a GIF and a sheet of frames.",
        'cogvx demo --prompt "a red circle moves right" --out out',
    )  # fmt: skip
    arguments.add_model(parser, default="tiny")
    parser.add_argument("--prompt", action="append", metavar="TEXT",
                        help="a sentence; may be repeated; by default three sentences")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR",
                        help="folder of the files; default %(default)s")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument("--clip", type=Path, metavar="FILE",
                        help="also reconstruct a video of yours with the VAE; that of tiny was "
                        "trained on slow shapes of plain colours, and blurs others")  # fmt: skip
    arguments.add_sampling(parser)
    arguments.add_machine(parser, tiles=False)
    arguments.add_hub(parser)


def _generate(commands: Any) -> None:
    parser = _command(
        commands, "generate", "cli.generate", "Generate a video from a prompt.",
        "Also from an image or a video.\nThe latents are saved beside the video, so that nothing "
        "is lost if decoding fails.",
        'cogvx generate --model THUDM/CogVideoX-5b --prompt "A red kite over a lake" '
        "--out kite.mp4",
    )  # fmt: skip
    arguments.add_model(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompt", metavar="TEXT",
                       help="text of the video; for the released models English, best long and "
                       "detailed")  # fmt: skip
    which.add_argument("--prompts", type=Path, metavar="FILE.jsonl",
                       help="a video for each line, such as "
                       '{"prompt": "A red kite", "seed": 1}, which may have any option of a '
                       "video; --out is their folder. The same command goes on where it was "
                       "stopped; under torchrun the ranks share the lines")  # fmt: skip
    parser.add_argument("--ray", nargs="?", const="", metavar="ADDRESS",
                        help="share the lines of --prompts over the GPUs of a Ray cluster, by "
                        "default of RAY_ADDRESS or else of this machine")  # fmt: skip
    arguments.add_output(parser, "the video, .mp4, .mov, .mkv or .gif; a folder with --prompts")
    add_video(parser)
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--lora", type=Path, action="append", default=[], metavar="FILE",
                      help="an adapter of cogvx train, diffusers, peft or kohya's scripts; may be "
                      "repeated; by default none")  # fmt: skip
    lora.add_argument("--lora-scale", type=arguments.number, action="append", default=[],
                      metavar="SCALE",
                      help="factor, once for all or once for each; default 1")  # fmt: skip
    arguments.add_machine(parser)
    arguments.add_backend(parser)
    parser.add_argument("--vram-budget", type=arguments.size_in_bytes, metavar="BYTES",
                        help="fail before weights are read if more memory is needed, such as "
                        "10G; by default no limit")  # fmt: skip
    parser.add_argument("--profile", type=Path, metavar="FILE.json",
                        help="a trace of torch.profiler, which ui.perfetto.dev shows: the text "
                        "encoder, each step, the VAE's chunks, every op; nvtx instead of a file "
                        "for nsys; by default none")  # fmt: skip
    arguments.add_hub(parser)
    several = parser.add_argument_group(
        "several GPUs", "torchrun --nproc-per-node 8 -m cogvx generate … starts the processes."
    )
    several.add_argument("--context-parallel", type=arguments.count, metavar="N",
                         help="split the sequence over N GPUs; by default over all that are left "
                         "by --cfg-parallel, with --prompts 1")  # fmt: skip
    several.add_argument("--cfg-parallel", action="store_true",
                         help="both predictions of guidance at once, on two groups of GPUs; by "
                         "default if neither option is given, and the GPUs are even")  # fmt: skip
    safe = parser.add_argument_group("checkpoints")
    arguments.add_param(safe, "checkpoint_every", type=arguments.count, metavar="N",
        help="save the latents every N steps; by default after the last")  # fmt: skip
    safe.add_argument("--resume", action="store_true",
                      help="continue from the latents beside the output")  # fmt: skip


def add_video(parser: Parser) -> None:
    """Add the options that a line of `--prompts` may have, too."""
    add = arguments.add_param
    parser.add_argument("--negative", default="", metavar="TEXT",
                        help="what the video should not show; by default nothing")  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--image", type=Path, metavar="FILE",
                        help="the first frame, for image-to-video models")  # fmt: skip
    source.add_argument("--video", type=Path, metavar="FILE",
                        help="source of video-to-video, for other models")  # fmt: skip
    add(parser, "strength", type=arguments.part, metavar="PART",
        help="how much of --video is changed, above 0 and at most 1; default "
        "%(default)s")  # fmt: skip
    arguments.add_size(parser, "as the model was trained",
                       "by default 8, or 16 for CogVideoX 1.5; --video is read at this rate, too, "
                       "by default at its own")  # fmt: skip
    steps = parser.add_argument_group("sampling")
    add(steps, "seed", type=arguments.seed, metavar="N",
        help="random seed; by default a new one, which is printed")  # fmt: skip
    add(steps, "steps", type=arguments.count, metavar="N",
        help="denoising steps, at most 1000; default %(default)s")  # fmt: skip
    add(steps, "guidance", type=arguments.number, metavar="SCALE",
        help="guidance scale; 1 is without guidance, twice as fast; default "
        "%(default)s")  # fmt: skip
    add(steps, "dynamic_guidance", help="less guidance in the first steps, as recommended for 5B")
    add(steps, "solver", help="DDIM or DPM-Solver++; by default the model's own")
    steps.add_argument("--scheduler", dest="solver", action=arguments.Deprecated,
                       choices=CHOICES["solver"], help=argparse.SUPPRESS)  # fmt: skip
    add(steps, "cfg", help="both predictions of guidance at once, or one after the other in half "
        "the memory; default %(default)s")  # fmt: skip
    add(steps, "image_latent_scale", metavar=arguments.one_of(CHOICES["image_latent_scale"]),
        help="scale of --image's latents with CogVideoX 1.5: as in diffusers, SAT or the training; "
        "default %(default)s")  # fmt: skip


def _encode(commands: Any) -> None:
    parser = _command(
        commands, "encode", "cli.clips", "Encode a video to a file of latents.",
        "Or a folder of videos with\ncaptions, for training: clip.mp4 has its caption in clip.txt.",
        "cogvx encode clip.mp4 --model THUDM/CogVideoX-5b --out clip.safetensors",
    )  # fmt: skip
    parser.add_argument("video", type=Path, help="a video file; or a folder of them")
    arguments.add_output(parser, "the latents, .safetensors; of a folder another folder")
    arguments.add_vae(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--mode", action="store_true", help="the most likely latents (the default)")
    which.add_argument("--sample", action="store_true", help="latents drawn with --seed")
    arguments.add_size(parser, "the video's; of a folder the model's", "by default the video's")
    arguments.add_machine(parser)


def _decode(commands: Any) -> None:
    parser = _command(
        commands, "decode", "cli.clips", "Decode a file of latents to a video.",
        "From cogvx encode or cogvx generate.",
        "cogvx decode clip.safetensors --model THUDM/CogVideoX-5b --out clip.mp4",
    )  # fmt: skip
    parser.add_argument("latents", type=Path, help="a .safetensors file")
    arguments.add_output(parser, "the video, .mp4, .mov, .mkv or .gif")
    arguments.add_vae(parser)
    arguments.add_fps(
        parser, "by default as recorded in the latents, else 8, or 16 for CogVideoX 1.5"
    )
    arguments.add_machine(parser)


def _reconstruct(commands: Any) -> None:
    parser = _command(
        commands, "reconstruct", "cli.clips", "Reconstruct a video by a VAE, and measure it.",
        "The clip is streamed through the VAE;\nprints PSNR and peak memory.",
        "cogvx reconstruct clip.mp4 --model THUDM/CogVideoX-5b --frames 49 --out back.mp4",
    )  # fmt: skip
    parser.add_argument("video", type=Path, help="a video file")
    arguments.add_output(parser, "the video, .mp4, .mov, .mkv or .gif")
    arguments.add_vae(parser)
    arguments.add_size(parser, "the video's", "by default the video's")
    arguments.add_machine(parser, tiles=False)
    parser.add_argument("--whole", action="store_true",
                        help="hold the whole clip in memory instead of streaming it")  # fmt: skip


def _plan(commands: Any) -> None:
    parser = _command(
        commands, "plan", "cli.models", "Plan the memory that a video needs.",
        "Nothing is loaded or run.\nPrints weights and activations of each stage; streamed: "
        "activations if the clip is streamed from and to\na file; cache: kept between two chunks; "
        "chunks: frames of each (latent frames for decode).",
        "cogvx plan --preset 1.5-5b --frames 81 --vram-budget 80G",
    )  # fmt: skip
    _add_which(parser)
    arguments.add_size(parser, "as the model was trained")
    arguments.add_dtype(parser, "default %(default)s", "bfloat16")
    arguments.add_param(parser, "cfg", help="both predictions of guidance at once, or one after "
                        "the other; default %(default)s")  # fmt: skip
    parser.add_argument("--no-guidance", action="store_true", help="one prediction a step")
    parser.add_argument("--no-text-encoder", action="store_true",
                        help="without T5, if embeddings are given")  # fmt: skip
    arguments.add_tiling(parser)
    parser.add_argument("--vram-budget", type=arguments.size_in_bytes, metavar="BYTES",
                        help="fail if it needs more, such as 10G; by default no limit")  # fmt: skip
    parser.add_argument("--gpus", type=arguments.count, metavar="N",
                        help="instead, for each mesh of so many GPUs: memory, messages, predicted "
                        "times, and the best one; by default one GPU")  # fmt: skip


def _params(commands: Any) -> None:
    parser = _command(
        commands, "params", "cli.models", "Print the exact numbers of parameters.",
        "Of a released model, a folder,\nor a factorised model of the sizes given.",
        "cogvx params --preset 5b",
    )  # fmt: skip
    _add_which(parser, required=False)
    group = parser.add_argument_group(
        "factorised model", "By default the recommended sizes (cogvx.recommended_defaults)."
    )
    for name, (kind, what) in FAMILY.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=what)
    group.add_argument("--base-channels", type=arguments.count, metavar="N",
                       help="width of the VAE")  # fmt: skip


def _convert(commands: Any) -> None:
    parser = _command(
        commands, "convert", "cli.models", "Convert a SAT checkpoint to a model's folder.",
        "SAT is the format in which CogVideoX\nwas first published.",
        "cogvx convert CogVideoX-2b-sat/transformer --vae 3d-vae.pt --out CogVideoX-2b",
    )  # fmt: skip
    parser.add_argument("source", type=Path, help="a file or folder of SAT")
    parser.add_argument("target", type=Path, nargs="?", help="the same as --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument("--vae", type=Path, metavar="FILE",
                        help="the VAE's file; by default in the source")  # fmt: skip
    parser.add_argument("--preset", choices=sorted(PRESETS),
                        help="the model; by default recognised by its shapes")  # fmt: skip
    arguments.add_dtype(parser, "by default that of the file")
    parser.add_argument("--force", action="store_true", help="write into a folder with files in it")


def _train(commands: Any) -> None:
    parser = _command(
        commands, "train", "cli.train", "Train a VAE, a transformer or a LoRA by a recipe.",
        "The same command continues\na training that was stopped.",
        "cogvx train lora.toml --out run --set transformer_training.steps=500",
    )  # fmt: skip
    parser.add_argument("recipe", help="a TOML file; or tiny, the recipe of the model tiny")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR",
                        help="the folder of the model and its checkpoints")  # fmt: skip
    parser.add_argument("--stage", choices=arguments.STAGES,
                        help="train only this; by default all that the recipe has")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
                        help="replaces a value of the recipe, such as "
                        "transformer_training.steps=100; may be repeated; by default "
                        "none")  # fmt: skip
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard's files")
    arguments.add_device(parser)


def _score(commands: Any) -> None:
    parser = _command(
        commands, "score", "shapes.commands", "Score a model of the procedural clips.",
        "A program reads off its clips how often they\nshow what held-out sentences say.",
        "cogvx score --prompts 50",
    )  # fmt: skip
    arguments.add_model(parser, default="tiny")
    parser.add_argument("--prompts", type=arguments.between(1, 10_000), default=200, metavar="N",
                        help="number of sentences; default %(default)s")  # fmt: skip
    parser.add_argument("--skip", type=arguments.between(0, 10_000), default=0, metavar="N",
                        help="leave out the first N sentences; default %(default)s")  # fmt: skip
    arguments.add_sampling(parser)
    arguments.add_machine(parser, tiles=False)
    arguments.add_hub(parser)


def _completion(commands: Any) -> None:
    parser = _command(
        commands, "completion", "cli.completion", "Print a shell's completion script.",
        "", 'eval "$(cogvx completion bash)"    # in ~/.bashrc; for zsh in ~/.zshrc\n'
        "  cogvx completion fish > ~/.config/fish/completions/cogvx.fish",
    )  # fmt: skip
    parser.add_argument("shell", choices=arguments.SHELLS, help="the shell")


def _add_which(parser: argparse.ArgumentParser, required: bool = True) -> None:
    which = parser.add_mutually_exclusive_group(required=required)
    which.add_argument("--preset", choices=sorted(PRESETS), help="a released model")
    arguments.add_model(which, required=False)
    arguments.add_hub(parser)
