"""End-to-end generation pipeline."""

import json
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cogvx_kernels import module_backend

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
from ..checkpoint.weights import variants_of
from ..config import SchedulerConfig
from ..files import CONFIG_BYTES, read_json
from ..generation import WHERE, GenerationParams
from ..hub import PARTS
from ..plan import Plan, forecast
from ..schedulers import SOLVERS
from ..shapes.word_encoder import WordTextEncoder, has_word_encoder
from ..text import T5TextEncoder, TextEncoder, check_packages
from ..transformer import ExpertTransformer
from ..vae import CausalVAE, Tiling
from . import resume, start
from .conditioning import Progress, decode
from .denoise import State, denoise, drawn_seed, make_generator
from .lora import Adapters
from .options import documents_options, merge_options
from .params import Request, default_size, resolve
from .pictures import to_tensor, warn_of_range
from .ranks import guides_of
from .resume import Saved

if TYPE_CHECKING:
    from ..parallel import Ranks

PathLike = str | os.PathLike[str]
LARGE = 3072  # the hidden size of the models of 5 billion parameters


class CogVideoX:
    """Generation pipeline of a model of the CogVideoX family.

    transformer   image-to-video if it has twice as many input as output channels; else text- and
                  video-to-video
    vae           with the same latent channels
    scheduler     config of the noise schedule that the transformer was trained with
    text_encoder  anything with `encode` (see `cogvx.text.TextEncoder`); None if embeddings are
                  always given
    solver        "ddim" or "dpm", the default of `generate`

    The parts are attributes and may be replaced. Raises ValueError if they do not fit together.

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
        self.ranks: Ranks | None = None  # see `cogvx.parallel.context_parallel`
        self._adapters: Adapters | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: PathLike,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        backend: str | None = None,
        attention: str = "auto",
        text_encoder: bool | TextEncoder = True,
        *,
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        local_files_only: bool = False,
    ) -> "CogVideoX":
        """Load a model from a folder in diffusers' layout: transformer/, vae/, scheduler/ and, if
        the model has one, text_encoder/ with tokenizer/.

        path          the folder, which never touches the network; or a model on the Hugging Face
                      hub, such as "THUDM/CogVideoX-5b", whose files are downloaded to the hub's
                      cache as needed; or "tiny", the model inside the package
        dtype         of all weights: bfloat16 for 5B and 1.5, float16 for 2B. By default, for each
                      part, the dtype of most of its weights; float32 for "tiny" on a CPU
        backend       see `load_transformer`; attention: see `ExpertTransformer`
        text_encoder  False leaves it out (4.8 billion parameters), if embeddings are given; or one
                      of your own
        variant       of the weights, as in "fp16"; parts without this variant are read without it
        revision, token, cache_dir, local_files_only
                      of a model on the hub; see `cogvx.assets.located`

        Raises CheckpointError or FileNotFoundError for missing or invalid files, and the errors of
        `located` for a name on the hub.
        """
        on_backend = module_backend(backend)
        if dtype is None and path in SHIPPED and torch.device(device).type == "cpu":
            dtype = torch.float32
        hub: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        # the small files first, so that their errors come before gigabytes are downloaded
        folder = located(path, parts=["scheduler", "tokenizer"], **hub)
        solver, scheduler = load_scheduler(folder)
        wants_text = text_encoder is True and _has_text_encoder(folder)
        if wants_text and (folder / "tokenizer").is_dir():
            check_packages(folder)
        parts = [part for part in PARTS if wants_text or part not in ("text_encoder", "tokenizer")]
        folder = located(path, parts=parts, variant=variant, **hub)
        variants = variants_of(folder, variant)
        if wants_text and has_word_encoder(folder):
            text_encoder = WordTextEncoder.from_pretrained(folder)
        elif wants_text:
            text_encoder = T5TextEncoder.from_pretrained(
                folder, dtype, device, variant=variants["text_encoder"]
            )
        with on_backend:
            transformer = load_transformer(
                folder, dtype, device, attention=attention, variant=variants["transformer"]
            )
            vae = load_vae(folder, dtype, device, variant=variants["vae"])
        text = None if isinstance(text_encoder, bool) else text_encoder
        return cls(transformer, vae, scheduler, text, solver)

    def load_lora(self, path: PathLike, scale: float = 1.0) -> None:
        """Merge a LoRA adapter into the transformer's weights; several add up.

        Args:
            path: a safetensors file, or a folder that holds one: of `cogvx train`, diffusers
                (`pytorch_lora_weights.safetensors`), peft (`adapter_model.safetensors` beside its
                `adapter_config.json`) or kohya's scripts.
            scale: factor, on top of the adapter's own alpha / rank.

        The original weights stay in CPU memory for `unload_lora`. In 16 bits the merged weight is
        rounded, so results are not bit for bit those of an unmerged adapter. `save_pretrained`
        writes the merged weights.

        Raises CheckpointError, naming the keys, for an adapter of another model or an unsupported
        kind (DoRA, LoHa, text encoders, pickles); then nothing has been changed.
        """
        adapters = self._adapters_of_transformer() or Adapters(self.transformer)
        adapters.add(Path(path), scale)
        self._adapters = adapters

    def unload_lora(self) -> None:
        """Remove all LoRA adapters; restores the original weights bit for bit."""
        if self._adapters is not None:
            self._adapters.remove()
        self._adapters = None

    def _adapters_of_transformer(self) -> Adapters | None:
        """Adapters of the current transformer, or None."""
        if self._adapters is None or self._adapters.transformer is not self.transformer:
            return None
        return self._adapters

    def save_pretrained(self, path: PathLike) -> None:
        """Write the folder that `from_pretrained` reads; diffusers reads that of a released model.

        A text encoder is written if it is one of this library's.
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
        """Device of the transformer."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the transformer."""
        return next(self.transformer.parameters()).dtype

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> "CogVideoX":
        """Move all parts to a device, convert them to a dtype, or both; returns self.

        As for a torch module: `to("cuda")`, `to(torch.bfloat16)`, `to("cuda", torch.bfloat16)`.
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
        """The parts that are torch modules; of the text encoder, its `model`."""
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
        lines.append(f"  solver: {self.solver}")
        adapters = self._adapters_of_transformer()
        if adapters is not None:
            lines.append(f"  lora: {adapters.record()}")
        return "\n".join(lines)

    def _default_size(self) -> tuple[int, int]:
        return default_size(self.transformer.config, self.vae.config)

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """Same as `generate`."""
        return self.generate(*args, **options)

    @documents_options
    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        params: GenerationParams | None = None,
        **options: Any,
    ) -> Tensor:
        """Generate a video from a prompt; also from an image, or from another video.

        prompt   one text or several, a video for each
        params   the other options; by default `GenerationParams()`
        options  keyword arguments, which replace fields of `params`; listed below. Also diffusers'
                 names: num_inference_steps (steps), guidance_scale (guidance), use_dynamic_cfg
                 (dynamic_guidance), max_sequence_length (text_length), output_type="latent"
                 (output="latents") and callback_on_step_end (callback; called with the pipeline,
                 the step, its timestep and {"latents": …})

        Returns the video, (batch, frames, 3, height, width) float32 in [-1, 1], on the VAE's
        device, or the latents.

        >>> from cogvx.video import write_video
        >>> write_video("kite.mp4", pipe.generate("A red kite over a harbour", steps=50), fps=8)

        Raises ValueError or TypeError, before anything is computed, for invalid options;
        FloatingPointError, naming the stage, for NaN or infinity; CheckpointError if `resume` was
        made with other models or options, naming the differences.
        """
        params = merge_options(self, prompt, params, options)
        usual = self._default_size()
        height = usual[0] if params.height is None else params.height
        width = usual[1] if params.width is None else params.width
        image = to_tensor("image", params.image, height, width)
        video = to_tensor("video", params.video, height, width)
        request = resolve(
            self.transformer.config,
            self.vae.config,
            replace(params, image=image, video=video),
            self.solver,
            self.scheduler.num_train_timesteps,
        )
        self._warn_of_half()
        warn_of_range({"image": params.image, "video": params.video})
        progress = request.progress or _no_progress
        shared = self.vae.decoder.ranks
        if shared is not None and request.output == "video":
            shared.check_method(WHERE, request.tiling)
        with nullcontext() if self.ranks is None else self.ranks.watched():
            state = self._denoised(request, progress)
        if request.output == "latents":
            return state.latents
        return decode(self.vae, state.latents[:, request.padding :], request.tiling, progress)

    def decode_saved(
        self,
        path: PathLike,
        tiling: Tiling | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Decode latents that `generate` saved; see `cogvx.pipeline.resume.decode_saved`."""
        return resume.decode_saved(self.vae, path, tiling, progress)

    def plan(
        self,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> Plan:
        """Memory that `generate` will need; see `cogvx.plan.forecast`, also for `options`: batch,
        guidance, cfg, tiling, budget, …"""
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

    def _denoised(self, request: Request, progress: Progress) -> State:
        """State after the last step, which is also saved."""
        ranks, path, every = self.ranks, request.save_latents, request.checkpoint_every
        guides = guides_of(ranks, request)
        draws = request.seed is None and request.generator is None

        def check() -> int | None:
            resume.check_saving(path, every)
            return drawn_seed() if draws else None

        drawn = check() if ranks is None else ranks.shared(check)
        if ranks is not None and not ranks.first:
            path = None  # the first rank writes files
        solver = SOLVERS[request.solver](self.scheduler, request.compat)
        timesteps = solver.timestep_schedule(request.steps, request.strength)
        seed = drawn if draws else request.seed
        generator = make_generator(seed, request.generator, request.batch)
        saved = start.begin(self, request, solver, timesteps, generator, progress)
        record, conditioning, state = saved.record, saved.conditioning, saved.state
        if conditioning is not None:  # None: the file had all steps
            progress("denoise", state.done, len(timesteps))
            run = denoise(
                self.transformer, solver, timesteps, state, conditioning, request, generator, guides
            )
            for state in run:
                now = every is not None and state.done % every == 0 and state.done < len(timesteps)
                if path is not None and now:
                    states = start.states(generator)
                    resume.write(path, Saved(record, len(timesteps), state, conditioning, states))
                progress("denoise", state.done, len(timesteps))
        if path is not None:
            resume.write(path, Saved(record, len(timesteps), state))
        return state

    def _model_index(self) -> dict[str, Any]:
        """Contents of model_index.json: diffusers' classes for the folders."""
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
                stacklevel=4,
            )


def _has_text_encoder(folder: Path) -> bool:
    """Look for a text encoder in the model's index, if it has one, else by its folder."""
    if (folder / "model_index.json").is_file():
        entry = read_json(folder / "model_index.json", CONFIG_BYTES).get("text_encoder")
        return isinstance(entry, list) and any(entry)
    # of a model on the hub, the tokenizer is downloaded before the encoder
    return any((folder / name).is_dir() for name in ("text_encoder", "tokenizer"))


def _no_progress(stage: str, done: int, total: int) -> None:
    pass
