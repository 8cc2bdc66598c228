"""`patch` among what else people do to these models: each before it and after it."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks import ModelHook as DiffusersHook
from peft import LoraConfig
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

import cogvx_kernels as ck
from tests.patching.small import (
    NEAR,
    clip,
    generate,
    inputs,
    latents,
    pipeline,
    predicted,
    relative,
    transformer,
    vae,
)


def assert_every_site_was_hit(model, *ops):
    for op in ops or ("adaln", "rope"):
        row = ck.explain(model)[op]
        assert row.hit == row.sites > 0 and not row.fallbacks, row


def with_lora(model):
    config = LoraConfig(
        r=2, target_modules=["to_q", "to_out.0", "ff.net.0.proj", "norm1.linear"],
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(5)
    model.add_adapter(config)


def fused(model):
    model.fuse_qkv_projections()


def in_eight_bits(model):
    quantize_(model.transformer_blocks, Int8WeightOnlyConfig())


def in_eight_bits_of_float(model):
    quantize_(model.transformer_blocks, Float8WeightOnlyConfig())


def with_casts(model):
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


CHANGES = {
    "LoRA": with_lora,
    "fused qkv": fused,
    "int8": in_eight_bits,
    "fp8": in_eight_bits_of_float,
    "fp8 storage": with_casts,
}


@pytest.mark.parametrize("first", ["patch", "change"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_are_called(change, first):
    """Adapters, quantised or cast weights: the same values, at every site, in either order."""
    model, stock = transformer(), transformer()
    CHANGES[change](stock)
    wanted = predicted(stock)
    if first == "patch":
        ck.patch(model)
        CHANGES[change](model)
    else:
        CHANGES[change](model)
        ck.patch(model)
    assert relative(predicted(model), wanted.double()) < NEAR
    assert relative(wanted, predicted(transformer()).double()) > 100 * NEAR or change == "fused qkv"
    assert_every_site_was_hit(model)
    ck.unpatch(model)
    assert torch.equal(predicted(model), wanted)


def test_lora_scale_disable_and_delete():
    model = transformer()
    plain = predicted(model)
    ck.patch(model)
    with_lora(model)
    strong = predicted(model)
    weak = predicted(model, attention_kwargs={"scale": 0.5})
    model.disable_adapters()
    assert relative(predicted(model), plain.double()) < NEAR
    model.enable_adapters()
    assert torch.equal(predicted(model), strong)
    assert relative(weak, plain.double()) < relative(strong, plain.double())
    model.delete_adapters("default")
    assert relative(predicted(model), plain.double()) < NEAR
    assert_every_site_was_hit(model)


def test_unfuse_after_patching():
    model = transformer()
    wanted = predicted(model)
    ck.patch(model)
    model.fuse_qkv_projections()
    ck.unpatch(model)
    model.unfuse_qkv_projections()
    assert torch.equal(predicted(model), wanted)


# --- hooks -----------------------------------------------------------------------------------


class Counting(ModelHook):
    """accelerate's kind."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class CountingToo(DiffusersHook):
    """diffusers' kind."""

    calls = 0

    def new_forward(self, module, *args, **kwargs):
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


def add_accelerate(module):
    hook = Counting()
    add_hook_to_module(module, hook)
    return hook


def add_diffusers(module):
    hook = CountingToo()
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "counting")
    return hook


def remove_diffusers(module):
    module._diffusers_hook.remove_hook("counting")


HOOKS = {
    "accelerate": (add_accelerate, remove_hook_from_module),
    "diffusers": (add_diffusers, remove_diffusers),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("order", ["hook, patch", "patch, hook"])
def test_hooks_stay_around_patched_forwards(kind, order):
    """Whatever the order of coming and of going: the hook runs, so do the ops, and both go."""
    add, remove = HOOKS[kind]
    model = transformer()
    wanted, block = predicted(model), model.transformer_blocks[0]
    if order == "hook, patch":
        hook = add(block)
        ck.patch(model)
    else:
        ck.patch(model)
        hook = add(block)
    assert relative(predicted(model), wanted.double()) < NEAR
    assert hook.calls == 1
    assert_every_site_was_hit(model)
    ck.unpatch(model)
    assert torch.equal(predicted(model), wanted)
    assert hook.calls == 2
    ck.patch(model)
    remove(block)
    predicted(model)
    assert hook.calls == 2 and ck.explain(model)["adaln"].hit == 4
    ck.unpatch(model)
    assert torch.equal(predicted(model), wanted)
    assert block.forward.__func__ is type(block).forward


def test_both_kinds_of_hooks_at_once():
    model = transformer()
    wanted, block = predicted(model), model.transformer_blocks[0]
    one = add_accelerate(block)
    ck.patch(model)
    other = add_diffusers(block)
    assert relative(predicted(model), wanted.double()) < NEAR
    assert_every_site_was_hit(model)
    ck.unpatch(model)
    assert torch.equal(predicted(model), wanted)
    assert (one.calls, other.calls) == (2, 2)


def test_offloaded_weights_are_read_in_calls_only():
    """Sequential offloading: weights are on the meta device until the layer itself is called."""
    model = transformer()
    wanted = predicted(model)
    ck.patch(model)
    cpu_offload(model, execution_device="cpu")
    assert model.transformer_blocks[0].norm1.norm.weight.is_meta
    assert torch.equal(predicted(model), wanted)
    assert ck.explain(model)["adaln"].fallbacks == {"a LayerNorm has hooks": 2}
    assert ck.explain(model)["rope"].fallbacks == {"a LayerNorm has hooks": 2}


@pytest.mark.parametrize("first", ["patch", "offload"])
def test_model_offload(first):
    """As `enable_model_cpu_offload` hangs its hooks: on the models, and for `vae.decode` too."""
    pipe = pipeline()
    wanted = generate(pipe)
    if first == "patch":
        ck.patch(pipe)
    for model in (pipe.transformer, pipe.vae):
        add_hook_to_module(model, AlignDevicesHook("cpu", io_same_device=True))
    if first == "offload":
        ck.patch(pipe)
    assert (generate(pipe) - wanted).abs().max() < NEAR
    assert_every_site_was_hit(pipe.transformer)
    ck.unpatch(pipe)
    assert torch.equal(generate(pipe), wanted)


@pytest.mark.parametrize("first", ["patch", "offload"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload(level, first):
    model = transformer()
    wanted = predicted(model)
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}

    def offload():
        apply_group_offloading(
            model, torch.device("cpu"), torch.device("cpu"), offload_type=level, **options
        )

    if first == "patch":
        ck.patch(model)
        offload()
    else:
        offload()
        ck.patch(model)
    found = predicted(model)
    assert relative(found, wanted.double()) < NEAR
    if level == "block_level":
        assert_every_site_was_hit(model)
    else:
        assert ck.explain(model)["adaln"].fallbacks == {"a LayerNorm has hooks": 2}
    ck.unpatch(model)
    assert torch.equal(predicted(model), wanted)


def test_block_cache():
    pipe = pipeline()
    wanted = [generate(pipe)]
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    wanted.append(generate(pipe))
    assert not torch.equal(*wanted)
    pipe.transformer.disable_cache()
    ck.patch(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    assert (generate(pipe) - wanted[1]).abs().max() < NEAR
    pipe.transformer.disable_cache()
    assert (generate(pipe) - wanted[0]).abs().max() < NEAR
    ck.unpatch(pipe)
    assert torch.equal(generate(pipe), wanted[0])


# --- options of the models -------------------------------------------------------------------


def test_vae_slicing_and_tiling():
    model = vae()
    z, x = latents(5, batch=2, side=6), clip(9, batch=2, side=48)
    for switch in (model.enable_slicing, lambda: model.enable_tiling(32, 32, 0.25, 0.25)):
        switch()
        with torch.no_grad():
            wanted = model.decode(z).sample, model.encode(x).latent_dist.mean
            with ck.patched(model, ["cache", "resample", "conv"]):
                assert torch.equal(model.decode(z).sample, wanted[0])
                assert torch.equal(model.encode(x).latent_dist.mean, wanted[1])
            with ck.patched(model):
                assert relative(model.decode(z).sample, wanted[0].double()) < NEAR


def test_step_callback():
    pipe = pipeline()
    seen = []

    def halve(pipe, step, timestep, tensors):
        seen.append(step)
        return {"latents": tensors["latents"] * 0.5}

    wanted = generate(pipe, callback_on_step_end=halve)
    ck.patch(pipe)
    assert (generate(pipe, callback_on_step_end=halve) - wanted).abs().max() < NEAR
    assert seen == [0, 1, 0, 1]


def test_attention_backend(monkeypatch):
    """diffusers' own processor of this model passes the choice by."""
    from diffusers.models import attention_dispatch

    registry = attention_dispatch._AttentionBackendRegistry
    native = attention_dispatch.AttentionBackendName.NATIVE
    math = attention_dispatch.AttentionBackendName._NATIVE_MATH
    calls = []
    kept = registry._backends[math]
    monkeypatch.setitem(registry._backends, math, lambda **of: calls.append(1) or kept(**of))
    model = transformer()
    wanted = predicted(model)
    model.set_attention_backend("_native_math")
    predicted(model)
    assert not calls
    try:
        ck.patch(model)
        model.set_attention_backend("_native_math")
        assert relative(predicted(model), wanted.double()) < NEAR
        assert len(calls) == 2
        registry.set_active_backend(native)  # of models without a choice of their own
        predicted(model)
        assert len(calls) == 4
        model.reset_attention_backend()
        predicted(model)
        assert len(calls) == 4
        with attention_dispatch.attention_backend("_native_math"):
            predicted(model)
        assert len(calls) == 6
    finally:
        registry.set_active_backend(native)


# --- training --------------------------------------------------------------------------------


def loss_and_gradients(model, run):
    model.train()
    out = run(model)
    out.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.detach(), found


@pytest.mark.parametrize("which", ["transformer", "vae"])
def test_checkpointed_gradients(which):
    model, run = {
        "transformer": (transformer(), lambda m: m(**inputs(m)).sample),
        "vae": (vae(), lambda m: m.decode(latents(5)).sample),
    }[which]
    ck.patch(model)
    wanted, gradients = loss_and_gradients(model, run)
    model.enable_gradient_checkpointing()
    found, again = loss_and_gradients(model, run)
    assert torch.equal(found, wanted) and again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(again[name], gradient), name


def test_lora_training():
    """A few steps of Adam, with and without the patch, as fine-tuning scripts do."""

    def trained(patched):
        model = transformer()
        with_lora(model)
        for name, p in model.named_parameters():
            p.requires_grad_("lora" in name)
        if patched:
            ck.patch(model)
        rates = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(rates, lr=1e-2)
        losses = []
        for step in range(8):
            loss = model(**inputs(model, seed=step)).sample.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    ours, theirs = trained(True), trained(False)
    assert theirs[-1] != theirs[0]
    for mine, other in zip(ours, theirs, strict=True):
        assert abs(mine - other) <= 1e-5 * abs(other)


def test_mixed_precision_training():
    """Under autocast the stream of a block keeps its dtype, and gradients arrive."""
    model = transformer()

    def run(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs(model)).sample.float()

    wanted, theirs = loss_and_gradients(model, run)
    ck.patch(model)
    found, ours = loss_and_gradients(model, run)
    assert relative(found, wanted.double()) < 2e-2
    assert ours.keys() == theirs.keys()
    assert_every_site_was_hit(model)
