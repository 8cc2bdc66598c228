"""Causal temporal convolution, dense or depthwise."""

from .module import TemporalConv
from .op import temporal_conv
from .reference import temporal_conv_reference

__all__ = ["TemporalConv", "temporal_conv", "temporal_conv_reference"]
