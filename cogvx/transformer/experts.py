"""Feed-forward of a block: shared, or routed experts of each modality."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvx_kernels import OpModule, expert_ffn, modality
from cogvx_kernels.context_parallel import Part
from cogvx_kernels.module_utils import is_unmodified

from .module_utils import is_plain_linear

ROUTER_STD = 0.02


class Routing(NamedTuple):
    """Statistics of one router in one forward, one value per expert, at least fp32.

    Zeros if there are no tokens.
    """

    fraction: Tensor  # (num_experts,): share of the choices; sums to 1
    probability: Tensor  # (num_experts,): mean router probability; has the gradient


def load_balancing_loss(routing: Iterable[Routing]) -> Tensor:
    """Auxiliary loss num_experts · Σ fraction · probability, averaged over the routers.

    1 if the load is balanced, else more. The gradient goes through the probabilities.

    routing  the list that `ExpertTransformer.forward` filled

    Raises ValueError if it is empty. Source: Switch Transformer (arXiv 2101.03961), section 2.2,
    for top 1, and GShard (arXiv 2006.16668) for more.
    """
    losses = [len(r.fraction) * (r.fraction * r.probability).sum() for r in routing]
    if not losses:
        raise ValueError(
            "load_balancing_loss: routing must hold what a forward of a model with several "
            "experts of a modality put there; got nothing"
        )
    return torch.stack(losses).mean()


def gather_routing(
    routing: Sequence[Routing], part: Part, shares: Sequence[float]
) -> list[Routing]:
    """Statistics of the tokens of all ranks, by one message.

    shares  for each router, the tokens of this rank's part over those of all
    """
    values = [torch.cat(r) * share for r, share in zip(routing, shares, strict=True)]
    flat = torch.cat(values).view(1, 1, -1)
    total = part.context.gather(flat, [1] * len(part.sizes)).sum((0, 1))
    return [Routing(*t.chunk(2)) for t in total.split([len(v) for v in values])]


class GELUProjection(nn.Module):
    """Linear and GELU (tanh approximation)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., ffn_dim)."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(OpModule):
    """Linear, GELU, linear; (..., dim) -> (..., dim). The middle entry is diffusers' dropout of 0.

    `cogvx_kernels.expert_ffn` reads the weights where everything inside is plain, and the modules
    are called where something is wrapped (`module_utils.py`).
    """

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GELUProjection(dim, ffn_dim), nn.Identity(), nn.Linear(ffn_dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        if x.dim() == 3 and self.is_plain():
            return fused([self], x)
        return self.net(x)

    def is_plain(self) -> bool:
        """True if its weights determine the output: nothing inside is wrapped or hooked."""
        first, middle, last = self.net
        return (
            is_unmodified(self.net, nn.Sequential)
            and is_unmodified(first, GELUProjection)
            and is_unmodified(middle, nn.Identity)
            and is_plain_linear(first.get_submodule("proj"))
            and is_plain_linear(last)
        )


def fused(
    experts: Sequence[FeedForward],
    x: Tensor,
    index: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    text_len: int = 0,
) -> Tensor:
    """`expert_ffn` of plain experts of one backend; (batch, seqlen, dim), and so its result."""
    ups = [e.net[0].get_submodule("proj") for e in experts]
    downs = [e.net[2] for e in experts]

    def of(layers: Sequence[nn.Module], name: str) -> list[Tensor]:
        return [getattr(layer, name) for layer in layers]

    return expert_ffn(
        x,
        of(ups, "weight"),
        of(ups, "bias"),
        of(downs, "weight"),
        of(downs, "bias"),
        index,
        weight,
        text_len=text_len,
        backend=experts[0].backend,
    )


class ExpertFeedForward(nn.Module):
    """Feed-forward experts of text tokens and of video tokens.

    A modality with several experts has a router, a linear layer without bias, that sends each token
    to the `top_k` experts of the highest probability. No token is dropped.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_text_experts: int,
        num_video_experts: int,
        top_k: int = 1,
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
        """Initialise the routers, small and random, so that equal experts see different tokens."""
        for router in (self.text_router, self.video_router):
            if router is not None:
                nn.init.normal_(router.weight, std=ROUTER_STD)

    def forward(self, x: Tensor, text_len: int) -> tuple[Tensor, tuple[Routing, ...]]:
        """Run each token through its experts.

        All experts are one call, text's first in the list, without host synchronisation.

        Args:
            x: (batch, text_len + video_len, dim), text first.
            text_len: number of text tokens.

        Returns:
            (batch, text_len + video_len, dim), and a `Routing` of each router, text's first.
        """
        choices = self._choices(x, text_len)
        routing = tuple(c.routing for c in choices if c is not None)
        experts = [*self.text, *self.video]
        if not all(is_unmodified(e, FeedForward) and e.is_plain() for e in experts):
            text, video = modality.split(x, text_len)
            text = run_unfused(text, choices[modality.TEXT], self.text)
            video = run_unfused(video, choices[modality.VIDEO], self.video)
            return modality.join(text, video), routing
        if self.text_router is None and self.video_router is None:
            y = fused(experts, x, text_len=text_len)
        else:
            index, weight = self._joint(x, choices, text_len)
            y = fused(experts, x, index, weight)
        return y, routing

    def _choices(self, x: Tensor, text_len: int) -> list["Choice | None"]:
        """Choices of the text router and of the video router.

        Each runs on the whole sequence and its result is sliced, because slices of the sequence
        would be copied first.
        """
        choices = []
        for which, router in enumerate((self.text_router, self.video_router)):
            logits = None if router is None else modality.split(router(x), text_len)[which]
            choices.append(choose(logits, self.top_k))
        return choices

    def _joint(
        self, x: Tensor, choices: Sequence["Choice | None"], text_len: int
    ) -> tuple[Tensor, Tensor]:
        """index and weight of `expert_ffn` for both modalities, in the list of all experts.

        A modality with one expert has it as first choice; its other choices are out of range.
        """
        lengths, firsts = (text_len, x.shape[1] - text_len), (0, len(self.text))
        wide = torch.promote_types(x.dtype, torch.float32)

        def of(which: int) -> tuple[Tensor, Tensor]:
            choice = choices[which]
            if choice is not None:
                return choice.expert + firsts[which], choice.weight
            shape = (x.shape[0], lengths[which], self.top_k)
            index = torch.full(shape, len(self.text) + len(self.video), device=x.device)
            index[..., 0] = firsts[which]
            return index, torch.ones(shape, dtype=wide, device=x.device)

        (text, text_weight), (video, video_weight) = of(modality.TEXT), of(modality.VIDEO)
        return modality.join(text, video), modality.join(text_weight, video_weight)


class Choice(NamedTuple):
    """A router's choice for its tokens, and its statistics."""

    expert: Tensor  # (batch, any, top_k): indices of the router's own experts
    weight: Tensor  # (batch, any, top_k), at least fp32
    routing: Routing


def choose(logits: Tensor | None, top_k: int) -> Choice | None:
    """Choice from a router's logits (batch, any, experts); None without logits.

    The weights of a token sum to one. With top_k 1 the weight is exactly 1, but has a gradient.
    """
    if logits is None:
        return None
    wide = torch.promote_types(logits.dtype, torch.float32)
    probability = logits.softmax(-1, dtype=wide)  # (batch, any, experts)
    weight, expert = probability.topk(top_k, -1)
    weight = weight / (weight.detach() if top_k == 1 else weight.sum(-1, keepdim=True))
    which = torch.arange(logits.shape[-1], device=logits.device)
    count = (expert[..., None] == which).sum((0, 1, 2)).to(wide)
    tokens = max(1, expert.numel() // top_k)  # a part of a sequence may have none
    routing = Routing(count / (tokens * top_k), probability.sum((0, 1)) / tokens)
    return Choice(expert, weight, routing)


def run_unfused(x: Tensor, choice: Choice | None, experts: nn.ModuleList) -> Tensor:
    """Call experts one after another; x (batch, any, dim).

    Tokens are sorted by expert and back, so that sums have one order, without atomics. An expert
    without tokens gets zero gradients. Waits for the device, to know the number of tokens of each
    expert.
    """
    if choice is None:
        return experts[0](x)
    index, top_k = choice.expert.flatten(), choice.expert.shape[-1]
    counts = (index[:, None] == torch.arange(len(experts), device=x.device)).sum(0)
    order = index.argsort(stable=True)  # (token, choice) pairs, expert by expert
    parts = x.flatten(0, 1)[order // top_k].split(_sizes(counts, len(order)))
    outputs = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
    outputs = outputs[order.argsort()].unflatten(0, choice.expert.shape)  # (batch, any, top_k, dim)
    return (outputs * choice.weight[..., None]).sum(-2).to(outputs.dtype)


def _sizes(counts: Tensor, total: int) -> Sequence[int]:
    """Counts as ints; on the meta device, which has no values, equal shares."""
    if counts.device.type == "meta":
        share, rest = divmod(total, len(counts))
        return [share + (i < rest) for i in range(len(counts))]
    return counts.tolist()
