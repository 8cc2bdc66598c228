"""Context parallelism: a joint sequence in parts, one on each rank of a process group.

Outside attention a token needs no other, and a part of a joint sequence is again "text first, then
video", with fewer text tokens, or none. In attention ranks exchange the tokens of their parts for
heads (DeepSpeed Ulysses, arXiv 2309.14509), or gather keys and values. Sequences and heads of any
number are split, without padding.

Gradients: each rank computes the loss of the whole output, and the mean of the ranks' gradients, as
of DDP and FSDP, is the gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

METHODS = ("auto", "heads", "tokens")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def split_sizes(total: int, parts: int) -> list[int]:
    """Sizes of `parts` parts of `total`, larger ones first, that differ by at most one."""
    size, rest = divmod(total, parts)
    return [size + (i < rest) for i in range(parts)]


@dataclass(frozen=True)
class Context:
    """Ranks that share one joint sequence.

    group   name of their process group
    rank    of this process in the group, from 0
    size    number of ranks
    method  of attention. "heads": two messages; each rank attends with its share of the heads, of
            which there is one for each rank at least. "tokens": one message, of n / 2 times as many
            bytes on n ranks; each rank attends with its own queries to all keys. "auto": "heads" if
            there are enough
    """

    group: str
    rank: int
    size: int
    method: str = "auto"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"Context: method must be one of {', '.join(METHODS)}; got {self.method!r}"
            )

    @classmethod
    def of(cls, group: "ProcessGroup | DeviceMesh", method: str = "auto") -> "Context":
        """Context of a process group, or of a device mesh of one dimension."""
        found: Any = group.get_group() if hasattr(group, "get_group") else group
        return cls(found.group_name, found.rank(), found.size(), method)

    def part(self, length: int) -> "Part":
        """This rank's part of a sequence. Raises ValueError for less than a token for each rank."""
        if length < self.size:
            raise ValueError(
                f"Context.part: length must be a token for each rank, {self.size}; got {length}"
            )
        return Part(self, tuple(split_sizes(length, self.size)))

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Concatenate the tensors of all ranks.

        x        (batch, sizes[rank], ...)
        sizes    of each rank's tensor along dim 1; 0 is allowed
        returns  (batch, sum of sizes, ...), on each rank
        """
        rows = x.transpose(0, 1)
        row = math.prod(rows.shape[1:])
        flat = self.exchange(
            rows.flatten().repeat(self.size),
            sent=[sizes[self.rank] * row] * self.size,
            received=[length * row for length in sizes],
        )
        return flat.view(sum(sizes), *rows.shape[1:]).transpose(0, 1)

    def exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """`all_to_all_single` of a flat tensor: values to and from each rank."""
        exchanged: Tensor = _Exchange.apply(x, sent, received, self.group)
        return exchanged


@dataclass(frozen=True)
class Part:
    """A rank's contiguous part of a sequence.

    sizes  tokens of each rank's part
    """

    context: Context
    sizes: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of this part."""
        return self.sizes[self.context.rank]

    @property
    def start(self) -> int:
        """Position of its first token in the sequence."""
        return sum(self.sizes[: self.context.rank])

    def narrow(self, x: Tensor, dim: int) -> Tensor:
        """View of the part, of a tensor with the tokens of the sequence along `dim`."""
        return x.narrow(dim, self.start, self.length)

    def text_len(self, text_len: int) -> int:
        """Number of text tokens in the part, of `text_len` in the sequence."""
        return min(max(text_len - self.start, 0), self.length)

    def video_sizes(self, text_len: int) -> list[int]:
        """Video tokens in each rank's part; `text_len` is that of the sequence."""
        starts = [sum(self.sizes[:rank]) for rank in range(len(self.sizes))]
        texts = [max(text_len - start, 0) for start in starts]
        return [max(size - text, 0) for size, text in zip(self.sizes, texts, strict=True)]

    def tables(self, *tables: Tensor) -> list[Tensor]:
        """Rows for the part, of tables (rows, any) of the last `rows` tokens of the sequence."""
        return [self._rows(table) for table in tables]

    def _rows(self, table: Tensor) -> Tensor:
        before = sum(self.sizes) - len(table)  # tokens without a row
        first = min(max(self.start - before, 0), len(table))
        return table.narrow(0, first, min(max(self.start + self.length - before, 0), self.length))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Attention of the part's queries to all keys.

        Args:
            q, k, v: (batch, tokens of the part, nheads, headdim).
            attend: called with q, k, v (batch, seqlen, nheads, headdim) of some heads and all
                tokens, or by "tokens" with the part's queries; returns a tensor like its q.

        Returns:
            A tensor like q. Raises ValueError for "heads" with more ranks than heads.
        """
        nheads, size = q.shape[2], self.context.size
        method = self.context.method
        if method == "tokens" or (method == "auto" and nheads < size):
            keys, values = self.context.gather(torch.stack([k, v], 2), self.sizes).unbind(2)
            return attend(q, keys, values)
        if nheads < size:
            raise ValueError(
                f'Part.attention: method="heads" needs a head for each of {size} ranks; got '
                f'{nheads}: use "tokens"'
            )
        heads = split_sizes(nheads, size)
        own, (batch, headdim) = heads[self.context.rank], (q.shape[0], q.shape[3])
        # Token-major, so that what arrives from all ranks is in the order of the sequence.
        qkv = torch.stack([q, k, v], 2).transpose(0, 1)  # (part, batch, 3, nheads, headdim)
        row = batch * 3 * headdim
        came = self.context.exchange(
            torch.cat([x.flatten() for x in qkv.split(heads, 3)]),
            sent=[self.length * h * row for h in heads],
            received=[length * own * row for length in self.sizes],
        )
        came = came.view(sum(self.sizes), batch, 3, own, headdim).transpose(0, 1)
        out = attend(*came.unbind(2)).transpose(0, 1)  # (all tokens, batch, own, headdim)
        row = batch * headdim
        received = [self.length * h * row for h in heads]
        back = self.context.exchange(
            out.flatten(), sent=[length * own * row for length in self.sizes], received=received
        )
        shares = zip(back.split(received), heads, strict=True)
        shaped = [x.view(self.length, batch, h, headdim) for x, h in shares]
        return torch.cat(shaped, 2).transpose(0, 1)


class _Exchange(torch.autograd.Function):
    """`all_to_all_single` of uneven sizes, with a gradient, waited for.

    `torch.distributed._functional_collectives` has another function with a gradient in each
    version, returns tensors that extensions without a dispatcher misread, and imports the compiler.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
        ctx.sizes, ctx.group = (received, sent), group
        ops = torch.ops._c10d_functional
        exchanged: Tensor = ops.wait_tensor(ops.all_to_all_single(x, received, sent, group))
        return exchanged

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x = gradients[0].contiguous()
        return _Exchange.apply(x, *ctx.sizes, ctx.group), None, None, None
