"""Linear layers that someone has wrapped: they are called, and not read behind the wrapping."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from cogvx.transformer import ExpertTransformer, experts
from cogvx.transformer.module_utils import is_plain_linear
from cogvx_kernels import module_backend

from .tiny import EXPERTS, ROPE, shaken

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
MODELS = {
    "shared": ROPE,
    "experts": dataclasses.replace(ROPE, num_text_experts=1, num_video_experts=1),
    "routed": EXPERTS,
}
models = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def made(config):
    with module_backend("reference"):
        return shaken(ExpertTransformer(config))


def inputs():
    return torch.randn(2, 2, 4, 4, 6), torch.randn(2, 5, 10), torch.tensor([999, 37])


@pytest.fixture
def read(monkeypatch):
    """Count of the times that a feed-forward's weights were read instead of its module called."""
    counts, fused = [], experts.fused
    monkeypatch.setattr(experts, "fused", lambda *a, **k: counts.append(1) or fused(*a, **k))
    return counts


def near(got, wanted, rtol=1e-6):
    return (got - wanted).norm() <= rtol * wanted.norm()


def with_lora(model, targets=TARGETS, init=True):
    """peft's adapters in place; `init` begins them as peft does, with B of zeros."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=init)
    return peft.inject_adapter_in_model(config, copy.deepcopy(model))


@models
def test_a_lora_that_has_learned_nothing_is_the_model(config, read):
    model, arguments = made(config), inputs()
    wanted = model(*arguments)
    assert len(read) == config.num_layers
    wrapped = with_lora(model)
    assert near(wrapped(*arguments), wanted)
    assert len(read) == config.num_layers  # and none since


@models
def test_a_lora_is_its_sum_with_the_weights(config):
    """Beside a model with the adapters merged into plain weights: the same output; and gradients
    that are, by the product rule of B·A, those of the merged weights."""
    model, arguments = made(config), inputs()
    wrapped = with_lora(model, init=False)
    merged = copy.deepcopy(wrapped)
    for name, module in list(merged.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(merged.get_submodule(parent), child, module.get_base_layer())
    assert merged.state_dict().keys() == model.state_dict().keys()
    wanted, got = merged(*arguments), wrapped(*arguments)
    assert not near(got, model(*arguments), 1e-2) and near(got, wanted, 1e-5)
    merged.requires_grad_(True)
    got.square().sum().backward()
    merged(*arguments).square().sum().backward()
    for name, module in wrapped.named_modules():
        if hasattr(module, "lora_A"):
            of_weight = merged.get_submodule(name).weight.grad
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            scale = module.scaling["default"]
            assert near(down.grad, scale * up.T @ of_weight, 1e-4), name
            assert near(up.grad, scale * of_weight @ down.T, 1e-4), name


@models
def test_adapters_of_attention_alone_leave_the_feed_forward_fused(config, read):
    wrapped, arguments = with_lora(made(config), ["to_q", "to_v"]), inputs()
    wrapped(*arguments).sum().backward()
    assert len(read) == config.num_layers
    trained = {name for name, p in wrapped.named_parameters() if p.grad is not None}
    assert len(trained) == 4 * config.num_layers and all(".lora_" in name for name in trained)


def test_adapters_of_the_modulation(read):
    """In the forward or in advance."""
    model, (latents, text, times) = made(ROPE), inputs()
    wrapped = with_lora(model, ["norm1.linear", "norm_out.linear"], init=False)
    wanted = wrapped(latents, text, times[0])
    assert not near(wanted, model(latents, text, times[0]), 1e-3)
    assert near(wrapped(latents, text, modulations=wrapped.modulations(times).at(0)), wanted)


@models
def test_weights_of_8_bits(config, read):
    """torchao's tensors: the result is that of the weights as they were rounded."""
    quantization = pytest.importorskip("torchao.quantization")
    model, arguments = made(config), inputs()
    rounded = copy.deepcopy(model)

    def of_a_block(module, name):
        return type(module) is nn.Linear and "transformer_blocks" in name and "router" not in name

    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(version=2), of_a_block)
    with torch.no_grad():
        for name, module in model.named_modules():
            if of_a_block(module, name):
                assert type(module.weight) is not nn.Parameter
                rounded.get_submodule(name).weight.copy_(module.weight.dequantize())
        wanted = rounded(*arguments)
        assert len(read) == config.num_layers
        assert near(model(*arguments), wanted, 1e-5)
        assert len(read) == config.num_layers
        ahead = model.modulations(arguments[2])
        assert near(ahead.values, rounded.modulations(arguments[2]).values, 1e-5)


class Negative(nn.Module):
    def forward(self, weight):
        return -weight


def touch_with_a_hook(linear):
    linear.register_forward_hook(lambda module, args, out: -out)


def touch_with_a_pre_hook(linear):
    linear.register_forward_pre_hook(lambda module, args: (-args[0],))


def touch_with_a_parametrization(linear):
    parametrize.register_parametrization(linear, "weight", Negative())


def touch_with_a_forward_of_its_own(linear):
    linear.forward = lambda x: -nn.functional.linear(x, linear.weight, linear.bias)


TOUCHES = [touch_with_a_hook, touch_with_a_pre_hook, touch_with_a_parametrization,
           touch_with_a_forward_of_its_own]  # fmt: skip


@pytest.mark.parametrize("touch", TOUCHES)
@models
def test_whatever_is_done_to_a_layer_shows(config, touch, read):
    """In the feed-forward, whose layers are read, and in a modulation."""
    for name in (".net.2", "norm2.linear"):
        model, arguments = made(config), inputs()
        layers = [m for n, m in model.named_modules() if n.endswith(name)]
        wanted = model(*arguments)
        for layer in layers:
            assert is_plain_linear(layer)
            touch(layer)
            assert not is_plain_linear(layer)
        got = model(*arguments)
        assert not near(got, wanted, 1e-3)
        latents, text, times = arguments
        assert near(model(latents, text, modulations=model.modulations(times)), got)


@pytest.mark.parametrize("part", ["net", "net.0", "net.1"])
def test_what_holds_the_layers_is_called_too_where_it_is_touched(part, read):
    model, arguments, seen = made(ROPE), inputs(), []
    wanted = model(*arguments)
    read.clear()
    for block in model.transformer_blocks:
        block.ff.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    assert near(model(*arguments), wanted)
    assert len(seen) == ROPE.num_layers and not read
