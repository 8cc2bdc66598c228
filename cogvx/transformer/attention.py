"""Joint attention over text and video tokens, without a mask; attention backends."""

import importlib.util
from functools import partial

import torch
from torch import Tensor, nn
from torch.backends import cuda
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogvx_kernels import OpModule, qk_norm_rope3d
from cogvx_kernels.context_parallel import Part

from ..validation import check_choice

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ATTENTION_BACKENDS = ("auto", *SDPA_BACKENDS, "flash-attn")

# torch's own order begins with FlashAttention 2, which cuDNN outruns on Hopper.
GPU_ORDER = [SDPA_BACKENDS[name] for name in ("cudnn", "flash", "efficient", "math")]

QK_NORM_EPS = 1e-6  # of the released models


def check_attention(where: str, attention: str) -> None:
    """Raises ValueError for an unknown backend and RuntimeError for one not installed."""
    check_choice(where, "attention", attention, ATTENTION_BACKENDS)
    if attention == "flash-attn" and importlib.util.find_spec("flash_attn") is None:
        raise RuntimeError(
            f'{where}: attention="flash-attn" cannot run: flash_attn is not installed '
            '(pip install flash-attn). Use attention="auto".'
        )


def attend(q: Tensor, k: Tensor, v: Tensor, attention: str = "auto") -> Tensor:
    """softmax(q kᵀ / √headdim) v for every head: (batch, seqlen, nheads, headdim), like q, k, v.

    "auto" is the first of cuDNN, FlashAttention, memory-efficient and plain that can run on a GPU,
    and torch's choice elsewhere. On the meta device no tensor of seqlen² is made.

    Raises RuntimeError if a backend requested by name cannot run on these tensors.
    """
    if q.device.type == "meta":
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*turned)
        return out.transpose(1, 2)
    if attention == "flash-attn":
        return _flash_attn(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if attention == "auto":
        if not q.is_cuda:
            return _without_gpu(q, k, v).transpose(1, 2)
        order = GPU_ORDER
    else:
        order = [SDPA_BACKENDS[attention]]
        # Under a compiler torch itself raises, with a shorter message.
        reason = None if torch.compiler.is_compiling() else _sdpa_reason(q, k, v, attention)
        if reason:
            raise RuntimeError(
                f'attention="{attention}" cannot run: {reason}. Use attention="auto".'
            )
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _without_gpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's choice of backend; in float32 when training under autocast on a CPU.

    There the backward in 16 bits took 3 times that of float32 for 96 tokens of bfloat16, 10 times
    for 400 of float16 (torch 2.13, one thread).
    """
    mixed = q.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not (mixed and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return wide.to(q.dtype)


def _sdpa_reason(q: Tensor, k: Tensor, v: Tensor, attention: str) -> str | None:
    """Reason why a backend cannot take these tensors, or None."""
    if attention == "math":
        return None
    if not q.is_cuda:
        if attention == "flash" and q.device.type == "cpu":
            return None
        return f"q is on {q.device}; it needs a CUDA GPU"
    can_use = {
        "flash": cuda.can_use_flash_attention,
        "cudnn": cuda.can_use_cudnn_attention,
        "efficient": cuda.can_use_efficient_attention,
    }[attention]
    if can_use(cuda.SDPAParams(q, k, v, None, 0.0, False, False)):
        return None
    return f"torch has none for {q.dtype} of head dim {q.shape[-1]} on {q.device}"


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash-attn package, which has the same layout."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(
            'attention="flash-attn" cannot run: it takes float16 or bfloat16 on a CUDA GPU; '
            f'q is {q.dtype} on {q.device}. Use attention="auto".'
        )
    import flash_attn

    return flash_attn.flash_attn_func(q, k, v)


class JointAttention(OpModule):
    """Attention over the joint sequence, with QK-norm, and RoPE on the video tokens."""

    def __init__(self, dim: int, nheads: int, attention: str = "auto") -> None:
        super().__init__()
        check_attention("JointAttention", attention)
        self.nheads = nheads
        self.attention = attention
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.norm_q = nn.LayerNorm(dim // nheads, QK_NORM_EPS)
        self.norm_k = nn.LayerNorm(dim // nheads, QK_NORM_EPS)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, part: Part | None = None) -> Tensor:
        """Project, normalise and rotate q and k, attend, project.

        Args:
            x: (batch, seqlen, dim), text tokens first.
            cos, sin: (rows, headdim // 2). q and k of the last `rows` tokens are rotated by them;
                no rows in a model without RoPE.
            part: of the sequence, if x, cos and sin are a rank's part.

        Returns:
            (batch, seqlen, dim).
        """
        heads = (self.nheads, -1)
        q, k, v = (to(x).unflatten(2, heads) for to in (self.to_q, self.to_k, self.to_v))
        q, k = qk_norm_rope3d(
            q,
            k,
            self.norm_q.weight,
            self.norm_q.bias,
            self.norm_k.weight,
            self.norm_k.bias,
            cos,
            sin,
            text_len=x.shape[1] - cos.shape[0],
            eps=QK_NORM_EPS,
            inplace=not torch.is_grad_enabled(),
            backend=self.backend,
        )
        own = partial(attend, attention=self.attention)
        y = own(q, k, v) if part is None else part.attention(q, k, v, own)
        return self.to_out(y.flatten(2))

    def extra_repr(self) -> str:
        return f"nheads={self.nheads}, backend={self.backend!r}, attention={self.attention!r}"
