"""Computations of which nothing is kept but their input: the backward pass computes them again (Chen et al., 2016,
arXiv:1604.06174), with the same random numbers, so every bit is the same."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Moment:
    """What a computation on a device depends on beside its input: the generators' states, and autocast."""

    def __init__(self, device: torch.device):
        self.kind, self.on_gpu = device.type, [device] if device.type == "cuda" else []
        self.states = torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in self.on_gpu]
        self.autocast = torch.is_autocast_enabled(self.kind), torch.get_autocast_dtype(self.kind)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside it is as it was; behind it the generators go on as if nothing had been drawn."""
        enabled, dtype = self.autocast
        with torch.random.fork_rng(self.on_gpu), torch.autocast(self.kind, dtype, enabled), torch.enable_grad():
            torch.set_rng_state(self.states[0])
            for gpu, state in zip(self.on_gpu, self.states[1], strict=True):
                torch.cuda.set_rng_state(state, gpu)
            yield


class Forgotten:
    """function(x), of which x alone is kept; x needs a gradient or not, as `needs` says."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, needs: bool):
        self.function, self.x, self.needs, self.moment = function, x, needs, Moment(x.device)

    def differentiate(self, grad: Tensor) -> Tensor | None:
        """Compute it again, and backpropagate `grad`, the gradient at its output; returns that at x, where it is
        needed. What hooks and parameters get is what they got without the forgetting."""
        x = self.x.detach().requires_grad_(self.needs)
        with self.moment.again():
            y = self.function(x)
        torch.autograd.backward(y, grad)
        return x.grad


class Recomputed(torch.autograd.Function):
    """function(x), by Forgotten. `backward(forgotten, grad)` is called in the backward pass, also where x needs no
    gradient, and returns the gradient at x or None."""

    @staticmethod
    def forward(ctx, x: Tensor, start: Tensor, function: Callable, backward: Callable) -> Tensor:
        ctx.backward_of, ctx.forgotten = backward, Forgotten(function, x.detach(), ctx.needs_input_grad[0])
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        forgotten, ctx.forgotten = ctx.forgotten, None
        return ctx.backward_of(forgotten, grad), None, None, None


def recomputed(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    backward: Callable[[Forgotten, Tensor], Tensor | None] = Forgotten.differentiate,
) -> Tensor:
    """function(x), of which the backward pass keeps x alone. Without gradients it is an ordinary call."""
    if not torch.is_grad_enabled():
        return function(x)
    start = torch.zeros((), device=x.device, requires_grad=True)  # makes the output part of the graph, whatever x is
    return Recomputed.apply(x, start, function, backward)
