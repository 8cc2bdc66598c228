"""Tiny transformers of every kind, and one training step of them on ranks."""

import dataclasses

import torch
import torch._dynamo  # checkpointing imports it: once here, not for 3 s in each rank
import torch.distributed as dist

from cogvx.config import TransformerConfig
from cogvx.training.lora import add_adapters
from cogvx.transformer import ExpertTransformer, load_balancing_loss
from cogvx_kernels import module_backend
from cogvx_kernels.context_parallel import Context
from tests.model.transformer.tiny import EXPERTS, ROPE, SIN_COS, shaken

FIVE_HEADS = dataclasses.replace(ROPE, num_attention_heads=5)
KINDS: dict[str, TransformerConfig] = {
    "2B": dataclasses.replace(SIN_COS, num_attention_heads=4),
    "5B": FIVE_HEADS,
    "1.5": dataclasses.replace(ROPE, patch_size_t=2, num_attention_heads=4, sample_frames=13),
    "I2V": dataclasses.replace(
        ROPE, use_learned_positional_embeddings=True, in_channels=8, num_attention_heads=4
    ),
    "routed": dataclasses.replace(EXPERTS, num_attention_heads=4, num_text_experts=3),
    "LoRA": FIVE_HEADS,
    "one expert each": dataclasses.replace(FIVE_HEADS, num_text_experts=1, num_video_experts=1),
    "one block": dataclasses.replace(FIVE_HEADS, num_layers=1),
    "2 heads": ROPE,  # fewer than ranks: "auto" gathers keys and values
    "long text": FIVE_HEADS,  # a rank without video tokens
}


def build(kind, dtype=torch.float32, backend="reference"):
    torch.manual_seed(0)
    with module_backend(backend):
        model = shaken(ExpertTransformer(KINDS[kind])).to(dtype)
    if kind == "LoRA":
        add_adapters(model, 2)
        shaken(model).to(dtype)
    return model


def inputs(kind, dtype=torch.float32):
    config = KINDS[kind]
    torch.manual_seed(1)
    frames, text_len = (4 if config.patch_size_t else 2), (24 if kind == "long text" else 5)
    latents = torch.randn(2, frames, config.in_channels, 4, 6, dtype=dtype)
    text = torch.randn(2, text_len, config.text_embed_dim, dtype=dtype)
    return latents, text, torch.tensor([3, 700])


def train_step(model, latents, text, timestep):
    """v, the statistics of the routers, and the gradients of this process."""
    latents, text = latents.requires_grad_(), text.requires_grad_()
    routing = []
    v = model(latents, text, timestep, routing=routing)
    weight = torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view_as(v)
    loss = (weight * v).sum()
    if routing:
        loss = loss + 10 * load_balancing_loss(routing)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained |= {"latents": latents, "text": text}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    statistics = [torch.stack(r).detach() for r in routing]
    return v.detach(), statistics, dict(zip(trained, gradients, strict=True))


def on_a_rank(kind, dtype, method, checkpointing, change=None):
    """v, statistics and the mean of the ranks' gradients, of a context of all ranks."""
    model = build(kind, dtype)
    model.gradient_checkpointing = checkpointing
    model.context = Context.of(dist.group.WORLD, method)
    v, statistics, gradients = train_step(change(model) if change else model, *inputs(kind, dtype))
    unused = [name for name, gradient in gradients.items() if gradient is None]
    assert not unused, f"without a gradient: {unused}"
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return v, statistics, gradients if dist.get_rank() == 0 else None
