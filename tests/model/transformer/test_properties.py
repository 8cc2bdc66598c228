"""Properties of every transformer, whatever its weights."""

import copy
import dataclasses
import gc
import itertools
import math
import weakref

import pytest
import torch

from cogvx.transformer import ExpertTransformer
from cogvx.transformer.block import ExpertBlock
from cogvx.transformer.embedding import JointEmbedding, timestep_sincos
from cogvx.transformer.modulation import Branch, ExpertAdaLayerNorm
from cogvx.transformer.patch import patchify, unpatchify
from cogvx.transformer.positions import Tables, sincos_table
from cogvx_kernels import module_backend

from .tiny import ROPE, SIN_COS, shaken

EXPERTS = dataclasses.replace(ROPE, num_text_experts=2, num_video_experts=3)
MODELS = {"sin-cos": SIN_COS, "rope": ROPE, "experts": EXPERTS}
models = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def made(config, **options):
    """With weights that are not what training begins with, among which many are zero."""
    with module_backend("reference"):
        return shaken(ExpertTransformer(config, **options))


def inputs(batch=2, dtype=torch.float32):
    timestep = torch.tensor([999, 37, 512])[:batch]
    return (
        torch.randn(batch, 2, 4, 4, 6, dtype=dtype),
        torch.randn(batch, 5, 10, dtype=dtype),
        timestep,
    )


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2), (1, 1, 1), (3, 2, 5)])
def test_patches_make_a_circle(patch):
    grid = (2, 3, 4)
    sizes = [tokens * side for tokens, side in zip(grid, patch, strict=True)]
    latents = torch.randn(2, sizes[0], 3, sizes[1], sizes[2])
    x = patchify(latents, patch)
    assert x.shape == (2, math.prod(grid), 3 * math.prod(patch))
    assert torch.equal(unpatchify(x, grid, patch), latents)
    assert torch.equal(patchify(unpatchify(x, grid, patch), patch), x)


def test_order_of_tokens_and_of_the_values_of_a_patch():
    latents = torch.arange(4 * 3 * 6 * 8.0).view(1, 4, 3, 6, 8)
    x = patchify(latents, (2, 2, 2))
    t, h, w, c, pt, ph, pw = 1, 2, 3, 2, 1, 0, 1
    token, value = (t * 3 + h) * 4 + w, ((c * 2 + pt) * 2 + ph) * 2 + pw
    assert x[0, token, value] == latents[0, 2 * t + pt, c, 2 * h + ph, 2 * w + pw]


def test_the_convolution_is_the_linear_layer_of_a_patch_of_one_frame():
    convolution = JointEmbedding(4, 10, 32, (1, 2, 2), linear=False).double()
    linear = JointEmbedding(4, 10, 32, (1, 2, 2), linear=True).double()
    state = convolution.state_dict()
    linear.load_state_dict({**state, "proj.weight": state["proj.weight"].flatten(1)})
    latents, text, _ = inputs(dtype=torch.float64)
    torch.testing.assert_close(linear(text, latents, None), convolution(text, latents, None))


def test_sincos_row():
    """Frame 1, row 2, column 3 of a grid, value by value."""
    dim, grid, scale = 32, (2, 3, 5), 1.875
    row = sincos_table(dim, grid, scale, 1.0)[(1 * 3 + 2) * 5 + 3]

    def axis(position, pairs):
        angles = [position * 10000 ** (-i / pairs) for i in range(pairs)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    wanted = axis(1, dim // 8) + axis(3 / scale, 3 * dim // 16) + axis(2 / scale, 3 * dim // 16)
    # The positions are divided in fp32, as in diffusers.
    torch.testing.assert_close(row, torch.tensor(wanted).double(), rtol=0, atol=2e-7)


def test_timestep_row():
    row = timestep_sincos(torch.tensor([37]), 8)[0]
    angles = [37 * 10000 ** (-i / 4) for i in range(4)]
    wanted = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    torch.testing.assert_close(row, torch.tensor(wanted), rtol=0, atol=1e-5)


def test_modulation_written_out():
    """Rows of the layer: shift, scale, gate of video, then of text. Each modality its own."""
    dim, text_len = 6, 3
    layer = ExpertAdaLayerNorm(dim, 4).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x, y = torch.randn(2, 2, 8, dim, dtype=torch.float64)
    temb = torch.randn(2, 4, dtype=torch.float64)
    modulation = layer.modulation(temb, torch.float64)
    same, h = layer(x, None, modulation, text_len)
    assert same is x
    branch = Branch(y, modulation.gate, modulation.text_gate)
    out = layer.add(x, branch, text_len)
    again = layer(x, branch, modulation, text_len)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], layer(out, None, modulation, text_len)[1])
    rows = layer.linear(temb).chunk(6, 1)
    for tokens, (shift, scale, gate) in (
        (slice(text_len, None), rows[:3]),
        (slice(0, text_len), rows[3:]),
    ):
        wanted = layer.norm(x[:, tokens]) * (1 + scale[:, None]) + shift[:, None]
        torch.testing.assert_close(h[:, tokens], wanted)
        torch.testing.assert_close(out[:, tokens], x[:, tokens] + gate[:, None] * y[:, tokens])


@pytest.mark.parametrize("experts", [0, 2])
def test_a_new_block_passes_its_input_on(experts):
    config = dataclasses.replace(ROPE, num_text_experts=experts, num_video_experts=experts)
    with module_backend("reference"):
        model = ExpertTransformer(config)
    for block in model.transformer_blocks:
        assert isinstance(block, ExpertBlock)
        x = torch.randn(2, 9, SIN_COS.hidden_size)
        none = torch.zeros(0, 8)
        out, _ = block.whole(x, torch.randn(2, SIN_COS.time_embed_dim), none, none, 3)
        assert torch.equal(out, x)


@models
def test_what_a_block_leaves_the_next_one_adds(config):
    """Its last sum, in one pass with the next block's first norm, or by itself: the same bits."""
    model, text_len = made(config), 5
    first, second = model.transformer_blocks
    x, temb = torch.randn(2, 17, config.hidden_size), torch.randn(2, config.time_embed_dim)
    where = temb, torch.zeros(0, 8), torch.zeros(0, 8), text_len
    stream, branch, routed = second(*first(x, None, *where)[:2], *where)
    assert not torch.equal(first(x, None, *where)[0], x)
    wanted, routing = second.whole(first.whole(x, *where)[0], *where)
    assert torch.equal(second.norm2.add(stream, branch, text_len), wanted)
    assert all(map(torch.equal, sum(routed, ()), sum(routing, ())))


def test_initial_weights():
    model = ExpertTransformer(ROPE)
    for weight in (model.patch_embed.proj.weight, model.proj_out.weight):
        fan_out, fan_in = weight.flatten(1).shape
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.9 * bound < weight.abs().max() <= bound
    for bias in (model.patch_embed.proj.bias, model.proj_out.bias):
        assert not bias.any()
    assert not model.norm_out.linear.weight.any()


@models
def test_batch_items_do_not_know_each_other(config):
    model, order = made(config).double(), [2, 0, 1]
    latents, text, timestep = inputs(3, torch.float64)
    with torch.no_grad():
        wanted = model(latents, text, timestep)
        turned = model(latents[order], text[order], timestep[order])
        alone = model(latents[1:2], text[1:2], timestep[1:2])
    torch.testing.assert_close(turned, wanted[order], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(alone, wanted[1:2], rtol=1e-10, atol=1e-12)


@models
def test_the_order_of_the_text_does_not_matter(config):
    """No text token has a position; but in 5B-I2V, whose learned table gives it one."""
    model = made(config).double()
    latents, text, timestep = inputs(dtype=torch.float64)
    order = torch.randperm(text.shape[1])
    with torch.no_grad():
        wanted, got = model(latents, text, timestep), model(latents, text[:, order], timestep)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", [ROPE, EXPERTS])
def test_no_text_at_all(config):
    latents, text, timestep = inputs()
    out = made(config)(latents, text[:, :0], timestep)
    assert out.shape == latents.shape and out.isfinite().all()


def test_a_scalar_timestep_is_that_of_every_item():
    model = made(ROPE)
    latents, text, _ = inputs()
    wanted = model(latents, text, torch.tensor([37, 37]))
    for timestep in (torch.tensor(37), torch.tensor(37.0), torch.tensor([37.0, 37.0]).double()):
        assert torch.equal(model(latents, text, timestep), wanted)


def test_ofs_of_one_item_is_that_of_every_item():
    model = made(dataclasses.replace(ROPE, ofs_embed_dim=6))
    arguments = inputs()
    wanted = model(*arguments, torch.tensor([2.0, 2.0]))
    for ofs in (torch.tensor(2), torch.tensor([2.0])):
        assert torch.equal(model(*arguments, ofs), wanted)
    assert not torch.equal(model(*arguments, torch.tensor([1.0])), wanted)


def test_1_5_goes_beyond_the_size_of_its_training():
    """Its positions are counted, so that the bound of its config changes nothing."""
    small = dataclasses.replace(ROPE, patch_size_t=2)
    large = dataclasses.replace(small, sample_height=40, sample_width=60)
    model = made(small)
    with module_backend("reference"):
        other = ExpertTransformer(large)
    other.load_state_dict(model.state_dict())
    arguments = torch.randn(1, 2, 4, 12, 18), *(x[:1] for x in inputs()[1:])
    assert torch.equal(model(*arguments), other(*arguments))


@models
def test_gradient_checkpointing_changes_no_bit(config):
    model, arguments = made(config), inputs()
    results = []
    for checkpointed in (False, True):
        model.gradient_checkpointing = checkpointed
        model.zero_grad()
        output = model(*arguments)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad for p in model.parameters())])
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


@pytest.mark.parametrize("experts", [0, 1])
def test_autocast(experts):
    """Weights and inputs in fp32, products in bf16; close to fp32 and with every gradient.

    With one expert of a modality at most: where a router wavers, a rounding changes its choice.
    """
    config = dataclasses.replace(ROPE, num_text_experts=experts, num_video_experts=experts)
    model, arguments = made(config), inputs()
    wanted = model(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(*arguments)
        latents, text, timestep = arguments
        mixed = [
            model(latents.to(a), text.to(b), timestep)
            for a, b in itertools.product([torch.bfloat16, torch.float32], repeat=2)
        ]
    for output in (got, *mixed):
        assert (output - wanted).norm() < 0.05 * wanted.norm()  # bf16 keeps 8 bits: 0.4 % a step
    got.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@models
def test_meta_gives_the_shape(config):
    with torch.device("meta"):
        model = ExpertTransformer(config)
    latents, text, timestep = (x.to("meta") for x in inputs())
    out = model(latents, text, timestep)
    assert out.shape == latents.shape and out.device.type == "meta"
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_tables_are_no_state_and_do_not_pile_up():
    tables = Tables(SIN_COS)
    for frames in range(1, 9):
        tables.sincos(frames, 4, 6, torch.device("cpu"), torch.bfloat16)
    assert len(tables._kept) == Tables.KEPT
    newest = tables.sincos(8, 4, 6, torch.device("cpu"), torch.bfloat16)
    assert newest is tables.sincos(8, 4, 6, torch.device("cpu"), torch.bfloat16)
    model = made(SIN_COS)
    model(*inputs())
    assert not list(model.buffers())
    gone = [weakref.ref(table) for table in model.tables._kept.values()]
    del model, tables, newest
    gc.collect()
    assert gone and all(table() is None for table in gone)


@models
def test_inference_mode_leaves_nothing_that_training_cannot_use(config):
    model, arguments = made(config), inputs()
    with torch.inference_mode():
        wanted = model(*arguments)
    got = model(*arguments)
    got.sum().backward()
    assert torch.equal(got, wanted)


def test_a_copy_is_a_model_of_its_own():
    model, arguments = made(SIN_COS), inputs()
    wanted = model(*arguments)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(*arguments), wanted)
    with torch.no_grad():
        twin.proj_out.bias.add_(1)
    assert torch.equal(model(*arguments), wanted)


@models
def test_every_op_is_on_the_backend_of_construction(config):
    model = made(config)
    with_backend = [module for module in model.modules() if hasattr(module, "backend")]
    # The model; of each block two norms, attention, and feed-forwards; the last norm.
    experts = max(1, config.num_text_experts + config.num_video_experts)
    assert len(with_backend) == 2 + (3 + experts) * config.num_layers
    assert {module.backend for module in with_backend} == {"reference"}
    assert model.state_dict().keys() == ExpertTransformer(config).state_dict().keys()
