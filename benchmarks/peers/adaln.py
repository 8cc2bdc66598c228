"""Adaptive norms and gated residuals of other libraries, over a joint sequence, text first."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvx_kernels.testing import OpInfo

from ..registry import Arguments, Function, Unavailable, compile_, find, provider

# (x, weight, bias, eps) -> normalised
Norm = Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]

ADALN, RESIDUAL, BOTH = "expert_adaln", "gated_residual", "gated_residual_adaln"


def _per_sample(arguments: Arguments) -> None:
    """Others' layers modulate a sample, and normalise with a LayerNorm."""
    modulation = [arguments.get(name) for name in ("shift", "text_shift", "gate", "text_gate")]
    if any(x is not None and x.dim() != 2 for x in modulation):
        raise Unavailable("it has one modulation for each sample alone")
    if arguments.get("norm", "layer") != "layer":
        raise Unavailable("it has LayerNorm alone")


# --- diffusers' steps ------------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, text_shift: Tensor, text_scale: Tensor, text_len: int
) -> Tensor:
    """x · (1 + scale) + shift of each modality, and then one sequence of the two."""
    text, video = x.split((text_len, x.shape[1] - text_len), 1)
    video = video * (1 + scale)[:, None] + shift[:, None]
    text = text * (1 + text_scale)[:, None] + text_shift[:, None]
    return torch.cat((text, video), 1)


def residual(x: Tensor, y: Tensor, gate: Tensor, text_gate: Tensor, text_len: int) -> Tensor:
    """x + gate · y of each modality.

    diffusers keeps the two streams apart. Where there is no gradient each is written where it
    belongs, which costs nothing; where there is one they are joined, which costs a copy.
    """
    sizes = (text_len, x.shape[1] - text_len)
    parts = zip(x.split(sizes, 1), y.split(sizes, 1), (text_gate, gate), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([of + by[:, None] * branch for of, branch, by in parts], 1)
    out = torch.empty_like(x)
    for to, (of, branch, by) in zip(out.split(sizes, 1), parts, strict=True):
        torch.add(of, by[:, None] * branch, out=to)
    return out


def _steps(norm: Norm, join: Callable[..., Tensor] = modulate) -> dict[str, Function]:
    """The three ops as these steps.

    The norm is of both modalities at once, whose weights it shares: of a modality alone it would
    first copy its slice of the batch, which diffusers' own tensors, being apart, do not need.
    """

    def expert_adaln(
        x: Tensor, shift: Tensor, scale: Tensor, text_shift: Tensor, text_scale: Tensor,
        weight: Tensor | None, bias: Tensor | None, *, text_len: int, eps: float = 1e-5, **_: Any,
    ) -> Tensor:  # fmt: skip
        x = norm(x, weight, bias, eps)
        return join(x, shift, scale, text_shift, text_scale, text_len)

    def gated_residual(
        x: Tensor, y: Tensor, gate: Tensor, text_gate: Tensor, *, text_len: int
    ) -> Tensor:
        return residual(x, y, gate, text_gate, text_len)

    def gated_residual_adaln(
        x: Tensor, y: Tensor, gate: Tensor, text_gate: Tensor, *modulation: Tensor,
        text_len: int, **rest: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        stream = residual(x, y, gate, text_gate, text_len)
        names = ("shift", "scale", "text_shift", "text_scale", "weight", "bias")
        return stream, expert_adaln(
            stream, **dict(zip(names, modulation, strict=False)), text_len=text_len, **rest
        )

    return {ADALN: expert_adaln, RESIDUAL: gated_residual, BOTH: gated_residual_adaln}


@provider(
    "diffusers-eager", "diffusers' own steps, each modality apart; rounds after each",
    ADALN, RESIDUAL, BOTH, compiled="compile-diffusers",
)  # fmt: skip
def _diffusers(info: OpInfo, arguments: Arguments) -> Function:
    """The steps of diffusers' CogVideoXBlock around its attention and its feed-forward.

    Of nn.LayerNorm and arithmetic alone, so that diffusers need not be installed; that
    CogVideoXLayerNormZero gives the same is tested.
    """
    _per_sample(arguments)
    return _steps(layer_norm)[info.name]


# --- Liger, sglang ---------------------------------------------------------------------------


@provider("liger", "liger-kernel's LayerNorm, and torch.compile of the modulation", ADALN, BOTH)
def _liger(info: OpInfo, arguments: Arguments) -> Function:
    """Liger's LayerNorm kernel, and the modulation as torch.compile fuses it."""
    _per_sample(arguments)
    x = arguments["x"]
    if not x.is_cuda:
        raise Unavailable("Liger's kernels do not run on a CPU")
    norm = find("liger-kernel", "liger_layer_norm", "liger_kernel.transformers.functional")
    ones, zeros = torch.ones_like(x[0, 0]), torch.zeros_like(x[0, 0])

    def of_liger(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return norm(x, ones if weight is None else weight, zeros if bias is None else bias, eps)

    return _steps(of_liger, compile_(modulate))[info.name]


@provider(
    "sglang", "sglang's norm with a modulation picked for each token; writes the tokens' gates too",
    ADALN, passes=("forward",),
)  # fmt: skip
def _sglang(info: OpInfo, arguments: Arguments) -> Function:
    """sglang's Triton kernel that picks one of two modulations for each token.

    It writes each token's gate too, three tensors moved where two would do. It copies tensors but
    keeps their strides, so its arguments are made contiguous, which is timed.
    """
    _per_sample(arguments)
    x = arguments["x"]
    if not x.is_cuda:
        raise Unavailable("sglang's kernels do not run on a CPU")
    name = "fuse_layernorm_scale_shift_gate_select01_kernel"
    new, old = "kernels.ops.diffusion.modulate.scale_shift_triton", "jit_kernel.diffusion.triton"
    kernel = find("sglang", name, f"sglang.{new}", f"sglang.{old}.scale_shift")
    batch, seqlen, _ = x.shape
    is_text = torch.arange(seqlen, device=x.device) < arguments["text_len"]
    index = is_text.int().expand(batch, seqlen).contiguous()
    gate = torch.zeros_like(x[:, 0])

    def expert_adaln(
        x: Tensor, shift: Tensor, scale: Tensor, text_shift: Tensor, text_scale: Tensor,
        weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-5, **_: Any,
    ) -> Tensor:  # fmt: skip
        scale, shift, text_scale, text_shift = (
            m.contiguous() for m in (scale, shift, text_scale, text_shift)
        )
        return kernel(
            x, weight, bias, scale, shift, gate, text_scale, text_shift, gate, index, eps
        )[0]

    return expert_adaln
