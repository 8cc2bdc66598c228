"""Cost of a block beside diffusers' block: launches, bytes moved, bytes kept, and no waits.

Launches and waits are those of the kernels as well, seen in Triton's interpreter; bytes moved are
counted from the shapes of the released model.
"""

import math
import sys

import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

from cogvx.config import PRESETS
from cogvx.transformer import ExpertTransformer
from cogvx.transformer.block import ExpertBlock
from cogvx.transformer.modulation import Branch, Modulation
from cogvx_kernels import _backend, module_backend, rope3d_tables, slice_positions, split_headdim
from cogvx_kernels._opinfo import SIZES

if not (_backend.HAS_TRITON and _backend.INTERPRETED):
    pytest.skip("launches are seen in Triton's interpreter", allow_module_level=True)

from ..costs import Launches, Moved, NoWait, kept, programs_left_out  # noqa: E402
from .tiny import EXPERTS, ROPE, shaken  # noqa: E402

pytestmark = pytest.mark.budget

NHEADS, HEADDIM, TIME, TEXT_LEN, GRID = 2, 64, 16, 8, (2, 3, 4)
DIM, SEQLEN = NHEADS * HEADDIM, TEXT_LEN + math.prod(GRID)
TABLES = rope3d_tables(slice_positions(GRID), split_headdim(HEADDIM))


def ours(dtype, experts=0):
    with module_backend("kernel"):
        block = ExpertBlock(
            DIM, NHEADS, 4 * DIM, TIME, num_text_experts=experts, num_video_experts=experts
        )
    return shaken(block).to(dtype)


def what_a_block_is_given(x):
    """Output of the block before, and the modulations made ahead, for a stream x."""
    batch, _, dim = x.shape
    gates, first, second = (x.new_zeros(n, batch, dim).unbind(0) for n in (2, 6, 6))
    return Branch(torch.zeros_like(x), *gates), (Modulation(*first), Modulation(*second))


def stream(dtype, **options):
    return torch.randn(2, SEQLEN, DIM, dtype=dtype, **options)


def run_theirs(block, x):
    """diffusers' block with the same tokens; the rotary tables in its own layout."""
    video, text = x[:, TEXT_LEN:].contiguous(), x[:, :TEXT_LEN].contiguous()
    rotary = tuple(table.repeat_interleave(2, 1) for table in TABLES)
    temb = torch.randn(2, TIME, dtype=x.dtype)
    return lambda: block(video, text, temb, image_rotary_emb=rotary)


def theirs(dtype):
    return CogVideoXBlock(DIM, NHEADS, HEADDIM, TIME, attention_bias=True).to(dtype)


@pytest.mark.parametrize("gemm", ["grouped", "dense"])
def test_a_block_is_at_most_12_launches(gemm, monkeypatch):
    """Three passes over rows, four projections, attention, and the feed-forward's two products.

    (torch has no product with tanh-GELU behind it on a CPU, so that dense has one more.)
    """
    monkeypatch.setattr(sys.modules["cogvx_kernels.expert_ffn.op"], "_select_gemm", lambda *_: gemm)
    block, x = ours(torch.bfloat16), stream(torch.bfloat16)
    branch, modulations = what_a_block_is_given(x)
    with torch.no_grad(), Launches() as seen:
        block(x, branch, modulations, *TABLES, TEXT_LEN)
    counts = seen.counts
    assert (counts["gated_residual_adaln"], counts["qk_norm_rope3d_"]) == (2, 1)
    assert counts.total() == (10 if gemm == "grouped" else 11), counts


def test_an_expert_of_each_modality_is_no_launch_more():
    block, x = ours(torch.bfloat16, experts=1), stream(torch.bfloat16)
    branch, modulations = what_a_block_is_given(x)
    with torch.no_grad(), Launches() as seen:
        block(x, branch, modulations, *TABLES, TEXT_LEN)
    assert seen.counts.total() == 10, seen.counts


def test_of_diffusers_the_same_counter_sees_about_60():
    with torch.no_grad():
        run = run_theirs(theirs(torch.bfloat16), stream(torch.bfloat16))
        with Launches() as seen:
            run()
    assert 55 <= seen.counts.total() <= 62, seen.counts


def test_bytes_moved_are_near_the_fused_minimum():
    """The minimum of a block of 5B at batch 2: 12.2 times its video (`docs/model.md`, section 7.1).

    Three passes that each read two tensors and write two, over text and video.
    """
    config, size = PRESETS["5b"].transformer, SIZES["5b-480x720-49f"]
    batch, dim, dtype = 2, config.hidden_size, torch.bfloat16
    with torch.device("meta"), module_backend("kernel"):
        block = ExpertBlock(dim, config.num_attention_heads, config.ffn_dim, 512)
        block.to(dtype)
        x = torch.empty(batch, size.seqlen, dim, dtype=dtype)
        tables = torch.empty(2, size.video_len, config.attention_head_dim // 2).unbind(0)
        branch, modulations = what_a_block_is_given(x)
    with torch.no_grad(), Moved() as moved:
        block(x, branch, modulations, *tables, size.text_len)
    unit = batch * size.video_len * dim * dtype.itemsize
    assert 12 * unit < moved.bytes.total() <= 1.3 * 12.2 * unit, moved.bytes


def test_of_diffusers_the_same_counter_sees_about_eight_times_the_minimum():
    """As in `docs/model.md`, less the rotation of text, which there is next to nothing of."""
    x = stream(torch.bfloat16)
    with torch.no_grad():
        run = run_theirs(theirs(torch.bfloat16), x)
        with Moved() as moved:
            run()
    assert 7 < moved.bytes.total() / (12 * x.nbytes) < 8.5, moved.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_keeps_at_most_0_6_of_what_diffusers_keeps(dtype):
    x = stream(dtype, requires_grad=True)
    of_theirs, of_ours = theirs(dtype), ours(dtype)
    run = run_theirs(of_theirs, x)
    with kept(of_theirs) as wanted:
        run()
    branch = Branch(stream(dtype), *torch.randn(2, 2, DIM, dtype=dtype))
    temb = torch.randn(2, TIME, dtype=dtype)
    with kept(of_ours) as got:
        of_ours(x, branch, temb, *TABLES, TEXT_LEN)
    assert sum(got) <= 0.6 * sum(wanted), (got, wanted)
    # The stream and what is added to it, twice; the three norms' results that enter a product;
    # q, k before and after their norm, v, and the result of attention.
    assert sum(size >= x.nbytes for size in got) == 12


def tokens():
    return torch.randn(2, 2, 4, 4, 6), torch.randn(2, 5, 10), torch.tensor([999, 37])


@pytest.mark.slow
@pytest.mark.parametrize("config", [ROPE, EXPERTS], ids=["shared", "routed"])
def test_nothing_waits_for_the_device(config):
    """Forward and backward, with what the kernels' launchers do; so a CUDA graph can hold them."""
    with module_backend("kernel"):
        model = shaken(ExpertTransformer(config))
    arguments, routing = tokens(), []
    with programs_left_out():
        model(*arguments)  # tables are made on the CPU, once
    with programs_left_out(), NoWait():
        model(*arguments, routing=routing).square().sum().backward()
        ahead = model.modulations(arguments[2])
        model(arguments[0], model.project_text(arguments[1]), modulations=ahead.at(0))
    assert all(p.grad is not None for p in model.parameters())


def test_the_watch_sees_a_wait():
    counts = torch.tensor([3, 2])
    for wait in (counts.tolist, counts.nonzero, lambda: bool(counts[0]), counts.bincount):
        with pytest.raises(AssertionError, match="waits for the device"), NoWait():
            wait()
