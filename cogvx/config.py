"""Model configs, checked when created, and the released presets. Imports no torch.

Fields are named as in diffusers' config.json. diffusers' options that no CogVideoX varies are in
`FIXED`: other values are rejected, not ignored.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from .validation import invalid, short_repr, unknown_key

C = TypeVar("C", bound="Config")

COUNT_LIMIT = 1 << 16  # no width, length or size of a real model is larger
LAYER_LIMIT = 1024
EXPERT_LIMIT = 256


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base class: types and ranges are checked when an instance is created.

    Raises TypeError for a value of the wrong type and ValueError for one out of range, naming the
    field, what was wanted and what came.
    """

    FIXED: ClassVar[Mapping[str, Any]] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset()
    LIMITS: ClassVar[Mapping[str, tuple[int, int]]] = {}
    RANGES: ClassVar[Mapping[str, tuple[float, float]]] = {}  # of floats; others are positive

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = self._checked(field.name, hints[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    def _checked(self, name: str, hint: Any, value: Any) -> Any:
        options = typing.get_args(hint)
        if type(None) in options:
            if value is None:
                return None
            hint = next(option for option in options if option is not type(None))
        if typing.get_origin(hint) is tuple:
            if not isinstance(value, (tuple, list)) or not 1 <= len(value) <= 16:
                raise self._invalid(TypeError, name, "a list of 1 to 16 integers", value)
            return tuple(self._checked(name, int, item) for item in value)
        if hint is int:
            return self._integer(name, value)
        if hint is float:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise self._invalid(TypeError, name, "a number", value)
            if name in self.RANGES:
                low, high = self.RANGES[name]
                if not low <= value <= high:
                    raise self._invalid(ValueError, name, f"a number in [{low}, {high}]", value)
            elif not 0 < value < 1e6:
                raise self._invalid(ValueError, name, "a positive number below 1e6", value)
            return float(value)
        if not isinstance(value, hint):
            raise self._invalid(TypeError, name, f"a {hint.__name__}", value)
        return value

    def _integer(self, name: str, value: Any) -> int:
        low, high = self.LIMITS.get(name, (1, COUNT_LIMIT))
        whole = isinstance(value, float) and value.is_integer()  # JSON may have 4.0
        if isinstance(value, bool) or not (isinstance(value, int) or whole):
            raise self._invalid(TypeError, name, "an integer", value)
        if not low <= value <= high:
            raise self._invalid(ValueError, name, f"an integer in [{low}, {high}]", value)
        return int(value)

    def _invalid(self, kind: type[Exception], name: str, wanted: str, value: Any) -> Exception:
        return invalid(type(self).__name__, name, wanted, short_repr(value, 60), kind)

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Create a config from the contents of a config.json; missing keys take their defaults.

        Keys that begin with an underscore are ignored. Raises ValueError for an unknown key and for
        another value of a key in `FIXED`.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__}: must be a JSON object; got {type(values).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        taken = {}
        for key, value in values.items():
            if key in known:
                taken[key] = value
            elif key in cls.FIXED:
                wanted = cls.FIXED[key]
                if value != wanted:
                    raise ValueError(
                        f"{cls.__name__}: {key} must be {wanted!r}, the only one that any "
                        f"CogVideoX uses; got {str(value)[:60]!r}"
                    )
            elif not key.startswith("_") and key not in cls.IGNORED:
                raise unknown_key(cls.__name__, key, known)
        return cls(**taken)

    def to_dict(self) -> dict[str, Any]:
        """Contents of config.json: all fields, and `FIXED`."""
        fields = dataclasses.asdict(self)
        lists = {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}
        return {**lists, **self.FIXED}


@dataclass(frozen=True, kw_only=True)
class VAEConfig(Config):
    """Config of the causal VAE. Sizes in pixels. Source: `docs/model.md`, sections 1.2 and 4.

    With `factorized` every causal convolution is a spatial one followed by a temporal one and norms
    are per frame, so that the VAE is strictly causal; without, it is the released one.

    Outputs of the released VAE depend on the chunk sizes, because its norms take statistics over a
    chunk: `num_sample_frames_batch_size` frames are encoded and `num_latent_frames_batch_size`
    latents decoded at a time (see `cogvx.frames`).
    """

    FIXED = {
        "act_fn": "silu",
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    IGNORED = frozenset({"force_upcast", "down_block_types", "up_block_types"})

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 3
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    temporal_compression_ratio: int = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: float = 1.15258426
    invert_scale_latents: bool = False
    factorized: bool = False
    num_sample_frames_batch_size: int = 8
    num_latent_frames_batch_size: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"VAEConfig: norm_num_groups must divide every one of block_out_channels "
                    f"{self.block_out_channels}; got {self.norm_num_groups}"
                )
        ratio, stages = self.temporal_compression_ratio, len(self.block_out_channels) - 1
        if ratio not in [2**n for n in range(stages + 1)]:
            raise ValueError(
                f"VAEConfig: temporal_compression_ratio must be a power of two, at most "
                f"{2**stages} with {stages + 1} block_out_channels; got {ratio}"
            )
        if not self.factorized and self.num_latent_frames_batch_size % 2:
            raise ValueError(
                "VAEConfig: num_latent_frames_batch_size must be even, because an odd chunk "
                f"begins with a frame of its own; got {self.num_latent_frames_batch_size}"
            )
        if self.num_sample_frames_batch_size != ratio * self.num_latent_frames_batch_size:
            raise ValueError(
                f"VAEConfig: num_sample_frames_batch_size must be temporal_compression_ratio times "
                f"num_latent_frames_batch_size = {ratio * self.num_latent_frames_batch_size}; "
                f"got {self.num_sample_frames_batch_size}"
            )

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent, of height and width: each level but the last halves them."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def time_levels(self) -> int:
        """Number of levels, counted from the pixels, that also halve the frames."""
        return self.temporal_compression_ratio.bit_length() - 1


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """Config of the expert transformer. Source: `docs/model.md`, sections 1.1 and 2.

    `sample_height` and `sample_width` are in latents, `sample_frames` in frames of video, as in the
    released files. `patch_size_t=None` is CogVideoX 1.0 (patches embedded by a convolution, frame
    by frame); a number is 1.5 and later (by a linear layer).

    `num_text_experts` and `num_video_experts` are feed-forward experts of each modality; 0 and 0,
    as released, is one feed-forward shared by both. If a modality has several, a learned router
    sends each token to `expert_top_k` of them.
    """

    FIXED = {
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "dropout": 0.0,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "norm_elementwise_affine": True,
    }
    LIMITS = {
        "num_layers": (1, LAYER_LIMIT),
        "num_text_experts": (0, EXPERT_LIMIT),
        "num_video_experts": (0, EXPERT_LIMIT),
        "expert_top_k": (1, EXPERT_LIMIT),
    }

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    num_layers: int = 30
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    patch_bias: bool = True
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    mlp_ratio: float = 4.0
    num_text_experts: int = 0
    num_video_experts: int = 0
    expert_top_k: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sample_height", "sample_width"):
            if getattr(self, name) % self.patch_size:
                raise ValueError(
                    f"TransformerConfig: {name} must be a multiple of patch_size "
                    f"{self.patch_size}; got {getattr(self, name)}"
                )
        if self.use_rotary_positional_embeddings:
            if self.attention_head_dim % 2 or self.attention_head_dim < 6:
                raise ValueError(
                    f"TransformerConfig: attention_head_dim must be even and at least 6 for rotary "
                    f"positions; got {self.attention_head_dim}"
                )
        elif self.hidden_size % 16:
            raise ValueError(
                f"TransformerConfig: hidden size must be a multiple of 16 for sin-cos positions; "
                f"got {self.num_attention_heads} heads of {self.attention_head_dim}"
            )
        if self.use_learned_positional_embeddings and self.patch_size_t is not None:
            raise ValueError(
                "TransformerConfig: use_learned_positional_embeddings must be false with "
                f"patch_size_t; got true with patch_size_t {self.patch_size_t}"
            )
        if self.ofs_embed_dim not in (None, self.time_embed_dim):
            raise ValueError(
                "TransformerConfig: ofs_embed_dim must be null or time_embed_dim "
                f"{self.time_embed_dim}, because the two are added; got {self.ofs_embed_dim}"
            )
        if (self.num_text_experts == 0) != (self.num_video_experts == 0):
            raise ValueError(
                f"TransformerConfig: num_text_experts and num_video_experts must both be 0 (one "
                f"feed-forward for both) or both at least 1; got {self.num_text_experts} and "
                f"{self.num_video_experts}"
            )
        several = [n for n in (self.num_text_experts, self.num_video_experts) if n > 1]
        if self.expert_top_k > min(several, default=1):
            raise ValueError(
                f"TransformerConfig: expert_top_k must be at most the number of experts of a "
                f"modality with several, {min(several, default=1)}; got {self.expert_top_k}"
            )

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def ffn_dim(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def grid(self) -> tuple[int, int]:
        """Training size (height, width) in tokens."""
        return self.sample_height // self.patch_size, self.sample_width // self.patch_size

    @property
    def sample_latent_frames(self) -> int:
        """Latent frames of a clip of `sample_frames`, before any padding."""
        return (self.sample_frames - 1) // self.temporal_compression_ratio + 1


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Config):
    """Noise schedule of the training. Source: `docs/model.md`, section 5.1."""

    FIXED = {
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }
    # diffusers' CogVideoX schedulers accept these and do not use them.
    IGNORED = frozenset({"clip_sample", "clip_sample_range", "sample_max_value"})

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    snr_shift_scale: float = 3.0
    rescale_betas_zero_snr: bool = True


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A released model, with recommended settings. Height and width in pixels."""

    transformer: TransformerConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    solver: str
    dynamic_cfg: bool
    height: int
    width: int
    frames: int
    fps: int


def _released(transformer: TransformerConfig, frames: int = 49, fps: int = 8, **vae: Any) -> Preset:
    large = transformer.num_attention_heads == 48
    return Preset(
        transformer=transformer,
        vae=VAEConfig(scaling_factor=0.7 if large else 1.15258426, **vae),
        scheduler=SchedulerConfig(snr_shift_scale=1.0 if large else 3.0),
        solver="dpm" if large else "ddim",
        dynamic_cfg=large,
        height=8 * transformer.sample_height,
        width=8 * transformer.sample_width,
        frames=frames,
        fps=fps,
    )


_5B: dict[str, Any] = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
_15: dict[str, Any] = {
    **_5B,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 96,
    "sample_width": 170,
    "sample_frames": 81,
}

# The released models. Source: `docs/model.md`, section 1.
PRESETS: Mapping[str, Preset] = {
    "2b": _released(TransformerConfig()),
    "5b": _released(TransformerConfig(**_5B)),
    "5b-i2v": _released(
        TransformerConfig(**_5B, in_channels=32, use_learned_positional_embeddings=True)
    ),
    "1.5-5b": _released(TransformerConfig(**_15), 81, 16, invert_scale_latents=True),
    "1.5-5b-i2v": _released(
        TransformerConfig(**_15, in_channels=32, ofs_embed_dim=512),
        81,
        16,
        invert_scale_latents=True,
    ),
}
