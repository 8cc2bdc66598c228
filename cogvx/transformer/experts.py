"""The feed-forward of a block: one for all tokens, or experts of text and experts of video."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvx_kernels import modality

ROUTER_STD = 0.02


class Routing(NamedTuple):
    """What one router did with the tokens of one forward, in numbers of one per expert, fp32."""

    fraction: Tensor  # (num_experts,): the part of all choices that fell on it; sums to 1
    probability: Tensor  # (num_experts,): the mean that the router gave it; has the gradient


def load_balancing_loss(routing: Iterable[Routing]) -> Tensor:
    """How unevenly routers spread their tokens: 1 where every expert gets its share, else more.

    num_experts · Σ fraction · probability, averaged over the routers. The gradient goes through
    the probabilities.

    routing  the list that was given to `ExpertTransformer` and filled by it

    Raises ValueError if it is empty. Source: Switch Transformer (arXiv 2101.03961), section 2.2,
    and GShard (arXiv 2006.16668), for one and for several choices of a token.
    """
    losses = [len(r.fraction) * (r.fraction * r.probability).sum() for r in routing]
    if not losses:
        raise ValueError(
            "load_balancing_loss: routing must hold what a forward of a model with several "
            "experts of a modality put there; got nothing"
        )
    return torch.stack(losses).mean()


class GELUProjection(nn.Module):
    """Linear and GELU, in its tanh form."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Up, GELU, down; (..., dim) -> (..., dim). The middle entry is diffusers' dropout of 0."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GELUProjection(dim, ffn_dim), nn.Identity(), nn.Linear(ffn_dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ExpertFeedForward(nn.Module):
    """Text tokens to experts of text, video tokens to experts of video.

    A modality with several has a router, a linear layer without bias, that sends each of its tokens
    to the `top_k` it gives the highest probability. No token is dropped.
    """

    def __init__(
        self, dim: int, ffn_dim: int, num_text_experts: int, num_video_experts: int, top_k: int = 1
    ) -> None:
        super().__init__()

        def experts(count: int) -> nn.ModuleList:
            return nn.ModuleList(FeedForward(dim, ffn_dim) for _ in range(count))

        def router(count: int) -> nn.Linear | None:
            return nn.Linear(dim, count, bias=False) if count > 1 else None

        self.top_k = top_k
        self.text = experts(num_text_experts)
        self.video = experts(num_video_experts)
        self.text_router = router(num_text_experts)
        self.video_router = router(num_video_experts)

    def reset_routers(self) -> None:
        """Small and random: experts that begin alike see different tokens, and so grow apart."""
        for router in (self.text_router, self.video_router):
            if router is not None:
                nn.init.normal_(router.weight, std=ROUTER_STD)

    def forward(self, x: Tensor, text_len: int) -> tuple[Tensor, tuple[Routing, ...]]:
        """x (batch, text_len + video_len, dim) -> the same, and what each router did."""
        text, video = modality.split(x, text_len)
        text, of_text = route(text, self.text, self.text_router, self.top_k)
        video, of_video = route(video, self.video, self.video_router, self.top_k)
        return modality.join(text, video), (*of_text, *of_video)


def route(
    x: Tensor, experts: nn.ModuleList, router: nn.Linear | None, top_k: int
) -> tuple[Tensor, tuple[Routing, ...]]:
    """x (batch, any, dim) through its experts, and what the router did, if there is one.

    Tokens are brought together by expert and taken back by the inverse order, so that sums have one
    order and nothing is added atomically. An expert without tokens gets gradients of zero.
    """
    if router is None or not x.shape[1]:
        return (experts[0](x), ()) if len(experts) else (x, ())
    tokens = x.flatten(0, 1)
    logits = router(tokens)
    wide = torch.promote_types(logits.dtype, torch.float32)
    probability = logits.softmax(1, dtype=wide)  # (tokens, experts)
    weight, chosen = probability.topk(top_k, 1)
    # The weights of a token sum to one. A single one is exactly 1, and yet has a gradient.
    weight = weight / (weight.detach() if top_k == 1 else weight.sum(1, keepdim=True))
    which = torch.arange(len(experts), device=x.device)
    counts = (chosen.flatten()[:, None] == which).sum(0)
    order = chosen.flatten().argsort(stable=True)  # (token, choice) pairs, expert by expert
    parts = tokens[order // top_k].split(_sizes(counts, len(order)))
    outputs = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
    outputs = outputs[order.argsort()].unflatten(0, (-1, top_k))  # (tokens, top_k, dim)
    y = (outputs * weight[..., None]).sum(1).to(outputs.dtype)
    routing = Routing(counts / len(order), probability.mean(0))
    return y.unflatten(0, x.shape[:2]), (routing,)


def _sizes(counts: Tensor, total: int) -> Sequence[int]:
    """The counts as numbers; on the meta device, which has none, equal shares."""
    if counts.device.type == "meta":
        share, rest = divmod(total, len(counts))
        return [share + (i < rest) for i in range(len(counts))]
    return counts.tolist()
