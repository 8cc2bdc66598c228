"""Peak signal-to-noise ratio of videos."""

import math

from torch import Tensor


class PSNR:
    """Peak signal-to-noise ratio in dB, accumulated over chunks of videos in [-1, 1]."""

    def __init__(self) -> None:
        self.squared = 0.0
        self.count = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        if a.shape != b.shape:
            raise ValueError(f"PSNR: shapes must be equal; got {tuple(a.shape)}, {tuple(b.shape)}")
        difference = a.clamp(-1, 1).double() - b.clamp(-1, 1).to(a.device).double()
        self.squared += float(difference.square().sum())
        self.count += a.numel()

    @property
    def decibels(self) -> float:
        """PSNR in dB; infinite for equal videos."""
        return 10 * math.log10(4 * self.count / self.squared) if self.squared else math.inf


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two videos, clamped to [-1, 1]."""
    measure = PSNR()
    measure.add(a, b)
    return measure.decibels
