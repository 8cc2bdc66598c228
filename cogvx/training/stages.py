"""The two stages of a training, VAE and transformer, from a recipe to a model's folder."""

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..checkpoint import load_scheduler, load_transformer, load_vae, save_vae
from ..config import SchedulerConfig, check_choice
from ..data import Clip, FolderClips, LatentClip, LatentClips, encode_clips
from ..pipeline import CogVideoX
from ..schedulers import NoiseSchedule
from ..shapes import ProceduralClips, WordTextEncoder, vocabulary
from ..shapes.scoring import GUIDANCE, STEPS
from ..transformer import ExpertTransformer
from ..vae import CausalVAE, DiagonalGaussian
from ..video import write_sheet
from .batches import mixed
from .beginnings import begin_vae
from .loop import Loop, Tell, make_accelerator
from .lora import add_adapters, save_adapters
from .losses import ReconstructionLoss, VelocityLoss, dropped, recolored
from .recipe import Recipe
from .run import Point, Run

PathLike = str | os.PathLike[str]
STAGES = ("vae", "transformer")
SEEN = 10**6  # procedural clips that a VAE may see before it sees one again
SHOWN = 4  # clips of a sheet
COLUMNS = 6  # frames of each
MEASURED = 64  # clips that tell how wide latents are spread


def train(
    recipe: Recipe,
    folder: PathLike,
    *,
    stages: Sequence[str] = STAGES,
    device: str | torch.device = "cpu",
    tensorboard: bool = False,
    tell: Tell | None = None,
) -> dict[str, list[Point]]:
    """Trains what a recipe says, or goes on where a run in the folder was stopped.

    In the end `folder` is the model's, as `CogVideoX.from_pretrained` reads it, with the moving
    averages of the weights; of adapters, `pytorch_lora_weights.safetensors`, which diffusers'
    `load_lora_weights` reads. What a run keeps beside is told in `cogvx.training.run`.

    stages  which; one that the recipe does not train is passed over
    device  "cpu", or "cuda" for the GPU that accelerate gives the process
    tell    called with a stage's name, steps done and steps in all

    Of several processes the main one tells, and returns the points of each stage's curve; the
    others return nothing. Raises ValueError if the folder was begun with another
    recipe, FloatingPointError for gradients that are not finite, ModuleNotFoundError for what the
    extra `train` would have brought.
    """
    for stage in stages:
        check_choice("train", "stages", stage, STAGES)
    accelerator = make_accelerator(torch.device(device))
    with accelerator.main_process_first():
        run = Run(folder, recipe)
    main = accelerator.is_main_process
    told = tell if tell is not None and main else lambda stage, done, total: None
    work = {"vae": train_vae, "transformer": train_transformer}
    curves = {}
    for stage in STAGES:
        wanted = getattr(recipe, f"{stage}_training") is not None
        if stage in stages and wanted:
            curves[stage] = work[stage](run, torch.device(device), tensorboard, told)
    return curves if main else {}


def train_vae(run: Run, device: torch.device, tensorboard: bool, tell: Tell) -> list[Point]:
    """Trains `run.folder/vae`: see `ReconstructionLoss`.

    In the end the latents are measured, and `scaling_factor` is what brings them to a standard
    deviation of 1.
    """
    recipe, accelerator = run.recipe, make_accelerator(device)
    options = recipe.vae_training
    assert options is not None
    vae = new_vae(recipe)
    vae.gradient_checkpointing = options.gradient_checkpointing
    clips = clips_of(recipe, vae)
    shown = ProceduralClips("test", SHOWN, *sizes(recipe)) if drawn(recipe) else clips

    def prepare(batch: list[Clip], step: int) -> tuple[Tensor]:
        count = options.frames_at(step)
        firsts = torch.randint(recipe.data.frames - count + 1, (len(batch),)).tolist()
        cut = [clip.video[n : n + count] for clip, n in zip(batch, firsts, strict=True)]
        video = torch.stack(cut).to(accelerator.device)
        return (recolored(video, options.recolored),)

    def sample() -> None:
        video = torch.stack([shown[i].video for i in range(min(SHOWN, _len(shown)))])
        again = vae.decode(vae.encode(video.to(accelerator.device)).mode()).cpu()
        pairs = torch.stack([video, again], 1).flatten(0, 1)
        write_sheet(stage.folder / "samples.png", _some(pairs))

    stage = run.stage("vae")
    loss = ReconstructionLoss(vae, options.kl_weight)
    loop = Loop(
        stage,
        options,
        mixed(recipe.seed, 0),
        accelerator,
        loss,
        clips,
        prepare,
        sample,
        recipe.data.workers,
        tensorboard,
    )
    points, weights = loop.run(tell), loop.weights()
    if loop.main:
        trained = CausalVAE(vae.config)
        trained.load_state_dict(weights)
        save_vae(_scaled(trained, clips), run.folder / "vae")
    accelerator.wait_for_everyone()
    return points


def train_transformer(run: Run, device: torch.device, tensorboard: bool, tell: Tell) -> list[Point]:
    """Trains `run.folder/transformer`, or adapters: see `VelocityLoss`.

    First the VAE encodes the clips into `run.folder/latents`, unless the data are latents already.
    """
    recipe, accelerator = run.recipe, make_accelerator(device)
    options = recipe.transformer_training
    assert options is not None
    own = (run.folder / "vae").is_dir()
    if recipe.model is None and not own:
        raise ValueError(
            f"train: {run.folder}/vae must be there before the transformer is trained; train the "
            "stage vae first"
        )
    vae = load_vae(run.folder if own else str(recipe.model), torch.float32, accelerator.device)
    latents = latents_of(run, vae, accelerator, tell)
    solver, scheduler = scheduler_of(recipe)
    transformer = new_transformer(recipe)
    transformer.gradient_checkpointing = options.gradient_checkpointing
    words = words_of(recipe) if drawn(recipe) else None
    scale = vae.config.scaling_factor

    def prepare(batch: list[LatentClip], step: int) -> tuple[Tensor, Tensor]:
        moments = torch.stack([clip.moments for clip in batch]).float().to(accelerator.device)
        text, empty = _texts(batch, latents, words)
        text, empty = text.to(moments), empty.to(moments)
        known = DiagonalGaussian(moments)
        taken = known.mode() if options.posterior == "mode" else known.sample()
        return scale * taken, dropped(text, empty, options.text_dropout)

    pipe = CogVideoX(transformer, vae, scheduler, words, solver)

    def sample() -> None:
        prompts = [latents.captions[i] for i in range(min(SHOWN, len(latents)))]
        if words is None:
            embeddings, empty = _texts([latents[i] for i in range(len(prompts))], latents, None)
            said: dict[str, Any] = {
                "prompt_embeds": embeddings.float(),
                "negative_prompt_embeds": empty.float().expand_as(embeddings),
            }
        else:
            said = {"prompt": prompts, "steps": STEPS, "guidance": GUIDANCE}
        frames, height, width = sizes(recipe)
        made = pipe.generate(**said, num_frames=frames, height=height, width=width, seed=0)
        write_sheet(stage.folder / "samples.png", _some(made))

    stage = run.stage("transformer")
    loss = VelocityLoss(transformer, NoiseSchedule(scheduler), options)
    loop = Loop(
        stage,
        options,
        mixed(recipe.seed, 1),
        accelerator,
        loss,
        latents,
        prepare,
        sample,
        tensorboard=tensorboard,
    )
    points, whole = loop.run(tell), loop.weights()
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


# --- what a recipe means ---------------------------------------------------------------------


def drawn(recipe: Recipe) -> bool:
    """Whether the clips are the procedural ones."""
    return recipe.data.folder is None


def sizes(recipe: Recipe) -> tuple[int, int, int]:
    """(frames, height, width) of a clip."""
    return recipe.data.frames, recipe.data.height, recipe.data.width


def clips_of(recipe: Recipe, vae: CausalVAE, count: int = SEEN) -> Dataset[Clip]:
    """The clips, as videos; of the procedural ones so many."""
    if recipe.data.folder is None:
        return ProceduralClips("train", count, *sizes(recipe), seed=recipe.seed)
    return FolderClips(recipe.data.folder, *sizes(recipe), vae=vae.config)


def latents_of(run: Run, vae: CausalVAE, accelerator: Any, tell: Tell) -> LatentClips:
    """The clips, as latents: those of the recipe's folder, or else encoded into the run's."""
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
        clips_of(recipe, vae, recipe.data.clips),
        vae,
        folder,
        workers=recipe.data.workers,
        progress=partial(tell, "latents"),
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
    )


def new_vae(recipe: Recipe) -> CausalVAE:
    """The VAE as it begins: of the recipe's model, or random."""
    if recipe.model is not None:
        return load_vae(recipe.model, torch.float32).train()
    assert recipe.vae is not None  # or Recipe would have said so
    torch.manual_seed(mixed(recipe.seed, 2))
    vae = CausalVAE(recipe.vae)
    begin_vae(vae)
    return vae


def new_transformer(recipe: Recipe) -> ExpertTransformer:
    """The transformer as it begins, likewise. One that only gets adapters is in the dtype of the
    products, and they are in float32."""
    training = recipe.transformer_training
    if recipe.model is not None and training is not None and training.lora_rank:
        dtype = getattr(torch, training.precision)
        transformer = load_transformer(recipe.model, dtype)
        add_adapters(transformer, training.lora_rank)
        return transformer
    if recipe.model is not None:
        return load_transformer(recipe.model, torch.float32)
    assert recipe.transformer is not None
    torch.manual_seed(mixed(recipe.seed, 3))
    return ExpertTransformer(recipe.transformer)


def scheduler_of(recipe: Recipe) -> tuple[str, SchedulerConfig]:
    """(solver, config)."""
    if recipe.model is not None:
        return load_scheduler(recipe.model)
    return "ddim", recipe.scheduler or SchedulerConfig()


def words_of(recipe: Recipe) -> WordTextEncoder:
    """The text encoder of the procedural clips."""
    return WordTextEncoder(vocabulary(), recipe.data.places, recipe.data.window)


def _texts(
    batch: Sequence[LatentClip], latents: LatentClips, words: WordTextEncoder | None
) -> tuple[Tensor, Tensor]:
    """Embeddings of the captions, (batch, text_len, dim), and of the empty one, (1, …)."""
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


def _scaled(vae: CausalVAE, clips: Dataset[Clip]) -> CausalVAE:
    """The VAE, its config with the factor that its latents need."""
    spread = []
    weight = next(vae.parameters())
    with torch.no_grad():
        for i in range(min(MEASURED, _len(clips))):
            spread.append(vae.encode(clips[i].video[None].to(weight)).mean.square().mean())
    factor = float(torch.stack(spread).mean().rsqrt())
    config = dataclasses.replace(vae.config, scaling_factor=round(factor, 6))
    for part in (vae, vae.encoder, vae.decoder):
        part.config = config
    return vae


def _len(data: Dataset[Any]) -> int:
    return len(data)  # type: ignore[arg-type]  # torch's type says nothing of it


def _some(videos: Tensor) -> Tensor:
    """A few frames of each clip, for a sheet."""
    chosen = torch.linspace(0, videos.shape[1] - 1, min(COLUMNS, videos.shape[1])).long()
    return videos[:, chosen]
