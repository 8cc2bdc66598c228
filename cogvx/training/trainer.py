"""The stages of a training, VAE and transformer, from a recipe to a model's folder."""

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import load_scheduler, load_transformer, load_vae, save_vae
from ..config import SchedulerConfig
from ..data import Clip, FolderClips, LatentClip, LatentClips, encode_clips
from ..pipeline import CogVideoX
from ..schedulers import NoiseSchedule
from ..shapes import ProceduralClips, WordTextEncoder, vocabulary
from ..shapes.scoring import GUIDANCE, STEPS
from ..transformer import ExpertTransformer
from ..vae import CausalVAE, DiagonalGaussian
from ..validation import check_choice
from ..video import write_sheet
from .checkpointing import Point, RunFolder
from .init import init_vae
from .loop import Loop, Progress, make_accelerator
from .lora import add_adapters, save_adapters
from .losses import ReconstructionLoss, VelocityLoss, drop_text, recolor
from .recipe import Recipe
from .sampler import mix_seed

PathLike = str | os.PathLike[str]
Clips = ProceduralClips | FolderClips
STAGES = ("vae", "transformer")
VAE_CLIPS = 10**6  # procedural clips of an epoch of the VAE
SHEET_CLIPS = 4
SHEET_FRAMES = 6
SCALING_CLIPS = 64  # clips that `scaling_factor` is measured on


def train(
    recipe: Recipe,
    folder: PathLike,
    *,
    stages: Sequence[str] = STAGES,
    device: str | torch.device = "cpu",
    tensorboard: bool = False,
    progress: Progress | None = None,
) -> dict[str, list[Point]]:
    """Train by a recipe, or resume a training in the folder.

    Writes the model with the EMA of its weights to `folder`, for `CogVideoX.from_pretrained`; LoRA
    adapters as `pytorch_lora_weights.safetensors`, for `load_lora`. The other files are listed in
    `cogvx.training.checkpointing`.

    stages    to train; those that the recipe lacks are skipped
    device    "cpu", or "cuda" for the GPU that accelerate gives the process
    progress  called with the stage's name, steps done and total steps, in the main process

    Returns the logged losses of each stage; {} in processes beside the main one. Raises ValueError
    for a folder of another recipe, FloatingPointError for gradients that are not finite,
    ModuleNotFoundError if the extra `train` is not installed.
    """
    for stage in stages:
        check_choice("train", "stages", stage, STAGES)
    accelerator = make_accelerator(torch.device(device))
    with accelerator.main_process_first():
        run = RunFolder(folder, recipe)
    main = accelerator.is_main_process
    report = progress if progress is not None and main else lambda stage, done, total: None
    work = {"vae": train_vae, "transformer": train_transformer}
    losses = {}
    for stage in STAGES:
        wanted = getattr(recipe, f"{stage}_training") is not None
        if stage in stages and wanted:
            losses[stage] = work[stage](run, torch.device(device), tensorboard, report)
    return losses if main else {}


def train_vae(
    run: RunFolder, device: torch.device, tensorboard: bool, progress: Progress
) -> list[Point]:
    """Train `run.folder/vae` by `ReconstructionLoss`.

    Its `scaling_factor` is measured at the end, so that scaled latents have a deviation of 1.
    """
    recipe, accelerator = run.recipe, make_accelerator(device)
    options = recipe.vae_training
    assert options is not None
    vae = new_vae(recipe)
    vae.gradient_checkpointing = options.gradient_checkpointing
    clips = make_clips(recipe, vae)
    test = ProceduralClips("test", SHEET_CLIPS, *clip_size(recipe))
    samples = test if is_procedural(recipe) else clips

    def prepare(batch: list[Clip], step: int) -> tuple[Tensor]:
        count = options.frames_at(step)
        firsts = torch.randint(recipe.data.frames - count + 1, (len(batch),)).tolist()
        cut = [clip.video[n : n + count] for clip, n in zip(batch, firsts, strict=True)]
        video = torch.stack(cut).to(accelerator.device)
        return (recolor(video, options.recolored),)

    def sample() -> None:
        video = torch.stack([samples[i].video for i in range(min(SHEET_CLIPS, len(samples)))])
        decoded = vae.decode(vae.encode(video.to(accelerator.device)).mode()).cpu()
        pairs = torch.stack([video, decoded], 1).flatten(0, 1)
        write_sheet(stage.folder / "samples.png", _sheet_frames(pairs))

    stage = run.stage("vae")
    loss = ReconstructionLoss(vae, options.kl_weight)
    loop = Loop(
        stage,
        options,
        mix_seed(recipe.seed, 0),
        accelerator,
        loss,
        clips,
        prepare,
        sample,
        recipe.data.workers,
        tensorboard,
    )
    points, weights = loop.run(progress), loop.weights()
    if loop.main:
        trained = CausalVAE(vae.config)
        trained.load_state_dict(weights)
        save_vae(_set_scaling_factor(trained, clips), run.folder / "vae")
    accelerator.wait_for_everyone()
    return points


def train_transformer(
    run: RunFolder, device: torch.device, tensorboard: bool, progress: Progress
) -> list[Point]:
    """Train `run.folder/transformer`, or LoRA adapters, by `VelocityLoss`.

    The clips are first encoded to `run.folder/latents`, unless the data are latents.
    """
    recipe, accelerator = run.recipe, make_accelerator(device)
    options = recipe.transformer_training
    assert options is not None
    has_vae = (run.folder / "vae").is_dir()
    if recipe.model is None and not has_vae:
        raise ValueError(
            f"train: {run.folder}/vae must be there before the transformer is trained; train the "
            "stage vae first"
        )
    vae = load_vae(run.folder if has_vae else str(recipe.model), torch.float32, accelerator.device)
    latents = encode_latents(run, vae, accelerator, progress)
    solver, scheduler = make_scheduler(recipe)
    transformer = new_transformer(recipe)
    transformer.gradient_checkpointing = options.gradient_checkpointing
    words = make_text_encoder(recipe) if is_procedural(recipe) else None
    scale = vae.config.scaling_factor

    def prepare(batch: list[LatentClip], step: int) -> tuple[Tensor, Tensor]:
        moments = torch.stack([clip.moments for clip in batch]).float().to(accelerator.device)
        text, empty = _embed(batch, latents, words)
        text, empty = text.to(moments), empty.to(moments)
        posterior = DiagonalGaussian(moments)
        x = posterior.mode() if options.posterior == "mode" else posterior.sample()
        return scale * x, drop_text(text, empty, options.text_dropout)

    pipe = CogVideoX(transformer, vae, scheduler, words, solver)

    def sample() -> None:
        prompts = [latents.captions[i] for i in range(min(SHEET_CLIPS, len(latents)))]
        if words is None:
            embeddings, empty = _embed([latents[i] for i in range(len(prompts))], latents, None)
            inputs: dict[str, Any] = {
                "prompt_embeds": embeddings.float(),
                "negative_prompt_embeds": empty.float().expand_as(embeddings),
            }
        else:
            inputs = {"prompt": prompts, "steps": STEPS, "guidance": GUIDANCE}
        frames, height, width = clip_size(recipe)
        videos = pipe.generate(**inputs, num_frames=frames, height=height, width=width, seed=0)
        write_sheet(stage.folder / "samples.png", _sheet_frames(videos))

    stage = run.stage("transformer")
    loss = VelocityLoss(transformer, NoiseSchedule(scheduler), options)
    loop = Loop(
        stage,
        options,
        mix_seed(recipe.seed, 1),
        accelerator,
        loss,
        latents,
        prepare,
        sample,
        tensorboard=tensorboard,
    )
    points, whole = loop.run(progress), loop.weights()
    prefix = "transformer."
    weights = {n.removeprefix(prefix): x for n, x in whole.items() if n.startswith(prefix)}
    if loop.main and options.lora_rank:
        save_adapters(transformer, weights, run.folder)
    elif loop.main:
        pipe.transformer = ExpertTransformer(transformer.config)
        pipe.transformer.load_state_dict(weights)
        pipe.save_pretrained(run.folder)
    accelerator.wait_for_everyone()
    return points


def is_procedural(recipe: Recipe) -> bool:
    """Return True if the clips are drawn, not read from a folder."""
    return recipe.data.folder is None


def clip_size(recipe: Recipe) -> tuple[int, int, int]:
    """(frames, height, width) of a clip."""
    return recipe.data.frames, recipe.data.height, recipe.data.width


def make_clips(recipe: Recipe, vae: CausalVAE, count: int = VAE_CLIPS) -> Clips:
    """Data set of videos; count: of procedural clips."""
    if recipe.data.folder is None:
        return ProceduralClips("train", count, *clip_size(recipe), seed=recipe.seed)
    return FolderClips(recipe.data.folder, *clip_size(recipe), vae=vae.config)


def encode_latents(
    run: RunFolder, vae: CausalVAE, accelerator: Any, progress: Progress
) -> LatentClips:
    """Data set of latents: the recipe's, or its clips encoded to `run.folder/latents`."""
    recipe, folder = run.recipe, run.folder / "latents"
    given = recipe.data.folder
    if given is not None and any(Path(given).glob("latents-*.safetensors")):
        return LatentClips(given, vae)
    if given is not None and recipe.model is not None:
        raise ValueError(
            f"train: data.folder must hold latents with embeddings of their captions, because the "
            f"text encoder of {recipe.model} is too large to be there in training; make them with "
            f"cogvx encode {given} --model {recipe.model} --out FOLDER"
        )
    return encode_clips(
        make_clips(recipe, vae, recipe.data.clips),
        vae,
        folder,
        workers=recipe.data.workers,
        progress=partial(progress, "latents"),
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
    )


def new_vae(recipe: Recipe) -> CausalVAE:
    """VAE to train: the recipe's model, or a random one."""
    if recipe.model is not None:
        return load_vae(recipe.model, torch.float32).train()
    assert recipe.vae is not None  # checked by Recipe
    torch.manual_seed(mix_seed(recipe.seed, 2))
    vae = CausalVAE(recipe.vae)
    init_vae(vae)
    return vae


def new_transformer(recipe: Recipe) -> ExpertTransformer:
    """Transformer to train: the recipe's model, or a random one.

    Under LoRA it is in the dtype of `precision`, and the adapters in float32.
    """
    training = recipe.transformer_training
    if recipe.model is not None and training is not None and training.lora_rank:
        dtype = getattr(torch, training.precision)
        transformer = load_transformer(recipe.model, dtype)
        add_adapters(transformer, training.lora_rank)
        return transformer
    if recipe.model is not None:
        return load_transformer(recipe.model, torch.float32)
    assert recipe.transformer is not None
    torch.manual_seed(mix_seed(recipe.seed, 3))
    return ExpertTransformer(recipe.transformer)


def make_scheduler(recipe: Recipe) -> tuple[str, SchedulerConfig]:
    """Solver and config of the scheduler."""
    if recipe.model is not None:
        return load_scheduler(recipe.model)
    return "ddim", recipe.scheduler or SchedulerConfig()


def make_text_encoder(recipe: Recipe) -> WordTextEncoder:
    """Text encoder of the procedural clips."""
    return WordTextEncoder(vocabulary(), recipe.data.places, recipe.data.window)


def _embed(
    batch: Sequence[LatentClip], latents: LatentClips, words: WordTextEncoder | None
) -> tuple[Tensor, Tensor]:
    """Embed captions, (batch, text_len, dim), and the empty one, (1, text_len, dim)."""
    if words is not None:
        places = words.places
        return words.encode([clip.caption for clip in batch], places), words.encode([""], places)
    texts = [clip.text for clip in batch if clip.text is not None]
    if latents.empty is None or len(texts) < len(batch):
        raise ValueError(
            f"{latents.folder}: must hold embeddings of the captions; make it with cogvx encode "
            "--model, of a model with a text encoder"
        )
    return torch.stack(texts), latents.empty[None]


def _set_scaling_factor(vae: CausalVAE, clips: Clips) -> CausalVAE:
    """Measure the deviation of the latents, and set `scaling_factor` of the config."""
    squares = []
    weight = next(vae.parameters())
    with torch.no_grad():
        for i in range(min(SCALING_CLIPS, len(clips))):
            squares.append(vae.encode(clips[i].video[None].to(weight)).mean.square().mean())
    factor = float(torch.stack(squares).mean().rsqrt())
    config = dataclasses.replace(vae.config, scaling_factor=round(factor, 6))
    for part in (vae, vae.encoder, vae.decoder):
        part.config = config
    return vae


def _sheet_frames(videos: Tensor) -> Tensor:
    """Select SHEET_FRAMES frames of each clip, evenly spaced."""
    chosen = torch.linspace(0, videos.shape[1] - 1, min(SHEET_FRAMES, videos.shape[1])).long()
    return videos[:, chosen]
