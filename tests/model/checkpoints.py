"""Models small enough to save and load all day, and files of safetensors written by hand."""

import json
import os
import struct

import torch

from cogvx.config import TransformerConfig
from cogvx.transformer import ExpertTransformer

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": 4,
}


def randomised(model):
    with torch.no_grad():
        for parameter in model.state_dict().values():
            parameter.normal_()
    return model


def tiny_transformer(**options):
    return randomised(ExpertTransformer(TransformerConfig(**{**TINY, **options})))


def assert_equal(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype is others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


def assert_same(model, other):
    assert_equal(model.state_dict(), other.state_dict())


def files(folder):
    return sorted(os.listdir(folder))


def written(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path
