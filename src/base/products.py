"""Products of activations with weights: through oneDNN where PyTorch's BLAS is slow, and in blocks of rows.

PyTorch sends float32 products to MKL, which uses half of what an AMD core can do: 88 GFLOP/s a core against 197
through oneDNN (AMD EPYC with AVX-512; 1024 x 768 by 768 x 3072). On an Intel core MKL is the faster one: 177 against
160, and for a weight's gradient by 1.3 to 3 times. So oneDNN serves CPUs that are not Intel's, by the operator that
torch.compile's CPU backend emits for a linear layer. Where uses_onednn() says no (GPU, other types, autocast, a build
without oneDNN) these functions are PyTorch's own. The choice rests on the maker's name and not on a timing, so that a
resumed run computes the same bits.

In a private run the bits of a row must not depend on the other rows either. See row_blocks().

Shapes: n rows, I in_features, O out_features.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def made_by_intel() -> bool:
    """Whether the CPU is Intel's, by /proc/cpuinfo; False where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as handle:
            return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in handle)
    except OSError:
        return False


AVAILABLE = (
    torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not made_by_intel()
)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether products of these two go through oneDNN."""
    return (
        AVAILABLE
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear by oneDNN; weight (O, I), plain or packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (n, I) times the transpose of b (O, I), plus bias (O,): (n, O). No gradient flows through it."""
    if uses_onednn(a, b):
        return onednn_linear(a, b, bias)
    return F.linear(a, b, bias)


class PackedLinear:
    """product() with one weight that serves many times: where it goes through oneDNN, the weight is packed for it once.

    On an AMD EPYC the packed product ran 2 to 3.5 times as fast as PyTorch's own (MKL): 430 against 130 GFLOP/s for 300
    rows of width 128 on two cores. On one core of an Intel Xeon it is the slower one: 150 against 160, and with 10 rows
    42 against 94.
    """

    ROWS = 32  # oneDNN compiles a product for each number of rows that it meets: with multiples of this it meets few

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight (O, I), copied where it is packed; bias (O,)."""
        self.bias = bias
        self.packed = uses_onednn(weight, weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 256) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, I) -> (n, O)."""
        if self.packed:
            return onednn_linear(F.pad(x, (0, 0, 0, -len(x) % self.ROWS)), self.weight, self.bias)[: len(x)]
        return F.linear(x, self.weight, self.bias)


# ------------------------------------------------------------------ the same bits for a row, whatever the others are

# Rows that one kernel call takes where row_blocks() asks for blocks. On 2 cores a block of 128 rows reaches 0.95 of the
# rate of 2,048 (768 x 3072); larger ones leave more filler. On a GPU a call has to be worth its launch.
BLOCK_ROWS = {"cpu": 128, "cuda": 1024}

block_rows = 0  # set by row_blocks(); 0: all rows at once


@contextlib.contextmanager
def row_blocks(rows: int) -> Iterator[None]:
    """Inside, linear(), gelu() and by_rows() call their kernels on `rows` rows at a time, the last block filled up with
    zeros.

    Libraries choose a kernel, and so the order of a row's sums, by the shape of the operands. So the result of a row
    would depend on the number of other rows; in bfloat16 it changes by up to 2^-8 of itself. With one shape there is
    one kernel, which computes every row alike (tests/privacy/test_company.py).
    """
    global block_rows
    before, block_rows = block_rows, rows
    try:
        yield
    finally:
        block_rows = before


def by_rows(function: Callable[..., Tensor], *operands: Tensor, rows: int | None = None) -> Tensor:
    """function(*operands) for operands (n, ...), row by row independent, in blocks of `rows` (default: those of
    row_blocks()): (n, ...)."""
    rows = block_rows if rows is None else rows
    n = len(operands[0])
    if not rows or n == 0:
        return function(*operands)
    out = None
    for start in range(0, n, rows):
        block = [fill_up(operand[start : start + rows], rows) for operand in operands]
        result = function(*block)
        if out is None:
            out = result.new_empty(n, *result.shape[1:])
        out[start : start + rows] = result[: n - start]
    return out


def product_by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """product(x, weight, bias) in blocks of `rows` (0: all at once), each written where it belongs: by_rows()
    without its copy of every block. x (n, I), weight (O, I), bias (O,) -> (n, O)."""
    n = len(x)
    whole = n - n % rows if rows else 0
    if not whole or uses_onednn(x, weight):
        return by_rows(lambda block: product(block, weight, bias), x, rows=rows)
    out, columns = x.new_empty(n, len(weight)), weight.T
    for block, target in zip(x[:whole].split(rows), out[:whole].split(rows), strict=True):
        if bias is None:
            torch.mm(block, columns, out=target)
        else:
            torch.addmm(bias, block, columns, out=target)
    if whole < n:
        out[whole:] = product(fill_up(x[whole:], rows), weight, bias)[: n - whole]
    return out


def fill_up(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` (n, ...), n <= rows, with rows of zeros behind it: (rows, ...)."""
    missing = rows - len(tensor)
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


class FixedLinear:
    """product() with one weight that serves many times, `rows` rows a call, the last call filled up with zeros: the
    bits of a row depend on no other row, nor on their number (see row_blocks()).

    oneDNN packs the weight where it can, on an Intel core too: with one number of rows it compiles one product. One
    core of an Intel Xeon, 64 rows, 768 x 3072: 107 GFLOP/s against 91 (MKL); in bfloat16 434 against 281.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, rows: int = 64):
        """weight (O, I), copied where it is packed; bias (O,)."""
        self.bias, self.rows = bias, rows
        self.packed = (
            torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and weight.device.type == "cpu"
            and (
                weight.dtype == torch.float32
                or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
            )
        )
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, I) -> (n, O)."""
        kernel = onednn_linear if self.packed else F.linear
        return by_rows(lambda block: kernel(block, self.weight, self.bias), x, rows=self.rows)


class Linear(torch.autograd.Function):
    """F.linear(x, weight, bias) for x (n, I), weight (O, I), in blocks of `rows`; under autocast in its type."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        kind = x.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.rows, ctx.types = rows, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        # of a weight that is held in fewer bits than it is multiplied in, no wide copy stays until backward
        kept, x, weight = weight, x.to(low), weight.to(low)
        kept = kept if kept.element_size() < weight.element_size() else weight
        bias = None if bias is None else bias.to(low)
        # a frozen weight needs no input for its gradient, and a weight is needed only for the input's
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, kept if ctx.needs_input_grad[0] else None)
        with torch.autocast(kind, enabled=False):
            return product_by_rows(x, weight, bias, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        type_x, type_weight, type_bias = ctx.types
        weight = weight.to(grad.dtype) if need_x else weight
        with torch.autocast(grad.device.type, enabled=False):
            return (
                product_by_rows(grad, weight.T, None, ctx.rows).to(type_x) if need_x else None,
                product(grad.T, x.T).to(type_weight) if need_weight else None,
                grad.sum(0, dtype=type_bias) if need_bias else None,
                None,
            )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., I), weight (O, I), bias (O,) -> (..., O). A weight of another type is cast to x's."""
    plain = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
    if plain and not block_rows and not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    return Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, block_rows).view(*x.shape[:-1], len(weight))


class Gelu(torch.autograd.Function):
    """GELU (its tanh form) of x (n, I), in blocks of `rows`."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: int) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x)
        return by_rows(lambda block: F.gelu(block, approximate="tanh"), x, rows=rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        return by_rows(
            lambda g, block: torch.ops.aten.gelu_backward(g, block, approximate="tanh"), grad, x, rows=ctx.rows
        ), None


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form: x (..., I) -> (..., I)."""
    if not block_rows:
        return F.gelu(x, approximate="tanh")
    return Gelu.apply(x.reshape(-1, x.shape[-1]), vector_rows(x)).view_as(x)


def vector_rows(x: Tensor) -> int:
    """Rows of a block for elementwise functions: the threads of a CPU share a tensor out, and what is left of a share
    behind its last whole vector is computed by other code, whose last bit differs. With 64 rows for each thread a share
    ends with a vector."""
    return 64 * torch.get_num_threads() if x.device.type == "cpu" else block_rows


class GatedSilu(torch.autograd.Function):
    """silu(gate) up for gate and up (n, I), in blocks of `rows`, all steps of a block while it is in the cache."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, rows: int) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(gate, up)
        return by_rows(lambda gate, up: F.silu(gate).mul_(up), gate, up, rows=rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        for start in range(0, len(gate), ctx.rows):
            part = slice(start, start + ctx.rows)
            g, x, y = (fill_up(tensor[part], ctx.rows) for tensor in (grad, gate, up))
            left = len(gate[part])
            d_gate[part] = torch.ops.aten.silu_backward(g * y, x)[:left]
            d_up[part] = F.silu(x).mul_(g)[:left]
        return d_gate, d_up, None


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, gate and up (..., I) -> (..., I)."""
    if not block_rows:
        return F.silu(gate) * up
    width = gate.shape[-1]
    return GatedSilu.apply(gate.reshape(-1, width), up.reshape(-1, width), vector_rows(gate)).view_as(gate)


def inverse_rms(x: Tensor, eps: float, rows: int | None = None) -> Tensor:
    """1 over the root mean square of each row of x (n, D): (n, 1)."""
    return by_rows(lambda block: torch.rsqrt(block.square().mean(1, keepdim=True) + eps), x, rows=rows)


class RMSNorm(torch.autograd.Function):
    """x (n, D) over its root mean square times weight (D,), in float32 at least; means in blocks of `rows`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, rows: int) -> Tensor:
        inverse = inverse_rms(at_least_float32(x), eps, rows)
        ctx.rows = rows
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse * weight).to(torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, inverse = ctx.saved_tensors
        normalised = x * inverse
        weighted = grad * weight
        mean = by_rows(lambda a, b: (a * b).mean(1, keepdim=True), weighted, normalised, rows=ctx.rows)
        need_x, need_weight, *_ = ctx.needs_input_grad
        return (
            ((weighted - normalised * mean) * inverse).to(x.dtype) if need_x else None,
            (grad * normalised).sum(0).to(weight.dtype) if need_weight else None,
            None,
            None,
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) over the root mean square of its rows, times weight (D,): (..., D)."""
    return RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps, block_rows).view(x.shape)


class RepeatHeads(torch.autograd.Function):
    """Each head of x (B, K, ...) `groups` times, (B, K groups, ...). The gradient's sum over a head's copies has one
    order; a reduction's would depend on the shape."""

    @staticmethod
    def forward(ctx, x: Tensor, groups: int) -> Tensor:
        ctx.groups = groups
        return x[:, :, None].expand(-1, -1, groups, *x.shape[2:]).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        first, *others = grad.unflatten(1, (-1, ctx.groups)).unbind(2)
        total = at_least_float32(first)
        for one in others:
            total = total + one
        return total.to(grad.dtype), None


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """x (B, K, T, W) -> (B, K groups, T, W), for attention whose queries share keys."""
    return RepeatHeads.apply(x, groups)


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
