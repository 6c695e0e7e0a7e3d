"""float32 matrix products through oneDNN where PyTorch's BLAS is slow: on CPUs that are not Intel's.

PyTorch sends float32 products to MKL, which uses half of what an AMD core can do: 88 GFLOP/s a core against 197
through oneDNN (AMD EPYC with AVX-512; 1024 x 768 by 768 x 3072). On an Intel core MKL is the faster one: 177 against
160, and for a weight's gradient by 1.3 to 3 times. The operator is the one that torch.compile's CPU backend emits for a
linear layer. Where it does not apply (GPU, other types, autocast, a build without oneDNN) these functions are
PyTorch's own. The choice rests on the maker's name and not on a timing, so that a resumed run computes the same bits.

Shapes: n rows, I in_features, O out_features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def made_by_intel() -> bool:
    """Whether the CPU says that Intel made it; Linux alone tells."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as handle:
            return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in handle)
    except OSError:
        return False


AVAILABLE = (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
             and not made_by_intel())


def applies(x: Tensor, weight: Tensor) -> bool:
    return (AVAILABLE and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
            and not torch.is_autocast_enabled("cpu"))


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (n, I) times the transpose of b (O, I), plus bias (O,): (n, O). No gradient flows through it."""
    if applies(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return F.linear(a, b, bias)


def add_product(target: Tensor, p: Tensor, q: Tensor) -> None:
    """target (P, Q) += p' q for p (n, P), q (n, Q): in one pass over `target` where BLAS does it."""
    if applies(p, q):
        target.add_(product(p.T, q.T))
    else:
        target.addmm_(p.T, q)


class OneDNNLinear(torch.autograd.Function):
    """F.linear(x, weight, bias) for x (n, I), weight (O, I)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # a frozen weight needs no input for its gradient, and a weight is needed only for the input's
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (product(grad, weight.T) if need_x else None, product(grad.T, x.T) if need_weight else None,
                grad.sum(0) if need_bias else None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    if not applies(x, weight):
        return F.linear(x, weight, bias)
    return OneDNNLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))
