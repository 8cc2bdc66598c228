"""`cogvx encode`, `decode`, `reconstruct`: videos to latents and back, streamed."""

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
from .. import parallel
from ..checkpoint import CheckpointError
from ..checkpoint.record import check_record, record_of_config, record_of_model
from ..config import VAEConfig
from ..data import FolderClips, encode_clips
from ..pipeline import default_size, resume
from ..pipeline.denoise import State
from ..text import T5TextEncoder
from ..vae import CausalVAE, DiagonalGaussian, Tiling
from ..video import PSNR, WRITTEN, Clip, check_video_output, open_video, write_video
from . import ranks
from .console import Console
from .loading import VAESource, device_of, dtype_of, model_of, tiling_of, usual_fps
from .outputs import claimed, output

if sys.platform != "win32":
    import resource

VIDEOS = tuple(WRITTEN)
FILE_OPTIONS = ("mode", "sample", "fps", "tiling", "force")  # options of `encode`


@torch.no_grad()
def encode(options: argparse.Namespace, console: Console) -> None:
    if options.video.is_dir():
        return _encode_folder(options, console)
    processes = ranks.start(options, console)
    if processes is None or processes.first:
        console.hold(output(options.out, options.force, (".safetensors",)))
    source = VAESource.of(options)
    clip, tiling = _clip(options, source.config), tiling_of(options)
    source.warn_if_long(console, *_latent_size(clip, source.config), "encode")
    vae = source.load(console)
    ranks.share(vae, processes, tiling)
    done = partial(console.progress, "encode")
    if tiling is not None:
        posterior = vae.encode(clip.read().to(_like(vae)), tiling=tiling, progress=done)
    else:
        moments = [part.moments.cpu() for part in _encoded(vae, clip, done)]
        posterior = DiagonalGaussian(torch.cat(moments, 1))
    generator = torch.Generator().manual_seed(options.seed)
    latents = posterior.sample(generator) if options.sample else posterior.mode()
    record = {
        **record_of_model("vae", vae),
        "padding": 0,
        "frames": clip.frames,
        "height": clip.height,
        "width": clip.width,
        "fps": clip.fps,
        "source": options.video.name,
    }
    scaled = State(vae.config.scaling_factor * latents)
    if processes is None or processes.first:
        resume.write(options.out, resume.Saved(record, 0, scaled))
    ranks.end(processes)
    facts = {**_facts(clip), "latents": list(latents.shape), "out": str(options.out)}
    console.print_summary({**facts, "seconds": console.seconds})


def _encode_folder(options: argparse.Namespace, console: Console) -> None:
    """Encode every video of a folder, and its caption if the model has a T5."""
    given = [name for name in FILE_OPTIONS if getattr(options, name) not in (None, False)]
    if given:
        raise ValueError(
            f"{options.video}: must be a file for {', '.join(f'--{name}' for name in given)}; it "
            "is a folder, which is encoded without"
        )
    if parallel.launched():
        raise ValueError(
            f"{options.video}: must be a file under torchrun; it is a folder, which is encoded in "
            "one process"
        )
    console.hold(claimed(options.out))
    source, text_encoder, length = VAESource.of(options), None, 0
    size: tuple[Any, ...] = (options.frames, options.height, options.width)
    if source.transformer is not None:
        usual = source.transformer.sample_frames, *default_size(source.transformer, source.config)
        size = tuple(given or other for given, other in zip(size, usual, strict=True))
        length = source.transformer.max_text_seq_length
    if None in size:
        raise ValueError("--frames, --height and --width must be given for a VAE alone")
    frames, height, width = size
    frame_rule.check("cogvx", "--frames", frames, source.config)
    clips = FolderClips(options.video, frames, height, width, source.config)
    if source.folder is not None and options.model is not None:
        model = model_of(options, ["text_encoder", "tokenizer"])
        if (model / "tokenizer").is_dir():
            console.progress("load text encoder")
            text_encoder = T5TextEncoder.from_pretrained(
                model,
                dtype_of(options, source.transformer),
                device_of(options),
                variant=options.variant,
            )
    vae = source.load(console)
    done = partial(console.progress, "encode")
    made = encode_clips(
        clips, vae, options.out, text_encoder=text_encoder, text_length=length, progress=done
    )
    facts = {"clips": len(made), "latents": list(made[0].moments.shape), "out": str(options.out)}
    console.print_summary({**facts, "seconds": console.seconds})


@torch.no_grad()
def decode(options: argparse.Namespace, console: Console) -> None:
    processes, tiling = ranks.start(options, console), tiling_of(options)
    if processes is None or processes.first:
        console.hold(output(options.out, options.force, VIDEOS))
    source, saved = VAESource.of(options), resume.read(options.latents)
    _check_latents(options.latents, saved, source.config)
    usual = saved.record.get("fps", usual_fps(source.transformer))
    fps = float(usual) if options.fps is None else options.fps
    ratio = source.config.spatial_compression_ratio
    frames, _, height, width = saved.state.latents.shape[1:]
    check_video_output(options.out, fps, ratio * height, ratio * width)
    source.warn_if_long(console, frames, height, width, "decode")
    vae = source.load(console)
    check_latents(options.latents, saved, vae)
    ranks.share(vae, processes, tiling)
    done = partial(console.progress, "decode")
    frames = write_latents(options.out, vae, saved, fps, tiling, done)
    ranks.end(processes)
    facts = {"frames": frames, "fps": fps, "out": str(options.out)}
    console.print_summary({**facts, "seconds": console.seconds})


@torch.no_grad()
def reconstruct(options: argparse.Namespace, console: Console) -> None:
    processes = ranks.start(options, console)
    if processes is None or processes.first:
        console.hold(output(options.out, options.force, VIDEOS))
    source = VAESource.of(options)
    clip = _clip(options, source.config)
    check_video_output(options.out, clip.fps, clip.height, clip.width)
    source.warn_if_long(console, *_latent_size(clip, source.config), "encode", "decode")
    vae = source.load(console)
    ranks.share(vae, processes, None)
    measure = PSNR()
    total = frame_rule.latent_frames(clip.frames, vae.config)
    chunks = 1 if options.whole else len(frame_rule.decode_plan(total, vae.config))
    done = partial(console.progress, "reconstruct", total=chunks)
    done(0)
    if options.whole:
        video = iter([_whole(vae, clip)])
    else:
        latents = (posterior.mode() for posterior in _encoded(vae, clip, lambda done, total: None))
        video = vae.stream_decode(latents, total=total)
    if processes is None or processes.first:
        video = _compared(video, clip, measure, done)
    _write(options.out, vae, video, clip.fps)
    ranks.end(processes)
    if processes is not None and not processes.first:
        return
    decibels = measure.decibels
    facts = {
        **_facts(clip),
        "psnr_db": round(decibels, 3) if math.isfinite(decibels) else None,
        **_process_memory(vae),
        "seconds": console.seconds,
        "note": "seconds include reading and writing: no benchmark",
        "out": str(options.out),
    }
    console.print_summary(facts)


def check_latents(path: Path, saved: resume.Saved, vae: CausalVAE) -> None:
    """Raises CheckpointError if the latents are of a VAE with other weights."""
    here = record_of_model("vae", vae)
    if saved.record.get("vae.dtype") == here["vae.dtype"]:  # else the fingerprints differ anyway
        check_record(path, saved.record, {"vae.weights": here["vae.weights"]})


def _check_latents(path: Path, saved: resume.Saved, vae: VAEConfig) -> None:
    """Raises CheckpointError for latents of another VAE config, or with steps left."""
    check_record(path, saved.record, record_of_config("vae", vae))
    if saved.state.done < saved.steps:
        raise CheckpointError(
            f"{path}: must hold latents after all steps; got {saved.state.done} of {saved.steps}: "
            "go on with cogvx generate --resume"
        )


def write_latents(
    path: Path, vae: CausalVAE, saved: resume.Saved, fps: float, tiling: Tiling | None, done: Any
) -> int:
    """Decode to a file, in constant memory unless tiled; returns the number of frames.

    Of a VAE on several ranks each calls this, and the first writes.
    """
    raw = saved.state.latents[:1, saved.padding :] / vae.config.scaling_factor
    if tiling is not None:
        video = vae.decode(raw.to(_like(vae)), tiling=tiling, progress=done)
        return _write(path, vae, iter([video]), fps)
    plan = frame_rule.decode_plan(raw.shape[1], vae.config)
    pieces = (piece.to(_like(vae)) for piece in torch.split(raw, list(plan), 1))
    chunks = vae.stream_decode(pieces, total=raw.shape[1])
    return _write(path, vae, _ticked(chunks, len(plan), done), fps)


def _write(path: Path, vae: CausalVAE, video: Iterator[Tensor], fps: float) -> int:
    """Write a decoded video on the rank that has it; returns the number of frames."""
    shared = vae.decoder.ranks
    if shared is None or shared.receives:
        return write_video(path, video, fps)
    return sum(chunk.shape[1] for chunk in video)  # of 0 frames each


def _clip(options: argparse.Namespace, vae: VAEConfig) -> Clip:
    if options.frames is not None:
        frame_rule.check("cogvx", "--frames", options.frames, vae)
    return open_video(
        options.video,
        frames=options.frames,
        height=options.height,
        width=options.width,
        fps=options.fps,
        multiple=vae.spatial_compression_ratio,
        vae=vae,
    )


def _latent_size(clip: Clip, vae: VAEConfig) -> tuple[int, int, int]:
    """Size (frames, height, width) of a clip's latents."""
    ratio = vae.spatial_compression_ratio
    return frame_rule.latent_frames(clip.frames, vae), clip.height // ratio, clip.width // ratio


def _encoded(vae: CausalVAE, clip: Clip, done: Any) -> Iterator[DiagonalGaussian]:
    plan = frame_rule.encode_plan(clip.frames, vae.config)
    like = _like(vae)
    pieces = (piece.to(like) for piece in clip.chunks(plan))
    return _ticked(vae.stream_encode(pieces, total=clip.frames), len(plan), done)


def _whole(vae: CausalVAE, clip: Clip) -> Tensor:
    """Encode and decode a clip at once."""
    video = torch.cat(list(clip.chunks(clip.frames)), 1).to(_like(vae))
    return vae.decode(vae.encode(video).mode())


def _compared(video: Iterator[Tensor], clip: Clip, measure: PSNR, done: Any) -> Iterator[Tensor]:
    """Yield the chunks of a video, each compared with the file, which is read again."""
    frames = clip.chunks(1)
    for number, chunk in enumerate(video, 1):
        original = torch.cat(list(itertools.islice(frames, chunk.shape[1])), 1)
        measure.add(original, chunk.float().cpu())
        del original
        yield chunk
        del chunk
        done(number)


def _ticked(chunks: Iterator[Any], total: int, done: Any) -> Iterator[Any]:
    done(0, total)
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
