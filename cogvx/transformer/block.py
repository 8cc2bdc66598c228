"""Transformer block: attention and feed-forward with expert adaptive layer norms and gates."""

from torch import Tensor, nn

from cogvx_kernels.context_parallel import Part

from .attention import JointAttention
from .experts import ExpertFeedForward, FeedForward, Routing
from .modulation import Branch, ExpertAdaLayerNorm, Modulation


class ExpertBlock(nn.Module):
    """x + gate · attention(adaln(x)), and then x + gate · feed_forward(adaln(x)).

    The second residual sum is left to the next block, which fuses it with its own first norm.
    Without experts one feed-forward serves text and video. Source: `docs/model.md`, section 2.3.
    """

    def __init__(
        self,
        dim: int,
        nheads: int,
        ffn_dim: int,
        time_embed_dim: int,
        eps: float = 1e-5,
        num_text_experts: int = 0,
        num_video_experts: int = 0,
        top_k: int = 1,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = ExpertAdaLayerNorm(dim, time_embed_dim, eps)
        self.attn1 = JointAttention(dim, nheads, attention)
        self.norm2 = ExpertAdaLayerNorm(dim, time_embed_dim, eps)
        self.ff: FeedForward | ExpertFeedForward
        if num_text_experts:
            self.ff = ExpertFeedForward(dim, ffn_dim, num_text_experts, num_video_experts, top_k)
        else:
            self.ff = FeedForward(dim, ffn_dim)

    def forward(
        self,
        x: Tensor,
        branch: Branch | None,
        time: Tensor | tuple[Modulation, Modulation],
        cos: Tensor,
        sin: Tensor,
        text_len: int,
        part: Part | None = None,
    ) -> tuple[Tensor, Branch, tuple[Routing, ...]]:
        """Run the block, except for its last residual sum.

        Args:
            x: (batch, text_len + video_len, dim), text first.
            branch: residual branch of the previous block, still to be added to x; None for the
                first block.
            time: (batch, time_embed_dim) after its SiLU; or the precomputed modulations of both
                norms.
            cos, sin: (rows, headdim // 2), as in `JointAttention`.
            text_len: number of text tokens.
            part: of the sequence, if x, cos, sin and text_len are of a rank's part.

        Returns:
            x, (batch, text_len + video_len, dim); the branch still to be added to it; and a
            `Routing` of each router.
        """
        if isinstance(time, Tensor):
            first, second = (n.modulation(time, x.dtype) for n in (self.norm1, self.norm2))
        else:
            first, second = time
        x, h = self.norm1(x, branch, first, text_len)
        y = self.attn1(h, cos, sin, part)
        x, h = self.norm2(x, Branch(y, first.gate, first.text_gate), second, text_len)
        if isinstance(self.ff, ExpertFeedForward):
            y, routing = self.ff(h, text_len)
        else:
            y, routing = self.ff(h), ()
        return x, Branch(y, second.gate, second.text_gate), routing

    def whole(
        self,
        x: Tensor,
        time: Tensor | tuple[Modulation, Modulation],
        cos: Tensor,
        sin: Tensor,
        text_len: int,
        part: Part | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Full block forward with the residual added.

        Returns:
            (batch, text_len + video_len, dim), and a `Routing` of each router.
        """
        x, branch, routing = self(x, None, time, cos, sin, text_len, part)
        return self.norm2.add(x, branch, text_len), routing
