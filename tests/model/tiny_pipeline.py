"""Models small enough to generate with in a test: ours, and diffusers' with the same weights."""

import json

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
)
from transformers import T5Tokenizer

from cogvx.checkpoint import save_transformer
from cogvx.checkpoint.folder import transformer_values, vae_values
from cogvx.config import SchedulerConfig, TransformerConfig, VAEConfig
from cogvx.pipeline import CogVideoX
from cogvx.text import T5TextEncoder
from cogvx.transformer import ExpertTransformer
from cogvx.vae import CausalVAE
from cogvx_kernels import module_backend
from tests.model.released_text import random_t5, write_text_encoder

CHANNELS, DIM, TEXT_LEN = 4, 16, 6
SIDE = 32  # pixels: a grid of 2x2 tokens
SCHEDULER = SchedulerConfig(snr_shift_scale=1.0)
SOLVERS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
PIPELINES = {
    "text": CogVideoXPipeline,
    "image": CogVideoXImageToVideoPipeline,
    "video": CogVideoXVideoToVideoPipeline,
}

# What the tiny text encoder knows, letters aside.
WORDS = "a the panda plays guitar in bamboo forest while rain falls on quiet green leaves".split()

# One of each released kind.
_ROPE = {"use_rotary_positional_embeddings": True}
_1_5 = {**_ROPE, "patch_size_t": 2, "patch_bias": False}
KINDS = {
    "2b": {},
    "5b": _ROPE,
    "5b-i2v": {**_ROPE, "in_channels": 8, "use_learned_positional_embeddings": True},
    "1.5": _1_5,
    "1.5-i2v": {**_1_5, "in_channels": 8, "ofs_embed_dim": 16},
}


class Words:
    """A text encoder without a file: a prompt's letters seed its embeddings."""

    dim = DIM

    def __init__(self):
        self.seen = []

    def encode(self, prompts, max_length):
        self.seen.append(list(prompts))
        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
            rows.append(torch.randn(max_length, DIM, generator=generator))
        return torch.stack(rows)


def transformer_config(kind, **options):
    values = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,  # 16: diffusers pairs the dims of 4, 6 and 6
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 16,
        "text_embed_dim": DIM,
        "num_layers": 2,
        "sample_width": SIDE // 8,
        "sample_height": SIDE // 8,
        "sample_frames": 9,
        "max_text_seq_length": TEXT_LEN,
        **KINDS[kind],
    }
    return TransformerConfig(**{**values, **options})


def vae_config(kind, **options):
    values = {
        "latent_channels": CHANNELS,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "sample_height": SIDE,
        "sample_width": SIDE,
        "scaling_factor": 0.7,
        "invert_scale_latents": kind.startswith("1.5"),
    }
    return VAEConfig(**{**values, **options})


def randomised(module, seed=0):
    """Weights of no special values, so that nothing is zero by chance of an initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def tiny(kind="5b", seed=0, **options):
    """A pipeline of ours with random weights, and videos that mostly stay within [-1, 1].

    The kernels are tested elsewhere; here, where they would be interpreted, references run.
    """
    with module_backend("reference"):
        transformer = ExpertTransformer(transformer_config(kind))
    vae = randomised(CausalVAE(vae_config(kind)), seed + 1)
    with torch.no_grad():
        for parameter in vae.decoder.conv_out.parameters():
            parameter.mul_(0.2)
    return CogVideoX(randomised(transformer, seed), vae, SCHEDULER, Words(), **options)


def save(folder, kind="5b"):
    """A tiny model in the hub's layout, text encoder and all."""
    pipe = tiny(kind)
    pipe.text_encoder = text_encoder(DIM)
    pipe.save_pretrained(folder)


def save_released(folder, kind="5b"):
    """A tiny model as the hub has them: bfloat16, large parts sharded, spiece.model alone."""
    pipe = tiny(kind)
    for part in (pipe.transformer, pipe.vae):
        part.to(torch.bfloat16)
    pipe.save_pretrained(folder)
    save_transformer(pipe.transformer, folder / "transformer", max_shard_bytes=30_000)
    write_text_encoder(folder, DIM)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "T5EncoderModel"]
    index["tokenizer"] = ["transformers", "T5Tokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))


def text_encoder(dim):
    """A random T5 of two layers, and its tokenizer."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    vocabulary += [(f"▁{word}", -float(i + 1)) for i, word in enumerate(WORDS)]
    vocabulary += [(letter, -30.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    return T5TextEncoder(random_t5(dim, len(tokenizer)), tokenizer)


def embeds(batch=1, seed=7):
    """Embeddings to give, (prompt, negative)."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, batch, TEXT_LEN, DIM, generator=generator)
    return {"prompt_embeds": both[0], "negative_prompt_embeds": both[1]}


def picture(*shape, seed=8):
    """Random pixels in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(*shape, 3, SIDE, SIDE, generator=generator) - 1


def theirs(pipe, mode, solver):
    """diffusers' pipeline with the weights of ours."""
    transformer = CogVideoXTransformer3DModel.from_config(
        transformer_values(pipe.transformer.config)
    )
    transformer.load_state_dict(pipe.transformer.state_dict())
    vae = AutoencoderKLCogVideoX.from_config(vae_values(pipe.vae.config))
    vae.load_state_dict(pipe.vae.state_dict())
    scheduler = SOLVERS[solver].from_config({**pipe.scheduler.to_dict(), "clip_sample": False})
    other = PIPELINES[mode](None, None, vae.eval(), transformer.eval(), scheduler)
    other.set_progress_bar_config(disable=True)
    return other
