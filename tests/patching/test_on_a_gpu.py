"""On a GPU, where the kernels run: the rule, the bits of a cache, and offloading for real."""

import pytest
import torch

import cogvx_kernels as ck
from tests.patching.small import double, generate, inputs, latents, pipeline, relative, vae

pytestmark = pytest.mark.gpu


def on_gpu(arguments):
    def moved(x):
        if isinstance(x, tuple):
            return tuple(map(moved, x))
        return x.cuda() if isinstance(x, torch.Tensor) else x

    return {name: moved(x) for name, x in arguments.items()}


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_of_both_models(dtype, mode, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pipe = pipeline()
    transformer = pipe.transformer.to("cuda", dtype)
    arguments = on_gpu(inputs(transformer, dtype=dtype))
    wide = {
        n: x.double() if n not in ("image_rotary_emb", "timestep") else x
        for n, x in arguments.items()
    }
    model, z = pipe.vae.to("cuda", dtype), latents(7, dtype=dtype).cuda()
    with torch.no_grad():
        fp64 = double(transformer)(**wide).sample, double(model).decode(z.double()).sample
        theirs = transformer(**arguments).sample, model.decode(z).sample
        report = ck.patch(pipe, mode=mode, backend="kernel")
        ours = transformer(**arguments).sample, model.decode(z).sample
    assert not any(row.fallbacks for row in report.rows)
    for mine, other, true in zip(ours, theirs, fp64, strict=True):
        assert relative(mine, true) <= 2 * relative(other, true) + 1e-6


def test_a_cache_changes_no_bit():
    model, z = vae().to("cuda"), latents(7).cuda()
    with torch.no_grad():
        wanted = model.decode(z).sample
        with ck.patched(model, ["cache"]):
            assert torch.equal(model.decode(z).sample, wanted)


@pytest.mark.parametrize("first", ["patch", "offload"])
def test_model_offload(first):
    pipe = pipeline()
    pipe.to("cuda")
    wanted = generate(pipe)
    pipe.to("cpu")
    if first == "patch":
        ck.patch(pipe)
    pipe.enable_model_cpu_offload()
    report = ck.patch(pipe)
    assert (generate(pipe) - wanted).abs().max() < 1e-3
    assert all(row.hit for row in report.rows)


def test_groups_offloaded_on_a_stream():
    pipe = pipeline()
    pipe.to("cuda")
    arguments = on_gpu(inputs(pipe.transformer))
    with torch.no_grad():
        wanted = pipe.transformer(**arguments).sample
    pipe.transformer.to("cpu")
    ck.patch(pipe.transformer)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1,
        use_stream=True,
    )  # fmt: skip
    with torch.no_grad():
        assert relative(pipe.transformer(**arguments).sample, wanted.double()) < 1e-4
    assert ck.explain(pipe.transformer)["adaln"].hit == 4
