"""AdamW and Muon, and which parameters each of them trains."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..transformer.module_utils import is_sharded, local
from .recipe import Training

# The hidden matrices of a transformer, without routers and modulation.
HIDDEN = re.compile(r"(^|\.)transformer_blocks\.\d+\.(attn1\.to_|ff\..*\.net\.).*weight$")


def make_optimizers(loss: nn.Module, options: Training) -> dict[torch.optim.Optimizer, float]:
    """Make AdamW for all parameters, or Muon for hidden matrices and AdamW for the rest.

    Returns each optimizer with its highest learning rate. Muon steps along the momentum with all
    singular values set to about one.
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
        made[Muon(hidden, weight_decay=decay)] = options.muon_learning_rate
    return made


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, also of sharded matrices; on a CPU its iteration is in float32.

    A CPU without bfloat16 instructions takes some twenty times as long in bfloat16, and one with
    them would give other bits. Of sharded matrices each rank orthogonalizes some, as a whole.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Run one step, of parameters that all have gradients. `closure` is not called."""
        for group in self.param_groups:
            parameters, rate = group["params"], group["lr"]
            ranks = parameters[0].device_mesh.size() if is_sharded(parameters[0]) else 1
            for first in range(0, len(parameters), ranks):
                some = parameters[first : first + ranks]
                updates = [self._update(p, group["momentum"]) for p in some]
                whole = _exchange(some, updates, group) if ranks > 1 else updates
                for parameter, update in zip(some, whole, strict=True):
                    rows, columns = parameter.shape
                    weight = local(parameter.detach())
                    if ranks == 1:
                        update = _orthogonalize(update, group)
                    weight.mul_(1 - rate * group["weight_decay"])
                    weight.add_(update, alpha=-rate * max(1, rows / columns) ** 0.5)

    def _update(self, parameter: Tensor, momentum: float) -> Tensor:
        """Update the momentum; returns this rank's shard of Nesterov's step, not orthogonal yet."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        gradient, buffer = local(parameter.grad), local(state["momentum_buffer"])
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)


def _exchange(
    parameters: Sequence[Any], shards: Sequence[Tensor], group: dict[str, Any]
) -> Iterable[Tensor]:
    """Orthogonalize at most one matrix for each rank, there as a whole; returns their shards."""
    mesh = parameters[0].device_mesh
    ranks, rank = mesh.size(), mesh.get_local_rank()
    none = [0] * (ranks - len(shards))
    sent, received = [shard.numel() for shard in shards] + none, [0] * ranks
    if rank < len(shards):
        rows, columns = parameters[rank].shape
        most = -(-rows // ranks)  # as DTensor and torch.chunk split rows
        received = [columns * max(0, min(most, rows - i * most)) for i in range(ranks)]
    flat = torch.cat([shard.flatten() for shard in shards])
    whole = flat.new_empty(sum(received))
    dist.all_to_all_single(whole, flat, received, sent, mesh.get_group())
    if rank < len(shards):
        whole = _orthogonalize(whole.view(rows, columns), group).to(whole.dtype).flatten()
    dist.all_to_all_single(flat, whole, sent, received, mesh.get_group())
    return [x.view_as(y) for x, y in zip(flat.split(sent), shards, strict=False)]


def _orthogonalize(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """Newton-Schulz iteration towards singular values of about one. Source: `torch.optim.Muon`."""
    x = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    a, b, c = group["ns_coefficients"]
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
