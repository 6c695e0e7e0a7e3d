"""Per-sample gradients of this project's layers, registered with Opacus when this module is imported.

Opacus calls a sampler with the layer, its inputs and the gradient at its output, and wants {parameter: its gradient for
each sample}. A gradient of a matrix that acts on positions is a sum of outer products over them; all that is particular
to the adapters are their factors, MergedLinear.adapter_factors. Opacus adds up what two layers return for one
parameter, so the tied embedding (wte and lm_head) needs no more than a sampler on each side.

Guarantees: sums and results are at least float32, under autocast too.

Shapes: B samples, ... any positions, I in_features, O out_features, D width, R rank, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn

import loralib as lora
from model import Conv1D, TiedHead

Gradients = dict[nn.Parameter, Tensor]


def register(*layers: type[nn.Module]) -> Callable:
    """Register `sampler(layer, x, grad)` for `layers`: x is the layer's input, grad the gradient at its output."""

    def decorate(sampler: Callable[[nn.Module, Tensor, Tensor], Gradients]) -> Callable:
        @register_grad_sampler(layers)
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


@register(lora.MergedLinear, lora.Linear)
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


@register(TiedHead)
def sample_tied_head(layer: TiedHead, states: Tensor, grad: Tensor) -> Gradients:
    return {layer.weight: outer(grad, states)} if layer.weight.requires_grad else {}  # (B, V, D)


@register(lora.Embedding)
def sample_embedding(layer: lora.Embedding, ids: Tensor, grad: Tensor) -> Gradients:
    """ids (B, ...), grad (B, ..., D)."""
    # padding_idx: a looked-up row of that id gets no gradient
    looked_up = grad if layer.padding_idx is None else grad * (ids != layer.padding_idx).unsqueeze(-1)
    gradients = {}
    if layer.weight.requires_grad:
        gradients[layer.weight] = scatter_rows(ids, looked_up, layer.num_embeddings)
    if layer.has_adapter() and layer.lora_A.requires_grad:
        up = looked_up @ layer.lora_B * layer.scaling  # (B, ..., R)
        gradients[layer.lora_A] = scatter_rows(ids, up, layer.num_embeddings).transpose(1, 2)  # (B, R, V)
    if layer.has_adapter() and layer.lora_B.requires_grad:
        gradients[layer.lora_B] = outer(grad * layer.scaling, F.embedding(ids, layer.lora_A.T))  # (B, D, R)
    return gradients


def scatter_rows(ids: Tensor, rows: Tensor, count: int) -> Tensor:
    """Row t of `rows` (B, ..., M) added to row ids[t] of a zero (B, count, M), for each sample."""
    index = ids.unsqueeze(-1).flatten(1).unsqueeze(-1)  # (B, positions, 1)
    B, positions, M = *index.shape[:2], rows.shape[-1]
    return rows.new_zeros(B, count, M).scatter_add_(1, index.expand(-1, -1, M), rows.reshape(B, positions, M))
