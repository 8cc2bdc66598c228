"""The commands `cogvx demo` and `cogvx score`, for models of the procedural clips."""

import argparse
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..assets import SHIPPED
from ..cli import loading
from ..cli.console import Console
from ..cli.outputs import output
from ..files import atomic_path
from ..pipeline import CogVideoX
from ..video import PSNR, Clip, open_video, write_contact_sheet, write_video
from .scoring import NAMES, Scores, score_model, score_vae
from .word_encoder import WordTextEncoder, has_word_encoder

PROMPTS = (
    "a large blue circle moves up and a small blue circle moves down on white",
    "a red circle moves right",
    "two yellow triangles on gray, one moving down",
)
FPS = 8.0
SCALE = 4  # enlargement of the 64 pixels in files
SUFFIXES = {
    ".mp4": "the clip, for a video player",
    ".gif": "the same, for a browser",
    ".png": "its frames side by side, numbered, under the sentence",
}
SEEDS = 1 << 63
NAME_LENGTH = 100  # of a file
T = TypeVar("T")


@torch.no_grad()
def demo(options: argparse.Namespace, console: Console) -> None:
    device, folder = loading.device_of(options), loading.model_of(options)
    transformer, vae = loading.read_configs(folder)
    if transformer is None or vae is None:
        raise ValueError(f"{options.model}: must have a transformer/ and a vae/")
    prompts = options.prompt or list(PROMPTS)
    text_encoder: Any = True
    if has_word_encoder(folder):
        text_encoder = WordTextEncoder.from_pretrained(folder)
        text_encoder.encode(prompts, transformer.max_text_seq_length)  # raises for unknown words
    clip = None
    if options.clip is not None:
        side = vae.sample_height
        frames = transformer.sample_frames
        clip = open_video(options.clip, frames=frames, height=side, width=side, vae=vae)
    seeds = [(options.seed + number) % SEEDS for number in range(len(prompts))]
    names = [f"{_name(text)}-seed{seed}" for text, seed in zip(prompts, seeds, strict=True)]
    options.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        for suffix in SUFFIXES:
            console.hold(output(options.out / f"{name}{suffix}", options.force, (suffix,)))
    beside = options.out / f"{_name(Path(options.clip or '').stem)}-reconstructed.mp4"
    if clip is not None:
        console.hold(output(beside, options.force, (".mp4",)))
    dtype = loading.dtype_of(options, transformer)
    pipe = CogVideoX.from_pretrained(folder, dtype, device, text_encoder=text_encoder)
    if pipe.text_encoder is None:
        raise ValueError(f"{options.model}: must have a text encoder to be shown sentences")
    rows = []
    for prompt, name, seed in zip(prompts, names, seeds, strict=True):
        made = partial(
            pipe.generate,
            prompt,
            steps=options.steps,
            guidance=options.guidance,
            seed=seed,
            progress=console.progress,
        )
        video, row = _timed(prompt, device, made)
        _write(options.out / name, _enlarged(video.cpu()), prompt)
        rows.append({**row, "files": [str(options.out / f"{name}{suffix}") for suffix in SUFFIXES]})
    if clip is not None:
        row = _reconstruct(pipe, clip, options.clip.name, beside, device)
        rows.append({**row, "files": [str(beside)]})
    console.print_summary({"device": str(device), "runs": rows}, _text(rows, device, options))


def _write(path: Path, video: Tensor, prompt: str) -> None:
    """Write all files of a prompt, or none."""
    with ExitStack() as stack:
        mp4, gif, png = (stack.enter_context(atomic_path(f"{path}{suffix}")) for suffix in SUFFIXES)
        write_video(mp4, video, FPS)
        write_video(gif, video, FPS)
        write_contact_sheet(png, video, caption=prompt)


def _reconstruct(
    pipe: CogVideoX, clip: Clip, name: str, path: Path, device: torch.device
) -> dict[str, Any]:
    """Reconstruct a clip by the VAE, and write both side by side."""
    video = clip.read()
    weight = next(pipe.vae.parameters())

    def again() -> Tensor:
        return pipe.vae.decode(pipe.vae.encode(video.to(weight)).mode())

    made, row = _timed(f"{name}, through the VAE and back", device, again)
    made, measure = made.float().cpu(), PSNR()
    measure.add(video, made)
    write_video(path, _enlarged(torch.cat([video, made], 4)), clip.fps)
    return {**row, "psnr_db": round(measure.decibels, 2)}


def _timed(what: str, device: torch.device, work: Callable[[], T]) -> tuple[T, dict[str, Any]]:
    """Result of `work`, with its seconds and on a GPU its peak memory."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    made = work()
    if on_gpu:
        torch.cuda.synchronize(device)
    row: dict[str, Any] = {"what": what, "seconds": round(time.perf_counter() - start, 2)}
    if on_gpu:
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return made, row


def _enlarged(video: Tensor) -> Tensor:
    """Upsample a clip `SCALE` times, bicubically."""
    frames = F.interpolate(video[0].float(), scale_factor=SCALE, mode="bicubic")
    return frames.clamp(-1, 1)[None]


def _name(text: str) -> str:
    """Turn a prompt into a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:NAME_LENGTH].strip("-") or "clip"


def _text(rows: list[dict[str, Any]], device: torch.device, options: argparse.Namespace) -> str:
    """Format a table of timings and a list of files."""
    width = max(len(row["what"]) for row in rows)
    lines = [f"{'on ' + str(device):{width}}  seconds"]
    for row in rows:
        peak = f"  {row['peak_bytes'] / 2**20:.1f} MiB at most" if "peak_bytes" in row else ""
        psnr = f"  {row['psnr_db']} dB" if "psnr_db" in row else ""
        lines.append(f"{row['what']:{width}}  {row['seconds']:7.2f}{peak}{psnr}")
    lines += ["", f"made in {options.out}, of each sentence:"]
    lines += [f"  {suffix}  {what}" for suffix, what in SUFFIXES.items()]
    if options.clip is not None:
        lines.append(f"and {rows[-1]['files'][0]}: the clip beside what came back of it")
        if options.model in SHIPPED:
            lines.append(
                "  (the VAE of this model was trained on slow shapes of plain colours: those come\n"
                "  back as they were; a real clip comes back blurred, and what is fast smears)"
            )
    return "\n".join([*lines, f"look at {rows[0]['files'][-1]} first"])


@torch.no_grad()
def score(options: argparse.Namespace, console: Console) -> None:
    device, folder = loading.device_of(options), loading.model_of(options)
    transformer, _ = loading.read_configs(folder)
    console.progress("load weights")
    dtype = loading.dtype_of(options, transformer)
    pipe = CogVideoX.from_pretrained(folder, dtype, device, variant=options.variant)
    console.progress("VAE")
    decibels = score_vae(pipe.vae)
    scores, control = score_model(
        pipe,
        options.prompts,
        skip=options.skip,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        progress=partial(console.progress, "clips"),
    )
    summary = {"psnr_db": round(decibels, 2), **scores.to_dict(), "control": control.to_dict()}
    console.print_summary(
        {**summary, "seconds": console.seconds}, _table(scores, control, decibels)
    )


def _table(scores: Scores, control: Scores, decibels: float) -> str:
    lines = [f"{'of ' + str(scores.prompts) + ' clips':16}{'own':>8}{'another':>9}  sentence's"]
    for name in NAMES:
        own, other = getattr(scores, name), getattr(control, name)
        lines.append(f"{name:16}{own:8.1%}{other:9.1%}")
    return "\n".join([*lines, "", f"held-out clips through the VAE: {decibels:.2f} dB"])
