"""What makes the steps of a training."""

import re

import torch
from torch import nn

from .recipe import Training

# A transformer's hidden matrices: not a router, nor what makes scales and shifts of the time.
HIDDEN = re.compile(r"(^|\.)transformer_blocks\.\d+\.(attn1\.to_|ff\..*\.net\.).*weight$")


def make_optimizers(loss: nn.Module, options: Training) -> dict[torch.optim.Optimizer, float]:
    """AdamW of all that is trained; or Muon of the hidden matrices, and AdamW of the rest.

    Each with its highest learning rate. Muon makes the singular values of a matrix's momentum all
    about one, and steps along that.
    """
    rest, hidden = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in loss.named_parameters():
        if parameter.requires_grad:
            orthogonal = options.optimizer == "muon" and HIDDEN.search(name)
            (hidden if orthogonal else rest).append(parameter)
    decay = options.weight_decay
    adamw = torch.optim.AdamW(rest, betas=(options.beta1, options.beta2), weight_decay=decay)
    made: dict[torch.optim.Optimizer, float] = {adamw: options.learning_rate}
    if hidden:
        muon = torch.optim.Muon(hidden, weight_decay=decay)
        made[muon] = options.muon_learning_rate
    return made
