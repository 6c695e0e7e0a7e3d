"""LoRA layers for PyTorch: Linear, MergedLinear, Embedding, and the helpers that freeze, save and merge them."""

from .layers import Embedding, Linear, LoRALayer, MergedLinear
from .utils import adapted_layers, lora_state_dict, mark_only_lora_as_trainable, merge, unmerge

__all__ = [
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "adapted_layers",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "unmerge",
]
