"""The pipeline: text, image or video in, video out."""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import frames
from ..assets import SHIPPED, located
from ..checkpoint import (
    atomic_path,
    load_scheduler,
    load_transformer,
    load_vae,
    save_scheduler,
    save_transformer,
    save_vae,
)
from ..checkpoint.folder import DIFFUSERS_VERSION
from ..checkpoint.folder import SOLVERS as SOLVER_CLASSES
from ..checkpoint.record import Record, check_record, record_of_config, record_of_model
from ..checkpoint.weights import variants_of
from ..config import SchedulerConfig
from ..files import CONFIG_BYTES, read_json
from ..hub import PARTS
from ..plan import Plan, forecast
from ..schedulers import SOLVERS, Generators, Solver, TimestepSchedule, randn_tensor
from ..text import T5TextEncoder, TextEncoder, check_packages
from ..transformer import ExpertTransformer
from ..vae import CausalVAE, Tiling
from ..words import WordTextEncoder, is_words
from . import resume as saving
from .conditioning import Progress, decode, embeddings, encoded, image_condition, noisy_video
from .denoise import Callback, Conditioning, State, denoise, each, make_generator
from .lora import Adapters
from .names import takes_diffusers_names
from .params import Inputs, Request, default_size, resolve
from .pictures import to_tensor
from .resume import Saved

PathLike = str | os.PathLike[str]
LARGE = 3072  # the hidden size of the models of 5 billion parameters


class CogVideoX:
    """A model of the CogVideoX family with all that it takes to generate a video.

    transformer   with twice as many channels in as out, an image-to-video model; else text- and
                  video-to-video
    vae           of the same latents
    scheduler     the noise that the transformer was trained with
    text_encoder  anything with `encode` (see `cogvx.text.TextEncoder`); None if embeddings are
                  always given
    solver        "ddim" or "dpm", what `generate` takes by default

    The parts are attributes, and may be exchanged. Raises ValueError if they do not fit together.

    >>> from cogvx.video import write_video
    >>> pipe = CogVideoX.from_pretrained("THUDM/CogVideoX-5b", torch.bfloat16, "cuda")
    >>> video = pipe.generate("A red kite over a harbour at dawn", seed=1)
    >>> write_video("kite.mp4", video, fps=8)  # 16 for CogVideoX1.5
    """

    def __init__(
        self,
        transformer: ExpertTransformer,
        vae: CausalVAE,
        scheduler: SchedulerConfig,
        text_encoder: TextEncoder | None = None,
        solver: str = "ddim",
    ) -> None:
        channels = transformer.config.out_channels
        if vae.config.latent_channels != channels:
            raise ValueError(
                f"CogVideoX: vae must have the transformer's {channels} latent channels; got "
                f"{vae.config.latent_channels}"
            )
        if transformer.config.in_channels not in (channels, 2 * channels):
            raise ValueError(
                f"CogVideoX: transformer must have {channels} channels in, as out, or twice as "
                f"many for image-to-video; got {transformer.config.in_channels}"
            )
        if text_encoder is not None and text_encoder.dim != transformer.config.text_embed_dim:
            raise ValueError(
                f"CogVideoX: text_encoder must have the transformer's text_embed_dim "
                f"{transformer.config.text_embed_dim}; got {text_encoder.dim}"
            )
        if solver not in SOLVERS:
            raise ValueError(f"CogVideoX: solver must be one of {', '.join(SOLVERS)}; got {solver}")
        self.transformer = transformer
        self.vae = vae
        self.scheduler = scheduler
        self.text_encoder = text_encoder
        self.solver = solver
        self._adapters: Adapters | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: PathLike,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        backend: str = "auto",
        attention: str = "auto",
        text_encoder: bool | TextEncoder = True,
        *,
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        local_files_only: bool = False,
    ) -> "CogVideoX":
        """The model in a folder of the hub's layout: transformer/, vae/, scheduler/ and, if the
        model has one, text_encoder/ with tokenizer/.

        path          the folder, which never touches the network; or a model of the Hugging Face
                      hub, such as "THUDM/CogVideoX-5b", of which the files that are needed are
                      downloaded to the hub's cache; or "tiny", the model inside the package
        dtype         of all weights: bfloat16 for 5B and 1.5, float16 for 2B. None takes for each
                      part the dtype of most of its weights, but float32 for "tiny" on a CPU
        backend       of the kernels, and attention: see `ExpertTransformer`
        text_encoder  False leaves it out (4.8 billion parameters), for when embeddings are given;
                      or one of your own
        variant       of the weights, as in "fp16"; a part that has none of it is read without
        revision, token, cache_dir, local_files_only
                      of a model of the hub; see `cogvx.assets.located`

        Raises CheckpointError or FileNotFoundError for what is missing or not as it should be, and
        the errors of `located` for a name of the hub.
        """
        if dtype is None and path in SHIPPED and torch.device(device).type == "cpu":
            dtype = torch.float32
        hub: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        # the small files first: what is wrong with them is found before gigabytes are downloaded
        folder = located(path, parts=["scheduler", "tokenizer"], **hub)
        solver, scheduler = load_scheduler(folder)
        wants_text = text_encoder is True and _has_text_encoder(folder)
        if wants_text and (folder / "tokenizer").is_dir():
            check_packages(folder)
        parts = [part for part in PARTS if wants_text or part not in ("text_encoder", "tokenizer")]
        folder = located(path, parts=parts, variant=variant, **hub)
        variants = variants_of(folder, variant)
        if wants_text and is_words(folder):
            text_encoder = WordTextEncoder.from_pretrained(folder)
        elif wants_text:
            text_encoder = T5TextEncoder.from_pretrained(
                folder, dtype, device, variant=variants["text_encoder"]
            )
        return cls(
            load_transformer(
                folder, dtype, device, backend, attention, variant=variants["transformer"]
            ),
            load_vae(folder, dtype, device, backend, variant=variants["vae"]),
            scheduler,
            None if isinstance(text_encoder, bool) else text_encoder,
            solver,
        )

    def load_lora(self, path: PathLike, scale: float = 1.0) -> None:
        """Merge a LoRA adapter into the transformer's weights; several add up.

        Args:
            path: a safetensors file, or a folder that holds one: of `cogvx train`, diffusers
                (`pytorch_lora_weights.safetensors`), peft (`adapter_model.safetensors` beside its
                `adapter_config.json`) or kohya's scripts.
            scale: how much of it, on top of its own alpha / rank.

        The weights as they were stay in CPU memory for `unload_lora`. In 16 bits the sum is rounded
        as every weight is, so that the result is not bit for bit that of an adapter that runs
        beside. `save_pretrained` writes the merged weights.

        Raises CheckpointError, naming the keys, for an adapter of another model or of a kind that
        is not supported (DoRA, LoHa, text encoders, pickles); nothing has been changed then.
        """
        adapters = self._adapters_of_transformer() or Adapters(self.transformer)
        adapters.add(Path(path), scale)
        self._adapters = adapters

    def unload_lora(self) -> None:
        """Take all LoRA adapters out: every weight is, bit for bit, what it was before them."""
        if self._adapters is not None:
            self._adapters.remove()
        self._adapters = None

    def _adapters_of_transformer(self) -> Adapters | None:
        """The adapters in the transformer that is there now, if it has any."""
        if self._adapters is None or self._adapters.transformer is not self.transformer:
            return None
        return self._adapters

    def save_pretrained(self, path: PathLike) -> None:
        """Writes the folder that `from_pretrained` reads; a released model's diffusers reads too.

        A text encoder is written if it is one of the library's, else left out.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_transformer(self.transformer, folder / "transformer")
        save_vae(self.vae, folder / "vae")
        save_scheduler(self.scheduler, folder / "scheduler", self.solver)
        if isinstance(self.text_encoder, (T5TextEncoder, WordTextEncoder)):
            self.text_encoder.save_pretrained(folder)
        with atomic_path(folder / "model_index.json") as part:
            index = json.dumps(self._model_index(), indent=2, sort_keys=True) + "\n"
            part.write_text(index, encoding="utf-8")

    @property
    def device(self) -> torch.device:
        """The transformer's."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's."""
        return next(self.transformer.parameters()).dtype

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> "CogVideoX":
        """Move all parts to a device, convert their weights to a dtype, or both; returns self.

        As of a torch module: `to("cuda")`, `to(torch.bfloat16)`, `to("cuda", torch.bfloat16)`.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise TypeError(f"CogVideoX.to: dtype must be given once; got {device} and {dtype}")
            device, dtype = None, device
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"CogVideoX.to: dtype must be a floating torch.dtype; got {dtype!r}")
        for module in self._modules().values():
            module.to(device=device, dtype=dtype)
        return self

    def _modules(self) -> dict[str, nn.Module]:
        """The parts that have weights; the text encoder only if it is, or has, a torch module."""
        encoder = getattr(self.text_encoder, "model", self.text_encoder)
        found = {"transformer": self.transformer, "vae": self.vae, "text_encoder": encoder}
        return {name: module for name, module in found.items() if isinstance(module, nn.Module)}

    def __repr__(self) -> str:
        config, (height, width) = self.transformer.config, self._default_size()
        image = config.in_channels > config.out_channels
        kind = "image-to-video" if image else "text-to-video and video-to-video"
        modules = self._modules()
        lines = [f"CogVideoX({kind}, {config.sample_frames} frames of {height}x{width} by default)"]
        for name in ("transformer", "vae", "text_encoder"):
            about = type(getattr(self, name)).__name__
            if name in modules:
                weights = list(modules[name].parameters())
                places = sorted({f"{str(w.dtype)[6:]} on {w.device}" for w in weights})
                count = sum(weight.numel() for weight in weights)
                about += f", {count:,} parameters, {' and '.join(places)}"
            lines.append(f"  {name}: {about}")
        lines.append(f"  scheduler: {self.solver}")
        adapters = self._adapters_of_transformer()
        if adapters is not None:
            lines.append(f"  lora: {adapters.record()}")
        return "\n".join(lines)

    def _default_size(self) -> tuple[int, int]:
        return default_size(self.transformer.config, self.vae.config)

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """The same as `generate`."""
        video: Tensor = self.generate(*args, **options)
        return video

    @takes_diffusers_names
    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        video: Any = None,
        strength: float = 0.8,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 50,
        guidance: float = 6.0,
        dynamic_guidance: bool = False,
        scheduler: str | None = None,
        compat: bool = False,
        seed: int | None = None,
        generator: Generators | None = None,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        latents: Tensor | None = None,
        cfg: str = "batch",
        uncond: str = "prompt",
        image_latent_scale: str = "diffusers",
        text_length: int | None = None,
        tiling: Tiling | None = None,
        output: str = "video",
        callback: Callback | None = None,
        progress: Progress | None = None,
        save_latents: PathLike | None = None,
        checkpoint_every: int | None = None,
        resume: PathLike | None = None,
    ) -> Tensor:
        """A video of the prompt; from an image, if one is given, or from another video.

        Args:
            prompt: one text or several, a video for each; long and in English, as in training.
            negative_prompt: what to stay away from; one, or one for each prompt; by default "".
            image: the first frame, (batch or 1, 3, height, width) in [-1, 1], already of the size
                of the video; or a PIL image or a uint8 array (height, width, 3), which is resized,
                or a list of such, one for each prompt. Image-to-video models need one, others take
                none.
            video: (batch or 1, frames, 3, height, width) in [-1, 1], to be made anew; or a list of
                PIL images or uint8 arrays, or a list of such lists.
            strength: how much of it is new: the last int(steps·strength) of the steps are made.
            num_frames: of the video; 49 for CogVideoX, 81 for 1.5, unless the config says another
                number. (diffusers' image-to-video takes 49 for 1.5 too.) See `cogvx.frames`.
            height, width: in pixels, multiples of 16; by default those of the config or the source.
            steps: from 1 to 1000.
            guidance: how much the text weighs. 1 or less: no second prediction, twice as fast.
            dynamic_guidance: see `cogvx.schedulers.dynamic_guidance`. False as in diffusers; the
                5B models are recommended with True and scheduler="dpm".
            scheduler: "ddim" or "dpm"; None for the model's own.
            compat: step as diffusers where the number of steps does not divide 1000.
            seed: of all random numbers, which are drawn on the CPU: the same on every device.
            generator: draws them instead; as in diffusers, in the same order. Or a list, one for
                each video: each video is then that of its generator alone.
            num_videos_per_prompt: so many videos of each prompt, one after another.
            prompt_embeds, negative_prompt_embeds: (batch, text_len, text_embed_dim), instead of
                the texts.
            latents: the noise to begin with, padding included, instead of a draw.
            cfg: "batch" asks both predictions of guidance at once, "two_pass" one after the other.
            uncond: "prompt" takes the embeddings of negative_prompt, "zeros" zeros, as SAT does.
            image_latent_scale: of 1.5's image-to-video: "diffusers", "sat" or "train"; see
                `cogvx.pipeline.conditioning.image_condition`.
            text_length: tokens of a prompt; by default the config's, 226. SAT has 224 for 1.5.
            tiling: of the VAE, if a clip does not fit; see `cogvx.Tiling`.
            output: "video" or "latents", which are scaled and still padded, as in diffusers.
            callback: see `cogvx.pipeline.denoise.denoise`.
            progress: called with a stage ("text", "encode", "denoise", "decode"), how much of it
                is done and how much there is: texts, chunks of the VAE, steps. First when the stage
                begins, with nothing done.
            save_latents: a file for the latents, written before they are decoded (`decode_saved`).
            checkpoint_every: also write it after every so many steps.
            resume: such a file; what it has done is not done again. The result is the same, bit for
                bit. Everything else must be asked for as it was.

        The names of diffusers are taken too: num_inference_steps (steps), guidance_scale
        (guidance), use_dynamic_cfg (dynamic_guidance), max_sequence_length (text_length),
        output_type="latent" (output="latents") and callback_on_step_end (callback; it is called
        with the pipeline, the step, its timestep and {"latents": …}).

        Returns the video, (batch, frames, 3, height, width) float32 in [-1, 1], on the VAE's
        device, or the latents.

        >>> from cogvx.video import write_video
        >>> write_video("kite.mp4", pipe.generate("A red kite over a harbour", steps=50), fps=8)

        Raises ValueError or TypeError, before anything is computed, for what cannot be;
        FloatingPointError, naming the stage, for NaN or infinity; CheckpointError if `resume` was
        made with something else, naming the difference.
        """
        usual = self._default_size()
        size = (usual[0] if height is None else height, usual[1] if width is None else width)
        inputs = Inputs(
            prompt,
            negative_prompt or "",
            to_tensor("image", image, *size),
            to_tensor("video", video, *size),
            prompt_embeds,
            negative_prompt_embeds,
            latents,
        ).repeated(num_videos_per_prompt)
        request = resolve(
            self.transformer.config,
            self.vae.config,
            inputs,
            num_frames=num_frames,
            height=height,
            width=width,
            text_length=text_length,
            strength=strength,
            scheduler=scheduler or self.solver,
            compat=compat,
            steps=steps,
            guidance=guidance,
            dynamic_guidance=dynamic_guidance,
            cfg=cfg,
            uncond=uncond,
            image_latent_scale=image_latent_scale,
            output=output,
            tiling=tiling,
            num_train_timesteps=self.scheduler.num_train_timesteps,
        )
        saving.check_saving(save_latents, checkpoint_every)
        self._warn_of_half()
        _warn_of_range({"image": image, "video": video})
        progress = progress or _no_progress
        solver = SOLVERS[request.scheduler](self.scheduler, compat)
        timesteps = solver.timestep_schedule(request.steps, request.strength)
        random, record = make_generator(seed, generator, request.batch), {}
        if save_latents is not None or resume is not None:
            record = self._record(request, inputs, random)
        conditioning: Conditioning | None
        if resume is None:
            conditioning, state = self._begin(
                inputs, request, solver, timesteps, random, tiling, progress
            )
        else:
            saved = self._resumed(resume, record, seed, random)
            record, conditioning, state = saved.record, saved.conditioning, saved.state
        if conditioning is not None:  # None: the file had all steps
            progress("denoise", state.done, len(timesteps))
            run = denoise(
                self.transformer, solver, timesteps, state, conditioning, request, random, callback
            )
            for state in run:
                due = checkpoint_every is not None and state.done % checkpoint_every == 0
                if save_latents is not None and due and state.done < len(timesteps):
                    now = Saved(record, len(timesteps), state, conditioning, _states(random))
                    saving.write(save_latents, now)
                progress("denoise", state.done, len(timesteps))
        if save_latents is not None:
            saving.write(save_latents, Saved(record, len(timesteps), state))
        if output == "latents":
            return state.latents
        return decode(self.vae, state.latents[:, request.padding :], tiling, progress)

    def decode_saved(
        self,
        path: PathLike,
        tiling: Tiling | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """The video of latents that `generate` saved; see `cogvx.pipeline.resume.decode_saved`."""
        return saving.decode_saved(self.vae, path, tiling, progress)

    def plan(
        self,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> Plan:
        """What `generate` needs for a clip, before it begins; see `cogvx.plan.forecast`, also for
        `options`: batch, guidance, cfg, tiling, budget, …"""
        usual = self._default_size()
        weight = next(self.transformer.parameters())
        if num_frames is not None:
            frames.check("CogVideoX.plan", "num_frames", num_frames, self.vae.config)
        backend = self.transformer.backend if weight.is_cuda else "reference"
        return forecast(
            self.transformer.config,
            self.vae.config,
            frames=self.transformer.config.sample_frames if num_frames is None else num_frames,
            height=usual[0] if height is None else height,
            width=usual[1] if width is None else width,
            **{"dtype": weight.dtype, "backend": backend, **options},
        )

    def _begin(
        self,
        inputs: Inputs,
        request: Request,
        solver: Solver,
        timesteps: TimestepSchedule,
        generator: Generators,
        tiling: Tiling | None,
        progress: Progress,
    ) -> tuple[Conditioning, State]:
        """What the first step needs: text, then image or video, then noise, in this order."""
        weight = next(self.transformer.parameters())
        like = weight.new_empty(request.shape)
        text, negative = embeddings(self.text_encoder, inputs, request, progress)
        text, negative = text.to(like), None if negative is None else negative.to(like)
        if inputs.video is not None:
            raw = encoded(self.vae, inputs.video, generator, progress, tiling)
            latents = noisy_video(raw, self.vae, request, solver, timesteps, generator, like)
            return Conditioning(text, negative), State(latents)
        image = None
        if inputs.image is not None:
            raw = encoded(self.vae, inputs.image[:, None], generator, progress, tiling)
            image = image_condition(raw, self.vae, request, like)
        latents = (
            randn_tensor(like, generator) if inputs.latents is None else inputs.latents.to(like)
        )
        return Conditioning(text, negative, image), State(latents)

    def _record(self, request: Request, inputs: Inputs, generator: Generators) -> Record:
        """All that must be the same for a file of latents to be gone on with."""
        adapters = self._adapters_of_transformer()
        weights = None if adapters is None else adapters.weights()
        seeds = [one.initial_seed() for one in each(generator)]
        return {
            **saving.record_of(request, inputs),
            **record_of_model("transformer", self.transformer, weights),
            "lora": None if adapters is None else adapters.record(),
            **record_of_model("vae", self.vae),
            **record_of_config("scheduler", self.scheduler),
            "generator": ", ".join(one.device.type for one in each(generator)),
            "seed": seeds[0] if len(seeds) == 1 else seeds,
        }

    def _resumed(
        self, path: PathLike, record: Record, seed: int | None, generator: Generators
    ) -> Saved:
        """What a file holds, on the transformer's device, and the random numbers as they were."""
        saved = saving.read(path)
        wanted = {
            name: value for name, value in record.items() if seed is not None or name != "seed"
        }
        check_record(path, saved.record, wanted)
        if saved.generator_states is not None:
            states = saved.generator_states.view(len(each(generator)), -1)
            for one, state in zip(each(generator), states, strict=True):
                one.set_state(state.clone())  # torch crashes on a view
        return saved.to(next(self.transformer.parameters()).device)

    def _model_index(self) -> dict[str, Any]:
        """What tells diffusers which of its classes read the folders."""
        image = self.transformer.config.in_channels > self.transformer.config.out_channels
        text, tokenizer = {
            T5TextEncoder: (["transformers", "T5EncoderModel"], ["transformers", "T5Tokenizer"]),
            WordTextEncoder: (["cogvx", "WordTextEncoder"], [None, None]),
        }.get(type(self.text_encoder), ([None, None], [None, None]))
        return {
            "_class_name": f"CogVideoX{'ImageToVideo' if image else ''}Pipeline",
            "_diffusers_version": DIFFUSERS_VERSION,
            "scheduler": ["diffusers", SOLVER_CLASSES[self.solver]],
            "text_encoder": text,
            "tokenizer": tokenizer,
            "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        }

    def _warn_of_half(self) -> None:
        config, dtype = self.transformer.config, next(self.transformer.parameters()).dtype
        if dtype == torch.float16 and config.hidden_size >= LARGE:
            warnings.warn(
                "the models of 5 billion parameters are trained in bfloat16, and in float16 they "
                "overflow: a black video, or NaN; load them with dtype=torch.bfloat16",
                stacklevel=5,
            )


def _has_text_encoder(folder: Path) -> bool:
    """Whether the model has one: by its index, if it has that, else by its folder."""
    if (folder / "model_index.json").is_file():
        entry = read_json(folder / "model_index.json", CONFIG_BYTES).get("text_encoder")
        return isinstance(entry, list) and any(entry)
    # of a model on the hub, the tokenizer is downloaded before the encoder
    return any((folder / name).is_dir() for name in ("text_encoder", "tokenizer"))


def _warn_of_range(sources: dict[str, Any]) -> None:
    """Tensors in [0, 1] are also in [-1, 1], where they are pale."""
    for name, source in sources.items():
        if isinstance(source, Tensor) and source.min() >= 0:
            warnings.warn(
                f"{name} has no value below 0, as if it were in [0, 1], and would come out pale "
                f"and gray: values are in [-1, 1], which 2 * {name} - 1 makes of [0, 1]",
                stacklevel=5,
            )


def _states(generator: Generators) -> Tensor:
    """The state of a generator, (bytes,), or of each of several, (batch, bytes)."""
    states = [one.get_state() for one in each(generator)]
    return states[0] if len(states) == 1 else torch.stack(states)


def _no_progress(stage: str, done: int, total: int) -> None:
    pass
