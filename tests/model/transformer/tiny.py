"""The smallest transformer, and weights unlike those that training begins with."""

import dataclasses

import torch

from cogvx.config import TransformerConfig

SIN_COS = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=6,
    text_embed_dim=10,
    num_layers=2,
    sample_height=4,
    sample_width=6,
    sample_frames=5,
    max_text_seq_length=5,
)
ROPE = dataclasses.replace(SIN_COS, use_rotary_positional_embeddings=True)
EXPERTS = dataclasses.replace(ROPE, num_text_experts=1, num_video_experts=4, expert_top_k=2)


def shaken(module):
    """Training begins with many zeros, behind which nothing can be seen."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module
