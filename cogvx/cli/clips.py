"""`cogvx encode`, `decode`, `reconstruct`: clips and their latents, streamed."""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import frames as frame_rule
from ..checkpoint import CheckpointError
from ..data import FolderClips, encode_clips
from ..memory import LiveBytes
from ..pipeline import default_size, saved
from ..pipeline.denoise import State
from ..text import T5TextEncoder
from ..vae import CausalVAE, DiagonalGaussian, Tiling
from ..video import PSNR, WRITTEN, Clip, open_video, write_video
from .arguments import (
    add_machine,
    add_output,
    add_size,
    add_vae,
    check_output,
    device_of,
    dtype_of,
    open_vae,
    read_configs,
)
from .console import Console

if sys.platform != "win32":
    import resource

VIDEOS = tuple(WRITTEN)
DEFAULT_FPS = 8.0
OF_A_FILE = ("mode", "sample", "fps", "tiling", "force")  # of `encode`


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "encode",
        parents=[shared],
        help="a video to a file of latents; or a folder of them",
    )
    parser.add_argument("video", type=Path, help="a file; or a folder, with captions")
    add_output(parser, "the latents, .safetensors; of a folder another one")
    add_vae(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--mode", action="store_true", help="the most likely latents (the default)")
    which.add_argument("--sample", action="store_true", help="latents drawn with --seed")
    add_size(parser, fps="frames a second; by default the file's")
    add_machine(parser)
    parser.set_defaults(run=encode)

    parser = commands.add_parser("decode", parents=[shared], help="a file of latents to a video")
    parser.add_argument("latents", type=Path)
    add_output(parser, "the video, .mp4, .mov, .mkv or .gif")
    add_vae(parser)
    parser.add_argument("--fps", type=float, help="by default what the file says, else 8")
    add_machine(parser)
    parser.set_defaults(run=decode)

    parser = commands.add_parser(
        "reconstruct", parents=[shared], help="a video through the VAE and back, with PSNR"
    )
    parser.add_argument("video", type=Path)
    add_output(parser, "the video, .mp4, .mov, .mkv or .gif")
    add_vae(parser)
    add_size(parser, fps="frames a second; by default the file's")
    add_machine(parser, tiles=False)
    parser.add_argument(
        "--whole", action="store_true", help="hold the whole clip instead of streaming it"
    )
    parser.set_defaults(run=reconstruct)


def encode(options: argparse.Namespace, console: Console) -> None:
    if options.video.is_dir():
        return _encode_folder(options, console)
    check_output(options.out, options.force, (".safetensors",))
    vae = open_vae(options)
    clip = _clip(options, vae)
    done = partial(console.progress, "encode")
    if options.tiling is not None:
        known = vae.encode(clip.read().to(_like(vae)), tiling=options.tiling, progress=done)
    else:
        moments = [part.moments.cpu() for part in _encoded(vae, clip, done)]
        known = DiagonalGaussian(torch.cat(moments, 1))
    generator = torch.Generator().manual_seed(options.seed)
    latents = known.sample(generator) if options.sample else known.mode()
    record = {
        **saved.record_of_model("vae", vae),
        "padding": 0,
        "frames": clip.frames,
        "height": clip.height,
        "width": clip.width,
        "fps": clip.fps,
        "source": options.video.name,
    }
    scaled = State(vae.config.scaling_factor * latents)
    saved.write(options.out, saved.Saved(record, 0, scaled))
    facts = {**_facts(clip), "latents": list(latents.shape), "out": str(options.out)}
    console.say({**facts, "seconds": console.seconds})


def _encode_folder(options: argparse.Namespace, console: Console) -> None:
    """Latents of every video, with embeddings of its caption if the model has a T5."""
    given = [name for name in OF_A_FILE if getattr(options, name) not in (None, False)]
    if given:
        raise ValueError(
            f"{options.video}: must be a file for {', '.join(f'--{name}' for name in given)}; it "
            "is a folder, which is encoded without"
        )
    vae, text_encoder, length = open_vae(options), None, 0
    size: tuple[Any, ...] = (options.frames, options.height, options.width)
    if options.model is not None:
        transformer, _ = read_configs(options.model)
        if transformer is not None:
            usual = transformer.sample_frames, *default_size(transformer, vae.config)
            size = tuple(given or other for given, other in zip(size, usual, strict=True))
            length = transformer.max_text_seq_length
        if (options.model / "tokenizer").is_dir():
            text_encoder = T5TextEncoder.from_pretrained(
                options.model, dtype_of(options), device_of(options)
            )
    if None in size:
        raise ValueError("encode: --frames, --height and --width must be given for a VAE alone")
    frames, height, width = size
    frame_rule.check("cogvx", "--frames", frames, vae.config)
    clips = FolderClips(options.video, frames, height, width, vae.config)
    done = partial(console.progress, "encode")
    made = encode_clips(
        clips, vae, options.out, text_encoder=text_encoder, text_length=length, progress=done
    )
    facts = {"clips": len(made), "latents": list(made[0].moments.shape), "out": str(options.out)}
    console.say({**facts, "seconds": console.seconds})


def decode(options: argparse.Namespace, console: Console) -> None:
    check_output(options.out, options.force, VIDEOS)
    vae = open_vae(options)
    has = read_latents(options.latents, vae)
    fps = options.fps or float(has.record.get("fps", DEFAULT_FPS))
    done = partial(console.progress, "decode")
    frames = write_latents(options.out, vae, has, fps, options.tiling, done)
    facts = {"frames": frames, "fps": fps, "out": str(options.out)}
    console.say({**facts, "seconds": console.seconds})


def reconstruct(options: argparse.Namespace, console: Console) -> None:
    check_output(options.out, options.force, VIDEOS)
    vae = open_vae(options)
    clip = _clip(options, vae)
    measure, live = PSNR(), LiveBytes()
    with live:
        if options.whole:
            chunks, video = 1, iter([_whole(vae, clip)])
        else:
            latents = (known.mode() for known in _encoded(vae, clip, lambda done, total: None))
            total = frame_rule.latent_frames(clip.frames, vae.config)
            chunks = len(frame_rule.decode_plan(total, vae.config))
            video = vae.stream_decode(latents, total=total)
        done = partial(console.progress, "reconstruct", total=chunks)
        write_video(options.out, _compared(video, clip, measure, done), clip.fps)
    decibels = measure.decibels
    facts = {
        **_facts(clip),
        "psnr_db": round(decibels, 3) if math.isfinite(decibels) else None,
        "peak_live_bytes": live.peak,
        **_process_memory(vae),
        "seconds": console.seconds,
        "note": "seconds are of this run, reading and writing included: no benchmark",
        "out": str(options.out),
    }
    console.say(facts)


def read_latents(path: Path, vae: CausalVAE) -> saved.Saved:
    """Latents that a VAE is to decode. Raises CheckpointError if they are another VAE's."""
    has = saved.read(path)
    wanted = saved.record_of_config("vae", vae.config)
    here = saved.record_of_model("vae", vae)
    if has.record.get("vae.dtype") == here["vae.dtype"]:  # else the bits say nothing
        wanted["vae.weights"] = here["vae.weights"]
    saved.check_record(path, has.record, wanted)
    if has.state.done < has.steps:
        raise CheckpointError(
            f"{path}: must hold latents after all steps; got {has.state.done} of {has.steps}: go "
            "on with cogvx generate --resume"
        )
    return has


def write_latents(
    path: Path, vae: CausalVAE, has: saved.Saved, fps: float, tiling: Tiling | None, done: Any
) -> int:
    """Decodes to a file, in constant memory unless in tiles; returns the number of frames."""
    raw = has.state.latents[:1, has.padding :] / vae.config.scaling_factor
    if tiling is not None:
        return write_video(path, vae.decode(raw.to(_like(vae)), tiling=tiling, progress=done), fps)
    plan = frame_rule.decode_plan(raw.shape[1], vae.config)
    pieces = (piece.to(_like(vae)) for piece in torch.split(raw, list(plan), 1))
    video = vae.stream_decode(pieces, total=raw.shape[1])
    return write_video(path, _ticked(video, len(plan), done), fps)


def _clip(options: argparse.Namespace, vae: CausalVAE) -> Clip:
    if options.frames is not None:
        frame_rule.check("cogvx", "--frames", options.frames, vae.config)
    return open_video(
        options.video,
        frames=options.frames,
        height=options.height,
        width=options.width,
        fps=options.fps,
        multiple=vae.config.spatial_compression_ratio,
        vae=vae.config,
    )


def _encoded(vae: CausalVAE, clip: Clip, done: Any) -> Iterator[DiagonalGaussian]:
    plan = frame_rule.encode_plan(clip.frames, vae.config)
    like = _like(vae)
    pieces = (piece.to(like) for piece in clip.chunks(plan))
    return _ticked(vae.stream_encode(pieces, total=clip.frames), len(plan), done)


def _whole(vae: CausalVAE, clip: Clip) -> Tensor:
    """The clip through the VAE and back, not as a stream."""
    video = torch.cat(list(clip.chunks(clip.frames)), 1).to(_like(vae))
    return vae.decode(vae.encode(video).mode())


def _compared(video: Iterator[Tensor], clip: Clip, measure: PSNR, done: Any) -> Iterator[Tensor]:
    """The chunks of a video, each measured against the file, which is read a second time."""
    frames = clip.chunks(1)
    for number, chunk in enumerate(video, 1):
        original = torch.cat(list(itertools.islice(frames, chunk.shape[1])), 1)
        measure.add(original, chunk.float().cpu())
        del original
        yield chunk
        del chunk
        done(number)


def _ticked(chunks: Iterator[Any], total: int, done: Any) -> Iterator[Any]:
    for number, chunk in enumerate(chunks, 1):
        done(number, total)
        yield chunk
        del chunk  # before the next one is made


def _like(vae: CausalVAE) -> Tensor:
    return next(vae.parameters())


def _facts(clip: Clip) -> dict[str, Any]:
    return {"frames": clip.frames, "height": clip.height, "width": clip.width, "fps": clip.fps}


def _process_memory(vae: CausalVAE) -> dict[str, int]:
    facts = {}
    if sys.platform != "win32":
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        facts["peak_process_bytes"] = most * (1 if sys.platform == "darwin" else 1024)
    if _like(vae).is_cuda:
        facts["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(_like(vae).device)
    return facts
