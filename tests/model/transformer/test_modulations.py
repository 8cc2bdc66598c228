"""Modulations made ahead of time, and a text projected once: same results as step by step."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cogvx.config import PRESETS
from cogvx.transformer import ExpertTransformer, Modulations, ProjectedText, modulation
from cogvx_kernels import module_backend

from .tiny import ROPE, SIN_COS, shaken

LEARNED = dataclasses.replace(ROPE, in_channels=8, use_learned_positional_embeddings=True)
V15 = dataclasses.replace(ROPE, patch_size_t=2, patch_bias=False)
MODELS = {
    "2b": SIN_COS,
    "5b": ROPE,
    "5b-i2v": LEARNED,
    "1.5-5b": V15,
    "1.5-5b-i2v": dataclasses.replace(V15, in_channels=8, ofs_embed_dim=6),
    "experts": dataclasses.replace(ROPE, num_text_experts=1, num_video_experts=3),
}
TIMES = torch.tensor([999, 749, 500, 250, 37])


def made(config):
    with module_backend("reference"):
        return shaken(ExpertTransformer(config))


def inputs(config, batch=2):
    latents = torch.randn(batch, 2, config.in_channels, 4, 6)
    ofs = None if config.ofs_embed_dim is None else torch.tensor([2.0])
    return latents, torch.randn(batch, 5, 10), ofs


class Products(TorchDispatchMode):
    """The matrix products, as (rows, columns) of what they give."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("name", MODELS)
def test_ahead_of_time_is_step_by_step(name):
    """fp32 to a few ulps: a product may sum in another order where it has more rows."""
    model, (latents, text, ofs) = made(MODELS[name]), inputs(MODELS[name])
    with torch.no_grad():
        ahead, projected = model.modulations(TIMES, ofs), model.project_text(text)
        assert len(ahead) == len(TIMES)
        for step, time in enumerate(TIMES):
            wanted = model(latents, text, time, ofs)
            got = model(latents, projected, modulations=ahead.at(step))
            assert (got - wanted).norm() <= 1e-6 * wanted.norm()
            assert torch.equal(model(latents, text, modulations=ahead.at(step)), got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"experts"}))
def test_ahead_of_time_in_half_errs_no_more(name, dtype):
    """The rule: against fp64, at most twice the error step by step. (A router that wavers
    chooses otherwise at a rounding, so that a model with one has no such bound.)"""
    model, (latents, text, ofs) = made(MODELS[name]), inputs(MODELS[name])
    half = made(MODELS[name]).to(dtype)
    half.load_state_dict(model.state_dict())
    exact_model = made(MODELS[name]).double()
    exact_model.load_state_dict(half.state_dict())
    latents, text = latents.to(dtype), text.to(dtype)
    with torch.no_grad():
        ahead, projected = half.modulations(TIMES, ofs), half.project_text(text)
        for step, time in enumerate(TIMES):
            exact = exact_model(latents.double(), text.double(), time, ofs)
            stepwise = half(latents, text, time, ofs)
            got = half(latents, projected, modulations=ahead.at(step))
            assert (got - exact).norm() <= 2 * (stepwise - exact).norm()


@pytest.mark.parametrize("name", MODELS)
def test_all_modulations_are_one_product(name):
    model, (_, _, ofs) = made(MODELS[name]), inputs(MODELS[name])
    config = model.config
    rows = (12 * config.num_layers + 2) * config.hidden_size
    with torch.no_grad(), Products() as products:
        model.modulations(TIMES, ofs)
    # Two of the time's embedding, two of ofs, and one of all modulations.
    embeddings = 2 if ofs is None else 4
    assert [shape[1] for shape in products.shapes].count(rows) == 1
    assert len(products.shapes) == embeddings + 1 and products.shapes[-1] == (len(TIMES), rows)


def test_with_modulations_ahead_a_step_makes_none():
    model, (latents, text, _) = made(ROPE), inputs(ROPE)
    ahead, projected = model.modulations(TIMES), model.project_text(text)
    called = []
    for part in (model.time_embedding, model.patch_embed.text_proj, model.norm_out.linear):
        part.register_forward_hook(lambda *_: called.append(_))
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            norm.linear.register_forward_hook(lambda *_: called.append(_))
    model(latents, projected, modulations=ahead.at(0))
    assert not called
    model(latents, text, TIMES[0])
    assert len(called) == 3 + 2 * ROPE.num_layers


def test_weights_are_stacked_only_so_many_at_once(monkeypatch):
    model = made(ROPE)
    wanted = model.modulations(TIMES).values
    of_a_norm = model.transformer_blocks[0].norm1.linear.weight.nbytes
    for limit, products in ((2 * of_a_norm, 3), (of_a_norm, 5), (1, 5)):
        monkeypatch.setattr(modulation, "STACK_BYTES", limit)
        with Products() as seen:
            got = model.modulations(TIMES).values
        assert len(seen.shapes) == 2 + products
        torch.testing.assert_close(got, wanted)


def test_what_5b_takes():
    """As the docstring says: 3.1 MB a step in bfloat16, 155 MB for fifty, whose weights are copied
    256 MiB at a time."""
    with torch.device("meta"):
        model = ExpertTransformer(PRESETS["5b"].transformer).bfloat16()
        with Products() as products:
            ahead = model.modulations(torch.empty(50))
    assert round(ahead.at(0).values.nbytes / 1e6, 1) == 3.1
    assert round(ahead.values.nbytes / 1e6) == 155
    assert all(columns * 512 * 2 <= modulation.STACK_BYTES for _, columns in products.shapes)
    assert len(products.shapes) == 2 + 7


def test_a_wrapped_layer_is_called():
    """In its place among the stacked ones."""

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model = made(ROPE)
    before = model.modulations(TIMES).values
    norm = model.transformer_blocks[1].norm1
    norm.linear = Doubled(norm.linear)
    after = model.modulations(TIMES).values
    torch.testing.assert_close(after[:, 12:18], 2 * before[:, 12:18])
    torch.testing.assert_close(after[:, :12], before[:, :12])
    torch.testing.assert_close(after[:, 18:], before[:, 18:])
    latents, text, _ = inputs(ROPE)
    wanted = model(latents, text, TIMES[1])
    got = model(latents, text, modulations=model.modulations(TIMES).at(1))
    assert (got - wanted).norm() <= 1e-6 * wanted.norm()


def test_a_step_for_each_item():
    model, (latents, text, _) = made(ROPE), inputs(ROPE)
    wanted = model(latents, text, TIMES[1:3])
    got = model(latents, text, modulations=Modulations(model.modulations(TIMES).values[1:3]))
    assert (got - wanted).norm() <= 1e-6 * wanted.norm()


def test_gradients_go_through():
    """Nothing is detached: in advance or in the forward, every parameter has the same gradient."""
    model, (latents, text, ofs) = made(MODELS["1.5-5b-i2v"]), inputs(MODELS["1.5-5b-i2v"])
    model(latents, text, TIMES[2], ofs).square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for checkpointed in (False, True):
        model.gradient_checkpointing = checkpointed
        model.zero_grad()
        ahead = model.modulations(TIMES, ofs).at(2)
        model(latents, model.project_text(text), modulations=ahead).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_steps_are_counted():
    ahead = made(ROPE).modulations(TIMES)
    assert torch.equal(ahead.at(4).values, ahead.values[4:])
    for step in (-1, 5):
        with pytest.raises(IndexError, match=rf"step must be in \[0, 5\); got {step}"):
            ahead.at(step)


def wrong_arguments():
    latents, text, _ = inputs(ROPE)
    model, other = made(ROPE), made(dataclasses.replace(ROPE, num_layers=3))
    one = model.modulations(TIMES).at(0)
    return {
        "beside a timestep": ({"timestep": TIMES[0]}, one, "timestep must be None beside modula"),
        "beside ofs": ({"ofs": TIMES[0]}, one, "ofs must be None beside modulations"),
        "of no kind": ({}, one.values, "modulations must be Modulations.*got float32"),
        "of a run": ({}, model.modulations(TIMES), r"or \(1, 26, 32\) for all items"),
        "of another model": ({}, other.modulations(TIMES).at(0), r"must be \(2, 26, 32\), or"),
        "elsewhere": ({}, Modulations(one.values.to("meta")), "must be on the device of latents"),
        "nothing": ({}, None, "timestep must be a tensor of numbers; got None"),
        "a text of another width": (
            {"text": ProjectedText(text)}, one, "text must have hidden_size = 32 values a token",
        ),
    }, model, latents, text  # fmt: skip


@pytest.mark.parametrize("name", ["beside a timestep", "beside ofs", "of no kind", "of a run",
                                  "of another model", "elsewhere", "nothing",
                                  "a text of another width"])  # fmt: skip
def test_wrong_modulations(name):
    cases, model, latents, text = wrong_arguments()
    assert name in cases
    options, modulations, says = cases[name]
    with pytest.raises((TypeError, ValueError), match=f"^ExpertTransformer: .*{says}"):
        model(latents, **{"text": text, "modulations": modulations, **options})


@pytest.mark.parametrize(
    "ask, says",
    [
        (lambda m: m.modulations(torch.tensor(9)), r"timesteps must be \(steps,\)"),
        (lambda m: m.modulations([9]), "timesteps must be a tensor of numbers"),
        (lambda m: m.modulations(TIMES, TIMES[0]), "ofs must be None in a model without"),
        (lambda m: m.project_text(torch.zeros(2, 5, 11)), "text must have text_embed_dim = 10"),
        (lambda m: m.project_text(torch.zeros(5, 10)), "text must be a floating-point tensor"),
        (lambda m: m.project_text(torch.zeros(2, 5, 10).half()), "text must be float32 as the mo"),
    ],
)
def test_wrong_times_and_texts(ask, says):
    with pytest.raises((TypeError, ValueError), match=f"^ExpertTransformer: {says}"):
        ask(made(ROPE))
