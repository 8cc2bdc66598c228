"""Training recipes: TOML files with the data, the models and the options of each stage.

    seed = 0
    [data]                  # without a folder: the procedural clips of `cogvx.shapes`
    [vae]                   # a `VAEConfig`, for a new VAE
    [vae_training]
    [transformer]           # a `TransformerConfig`, for a new transformer
    [transformer_training]
    [scheduler]             # a `SchedulerConfig`

`model = "folder"` starts from a model's weights instead. A stage without its table is not trained.
Example: `cogvx/assets/tiny/recipe.toml`.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import frames
from ..assets import SHIPPED, located
from ..config import Config, SchedulerConfig, TransformerConfig, VAEConfig
from ..files import CONFIG_BYTES
from ..shapes.word_encoder import WINDOW_LIMIT
from ..validation import check_choice, unknown_key

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PathLike = str | os.PathLike[str]
STEPS_LIMIT = 10**8
MIN_FACTOR = 0.01  # of the learning rate, at the end of a cosine
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "constant")
POSTERIORS = ("sample", "mode")
WEIGHTINGS = ("none", "uncertainty")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Data(Config):
    """Clips to train on.

    folder   videos with captions, or latents of `cogvx encode`; None: procedural clips
    clips    number of procedural clips for the transformer; the VAE does not repeat any
    frames, height, width  of a clip; videos are cut and scaled to them
    places, window  of `WordTextEncoder`, for procedural clips
    workers  data loading processes
    """

    LIMITS: ClassVar[Mapping[str, tuple[int, int]]] = {
        "clips": (1, STEPS_LIMIT),
        "window": (0, WINDOW_LIMIT),
        "workers": (0, 256),
    }

    folder: str | None = None
    clips: int = 10_000
    frames: int = 17
    height: int = 64
    width: int = 64
    places: int = 16
    window: int = 0
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class Training(Config):
    """Options of one stage.

    steps        of the optimizer
    batch_size   clips of a step over all ranks, in `accumulate` parts
    optimizer    "adamw"; or "muon": Muon for the matrices of a transformer's attention and
                 feed-forwards, AdamW for the rest of it. Neither for a VAE nor for adapters
    muon_learning_rate  of those matrices, with the same schedule as learning_rate
    learning_rate, warmup, schedule  linear warmup, then "cosine" to a hundredth, or "constant"
    ema_decay    of the weights' EMA, which is saved as the model; (1 + step) / (10 + step) early on
    precision    "bfloat16" is autocast of float32 weights; slow, with a warning, on a CPU with AVX2
    compile      use torch.compile
    save_every, sample_every  steps between checkpoints and between samples: multiples of log_every
    """

    LIMITS: ClassVar[Mapping[str, tuple[int, int]]] = {
        "steps": (1, STEPS_LIMIT),
        "warmup": (0, STEPS_LIMIT),
        "save_every": (1, STEPS_LIMIT),
        "log_every": (1, STEPS_LIMIT),
        "sample_every": (1, STEPS_LIMIT),
        "image_steps": (0, STEPS_LIMIT),
        "lora_rank": (0, 4096),
        "context": (1, 4096),
    }
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {
        "beta1": (0.0, 1.0),
        "beta2": (0.0, 1.0),
        "weight_decay": (0.0, 10.0),
        "ema_decay": (0.0, 1.0),
        "recolored": (0.0, 1.0),
        "kl_weight": (0.0, 1e3),
        "text_dropout": (0.0, 1.0),
        "logit_mean": (-10.0, 10.0),
        "balance_weight": (0.0, 1e3),
    }

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    muon_learning_rate: float = 0.02
    warmup: int = 100
    schedule: str = "cosine"
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    precision: str = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False
    save_every: int = 500
    log_every: int = 50
    sample_every: int = 1000

    def batch_at(self, step: int) -> int:
        """Batch size of a step."""
        return self.batch_size

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(type(self).__name__, "optimizer", self.optimizer, OPTIMIZERS)
        check_choice(type(self).__name__, "schedule", self.schedule, SCHEDULES)
        check_choice(type(self).__name__, "precision", self.precision, PRECISIONS)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"{type(self).__name__}: accumulate must divide batch_size {self.batch_size}; got "
                f"{self.accumulate}"
            )
        for name in ("save_every", "sample_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be a multiple of log_every "
                    f"{self.log_every}; got {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True)
class VAETraining(Training):
    """Options of the VAE.

    frames       of a training clip, cut at random from the data's
    image_steps  first steps, on single frames of `frames` times as many clips: images teach space
                 soonest
    recolored    part of the clips with random colours: the few colours of small shapes are learned
                 late otherwise
    kl_weight    of the KL divergence per latent value, beside |error| + 8 · error² per pixel value
    """

    frames: int = 17
    image_steps: int = 0
    recolored: float = 0.0
    kl_weight: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer == "muon":
            raise ValueError(
                "VAETraining: optimizer must be adamw, for a VAE has convolutions, no matrices; "
                "got muon"
            )

    def frames_at(self, step: int) -> int:
        """Frames of a clip at a step."""
        return 1 if step < self.image_steps else self.frames

    def batch_at(self, step: int) -> int:
        return self.batch_size * self.frames // self.frames_at(step)


@dataclass(frozen=True, kw_only=True)
class TransformerTraining(Training):
    """Options of the transformer.

    text_dropout    part of the captions replaced by the empty one, for guidance
    posterior       "sample" latents, as CogVideoX does, or "mode", without the posterior's noise
    logit_mean, logit_std  of logit-normal timesteps t / 1000: above 0 more of them are noisy.
                    None, the default, is uniform, as CogVideoX was trained
    weighting       of timesteps: "none", or "uncertainty", see `UncertaintyWeighting`
    balance_weight  of `load_balancing_loss`, where a modality has several experts
    lora_rank       of adapters on q, k, v and the output of attention; 0: train all weights
    shard           keep a part of weights, gradients and optimizer state on each rank (FSDP2)
    context         ranks that share the tokens of each clip; shard and context may change when a
                    training is resumed
    """

    text_dropout: float = 0.1
    posterior: str = "sample"
    logit_mean: float | None = None
    logit_std: float = 1.0
    weighting: str = "none"
    balance_weight: float = 0.01
    lora_rank: int = 0
    shard: bool = False
    context: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("TransformerTraining", "posterior", self.posterior, POSTERIORS)
        check_choice("TransformerTraining", "weighting", self.weighting, WEIGHTINGS)
        if self.lora_rank and self.optimizer == "muon":
            raise ValueError(
                "TransformerTraining: optimizer must be adamw for the adapters of lora_rank "
                f"{self.lora_rank}; got muon"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe; its fields are the tables of the file.

    Raises TypeError or ValueError, naming table and key, for values out of range.
    """

    seed: int = 0
    model: str | None = None
    data: Data = Data()
    vae: VAEConfig | None = None
    vae_training: VAETraining | None = None
    transformer: TransformerConfig | None = None
    transformer_training: TransformerTraining | None = None
    scheduler: SchedulerConfig | None = None

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"Recipe: seed must be a whole number, not negative; got {self.seed}")
        if self.vae_training is None and self.transformer_training is None:
            raise ValueError(
                "Recipe: vae_training or transformer_training must be there; got neither"
            )
        training = self.transformer_training
        if training is not None and training.lora_rank and self.model is None:
            raise ValueError(
                "Recipe: model must be the folder of a model for lora_rank, which adapts one; got "
                "none"
            )
        if self.vae is not None:
            frames.check("Recipe", "data.frames", self.data.frames, self.vae)
            if self.vae_training is not None:
                frames.check("Recipe", "vae_training.frames", self.vae_training.frames, self.vae)
        if self.vae_training is not None and self.vae_training.frames > self.data.frames:
            raise ValueError(
                f"Recipe: vae_training.frames must be at most data.frames {self.data.frames}; got "
                f"{self.vae_training.frames}"
            )
        if self.model is None and (self.vae is None or self.transformer is None):
            raise ValueError(
                "Recipe: model must be the folder of a model, unless vae and transformer are both "
                "there; got none"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Make a recipe from nested dicts. Errors in a table begin with its name."""
        taken: dict[str, Any] = {}
        for key, value in values.items():
            if key in TABLES:
                if not isinstance(value, Mapping):
                    raise TypeError(f"Recipe: {key} must be a table; got {value!r}")
                try:
                    taken[key] = TABLES[key].from_dict(value)
                except (TypeError, ValueError) as error:
                    message = str(error).removeprefix(f"{TABLES[key].__name__}: ")
                    raise type(error)(f"{key}: {message}") from error
            elif key in ("seed", "model"):
                taken[key] = value
            else:
                raise unknown_key("Recipe", key, [*TABLES, "model", "seed"])
        return cls(**taken)

    @classmethod
    def read(cls, path: PathLike, settings: Sequence[str] = ()) -> "Recipe":
        """Read a TOML file, or the packaged recipe "tiny".

        settings  such as "transformer_training.steps=100", which replace values of the file

        Raises ValueError, with the path, for bad values; OSError if there is no such file.
        """
        if path in SHIPPED:
            path = located(path) / "recipe.toml"
        with open(path, "rb") as file:
            data = file.read(CONFIG_BYTES + 1)
        if len(data) > CONFIG_BYTES:
            raise ValueError(f"{path}: must be at most {CONFIG_BYTES:,} bytes")
        try:
            values = tomllib.loads(data.decode())
            for setting in settings:
                _set(values, setting)
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {str(error).removeprefix('Recipe: ')}") from error

    def to_dict(self) -> dict[str, Any]:
        """All values, with the defaults, as JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {k: v.to_dict() if isinstance(v, Config) else v for k, v in fields.items()}
        return {key: value for key, value in plain.items() if value is not None}


def learning_rate(options: Training, step: int) -> float:
    """Learning rate of a step, counted from 0."""
    return options.learning_rate * learning_rate_factor(options, step)


def learning_rate_factor(options: Training, step: int) -> float:
    """Factor of every learning rate at a step."""
    rise = min(1.0, (step + 1) / max(options.warmup, 1))
    if options.schedule == "constant" or step < options.warmup:
        return rise
    part = (step - options.warmup) / max(options.steps - options.warmup, 1)
    return rise * (MIN_FACTOR + (1 - MIN_FACTOR) * (0.5 + 0.5 * math.cos(math.pi * part)))


TABLES: Mapping[str, type[Config]] = {
    "data": Data,
    "vae": VAEConfig,
    "vae_training": VAETraining,
    "transformer": TransformerConfig,
    "transformer_training": TransformerTraining,
    "scheduler": SchedulerConfig,
}


def _set(values: dict[str, Any], setting: str) -> None:
    """Set `table.key=value` in nested dicts; the value is JSON, or else a string."""
    name, equals, text = setting.partition("=")
    *tables, key = name.strip().split(".")
    if not equals or not key or len(tables) > 1:
        raise ValueError(
            f"Recipe: a setting must be like transformer_training.steps=100; got {setting!r}"
        )
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ValueError(f"Recipe: {table} is no table; got the setting {setting!r}")
    values[key] = value
