"""The released models: what diffusers computes with the same weights, and the golden counts."""

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import (
    get_3d_rotary_pos_embed,
    get_resize_crop_region_for_grid,
)

from cogvx.config import PRESETS, TransformerConfig
from cogvx.transformer import ExpertTransformer, rope_tables
from cogvx_kernels import module_backend

TINY = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=6,
    text_embed_dim=10,
    num_layers=2,
    sample_height=8,
    sample_width=12,
    sample_frames=9,
    max_text_seq_length=5,
)
ROPE = dict(TINY, use_rotary_positional_embeddings=True)
MODELS = {
    "2b": TINY,
    "5b": ROPE,
    "5b-i2v": dict(ROPE, in_channels=8, use_learned_positional_embeddings=True),
    "1.5-5b": dict(ROPE, patch_size_t=2, patch_bias=False),
    "1.5-5b-i2v": dict(ROPE, in_channels=8, patch_size_t=2, patch_bias=False, ofs_embed_dim=6),
}
# (frames, height, width) of latents: the size of the training, then other frames, taller than the
# training's aspect, wider, square, larger, one row of tokens.
SIZES = [(3, 8, 12), (5, 8, 12), (3, 12, 8), (1, 4, 16), (2, 6, 6), (2, 10, 20), (2, 2, 6)]
CASES = [
    pytest.param(name, size, id=f"{name}-{'x'.join(map(str, size))}")
    for name in MODELS
    for size in SIZES
    if name != "5b-i2v" or size[1:] == (8, 12)
]


def theirs_and_ours(name, dtype=torch.float32):
    """diffusers' model with random weights, and ours with the same."""
    config = TransformerConfig(**MODELS[name])
    theirs = CogVideoXTransformer3DModel(**MODELS[name])
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.add_(0.2 * torch.randn_like(tensor))
    with module_backend("reference"):
        ours = ExpertTransformer(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype), ours.to(dtype)


def error(got, fp64):
    return (got.to(fp64.dtype) - fp64).norm().item()


def inputs(name, size, dtype=torch.float32, batch=2):
    config = TransformerConfig(**MODELS[name])
    frames, height, width = size
    frames *= config.patch_size_t or 1
    latents = torch.randn(batch, frames, config.in_channels, height, width, dtype=dtype)
    text = torch.randn(batch, config.max_text_seq_length, config.text_embed_dim, dtype=dtype)
    timestep = torch.tensor([999, 37][:batch])
    ofs = torch.tensor([2.0]) if config.ofs_embed_dim else None
    return latents, text, timestep, ofs


def run_theirs(theirs, latents, text, timestep, ofs):
    """With the rotary tables of diffusers' own pipeline."""
    rotary = None
    if theirs.config.use_rotary_positional_embeddings:
        pipeline = object.__new__(CogVideoXPipeline)
        # What the pipeline's method reads, without a VAE and a text encoder around it.
        pipeline.__dict__.update(vae_scale_factor_spatial=8, transformer=theirs)
        height, width = (8 * side for side in latents.shape[3:])
        if theirs.config.patch_size_t and (height > 64 or width > 96):
            rotary = larger_slice_tables(theirs, latents)
        else:
            rotary = pipeline._prepare_rotary_positional_embeddings(
                height, width, latents.shape[1], torch.device("cpu")
            )
    return theirs(latents, text, timestep, ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0]


def larger_slice_tables(theirs, latents):
    """Beyond the end of diffusers' finite table: its table for a model of larger sample size."""
    _, frames, _, height, width = latents.shape
    return get_3d_rotary_pos_embed(
        embed_dim=theirs.config.attention_head_dim,
        crops_coords=None,
        grid_size=(height // 2, width // 2),
        temporal_size=frames // 2,
        grid_type="slice",
        max_size=(height // 2, width // 2),
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("name, size", CASES)
def test_equals_diffusers_in_fp32(name, size):
    theirs, ours = theirs_and_ours(name)
    arguments = inputs(name, size)
    with torch.no_grad():
        wanted, got = run_theirs(theirs, *arguments), ours(*arguments)
    assert got.shape == wanted.shape
    # Two roundings of a few hundred products each; measured 3e-7.
    assert error(got, wanted) <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", MODELS)
def test_bf16_errs_at_most_twice_what_diffusers_errs(name):
    theirs, ours = theirs_and_ours(name, torch.bfloat16)
    arguments = inputs(name, SIZES[0], torch.bfloat16)
    with torch.no_grad():
        of_theirs, of_ours = run_theirs(theirs, *arguments), ours(*arguments)
        latents, text, *times = arguments
        fp64 = run_theirs(theirs.double(), latents.double(), text.double(), *times)
    # The bound of the contract; measured 0.9 to 1.0.
    assert error(of_ours, fp64) <= 2 * error(of_theirs, fp64)


@pytest.mark.parametrize("text_len", [1, 9])
def test_any_text_length_with_rope(text_len):
    theirs, ours = theirs_and_ours("5b")
    latents, _, *times = inputs("5b", SIZES[0])
    text = torch.randn(2, text_len, TINY["text_embed_dim"])
    with torch.no_grad():
        wanted, got = run_theirs(theirs, latents, text, *times), ours(latents, text, *times)
    assert error(got, wanted) <= 1e-5 * wanted.norm()


def test_gradients_equal_diffusers():
    theirs, ours = theirs_and_ours("5b-i2v")
    arguments = inputs("5b-i2v", SIZES[0])
    run_theirs(theirs, *arguments).square().sum().backward()
    ours(*arguments).square().sum().backward()
    of_theirs = dict(theirs.named_parameters())
    assert of_theirs.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        wanted = of_theirs[name].grad
        assert error(parameter.grad, wanted) <= 1e-5 * wanted.norm(), name


@pytest.mark.parametrize("name", ["5b", "1.5-5b"])
@pytest.mark.parametrize("height, width", [(480, 720), (720, 480), (256, 256), (768, 1360)])
def test_rotary_tables_are_those_of_the_pipeline(name, height, width):
    config, frames = PRESETS[name].transformer, 6
    grid, base = (height // 16, width // 16), config.grid
    if config.patch_size_t is None:
        wanted = get_3d_rotary_pos_embed(
            config.attention_head_dim,
            get_resize_crop_region_for_grid(grid, base[1], base[0]),
            grid,
            frames,
        )
    else:
        wanted = get_3d_rotary_pos_embed(
            config.attention_head_dim,
            None,
            grid,
            frames // 2,
            grid_type="slice",
            max_size=(max(grid[0], base[0]), max(grid[1], base[1])),
        )
    got = rope_tables(config, frames, height // 8, width // 8)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours.repeat_interleave(2, 1), theirs)


def test_learned_positions_of_other_frames_are_sines_and_cosines_as_in_diffusers():
    """The learned table is not looked at, in either."""
    theirs, ours = theirs_and_ours("5b-i2v")
    arguments = inputs("5b-i2v", (4, 8, 12))
    with torch.no_grad():
        wanted = run_theirs(theirs, *arguments)
        ours.patch_embed.pos_embedding.fill_(float("nan"))
        got = ours(*arguments)
    assert error(got, wanted) <= 1e-5 * wanted.norm()


def test_learned_positions_begin_as_in_diffusers():
    theirs = CogVideoXTransformer3DModel(**MODELS["5b-i2v"]).patch_embed.pos_embedding
    ours = ExpertTransformer(TransformerConfig(**MODELS["5b-i2v"])).patch_embed.pos_embedding
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=6e-8)  # an ulp of fp32 at 1


# Of each released model: parameters, tensors in the state dict, elements of buffers.
GOLDEN = {
    "2b": (1_693_783_872, 736, 0),
    "5b": (5_570_283_072, 1024, 0),
    "5b-i2v": (5_570_479_680, 1025, 54_607_872),
    "1.5-5b": (5_570_676_352, 1024, 0),
    "1.5-5b-i2v": (5_571_594_880, 1028, 0),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_counts(name):
    with torch.device("meta"):
        model = ExpertTransformer(PRESETS[name].transformer)
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() for b in model.buffers())
    assert (parameters, len(model.state_dict()), buffers) == GOLDEN[name]


def test_every_preset_has_a_golden_count():
    assert GOLDEN.keys() == PRESETS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_shapes_are_those_of_diffusers(name):
    with torch.device("meta"):
        theirs = CogVideoXTransformer3DModel(**MODELS[name]).state_dict()
        ours = ExpertTransformer(TransformerConfig(**MODELS[name])).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
