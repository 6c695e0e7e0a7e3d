"""Freezing, saving and merging the adapters of a whole model."""

from torch import Tensor, nn

from .layers import MergedLinear


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze every parameter whose name holds no `lora_`, except for biases: "none", "all", or "lora_only", those of
    adapted layers."""
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias={bias!r}: expected "none", "all" or "lora_only"')
    for name, parameter in model.named_parameters():
        is_bias = name == "bias" or name.endswith(".bias")
        parameter.requires_grad_("lora_" in name or (bias == "all" and is_bias))
    if bias == "lora_only":
        for layer in adapted_layers(model):
            if layer.bias is not None:
                layer.bias.requires_grad_(True)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The part of `model.state_dict()` that mark_only_lora_as_trainable(model, bias) leaves trainable."""
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias={bias!r}: expected "none", "all" or "lora_only"')
    layers = set(adapted_layers(model))
    adapted = {name for name, layer in model.named_modules() if layer in layers}
    kept = {}
    for name, value in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if "lora_" in name or (leaf == "bias" and (bias == "all" or (bias == "lora_only" and owner in adapted))):
            kept[name] = value
    return kept


def adapted_layers(model: nn.Module) -> list[MergedLinear]:
    return [layer for layer in model.modules() if isinstance(layer, MergedLinear) and layer.has_adapter()]


def merge(model: nn.Module) -> None:
    """Fold every adapter into its base weight, for inference."""
    for layer in adapted_layers(model):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo merge(), bit for bit."""
    for layer in adapted_layers(model):
        layer.unmerge()
