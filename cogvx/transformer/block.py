"""One block: attention and feed-forward, each between an adaptive norm and a gate."""

from torch import Tensor, nn

from .attention import JointAttention
from .experts import ExpertFeedForward, FeedForward, Routing
from .modulation import ExpertAdaLayerNorm


class ExpertBlock(nn.Module):
    """x + gate · attention(adaln(x)), and then x + gate · feed_forward(adaln(x)).

    Without experts one feed-forward serves text and video. Source: fact sheet section 2.3.
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
        backend: str = "auto",
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = ExpertAdaLayerNorm(dim, time_embed_dim, eps, backend)
        self.attn1 = JointAttention(dim, nheads, backend, attention)
        self.norm2 = ExpertAdaLayerNorm(dim, time_embed_dim, eps, backend)
        self.ff: FeedForward | ExpertFeedForward
        if num_text_experts:
            self.ff = ExpertFeedForward(dim, ffn_dim, num_text_experts, num_video_experts, top_k)
        else:
            self.ff = FeedForward(dim, ffn_dim)

    def forward(
        self, x: Tensor, temb: Tensor, cos: Tensor, sin: Tensor, text_len: int
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """The joint sequence after the block, and what each router of it did.

        x         (batch, text_len + video_len, dim), text first
        temb      (batch, time_embed_dim), after its SiLU
        cos, sin  as in `JointAttention`
        """
        h, gates = self.norm1(x, temb, text_len)
        x, h, gates = self.norm2.after(x, self.attn1(h, cos, sin), gates, temb, text_len)
        if isinstance(self.ff, ExpertFeedForward):
            y, routing = self.ff(h, text_len)
        else:
            y, routing = self.ff(h), ()
        return self.norm2.residual(x, y, gates, text_len), routing
