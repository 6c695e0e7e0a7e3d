"""LoRA for PyTorch: the layer MergedLinear, and the helpers that freeze, save and merge the adapters of a model."""

from .layers import MergedLinear
from .utils import adapted_layers, lora_state_dict, mark_only_lora_as_trainable, merge, unmerge

__all__ = ["MergedLinear", "adapted_layers", "lora_state_dict", "mark_only_lora_as_trainable", "merge", "unmerge"]
