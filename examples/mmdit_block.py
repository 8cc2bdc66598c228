"""A double-stream MMDiT block, in plain torch and then on cogvx_kernels.

Text and video have separate weights and share the attention. In plain torch every norm, shift,
scale, gate and rotation is a pass over each of two tensors. On cogvx_kernels the block works on the
joint sequence of `text_len` text tokens, then video:

- norm, shift and scale are one pass, `expert_adaln`; gate, residual and next norm are one,
  `gated_residual_adaln`; the last gate and residual are `gated_residual`;
- both feed-forwards are one call, `expert_ffn`, with the weights of the linear layers;
- QK-norm and rotation are one pass, `qk_norm_rope3d`, over views of the packed projection. Each
  stream needs a call because it has its own norms; with shared norms one call with `text_len`
  serves the joint sequence.

`AfterBlock` has the same modules, so that state dicts are interchangeable. Every op is
differentiable, and under torch.autocast both blocks have the same dtypes.
Run: python -m examples.mmdit_block
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvx_kernels import (
    expert_adaln,
    expert_ffn,
    gated_residual,
    gated_residual_adaln,
    qk_norm_rope3d,
    rope3d_tables,
    slice_positions,
)
from cogvx_kernels.modality import join, split

EPS = 1e-6

# --- plain torch -----------------------------------------------------------------------------


class Modulation(NamedTuple):
    """Modulation of the attention or the feed-forward of a stream, (batch, dim) each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Stream(nn.Module):
    """Parameters of one modality."""

    def __init__(self, dim: int, nheads: int, ffn_dim: int) -> None:
        super().__init__()
        self.nheads = nheads
        self.modulation = nn.Linear(dim, 6 * dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm_q = nn.RMSNorm(dim // nheads, eps=EPS)
        self.norm_k = nn.RMSNorm(dim // nheads, eps=EPS)
        self.out = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, ffn_dim)
        self.down = nn.Linear(ffn_dim, dim)
        nn.init.zeros_(self.modulation.weight)  # adaLN-zero: the block starts as the identity
        nn.init.zeros_(self.modulation.bias)

    def rows(self, temb: Tensor) -> tuple[Modulation, Modulation]:
        """Modulation of the attention and of the feed-forward."""
        rows = self.modulation(F.silu(temb)).chunk(6, 1)
        return Modulation(*rows[:3]), Modulation(*rows[3:])

    def heads(self, x: Tensor) -> Sequence[Tensor]:
        """q, k and v, (batch, tokens, nheads, headdim) each: views of one projection."""
        return self.qkv(x).unflatten(2, (3, self.nheads, -1)).unbind(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def modulate(x: Tensor, by: Modulation) -> Tensor:
    return F.layer_norm(x, x.shape[2:], eps=EPS) * (1 + by.scale[:, None]) + by.shift[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]  # for every head
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3)


class BeforeBlock(nn.Module):
    """Block on text and video tokens, (batch, tokens, dim) each, and temb (batch, dim)."""

    def __init__(self, dim: int, nheads: int, ffn_dim: int) -> None:
        super().__init__()
        self.text = Stream(dim, nheads, ffn_dim)
        self.video = Stream(dim, nheads, ffn_dim)

    def forward(
        self, text: Tensor, video: Tensor, temb: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        text_attn, text_ffn = self.text.rows(temb)
        attn, ffn = self.video.rows(temb)

        q, k, v = self.text.heads(modulate(text, text_attn))
        text_qkv = self.text.norm_q(q), self.text.norm_k(k), v
        q, k, v = self.video.heads(modulate(video, attn))
        qkv = rotate(self.video.norm_q(q), cos, sin), rotate(self.video.norm_k(k), cos, sin), v
        y = attend(*(torch.cat(both, 1) for both in zip(text_qkv, qkv, strict=True)))
        y_text, y = y[:, : text.shape[1]], y[:, text.shape[1] :]
        text = text + text_attn.gate[:, None] * self.text.out(y_text)
        video = video + attn.gate[:, None] * self.video.out(y)

        y_text = F.gelu(self.text.up(modulate(text, text_ffn)), approximate="tanh")
        y = F.gelu(self.video.up(modulate(video, ffn)), approximate="tanh")
        text = text + text_ffn.gate[:, None] * self.text.down(y_text)
        video = video + ffn.gate[:, None] * self.video.down(y)
        return text, video


# --- on cogvx_kernels ------------------------------------------------------------------------


def normed_and_rotated(of: Stream, x: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
    """q, k and v of a stream, of which the last len(cos) tokens are rotated."""
    q, k, v = of.heads(x)
    q, k = qk_norm_rope3d(
        q, k, q_weight=of.norm_q.weight, k_weight=of.norm_k.weight, cos=cos, sin=sin,
        text_len=x.shape[1] - len(cos), norm="rms", eps=EPS,
    )  # fmt: skip
    return q, k, v


class AfterBlock(nn.Module):
    """Block on the joint sequence (batch, text_len + video_len, dim); the same state dict."""

    def __init__(self, dim: int, nheads: int, ffn_dim: int) -> None:
        super().__init__()
        self.text = Stream(dim, nheads, ffn_dim)
        self.video = Stream(dim, nheads, ffn_dim)

    def forward(self, x: Tensor, temb: Tensor, cos: Tensor, sin: Tensor, text_len: int) -> Tensor:
        text, video = self.text, self.video
        text_attn, text_ffn = text.rows(temb)
        attn, ffn = video.rows(temb)

        h = expert_adaln(
            x, attn.shift, attn.scale, text_attn.shift, text_attn.scale,
            text_len=text_len, eps=EPS,
        )  # fmt: skip
        h_text, h = split(h, text_len)
        text_qkv = normed_and_rotated(text, h_text, cos[:0], sin[:0])
        qkv = normed_and_rotated(video, h, cos, sin)
        y = attend(*(join(*both) for both in zip(text_qkv, qkv, strict=True)))
        y_text, y = split(y, text_len)

        x, h = gated_residual_adaln(
            x, join(text.out(y_text), video.out(y)), attn.gate, text_attn.gate,
            ffn.shift, ffn.scale, text_ffn.shift, text_ffn.scale, text_len=text_len, eps=EPS,
        )  # fmt: skip
        y = expert_ffn(
            h, [text.up.weight, video.up.weight], [text.up.bias, video.up.bias],
            [text.down.weight, video.down.weight], [text.down.bias, video.down.bias],
            text_len=text_len, activation="gelu_tanh",
        )  # fmt: skip
        return gated_residual(x, y, ffn.gate, text_ffn.gate, text_len=text_len)


# --- comparison ------------------------------------------------------------------------------


def results(
    block: BeforeBlock | AfterBlock, text: Tensor, video: Tensor, temb: Tensor,
    cos: Tensor, sin: Tensor, dout: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """Output, and the gradients of all inputs and parameters, by name."""
    text, video, temb = (x.clone().requires_grad_() for x in (text, video, temb))
    wanted = {"text": text, "video": video, "temb": temb, **dict(block.named_parameters())}
    if isinstance(block, AfterBlock):
        out = block(join(text, video), temb, cos, sin, text_len=text.shape[1])
    else:
        out = join(*block(text, video, temb, cos, sin))
    grads = torch.autograd.grad(out, list(wanted.values()), dout)
    return {"output": out.detach(), **dict(zip(wanted, grads, strict=True))}


def main() -> None:
    torch.manual_seed(0)
    before, after = BeforeBlock(96, 4, 384), AfterBlock(96, 4, 384)
    for parameter in before.parameters():
        nn.init.normal_(parameter, std=0.1)  # not the identity, as after training
    print("the same weights:", after.load_state_dict(before.state_dict()))
    cos, sin = rope3d_tables(slice_positions((3, 4, 6)), split=(8, 8, 8))  # frames, height, width
    text, video, temb = torch.randn(2, 7, 96), torch.randn(2, 72, 96), torch.randn(2, 96)
    arguments = text, video, temb, cos, sin, torch.randn(2, 79, 96)

    exact = results(deepcopy(before).double(), *(x.double() for x in arguments))
    errors = []
    for block in (before, after):
        found = results(block, *arguments)
        error = {n: ((found[n] - x).norm() / x.norm()).item() for n, x in exact.items()}
        worst = max(list(exact)[1:], key=error.__getitem__)
        print(f"{type(block).__name__}: error against fp64 {error['output']:.1e};", end=" ")
        print(f"of {len(exact) - 1} gradients at most {error[worst]:.1e}, {worst}")
        errors.append(error)

    for name in exact:
        assert errors[1][name] <= 2 * errors[0][name] + 3e-7, f"the error of {name} is torch's"


if __name__ == "__main__":
    main()
