"""The stages of a training, VAE and transformer, from a recipe to a model's folder."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import load_scheduler, load_transformer, load_vae, save_vae
from ..config import SchedulerConfig
from ..data import Clip, FolderClips, LatentClip, LatentClips, encode_clips
from ..frames import latent_frames
from ..pipeline import CogVideoX
from ..schedulers import NoiseSchedule
from ..shapes import ProceduralClips, WordTextEncoder, vocabulary
from ..shapes.scoring import GUIDANCE, STEPS
from ..transformer import ExpertTransformer
from ..vae import CausalVAE, DiagonalGaussian
from ..validation import check_choice
from .checkpointing import Point, RunFolder
from .init import init_vae
from .loop import Loop, Progress
from .lora import add_adapters, save_adapters
from .losses import ReconstructionLoss, VelocityLoss, drop_text, pad_frames, recolor
from .recipe import Recipe
from .sampler import Draws, mix_seed, shares
from .sharding import World, make_context, shard, start

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
    device    "cpu", or "cuda" for the GPU of the rank's number on its machine
    progress  called with the stage's name, steps done and total steps, on the first rank

    Under torchrun every rank calls this. Returns the logged losses of each stage; {} on the ranks
    beside the first. Raises ValueError for a folder of another recipe or for ranks that cannot
    share a batch, FloatingPointError for gradients that are not finite, ModuleNotFoundError if the
    extra `train` is not installed.
    """
    for stage in stages:
        check_choice("train", "stages", stage, STAGES)
    world = start(torch.device(device))
    for stage in stages:
        check_world(recipe, stage, world)
    if not world.main:
        world.wait()  # for the folder that rank 0 makes
    run = RunFolder(folder, recipe)
    if world.main:
        world.wait()
    report = progress if progress is not None and world.main else lambda *_: None
    work = {"vae": train_vae, "transformer": train_transformer}
    losses = {}
    for stage in STAGES:
        if stage in stages and getattr(recipe, f"{stage}_training") is not None:
            losses[stage] = work[stage](run, world, tensorboard, report)
    return losses if world.main else {}


def train_vae(run: RunFolder, world: World, tensorboard: bool, progress: Progress) -> list[Point]:
    """Train `run.folder/vae` by `ReconstructionLoss`.

    Its `scaling_factor` is measured at the end, so that scaled latents have a deviation of 1.
    """
    recipe, options = run.recipe, run.recipe.vae_training
    assert options is not None
    vae = new_vae(recipe)
    vae.gradient_checkpointing = options.gradient_checkpointing
    clips = make_clips(recipe, vae)
    test = ProceduralClips("test", SHEET_CLIPS, *clip_size(recipe))
    samples = test if is_procedural(recipe) else clips

    def prepare(batch: list[Clip], step: int, draws: Draws) -> tuple[Tensor, Tensor]:
        count = options.frames_at(step)
        firsts = (draws.rand() * (recipe.data.frames - count + 1)).long().tolist()
        cut = [clip.video[n : n + count] for clip, n in zip(batch, firsts, strict=True)]
        video = torch.stack(cut).to(world.device)
        return recolor(video, options.recolored, draws), draws.randn(*latent_shape(video, vae))

    def sample() -> Tensor:
        video = torch.stack([samples[i].video for i in range(min(SHEET_CLIPS, len(samples)))])
        decoded = vae.decode(vae.encode(video.to(world.device)).mode()).cpu()
        return _sheet_frames(torch.stack([video, decoded], 1).flatten(0, 1))

    loss = ReconstructionLoss(vae, options.kl_weight)
    loop = Loop(
        run.stage("vae"),
        options,
        mix_seed(recipe.seed, 0),
        world,
        loss,
        clips,
        prepare,
        sample,
        recipe.data.workers,
        tensorboard,
    )
    points, weights = loop.run(progress), loop.weights()
    if world.main:
        trained = CausalVAE(vae.config)
        trained.load_state_dict(weights)
        save_vae(_set_scaling_factor(trained, clips), run.folder / "vae")
    world.wait()
    return points


def train_transformer(
    run: RunFolder, world: World, tensorboard: bool, progress: Progress
) -> list[Point]:
    """Train `run.folder/transformer`, or LoRA adapters, by `VelocityLoss`.

    The clips are first encoded to `run.folder/latents`, unless the data are latents.
    """
    recipe, options = run.recipe, run.recipe.transformer_training
    assert options is not None
    world = replace(world, context=options.context)
    has_vae = (run.folder / "vae").is_dir()
    if recipe.model is None and not has_vae:
        raise ValueError(
            f"train: {run.folder}/vae must be there before the transformer is trained; train the "
            "stage vae first"
        )
    vae = load_vae(run.folder if has_vae else str(recipe.model), torch.float32, world.device)
    latents = encode_latents(run, vae, world, progress)
    solver, scheduler = make_scheduler(recipe)
    transformer = new_transformer(recipe)
    transformer.gradient_checkpointing = options.gradient_checkpointing
    transformer.context = make_context(world)
    if options.shard and world.size > 1:
        shard(transformer, world, options)
    words = make_text_encoder(recipe) if is_procedural(recipe) else None
    scale = vae.config.scaling_factor

    def prepare(batch: list[LatentClip], step: int, draws: Draws) -> tuple[Tensor, ...]:
        moments = torch.stack([clip.moments for clip in batch]).float().to(world.device)
        text, empty = _embed(batch, latents, words)
        text, empty = text.to(moments), empty.to(moments)
        posterior = DiagonalGaussian(moments)
        x = posterior.mode()
        if options.posterior == "sample":
            x = x + posterior.std * draws.randn(*x.shape[1:])
        x = pad_frames(scale * x, transformer)
        text = drop_text(text, empty, options.text_dropout, draws)
        return x, text, draws.quantiles(), draws.randn(*x.shape[1:])

    pipe = CogVideoX(transformer, vae, scheduler, words, solver)

    def sample() -> Tensor:
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
        return _sheet_frames(
            pipe.generate(**inputs, num_frames=frames, height=height, width=width, seed=0)
        )

    loss = VelocityLoss(transformer, NoiseSchedule(scheduler), options)
    loop = Loop(
        run.stage("transformer"),
        options,
        mix_seed(recipe.seed, 1),
        world,
        loss,
        latents,
        prepare,
        sample,
        tensorboard=tensorboard,
    )
    points, whole = loop.run(progress), loop.weights()
    prefix = "transformer."
    weights = {n.removeprefix(prefix): x for n, x in whole.items() if n.startswith(prefix)}
    if world.main and options.lora_rank:
        save_adapters(transformer, weights, run.folder)
    elif world.main:
        pipe.transformer = ExpertTransformer(transformer.config)
        pipe.transformer.load_state_dict(weights)
        pipe.save_pretrained(run.folder)
    world.wait()
    return points


def check_world(recipe: Recipe, stage: str, world: World) -> None:
    """Raises ValueError if the ranks cannot share the clips of a step evenly."""
    options = getattr(recipe, f"{stage}_training")
    if options is None:
        return
    context = getattr(options, "context", 1)
    if world.size % context:
        raise ValueError(
            f"train: {stage}_training.context must divide the number of ranks, for example "
            f"torchrun --nproc-per-node {context} -m cogvx train RECIPE; got context {context} and "
            f"{world.size} ranks"
        )
    shares(options.batch_size, options.accumulate, *replace(world, context=context).data)


def is_procedural(recipe: Recipe) -> bool:
    """Return True if the clips are drawn, not read from a folder."""
    return recipe.data.folder is None


def clip_size(recipe: Recipe) -> tuple[int, int, int]:
    """(frames, height, width) of a clip."""
    return recipe.data.frames, recipe.data.height, recipe.data.width


def latent_shape(video: Tensor, vae: CausalVAE) -> tuple[int, int, int, int]:
    """(frames, channels, height, width) of the latents of each of some clips."""
    _, count, _, height, width = video.shape
    ratio, channels = vae.config.spatial_compression_ratio, vae.config.latent_channels
    return latent_frames(count, vae.config), channels, height // ratio, width // ratio


def make_clips(recipe: Recipe, vae: CausalVAE, count: int = VAE_CLIPS) -> Clips:
    """Data set of videos; count: of procedural clips."""
    if recipe.data.folder is None:
        return ProceduralClips("train", count, *clip_size(recipe), seed=recipe.seed)
    return FolderClips(recipe.data.folder, *clip_size(recipe), vae=vae.config)


def encode_latents(run: RunFolder, vae: CausalVAE, world: World, progress: Progress) -> LatentClips:
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
        process=world.rank,
        processes=world.size,
        wait=world.wait,
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
    config = replace(vae.config, scaling_factor=round(factor, 6))
    for part in (vae, vae.encoder, vae.decoder):
        part.config = config
    return vae


def _sheet_frames(videos: Tensor) -> Tensor:
    """Select SHEET_FRAMES frames of each clip, evenly spaced."""
    chosen = torch.linspace(0, videos.shape[1] - 1, min(SHEET_FRAMES, videos.shape[1])).long()
    return videos[:, chosen]
