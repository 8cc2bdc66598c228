"""LoRA adapters of a transformer by peft, saved as diffusers loads them."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoint.tensors import write_tensors
from ..extras import extra
from ..transformer import ExpertTransformer

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # as in CogVideoX's own training
FILE = "pytorch_lora_weights.safetensors"


def add_adapters(transformer: ExpertTransformer, rank: int) -> None:
    """Freeze the transformer and add adapters of scale 1 to its attention projections.

    Adapters are in float32 and start at zero, so that outputs are unchanged. Raises
    ModuleNotFoundError if peft is not installed.
    """
    peft = _peft()
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
    transformer.requires_grad_(False)
    peft.inject_adapter_in_model(config, transformer)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_adapters(transformer: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the file that `CogVideoX.load_lora` and diffusers' `load_lora_weights` read.

    transformer  with adapters; weights: its state dict
    """
    state: dict[str, Tensor] = _peft().get_peft_model_state_dict(transformer, weights)
    write_tensors(folder / FILE, {f"transformer.{name}": t for name, t in state.items()})


def _peft() -> Any:
    return extra("peft", "train", "cogvx[train]")
