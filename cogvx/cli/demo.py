"""`cogvx demo`: a model of the procedural clips, from sentences to pictures that move."""

import argparse
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..memory import LiveBytes
from ..pipeline import CogVideoX
from ..video import PSNR, open_video, write_contact_sheet, write_video
from . import loading
from .console import Console

PROMPTS = (
    "a red circle moves right",
    "a large yellow triangle moves up on gray",
    "two small blue squares on white, one moving down",
)
FPS = 8.0
SCALE = 4  # of the files' pixels: 64 of them are few on a screen
T = TypeVar("T")


@torch.no_grad()
def demo(options: argparse.Namespace, console: Console) -> None:
    device, folder = loading.device_of(options), loading.model_of(options)
    transformer, _ = loading.read_configs(folder)
    pipe = CogVideoX.from_pretrained(folder, loading.dtype_of(options, transformer), device)
    prompts = options.prompt or list(PROMPTS)
    if pipe.text_encoder is None:
        raise ValueError(f"{options.model}: must have a text encoder to be shown sentences")
    pipe.text_encoder.encode(prompts, pipe.transformer.config.max_text_seq_length)  # or says why
    options.out.mkdir(parents=True, exist_ok=True)
    done = []
    for number, prompt in enumerate(prompts):
        name = re.sub(r"[^a-z]+", "-", prompt.lower()).strip("-")
        made = partial(
            pipe.generate,
            prompt,
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed + number,
            progress=console.progress,
        )
        video, row = _measured(prompt, device, made)
        large = _large(video.cpu())
        for suffix in (".mp4", ".gif"):
            write_video(options.out / f"{name}{suffix}", large, FPS)
        write_contact_sheet(options.out / f"{name}.png", large)
        done.append({**row, "files": f"{options.out / name}.mp4, .gif, .png"})
    if options.clip is not None:
        done.append(_reconstruct(pipe, options.clip, options.out, device))
    console.say({"device": str(device), "runs": done}, _table(done, device))


def _reconstruct(pipe: CogVideoX, path: Path, out: Path, device: torch.device) -> dict[str, Any]:
    """A real clip through the VAE and back, side by side with itself."""
    config = pipe.transformer.config
    side = pipe.vae.config.sample_height
    clip = open_video(
        path, frames=config.sample_frames, height=side, width=side, vae=pipe.vae.config
    )
    video = clip.read()
    weight = next(pipe.vae.parameters())

    def again() -> Tensor:
        return pipe.vae.decode(pipe.vae.encode(video.to(weight)).mode())

    made, row = _measured(f"{path.name}, reconstructed", device, again)
    made, measure = made.float().cpu(), PSNR()
    measure.add(video, made)
    write_video(out / "reconstruction.mp4", _large(torch.cat([video, made], 4)), clip.fps)
    files = f"{out / 'reconstruction'}.mp4"
    return {**row, "psnr_db": round(measure.decibels, 2), "files": files}


def _measured(what: str, device: torch.device, work: Callable[[], T]) -> tuple[T, dict[str, Any]]:
    """What it makes; how long it took, and how many bytes were alive at most."""
    live, on_gpu = LiveBytes(), device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    with live:
        made = work()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else live.peak
    return made, {"what": what, "seconds": round(seconds, 2), "peak_bytes": peak}


def _large(video: Tensor) -> Tensor:
    """Each pixel as a square of `SCALE`."""
    return video.repeat_interleave(SCALE, 3).repeat_interleave(SCALE, 4)


def _table(rows: list[dict[str, Any]], device: torch.device) -> str:
    width = max(len(row["what"]) for row in rows)
    lines = [f"{'on ' + str(device):{width}}  seconds  peak MiB"]
    for row in rows:
        psnr = f"  {row['psnr_db']} dB" if "psnr_db" in row else ""
        numbers = f"{row['seconds']:7.2f}  {row['peak_bytes'] / 2**20:8.1f}"
        lines.append(f"{row['what']:{width}}  {numbers}  {row['files']}{psnr}")
    return "\n".join(lines)
