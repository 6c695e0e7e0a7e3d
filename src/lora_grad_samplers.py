"""Per-sample gradients of this project's layers, registered with Opacus when this module is imported.

Opacus calls a sampler with the layer, its inputs and the gradient at its output, and wants {parameter: its gradient for
each sample}. The gradient of a matrix that acts on positions is a sum of outer products over them, with the factors
of MergedLinear.adapter_factors() for the adapters. Opacus adds up what two layers return for one parameter, so the tied
embedding (wte and lm_head) needs a sampler on each side and no more.

Guarantees: sums and results are at least float32, under autocast too.

Shapes: B samples, ... any positions, I in_features, O out_features, D width, R rank, V vocabulary.
"""

from collections.abc import Callable

import torch
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn

import loralib as lora
from base.products import inverse_rms
from language_model import Head, TiedHead
from llama import RMSNorm
from model import Conv1D

Gradients = dict[nn.Parameter, Tensor]


def register(kind: type[nn.Module]) -> Callable:
    """Register `sampler(layer, x, grad)` for layers of a kind: x is the input, grad the gradient at the output."""

    def decorate(sampler: Callable[[nn.Module, Tensor, Tensor], Gradients]) -> Callable:
        @register_grad_sampler(kind)
        def sample(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> Gradients:
            with torch.autocast(backprops.device.type, enabled=False):
                return sampler(layer, activations[0], backprops.to(torch.promote_types(backprops.dtype, torch.float32)))

        return sampler

    return decorate


def outer(p: Tensor, q: Tensor) -> Tensor:
    """The sum over positions of p ⊗ q: (B, ..., M), (B, ..., N) -> (B, M, N)."""
    return torch.einsum("b...m,b...n->bmn", p, q.to(p.dtype))


def linear_gradients(layer: nn.Module, x: Tensor, grad: Tensor, fan_in_fan_out: bool) -> Gradients:
    """Of the weight, (I, O) when fan_in_fan_out and else (O, I), and of the bias (O,), where they are trainable."""
    gradients = {}
    if layer.weight.requires_grad:
        gradients[layer.weight] = outer(x.to(grad.dtype), grad) if fan_in_fan_out else outer(grad, x)
    if layer.bias is not None and layer.bias.requires_grad:
        gradients[layer.bias] = torch.einsum("b...o->bo", grad)
    return gradients


@register(lora.MergedLinear)
def sample_merged_linear(layer: lora.MergedLinear, x: Tensor, grad: Tensor) -> Gradients:
    gradients = linear_gradients(layer, x, grad, layer.fan_in_fan_out)
    if layer.has_adapter() and (layer.lora_A.requires_grad or layer.lora_B.requires_grad):
        factors_a, factors_b = layer.adapter_factors(x, grad)
        if layer.lora_A.requires_grad:
            gradients[layer.lora_A] = outer(*factors_a)  # (B, G*R, I)
        if layer.lora_B.requires_grad:
            gradients[layer.lora_B] = torch.cat([outer(p, q) for _, p, q in factors_b], dim=1)  # (B, G*O/slots, R)
    return gradients


@register(Conv1D)
def sample_conv1d(layer: Conv1D, x: Tensor, grad: Tensor) -> Gradients:
    return linear_gradients(layer, x, grad, fan_in_fan_out=True)


@register(RMSNorm)
def sample_rms_norm(layer: RMSNorm, x: Tensor, grad: Tensor) -> Gradients:
    if not layer.weight.requires_grad:
        return {}
    rows = x.to(grad.dtype).flatten(0, -2)
    normalised = (rows * inverse_rms(rows, layer.eps)).view_as(x)
    return {layer.weight: torch.einsum("b...d->bd", grad * normalised)}  # (B, D)


@register(Head)
@register(TiedHead)
def sample_head(layer: Head, states: Tensor, grad: Tensor) -> Gradients:
    return {layer.weight: outer(grad, states)} if layer.weight.requires_grad else {}  # (B, V, D)
