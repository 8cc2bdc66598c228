"""LoRA adapters in a pipeline: every layout that people have, exact removal, and refusals."""

import json
import math
import re

import pytest
import torch
from torch import nn

from cogvx.checkpoint import CheckpointError, write_tensors
from cogvx.pipeline.lora import Adapters
from cogvx.training.lora import add_adapters, save_adapters

from .tiny_pipeline import SIDE, embeds, randomised, theirs, tiny

LAYERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
SMALL = {"steps": 2, "num_frames": 9, "seed": 1, "output": "latents", **embeds()}
RANK = 3


def adapter(model, rank=RANK, seed=3, layers=LAYERS):
    """{layer: (A, B)} of random numbers that change what a model computes."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in model.named_modules():
        if name.endswith(layers) and isinstance(module, (nn.Linear, nn.Conv2d)):
            out, *inner = module.weight.shape
            down = torch.randn(rank, *inner, generator=generator) / math.prod(inner) ** 0.5
            up = torch.randn(out, rank, *(1 for _ in inner[1:]), generator=generator)
            found[name] = down, 0.3 * up
    return found


def diffusers_layout(pairs, **more):
    return {
        f"transformer.{layer}.{name}.weight": tensor
        for layer, pair in pairs.items()
        for name, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    } | more


@pytest.fixture(scope="module")
def pipe():
    return tiny()


@pytest.fixture(autouse=True)
def as_it_was(pipe):
    yield
    pipe.unload_lora()


def weights(pipe):
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}


def expected(before, pairs, scale):
    """Weights in fp64: W + scale * B A."""
    state = {name: tensor.double() for name, tensor in before.items()}
    for layer, (down, up) in pairs.items():
        change = up.double().flatten(1) @ down.double().flatten(1)
        state[f"{layer}.weight"] += scale * change.view_as(state[f"{layer}.weight"])
    return state


def check(pipe, before, pairs, scale):
    for name, wanted in expected(before, pairs, scale).items():
        torch.testing.assert_close(
            pipe.transformer.state_dict()[name].double(), wanted, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("settings", [None, {"lora_alpha": 12}, {"lora_alpha": 6, "alpha_pattern":
    {"transformer_blocks.1.attn1.to_q": 9}, "use_rslora": True}])  # fmt: skip
def test_videos_are_those_of_diffusers(settings, pipe, tmp_path):
    pairs = adapter(pipe.transformer)
    values = {"peft_type": "LORA", "r": RANK, "target_modules": list(LAYERS), **(settings or {})}
    metadata = {"format": "pt"}
    if settings is not None:
        header = {f"transformer.{name}": value for name, value in values.items()}
        metadata["lora_adapter_metadata"] = json.dumps(header)
    write_tensors(tmp_path / "kite.safetensors", diffusers_layout(pairs), metadata)
    plain = pipe.generate(**SMALL)
    other = theirs(pipe, "text", "ddim")
    other.load_lora_weights(tmp_path, weight_name="kite.safetensors")
    call = {"num_frames": 9, "height": SIDE, "width": SIDE, "num_inference_steps": 2}
    wanted = other(**embeds(), **call, generator=torch.Generator().manual_seed(1),
                   output_type="latent").frames  # fmt: skip
    pipe.load_lora(tmp_path / "kite.safetensors")
    came = pipe.generate(**SMALL)
    torch.testing.assert_close(came, wanted, rtol=1e-4, atol=1e-4)
    assert (came - plain).abs().max() > 0.01


def test_what_training_writes_computes_what_was_trained(pipe, tmp_path):
    trained, x = tiny(), torch.randn(1, 3, 4, 4, 4)
    text, time = embeds()["prompt_embeds"], torch.tensor([500])
    add_adapters(trained.transformer, 2)
    with torch.no_grad():
        for name, parameter in trained.transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        wanted = trained.transformer(x, text, time)
        plain = pipe.transformer(x, text, time)
        save_adapters(trained.transformer, trained.transformer.state_dict(), tmp_path)
        pipe.load_lora(tmp_path)
        came = pipe.transformer(x, text, time)
    torch.testing.assert_close(came, wanted, rtol=1e-4, atol=1e-5)
    assert (came - plain).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unloading_is_exact_and_adapters_add_up(dtype, tmp_path):
    pipe = tiny()
    pipe.transformer.to(dtype)
    before = weights(pipe)
    one, two = adapter(pipe.transformer), adapter(pipe.transformer, 2, 4, LAYERS[:2])
    for name, pairs in (("one", one), ("two", two)):
        write_tensors(tmp_path / f"{name}.safetensors", diffusers_layout(pairs), dtype=dtype)
    pipe.load_lora(tmp_path / "one.safetensors", 0.5)
    pipe.load_lora(tmp_path / "two.safetensors", -2.0)
    sums = expected(expected(before, one, 0.5), two, -2.0)
    for name, wanted in sums.items():
        torch.testing.assert_close(
            pipe.transformer.state_dict()[name].double(),
            wanted,
            rtol=0,
            atol=8 * torch.finfo(dtype).eps,
        )
        assert pipe.transformer.state_dict()[name].dtype == dtype
    pipe.unload_lora()
    pipe.unload_lora()
    assert all(torch.equal(t, before[name]) for name, t in pipe.transformer.state_dict().items())


def old_diffusers(pairs):
    names = ("lora.down", "lora.up")
    return {f"transformer.{layer}.{name}.weight": t for layer, pair in pairs.items()
            for name, t in zip(names, pair, strict=True)}  # fmt: skip


def processors(pairs):
    pairs = {layer: pair for layer, pair in pairs.items() if ".attn1." in layer}
    return {
        f"transformer.{layer.replace('attn1.', 'attn1.processor.').removesuffix('.0')}"
        f"_lora.{name}.weight": t
        for layer, pair in pairs.items()
        for name, t in zip(("down", "up"), pair, strict=True)
    }


def kohya(pairs, prefix="lora_transformer_"):
    found = {}
    for layer, (down, up) in pairs.items():
        name = prefix + layer.replace(".", "_")
        found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"] = down, up
        found[f"{name}.alpha"] = torch.tensor(1.5)
    return found


def peft_layout(pairs, default=""):
    return {f"base_model.model.{layer}.{name}{default}.weight": t for layer, pair in pairs.items()
            for name, t in zip(("lora_A", "lora_B"), pair, strict=True)}  # fmt: skip


LAYOUTS = {
    "diffusers": (diffusers_layout, 1.0),
    "no prefix": (lambda p: {k.removeprefix("transformer."): t for k, t in
                             diffusers_layout(p).items()}, 1.0),
    "ComfyUI": (lambda p: {k.replace("transformer.", "diffusion_model.", 1): t for k, t in
                           diffusers_layout(p).items()}, 1.0),
    "old diffusers": (old_diffusers, 1.0),
    "processors": (processors, 1.0),
    "kohya": (kohya, 0.5),
    "lora_unet": (lambda p: kohya(p, "lora_unet__"), 0.5),
    "alphas": (lambda p: diffusers_layout(p) | {f"transformer.{layer}.alpha": torch.tensor([6.0])
                                                for layer in p}, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_keys(layout, pipe, tmp_path):
    rename, scale = LAYOUTS[layout]
    before, pairs = weights(pipe), adapter(pipe.transformer)
    write_tensors(tmp_path / "my kite (2).safetensors", rename(pairs))
    pipe.load_lora(tmp_path)
    if layout == "processors":
        pairs = {layer: pair for layer, pair in pairs.items() if ".attn1." in layer}
    check(pipe, before, pairs, scale)


@pytest.mark.parametrize(("settings", "scale"), [
    ({"r": RANK, "lora_alpha": 12}, 4.0),
    ({"r": RANK, "lora_alpha": 12, "use_rslora": True}, 12 / 3**0.5),
    ({"r": 8, "rank_pattern": {"to_q": 3}, "lora_alpha": 1, "alpha_pattern":
      {r".*\.(attn1|ff)\..*": 6}}, 2.0),
    ({"r": RANK, "lora_alpha": 1, "alpha_pattern": {layer: 9 for layer in LAYERS}}, 3.0),
])  # fmt: skip
@pytest.mark.parametrize("given", ["folder", "adapter_model.safetensors", "kite.safetensors"])
def test_folders_of_peft(settings, scale, given, pipe, tmp_path):
    before, pairs = weights(pipe), adapter(pipe.transformer)
    name = "adapter_model.safetensors" if given == "folder" else given
    write_tensors(tmp_path / name, peft_layout(pairs))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    pipe.load_lora(tmp_path if given == "folder" else tmp_path / name)
    check(pipe, before, pairs, scale)


def test_peft_without_its_config_warns(pipe, tmp_path):
    before, pairs = weights(pipe), adapter(pipe.transformer)
    write_tensors(tmp_path / "adapter_model.safetensors", peft_layout(pairs, ".default"))
    with pytest.warns(UserWarning, match=r"no adapter_config.json lies beside it.*scale=alpha/ran"):
        pipe.load_lora(tmp_path)
    check(pipe, before, pairs, 1.0)


def test_biases_and_convolutions(tmp_path):
    pipe = tiny("5b")
    before = weights(pipe)
    pairs = adapter(pipe.transformer, layers=("patch_embed.proj", "attn1.to_q"))
    assert pairs["patch_embed.proj"][0].dim() == 4
    bias = {
        f"transformer.{layer}.lora_B.bias": torch.ones(len(up)) for layer, (_, up) in pairs.items()
    }
    alpha = {f"transformer.{layer}.alpha": torch.tensor(6.0) for layer in pairs}
    write_tensors(tmp_path / "a.safetensors", diffusers_layout(pairs) | bias | alpha)
    pipe.load_lora(tmp_path)
    for layer in pairs:
        before[f"{layer}.bias"] += 2.0
    check(pipe, before, pairs, 2.0)


PAIR = {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 32),
        "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(32, 2)}  # fmt: skip
A, B = PAIR
WRONG = {
    "another width": ({A: torch.ones(2, 48), B: torch.ones(48, 2)},
                      r"2 of another shape.*\[2, 32\]; got \[2, 48\]"),
    "another depth": ({k.replace("blocks.0", "blocks.7"): t for k, t in PAIR.items()},
                      "2 of no layer of this transformer.*transformer_blocks.7.attn1.to_q"),
    "ranks": ({A: PAIR[A], B: torch.ones(32, 3)}, r"\[32, 2\]; got \[32, 3\]"),
    "half": ({A: PAIR[A]}, "without its other half.*lora_A and lora_B of transformer_blocks.0"),
    "DoRA": (PAIR | {A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)},
             "1 of DoRA, which is not supported"),
    "DoRA of kohya": (PAIR | {A.replace("lora_A.weight", "dora_scale"): torch.ones(32)}, "DoRA"),
    "text": (PAIR | {"text_encoder.encoder.block.0.q.lora_A.weight": torch.ones(2, 8)},
             "1 of a text encoder.*text_encoder.encoder.block.0.q.lora_A.weight"),
    "LoHa": ({A.replace("lora_A.weight", "hada_w1_a"): torch.ones(2, 2)}, "LoHa or LoKr"),
    "SAT": ({"model.diffusion_model.mixins.lora.matrix_A.0": torch.ones(2, 2)}, "1 of SAT, which"),
    "another file": ({"decoder.conv_in.weight": torch.ones(2)}, "of no layer.*decoder.conv_in"),
    "nothing": ({}, "lora_A and lora_B of a layer, for example "),
    "alpha alone": ({A.replace("lora_A.weight", "alpha"): torch.ones(())}, "without its other"),
    "twice": (PAIR | {A.removeprefix("transformer."): PAIR[A]}, "1 that give a layer twice"),
    "integers": ({A: torch.ones(2, 32).int(), B: PAIR[B]}, "of a dtype other than .*: I32"),
    "NaN": ({A: PAIR[A] * float("nan"), B: PAIR[B]}, "must be finite; got NaN"),
    "rank 0": ({A: torch.ones(0, 32), B: torch.ones(32, 0)}, "of another shape"),
    "alphas": (PAIR | {A.replace("lora_A.weight", "alpha"): torch.ones(2)}, "expected a number"),
    "infinite alpha": (PAIR | {A.replace("lora_A.weight", "alpha"): torch.tensor(float("inf"))},
                       "alpha must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_by_its_keys(name, pipe, tmp_path):
    tensors, match = WRONG[name]
    before = weights(pipe)
    write_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=re.compile(match, re.DOTALL)) as error:
        pipe.load_lora(tmp_path / "a.safetensors")
    assert str(tmp_path / "a.safetensors") in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in pipe.transformer.state_dict().items())


SETTINGS = {
    "IA3": ({"peft_type": "IA3"}, "peft_type must be LORA; got 'IA3'"),
    "DoRA": ({"use_dora": True}, "use_dora must be false"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights must not be 'pissa_nit"),
    "alpha": ({"lora_alpha": "16"}, "'lora_alpha' must be a number; got '16'"),
    "patterns": ({"alpha_pattern": []}, None),
    "a list": ({"alpha_pattern": [1]}, r"alpha_pattern must be an object; got \[1\]"),
    "nested": ({"alpha_pattern": {"(a+)+b": 1}}, r"simple regular expressions; got '\(a\+\)\+b'"),
    "many": ({"alpha_pattern": {".*.*.*.*x": 1}}, "simple regular expressions"),
    "no expression": ({"alpha_pattern": {"a[": 1}}, "simple regular expressions"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_peft_that_cannot_be(name, pipe, tmp_path):
    settings, match = SETTINGS[name]
    of_peft = {k.replace("transformer.", "base_model.model.", 1): t for k, t in PAIR.items()}
    write_tensors(tmp_path / "adapter_model.safetensors", of_peft)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    if match is None:
        pipe.load_lora(tmp_path)
        return
    with pytest.raises(CheckpointError, match=match):
        pipe.load_lora(tmp_path)


def test_files_that_are_no_adapters(pipe, tmp_path):
    with pytest.raises(
        CheckpointError, match="does not exist. Nothing is downloaded: `hf download"
    ):
        pipe.load_lora(tmp_path / "none")
    with pytest.raises(
        CheckpointError, match="must hold pytorch_lora_weights.safetensors or .* none"
    ):
        pipe.load_lora(tmp_path)
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"PK")
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        with pytest.raises(CheckpointError, match="pickle can run any code"):
            pipe.load_lora(path)
    for name in "ab":
        write_tensors(tmp_path / f"{name}.safetensors", PAIR)
    with pytest.raises(CheckpointError, match="one other .safetensors file; got a.safet.*, b.safe"):
        pipe.load_lora(tmp_path)
    for scale in (float("nan"), float("inf"), True, "1"):
        with pytest.raises((TypeError, ValueError), match="load_lora: scale must be a"):
            pipe.load_lora(tmp_path / "a.safetensors", scale)


def test_a_merge_that_fails_changes_nothing(pipe, tmp_path, monkeypatch):
    before = weights(pipe)
    write_tensors(tmp_path / "a.safetensors", PAIR)
    with pytest.raises(ValueError, match="scale must leave .*to_q.weight finite in torch.float32"):
        pipe.load_lora(tmp_path / "a.safetensors", 1e39)
    write_tensors(tmp_path / "b.safetensors", diffusers_layout(adapter(pipe.transformer)))
    merge, calls = Adapters._merge, []

    def fails_once(self, name):
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        merge(self, name)

    monkeypatch.setattr(Adapters, "_merge", fails_once)
    with pytest.raises(KeyboardInterrupt):
        pipe.load_lora(tmp_path / "b.safetensors")
    assert all(torch.equal(t, before[name]) for name, t in pipe.transformer.state_dict().items())


def test_a_run_goes_on_with_the_same_adapters_only(pipe, tmp_path):
    kept = tmp_path / "kept.safetensors"
    (tmp_path / "loras").mkdir()
    for name, seed in (("kite", 3), ("bird", 4)):
        pairs = adapter(pipe.transformer, seed=seed)
        write_tensors(tmp_path / "loras" / f"{name}.safetensors", diffusers_layout(pairs))
    kite, bird = (tmp_path / "loras" / f"{name}.safetensors" for name in ("kite", "bird"))
    pipe.load_lora(kite, 0.8)
    done = pipe.generate(**SMALL, save_latents=kept)
    assert torch.equal(pipe.generate(**SMALL, resume=kept), done)
    for adapters in ([], [(bird, 0.8)], [(kite, 0.7)], [(kite, 0.8), (bird, 1.0)]):
        pipe.unload_lora()
        for path, scale in adapters:
            pipe.load_lora(path, scale)
        with pytest.raises(
            CheckpointError, match=r"options: lora .kite.safetensors \(scale 0.8, "
        ) as e:
            pipe.generate(**SMALL, resume=kept)
        assert "weights" not in str(e.value)
    pipe.unload_lora()
    pipe.generate(**SMALL, save_latents=kept)
    pipe.load_lora(kite)
    with pytest.raises(CheckpointError, match=r"lora null there, .kite.safetensors \(scale 1"):
        pipe.generate(**SMALL, resume=kept)


def test_another_transformer_has_no_adapters(pipe, tmp_path):
    write_tensors(tmp_path / "a.safetensors", PAIR)
    old = pipe.transformer
    before = weights(pipe)
    pipe.load_lora(tmp_path)
    pipe.transformer = new = randomised(tiny().transformer, 5)
    fresh = weights(pipe)
    pipe.unload_lora()
    assert all(torch.equal(t, fresh[name]) for name, t in new.state_dict().items())
    assert all(torch.equal(t, before[name]) for name, t in old.state_dict().items())
    pipe.transformer = old
