"""What ranks send, and the exchange under the compiler and beside Triton kernels."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from cogvx.transformer import ExpertTransformer
from cogvx_kernels import module_backend
from cogvx_kernels.context_parallel import Context
from tests.harness.selection import rest
from tests.model.transformer.tiny import ROPE

from . import models, ranks

THIRTY_HEADS = dataclasses.replace(ROPE, num_attention_heads=30, num_layers=2)
LATENTS = 2, 4, 4, 8, 12  # 96 video tokens
TEXT_LEN = 5


class Messages(TorchDispatchMode):
    """Bytes of each message to other ranks."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            x, _, sizes, _ = args
            self.sent.append((sum(sizes) - sizes[dist.get_rank()]) * x.element_size())
        else:
            assert "c10d" not in func.namespace or "wait" in func.__name__, func
        return func(*args, **(kwargs or {}))


def messages(method):
    with module_backend("reference"):
        model = ExpertTransformer(THIRTY_HEADS).bfloat16()
    model.context = Context.of(dist.group.WORLD, method)
    latents = torch.randn(LATENTS).bfloat16()
    text = torch.randn(2, TEXT_LEN, ROPE.text_embed_dim).bfloat16()
    with Messages() as seen, torch.no_grad():
        model(latents, text, torch.tensor(3))
    return seen.sent


@pytest.mark.parametrize("size", [4, rest(2)])
def test_a_rank_sends_two_messages_a_block_of_the_bytes_of_the_formula(size):
    layers, dim, batch = THIRTY_HEADS.num_layers, THIRTY_HEADS.hidden_size, LATENTS[0]
    seqlen = TEXT_LEN + 96
    video_values = 4 * 2 * 2  # of a token's v
    for sent in ranks.run(messages, size, "heads"):
        *blocks, last = sent
        assert len(blocks) == 2 * layers
        formula = 8 * (seqlen / size) * dim * layers * batch * (size - 1) / size
        assert sum(blocks) == pytest.approx(formula, rel=0.05)
        # Every other rank gets the video tokens of this one, of which the first has fewer.
        assert last <= 1.05 * 2 * (seqlen / size) * video_values * batch * (size - 1)
    for sent in ranks.run(messages, size, "tokens"):
        assert len(sent) == layers + 1
        formula = 4 * (seqlen / size) * dim * layers * batch * (size - 1)
        assert sum(sent[:-1]) == pytest.approx(formula, rel=0.05)


def compiled(kind, backend):
    def change(model):
        model.compile(fullgraph=True, backend=backend)
        return model

    v, _, gradients = models.on_a_rank(kind, torch.float64, "auto", False, change)
    return v, gradients


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be")
@pytest.mark.parametrize("kind, backend", [("one block", "aot_eager")])
def test_the_exchange_compiles_into_one_graph(kind, backend):
    expected = models.train_step(
        models.build(kind, torch.float64), *models.inputs(kind, torch.float64)
    )
    (v, gradients), (other_v, _) = ranks.run(compiled, 2, kind, backend, deadline=500.0)
    assert torch.equal(v, other_v)
    assert (v - expected[0]).norm() < 1e-13 * v.norm()
    for name, gradient in expected[2].items():
        assert (gradients[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


def with_kernels(kind):
    """On rank 1 no token is text."""
    model = models.build(kind, backend="kernel")
    model.context = Context.of(dist.group.WORLD)
    v, _, gradients = models.train_step(model, *models.inputs(kind))
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return v, gradients


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, ranks on the CPU")
@pytest.mark.parametrize("kind", ["one block", "routed", rest("long text")])
def test_kernels_take_parts_of_a_sequence(kind):
    v, _, gradients = models.train_step(models.build(kind), *models.inputs(kind))
    (own_v, own), (other_v, _) = ranks.run(with_kernels, 2, kind, deadline=500.0)
    assert torch.equal(own_v, other_v)
    assert (own_v - v).norm() < 1e-6 * v.norm()
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
