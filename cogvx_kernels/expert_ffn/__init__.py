"""Feed-forwards of a joint sequence: one for each modality, or for each expert."""

from .module import ExpertFFN
from .op import expert_ffn
from .reference import expert_ffn_reference

__all__ = ["ExpertFFN", "expert_ffn", "expert_ffn_reference"]
