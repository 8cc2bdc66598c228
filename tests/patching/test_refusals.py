"""Objects and options that `patch` refuses before anything is changed; supported ones."""

import copy
import types
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import AutoencoderKL, CogVideoXPipeline
from torch import nn
from transformers import T5Config, T5EncoderModel

import cogvx_kernels as ck
from tests.patching.small import assert_untouched, latents, pipeline, transformer, vae

T5 = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)


def test_unknown_objects_are_refused():
    for thing, message in ((nn.Linear(2, 2), "Linear"), (object(), "object"), (None, "NoneType")):
        with pytest.raises(ck.UnsupportedModelError, match=f"{message}.*AutoencoderKLCogVideoX"):
            ck.patch(thing)
        with pytest.raises(ck.UnsupportedModelError):
            ck.unpatch(thing)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (nn.Linear(2, 2), "Linear is not supported"),
        (T5EncoderModel(T5), "T5EncoderModel is not supported"),
        ("CogVideoX-5b", "str has no model of diffusers in it"),
        (None, "NoneType has no model of diffusers in it"),
        (CogVideoXPipeline, "the class CogVideoXPipeline has no model of diffusers in it"),
        (types.SimpleNamespace(components={}), "SimpleNamespace has no model of diffusers in it"),
        (MagicMock(), "MagicMock has no model of diffusers in it"),
    ],
    ids=["linear", "transformers", "str", "None", "class", "empty", "mock"],
)
def test_unsupported_objects_are_reported(thing, message):
    with pytest.raises(ck.UnsupportedModelError, match=f"^patch: obj: {message}.*strict=False"):
        ck.patch(thing)
    with ck.patched(thing, ["rope"], strict=False) as report:
        assert report.skipped == {"obj": message} and report.rows == [] and report.mode is None
        assert f"not patched\n  left as it is: obj: {message}" in str(report)
        assert str(ck.explain(thing)) == str(report)
    with pytest.raises(ValueError, match="only must name some of adaln, cache, .* got rop"):
        ck.patch(thing, ["rop"], strict=False)


def test_an_unknown_component_is_refused_or_reported():
    pipe = pipeline()
    pipe.register_modules(vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=2))
    with pytest.raises(ck.UnsupportedModelError, match="vae: AutoencoderKL is not supported"):
        ck.patch(pipe)
    assert not ck.explain(pipe).rows
    report = ck.patch(pipe, strict=False)
    assert report.skipped == {"vae": "AutoencoderKL is not supported"}
    assert "left as it is: vae: AutoencoderKL is not supported" in str(report)
    assert {row.component for row in report.rows} == {"transformer"}


def test_another_forward_signature_is_refused(monkeypatch):
    model = transformer()
    kind = type(model.transformer_blocks[0])
    stock = kind.forward

    def forward(self, hidden_states, encoder_hidden_states, temb, rotary=None):
        return stock(self, hidden_states, encoder_hidden_states, temb, rotary)

    monkeypatch.setattr(kind, "forward", forward)
    with (
        assert_untouched(model),
        pytest.raises(
            ck.UnsupportedModelError,
            match=r"transformer_blocks.0: its forward takes \(self, .*rotary",
        ),
    ):
        ck.patch(model)
    report = ck.patch(model, strict=False)
    assert report["adaln"].sites == 0 and report["rope"].sites == 2
    assert "transformer_blocks.0" in report.skipped


@pytest.mark.parametrize("bound", [False, True])
def test_a_replaced_forward_is_refused(bound):
    model = transformer()
    block = model.transformer_blocks[0]

    def mine(*args, **kwargs):
        return None

    block.forward = types.MethodType(mine, block) if bound else mine
    with pytest.raises(
        ck.UnsupportedModelError, match="transformer_blocks.0: its forward was repl"
    ):
        ck.patch(model)
    assert not ck.explain(model).rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["rop"]}, "only must name some of adaln, rope, transformer; got rop"),
        ({"only": "rope"}, r'only must be a list of names, such as \["rope"\]; got "rope"'),
        ({"only": []}, "only must name some of .* got none"),
        ({"only": ["vae"]}, "only must name some of adaln, rope, transformer; got vae"),
        ({"mode": "quick"}, "mode must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_wrong_options_are_refused(options, message):
    model = transformer()
    with assert_untouched(model), pytest.raises(ValueError, match=message):
        ck.patch(model, **options)


def test_supported():
    table = ck.supported()
    assert {"AutoencoderKLCogVideoX", "CogVideoXTransformer3DModel"} <= {r.model for r in table}
    assert {row.op for row in table if row.bits} >= {"cache", "resample", "conv"}
    assert len(str(table).splitlines()) == len(table)


def test_cached_frames_are_taken_once():
    """Whoever calls the decoder himself cannot read frames that a later chunk has replaced."""
    model = vae()
    ck.patch(model)
    z = latents(5)
    with torch.no_grad():
        _, cache = model.decoder(z[:, :, :3])
        branch = copy.deepcopy(cache)
        first, _ = model.decoder(z[:, :, 3:], conv_cache=cache)
        with pytest.raises(RuntimeError, match="taken by a later chunk"):
            model.decoder(z[:, :, 3:], conv_cache=cache)
        second, _ = model.decoder(z[:, :, 3:], conv_cache=branch)
    assert torch.equal(first, second)
