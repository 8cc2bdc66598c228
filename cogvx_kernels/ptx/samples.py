"""Samples of ops on the compiled code, compared by the rule of `cogvx_kernels.testing`."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import torch

from .._opinfo import OpInfo, Sample
from ..testing import Comparison, as_tuple, compare, evaluate, grad_outputs_like, materialize
from .launch import Launch, executing


@dataclasses.dataclass
class Result:
    """A sample in a dtype, executed: comparisons of its tensors, and its launches."""

    info: OpInfo
    sample: Sample
    dtype: torch.dtype
    comparisons: Sequence[Comparison]
    launches: Sequence[Launch]

    @property
    def missed(self) -> list[Comparison]:
        return [c for c in self.comparisons if not c.ok]

    @property
    def faults(self) -> list[str]:
        return sorted({f"{x.name}: {text}" for x in self.launches for text in x.faults})

    @property
    def ok(self) -> bool:
        return not self.missed and not self.faults

    @property
    def classes(self) -> Counter[str]:
        """Warp instructions by class (`issue.classify`)."""
        total: Counter[str] = Counter()
        for launch in self.launches:
            for warps, uses in zip(launch.counters.blocks, launch.program.uses, strict=True):
                total.update({kind: int(warps) * use.instructions for kind, use in uses.items()})
        return total


def run_sample(
    info: OpInfo, sample: Sample, dtype: torch.dtype, arch: int, *, counting: bool = True
) -> Result:
    """Run the op and its gradients on a sample; new tensors hold NaN until they are written."""
    arguments = materialize(sample, dtype)
    grad_outputs = grad_outputs_like(as_tuple(info.reference(**arguments)), 0)
    launches: list[Launch] = []
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty
    try:
        with executing(arch, done=launches.append, counting=counting):
            ours = evaluate(info.op, arguments, info.differentiable, grad_outputs, backend="kernel")
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    comparisons = compare(info, sample, dtype, arguments=arguments, ours=ours)
    return Result(info, sample, dtype, comparisons, launches)
