"""diffusers' CogVideoX transformer on ranks, patched: our context, and diffusers' own."""

import copy
import functools
import pickle

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig
from torch.distributed.device_mesh import init_device_mesh

import cogvx_kernels
from cogvx_kernels import UnsupportedModelError
from cogvx_kernels.context_parallel import Context
from cogvx_kernels.patching.rotary import TableCache
from tests.harness.selection import rest
from tests.model.transformer.tiny import shaken
from tests.patching import small, wan

from . import ranks
from .test_transformers import relative

NEAR = 1e-6  # relative: sums of other lengths are added in another order


def group():
    """Ranks of this process group, as one of what `patch` takes."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "context"))
    return {2: dist.group.WORLD, 3: Context.of(mesh["context"], "tokens")}.get(
        size, mesh["context"]
    )


def step(model):
    """The prediction, and the gradients of a loss of it."""
    arguments = small.inputs(model)
    v = model(**arguments).sample
    weight = torch.linspace(-1, 1, v.numel()).view_as(v)
    gradients = torch.autograd.grad((weight * v).sum(), list(model.parameters()))
    return v.detach(), gradients


@functools.cache
def alone(kind):
    """A stock model and its step in one process, with gradient checkpointing."""
    name, _, heads = kind.partition(" with heads: ")
    model = small.transformer(name)
    if heads:
        torch.manual_seed(0)
        config = {**model.config, "num_attention_heads": int(heads)}
        model = shaken(type(model).from_config(config)).eval()
    model.enable_gradient_checkpointing()
    return model, step(model)


def ours(kind):
    """Of a patched model on this rank: prediction, mean of gradients; then of it unpatched."""
    model = alone(kind)[0]
    cogvx_kernels.patch(model, backend="reference", context=group())
    v, gradients = step(model)
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    report = cogvx_kernels.explain(model)
    assert report["rope"].hit == report["rope"].sites and not report["rope"].fallbacks
    twin = copy.deepcopy(model)
    assert torch.equal(small.predicted(twin), small.predicted(model))
    width = model.proj_out.in_features
    assert model.proj_out(torch.zeros(1, 1, width)).shape[1] == 1  # alone it gathers nothing
    cogvx_kernels.patch(model, backend="reference")  # without a context
    assert "cogvx_part" not in str(model._forward_pre_hooks)
    whole = small.predicted(model)
    cogvx_kernels.unpatch(model)
    assert not (model._forward_pre_hooks or model.proj_out._forward_hooks)
    return v, gradients, whole, small.predicted(model)


@pytest.mark.parametrize("size", [2, 4, rest(1), rest(3)])
@pytest.mark.parametrize("kind", ["2b", "5b", "5b with heads: 5", "5b-i2v", "1.5-i2v"])
def test_ranks_share_the_sequence_of_a_patched_transformer(kind, size):
    model, (v, gradients) = alone(kind)
    for own, means, whole, stock in ranks.run(ours, size, kind):
        assert relative(own, v) < NEAR and relative(whole, v) < NEAR
        assert torch.equal(stock, small.predicted(model))
        for name, a, b in zip(dict(model.named_parameters()), means, gradients, strict=True):
            if name.endswith("norm_k.bias") and kind == "2b":  # 0: softmax does not see a shift
                assert a.norm() < 1e-4, name
            else:
                assert relative(a, b) < 1e-5, name


def theirs(kind, options):
    """Of `enable_parallelism` on this rank: the prediction; then of the model unpatched."""
    model = alone(kind)[0]
    cogvx_kernels.patch(model, backend="reference")

    def resolve(config):
        """As diffusers' does for an accelerator, of which it divides by the number."""
        config = ParallelConfig(context_parallel_config=config)
        one = config.context_parallel_config
        mesh = init_device_mesh("cpu", one.mesh_shape, mesh_dim_names=one.mesh_dim_names)
        config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
        model._parallel_config = config
        return config

    model._resolve_parallel_config = resolve
    size = dist.get_world_size()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size, **options))
    v = small.predicted(model)
    with pytest.raises(UnsupportedModelError, match="diffusers' parallelism is enabled"):
        cogvx_kernels.patch(model, context=dist.group.WORLD)
    model.transformer_blocks[1].attn1.processor = Unknown(model)
    with pytest.raises(RuntimeError, match="transformer_blocks.1.attn1: must be as patch knows"):
        small.predicted(model)
    model.transformer_blocks[1].attn1.processor = model.transformer_blocks[0].attn1.processor
    cogvx_kernels.unpatch(model)
    assert model._cp_plan is None and model._parallel_config is None
    return v, small.predicted(model)


class Unknown:
    """A processor that patch does not know, with diffusers' parallelism."""

    def __init__(self, model):
        self._parallel_config = model._parallel_config

    def __call__(self, attn, hidden_states, encoder_hidden_states, **others):
        raise AssertionError("its attention would be within a part")


@pytest.mark.parametrize("kind, size, options", [
    ("5b", 2, {}), ("2b", 2, {}), ("5b with heads: 4", 4, {"ulysses_anything": True}),
    rest("5b with heads: 5", 3, {"ulysses_anything": True}),
    rest("5b-i2v", 2, {}), rest("1.5-i2v", 2, {}),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*all_gather_tensor. is deprecated:FutureWarning")
def test_diffusers_parallelism_takes_a_patched_transformer(kind, size, options):
    model, (v, _) = alone(kind)
    with pytest.raises(RuntimeError, match="initialized"):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    for own, stock in ranks.run(theirs, size, kind, options):
        assert relative(own, v) < NEAR
        assert torch.equal(stock, small.predicted(model))


def test_only_a_cogvideox_transformer_takes_a_context():
    context = Context("", rank=0, size=2)
    for wrong in (wan.transformer(), small.vae()):
        name = type(wrong).__name__
        with pytest.raises(UnsupportedModelError, match=f"a CogVideoXTrans.*; got {name}"):
            cogvx_kernels.patch(wrong, context=context)
    model = small.transformer()
    with pytest.raises(UnsupportedModelError, match='"rope" must be in only'):
        cogvx_kernels.patch(model, only=["adaln"], context=context)
    with pytest.raises(TypeError, match="patch: context must be"):
        cogvx_kernels.patch(model, context=4)
    assert not model._forward_pre_hooks and "not patched" in str(cogvx_kernels.explain(model))


def test_the_same_rows_of_tables_are_converted_once():
    made = []

    def make(cos, sin):
        made.append(cos)

    cache = functools.partial(TableCache(), make)
    cos, sin = torch.randn(8, 4), torch.randn(8, 4)
    for rows in (slice(4), slice(4), slice(4, 8), slice(2, 6)):
        cache(cos[rows], sin[rows])
    assert len(made) == 3
    cos.add_(1)
    cache(cos[2:6], sin[2:6])
    assert len(made) == 4


def test_a_pickle_is_of_the_model_alone():
    model = small.transformer()
    stock = small.predicted(model)
    cogvx_kernels.patch(model, backend="reference", context=Context("", rank=0, size=2))
    assert torch.equal(small.predicted(pickle.loads(pickle.dumps(model))), stock)


def test_what_attends_within_a_part_is_refused():
    """A processor that patch does not know would see the rank's tokens alone."""
    model = small.transformer()
    cogvx_kernels.patch(model, backend="reference", context=Context("", rank=0, size=1))
    model.transformer_blocks[1].attn1.processor = object()
    model.transformer_blocks[0].attn1.processor = object()
    with pytest.raises(RuntimeError, match="transformer_blocks.0.attn1: must be as patch knows"):
        small.predicted(model)
