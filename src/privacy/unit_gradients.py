"""What a layer contributes to the gradient of each unit, without any unit's gradient being formed where that is dearer.

A layer's per-unit gradient is one of three kinds: a sum of outer products (linear layers, adapters, a head), a sum of
rows (biases, norms), or rows sent to a table (embeddings). RULES says which, by the layer's type; a new kind of layer
is a function and a line there.
For an outer product the cheaper of two ways to the norm is taken:
  ghost        |sum_s p_s q_s'|^2 = sum_{s,t} <p_s,p_t> <q_s,q_t>          S^2 (P+Q) multiply-adds   (Goodfellow, 2015)
  materialise  form the (P, Q) gradient of every unit and keep it          S P Q, and memory traffic of P Q

Shapes: U units, S positions of a unit (rows_per_unit x T), P x Q a weight, n scored positions, D width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loralib as lora
from base.products import at_least_float32 as wide
from base.products import by_rows, inverse_rms
from llama import RMSNorm
from model import Conv1D

# Writing, squaring and summing one entry of a materialised gradient costs about as much as this many multiply-adds of a
# matrix product (measured on 2 cores: 90 GMAC/s against 4 GB/s a pass of three).
TRAFFIC_COST = 75
# Units whose norms one kernel call takes, the last call filled up with zeros; fewer where their positions together are
# more than UNITS_POSITIONS: see by_units().
UNITS, UNITS_POSITIONS = 8, 1024
# Roundings of 2^-53 that may shrink a squared norm whose terms cancel, beside those of the sum over positions: those of
# the entries of the Gram matrices, sums over a row of this length; see gram_norm_sq().
ROUNDING = 2**17
# The most by which a unit's positions may cancel, sum_s |p_s| |q_s| over |sum_s p_s q_s'|: a unit whose positions
# cancel more is clipped as if it were that much larger. Typical texts stay below 20.
CANCELLATION = 64
# The most by which the lookups and the head may cancel in the tied embedding, as squared norms.
TIED_CANCELLATION = 8
# Entries that are made float64 at a time on their way into the sums. On a CPU those that are added stay in the cache;
# of a matrix product, BLAS wants more: 2^22 took 0.85 of the time of 2^17 for 2,048 positions of GPT-2 small.
ADDED_ENTRIES = {"cpu": 2**17, "cuda": 2**25}
MULTIPLIED_ENTRIES = {"cpu": 2**22, "cuda": 2**25}
# Positions and entries from which a CPU forms a unit's product by itself, in float32, and adds that in float64. With
# 16 units of 128 positions and 576 x 1536 entries this took 0.73 of the time of a float64 product of all positions;
# with 64 positions the adding costs what the product saves. A GPU for training multiplies float64 as fast as float32.
ALONE_POSITIONS, ALONE_ENTRIES = 128, 2**14
# Entries of such a product that are added at a time: with their sums they stay in the cache.
ALONE_ADDED = 2**16
# Rows of such a product that are held at a time: a head's product, (V, D), is never whole in memory.
ALONE_ROWS = 2048
# The most that sum_s |p_s| |q_s| may be there: below, no float32 sum overflows.
ALONE_MOST = 1e38


# ------------------------------------------------------------------ the three kinds of per-unit gradient


class Outer:
    """sum_s p_s q_s' for each unit: p (U, S, P), q (U, S, Q), added into `target` (P, Q)."""

    def __init__(self, target: Tensor, p: Tensor, q: Tensor):
        self.target, self.p, self.q = target, p, q
        self.grads: Tensor | None = None
        self.alone = forms_alone(target, p.shape[1])  # by the layer and the unit's length, so the same in any company
        self.grams = Grams()  # or those that layers of one input share
        (_, S, P), Q = p.shape, q.shape[2]
        if S * S * (P + Q) >= TRAFFIC_COST * P * Q:
            self.grads = self.materialised(wide(p), wide(q))
            del self.p, self.q

    def materialised(self, p: Tensor, q: Tensor) -> Tensor:
        """The gradient of each unit, (U, P, Q)."""
        if not self.alone:
            return by_units(lambda p, q: p.mT @ q, p, q, positions=p.shape[1])
        grads = torch.empty(len(p), p.shape[2], q.shape[2], device=p.device, dtype=p.dtype)
        for u, of_unit in enumerate(grads):
            product_alone(p[u], q[u], of_unit)
        return grads

    @property
    def entries(self) -> int:
        """Numbers that it holds."""
        return self.p.numel() + self.q.numel() if self.grads is None else self.grads.numel()

    def norm_sq(self) -> Tensor:
        if self.grads is not None:
            return by_rows(sum_of_squares, self.grads, rows=1 if self.alone else UNITS)
        S = self.p.shape[1]
        if not self.alone:
            return by_units(lambda p, q: gram_norm_sq(gram(p), gram(q)), wide(self.p), wide(self.q), positions=S)
        pp, qq = self.grams.of(self.p), self.grams.of(self.q)
        return by_units(lambda pp, qq: alone_norm_sq(pp, qq, S), pp, qq)

    def add(self, factor: Tensor, finite: Tensor | None) -> None:
        if self.grads is not None:
            add_units(self.target, factor, zero_rows(self.grads, finite))
            return
        if self.alone:
            add_alone(self.target, zip(wide(self.p), wide(self.q), strict=True), factor, finite)
            return
        p, q = zero_rows(self.p, finite), zero_rows(self.q, finite)
        if p.shape[2] <= q.shape[2]:
            p = p * factor[:, None, None]
        else:
            q = q * factor[:, None, None]
        add_product(self.target, p.flatten(0, 1), q.flatten(0, 1))


class Rows:
    """The sum over positions of `rows` (U, S, P) for each unit, added into `target` (P,)."""

    def __init__(self, target: Tensor, rows: Tensor):
        self.target, self.grads = target, by_units(lambda rows: rows.sum(1), wide(rows), positions=rows.shape[1])

    @property
    def entries(self) -> int:
        return self.grads.numel()

    def norm_sq(self) -> Tensor:
        return by_units(sum_of_squares, self.grads)

    def add(self, factor: Tensor, finite: Tensor | None) -> None:
        add_units(self.target, factor, zero_rows(self.grads, finite))


class Lookup:
    """Rows (U, S, D) sent to the entries `ids` (U, S) of a table `target` (V, D)."""

    def __init__(self, target: Tensor, ids: Tensor, rows: Tensor):
        self.target, self.ids, self.rows = target, ids, wide(rows)

    @property
    def entries(self) -> int:
        return self.rows.numel()

    def norm_sq(self) -> Tensor:
        def of_units(ids: Tensor, rows: Tensor) -> Tensor:
            same = ids[:, :, None] == ids[:, None, :]  # (U, S, S): two positions add up where they share an entry
            return gram_norm_sq(gram(rows), same.double())

        return by_units(of_units, self.ids, self.rows, positions=self.ids.shape[1])

    def add(self, factor: Tensor, finite: Tensor | None) -> None:
        rows = zero_rows(self.rows, finite) * factor[:, None, None]
        self.target.index_add_(0, self.ids.flatten(), rows.flatten(0, 1))


class Ragged:
    """sum_s b_s h_s' over the scored positions of each unit: b (n, V) and h (n, D), `counts` positions a unit, `unit`
    (n,) int64 the unit of each."""

    slack: Tensor  # (U,) float64, set by norm_sq(): by how much it raised norms for products formed alone

    def __init__(self, target: Tensor, b: Tensor, h: Tensor, counts: list[int], unit: Tensor):
        self.target, self.b, self.h, self.counts, self.unit = target, b, wide(h), counts, unit

    @property
    def entries(self) -> int:
        return self.b.numel() + self.h.numel()

    def by_unit(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(b (n_u, V), h (n_u, D)) of each unit, one unit a product: its shape is the unit's own."""
        return zip(self.b.split(self.counts), self.h.split(self.counts), strict=True)

    def norm_sq(self) -> Tensor:
        norms_sq, slacks = [], []
        for b, h in self.by_unit():
            grams = gram(b), gram(h)
            alone = forms_alone(self.target, len(b))
            norms_sq.append(alone_norm_sq(*grams, len(b)) if alone else gram_norm_sq(*grams))
            slacks.append(rounding_alone(*grams, len(b)) if alone else torch.zeros_like(norms_sq[-1]))
        self.slack = torch.stack(slacks)
        return torch.stack(norms_sq)

    def cross(self, table: Lookup) -> Tensor:
        """<this gradient, that of the same table's lookups>: sum_{s,t} b_t[x_s] <h_t, e_s>, for each unit."""
        units = zip(self.by_unit(), table.ids, table.rows, strict=True)
        return torch.stack([(b[:, ids].double() * (h.double() @ rows.double().T)).sum() for (b, h), ids, rows in units])

    def add(self, factor: Tensor, finite: Tensor | None) -> None:
        formed = [forms_alone(self.target, count) for count in self.counts]
        if any(formed):  # on a CPU alone, so that reading what is kept waits for no device
            alone = torch.tensor(formed)
            add_alone(self.target, self.by_unit(), factor, alone if finite is None else alone & finite)
            if all(formed):
                return
            finite = ~alone if finite is None else finite & ~alone
        b, h = self.b, self.h * factor[self.unit][:, None]
        if finite is not None:
            bad = ~finite[self.unit][:, None]
            b, h = b.masked_fill(bad, 0), h.masked_fill(bad, 0)
        add_product(self.target, b, h)


class Grams:
    """gram() of each unit's rows (U, S, P), (U, S, S); projections of one input share the input's."""

    def __init__(self):
        self.kept: list[tuple[tuple, Tensor, Tensor]] = []  # key, rows, what gram() says of them: of the last two

    def of(self, rows: Tensor) -> Tensor:
        # `rows` is kept, so that its place is not given to another tensor; the version counts changes in place
        key = rows.data_ptr(), rows.shape, rows.stride(), rows.dtype, rows._version
        found = next((entry for entry in self.kept if entry[0] == key), None)
        if found is None:
            found = key, rows, torch.stack([gram(of_unit) for of_unit in rows])
        self.kept = [found, *(entry for entry in self.kept if entry is not found)][:2]
        return found[2]


def forms_alone(target: Tensor, positions: int) -> bool:
    """Whether a unit's product of so many positions is formed by itself, in float32, before it is added to `target`."""
    return target.device.type == "cpu" and target.numel() >= ALONE_ENTRIES and positions >= ALONE_POSITIONS


def aligned(rows: Tensor) -> Tensor:
    """`rows`, or a copy, contiguous and where an allocation may begin: by that, too, libraries choose their kernels."""
    return (
        rows
        if rows.is_contiguous() and rows.data_ptr() % 64 == 0
        else rows.clone(memory_format=torch.contiguous_format)
    )


def product_alone(p: Tensor, q: Tensor, out: Tensor) -> None:
    """out (P, Q) = p' q for one unit's p (S, P), q (S, Q), by the same kernel whatever the unit's place."""
    if out.data_ptr() % 64 == 0:
        torch.mm(aligned(p).mT, aligned(q), out=out)
    else:
        out.copy_(aligned(p).mT @ aligned(q))


def add_alone(target: Tensor, units: Iterable[tuple[Tensor, Tensor]], factor: Tensor, kept: Tensor | None) -> None:
    """target (P, Q) += sum_u factor_u p_u' q_u for the units (p_u (S_u, P), q_u (S_u, Q)) that are `kept` (None: all).

    Each product is float32 (float64 where its factors are) and a function of its unit alone; the root of
    alone_norm_sq() is at least its norm. The factors and the sum are float64.
    """
    chosen = [
        (p, aligned(q), c)
        for u, ((p, q), c) in enumerate(zip(units, factor.tolist(), strict=True))
        if kept is None or kept[u]
    ]
    for start in range(0, len(target) if chosen else 0, ALONE_ROWS):
        part = target[start : start + ALONE_ROWS]
        of_unit = torch.empty(part.shape, device=part.device, dtype=chosen[0][1].dtype)
        pieces = list(zip(part.view(-1).split(ALONE_ADDED), of_unit.view(-1).split(ALONE_ADDED), strict=True))
        for p, q, c in chosen:
            product_alone(wide(p[:, start : start + ALONE_ROWS]), q, of_unit)
            for total, piece in pieces:
                total.add_(piece.double(), alpha=c)


def gram(rows: Tensor) -> Tensor:
    """<row_s, row_t> of rows (..., S, P), in float64: (..., S, S)."""
    rows = rows.double()
    return rows @ rows.mT


def add_product(target: Tensor, p: Tensor, q: Tensor) -> None:
    """target (P, Q) += p' q for p (n, P), q (n, Q), in float64: of a head's p, (n, V), no second one is made."""
    q, rows = q.double(), max(256, MULTIPLIED_ENTRIES[target.device.type] // max(1, len(q)))
    for start in range(0, len(target), rows):
        target[start : start + rows].addmm_(p[:, start : start + rows].double().T, q)


def add_units(target: Tensor, factor: Tensor, grads: Tensor) -> None:
    """target (...) += sum_u factor_u grads_u for factor (U,), grads (U, ...), in float64."""
    target, grads, factor = target.view(-1), grads.flatten(1), factor.double()
    columns = max(256, ADDED_ENTRIES[target.device.type] // len(factor))
    for start in range(0, len(target), columns):
        target[start : start + columns] += factor @ grads[:, start : start + columns].double()


def gram_norm_sq(pp: Tensor, qq: Tensor) -> Tensor:
    """sum_{s,t} <p_s,p_t> <q_s,q_t> from the Gram matrices (..., S, S), raised by what rounding may have taken from it.

    Where positions cancel, the sum is far below its terms and their rounding would hide it: a unit would pass for a
    small one and contribute more than C. So it is raised by gamma (sum_s |p_s| |q_s|)^2, the bound on that rounding
    (Higham, 2002, (3.5): rows of P and Q entries and S^2 terms err by gamma_(P+Q+S^2) of their sizes).
    And it is (sum_s |p_s| |q_s| / CANCELLATION)^2 at least: what rounding can do to the sum over all units' positions
    grows with their sizes (rounding_share).
    """
    sizes = sizes_of(pp, qq)
    roundings = ROUNDING + pp.shape[-1] ** 2
    norm_sq = (pp * qq).sum((-2, -1)) + roundings * torch.finfo(pp.dtype).eps / 2 * sizes.square()
    return torch.maximum(norm_sq, (sizes / CANCELLATION).square())  # NaN stays NaN


def sizes_of(pp: Tensor, qq: Tensor) -> Tensor:
    """sum_s |p_s| |q_s| from the Gram matrices (..., S, S)."""
    return (pp.diagonal(dim1=-2, dim2=-1) * qq.diagonal(dim1=-2, dim2=-1)).sqrt().sum(-1)


def rounding_alone(pp: Tensor, qq: Tensor, positions: int) -> Tensor:
    """The most by which float32 changes a sum over `positions`, in any order, by its Gram matrices (..., S, S): (...).

    gamma_S sum_s |p_s| |q_s|, gamma_S = S u/(1 - S u), u = 2^-24 (Higham, 2002, (3.13), Frobenius norm); and what
    numbers below 2^-126 lose: that times S and the root of the entries, under 10^-30.
    """
    share = positions * 2.0**-24
    return share / (1 - share) * sizes_of(pp, qq) + 1e-30


def alone_norm_sq(pp: Tensor, qq: Tensor, positions: int) -> Tensor:
    """gram_norm_sq() for a sum that product_alone() forms, raised by its rounding; infinite where it might overflow."""
    norm = gram_norm_sq(pp, qq).sqrt() + rounding_alone(pp, qq, positions)
    return torch.where(sizes_of(pp, qq) < ALONE_MOST, norm.square(), math.inf)


def by_units(function: Callable[..., Tensor], *operands: Tensor, positions: int = 1) -> Tensor:
    """function(*operands) for operands (U, ...), unit by unit independent, on UNITS units at a time, or fewer of many
    positions: (U, ...).

    A batched product or a reduction of another number of units may be another kernel, with its sums in another order.
    """
    return by_rows(function, *operands, rows=max(1, min(UNITS, UNITS_POSITIONS // max(1, positions))))


def sum_of_squares(grads: Tensor) -> Tensor:
    """(U, ...) -> (U,) float64."""
    return grads.flatten(1).square().sum(1, dtype=torch.float64)


def unless_all(finite: Tensor) -> Tensor | None:
    """finite (U,) bool; None on a CPU where all are, so that nothing is masked. Another device is not asked: that would
    have to wait for it, and masking nothing is cheaper."""
    return None if finite.device.type == "cpu" and bool(finite.all()) else finite


def zero_rows(tensor: Tensor, finite: Tensor | None) -> Tensor:
    """`tensor` with the units that are not finite set to zero (a factor of zero would leave 0 x NaN)."""
    if finite is None:
        return tensor
    return tensor.masked_fill(~finite.view(-1, *[1] * (tensor.dim() - 1)), 0)


# ------------------------------------------------------------------ what each layer contributes

Grad = Callable[[nn.Parameter | None], Tensor | None]  # the gradient's view of a trained parameter, None of another
Contribution = Outer | Rows | Lookup | Ragged
Contributions = list[tuple[nn.Parameter, Contribution]]


def linear(module: nn.Module, x: Tensor, g: Tensor, grad: Grad, transposed: bool) -> Contributions:
    """The weight and bias of a linear layer; `transposed`: the weight is stored as (in, out)."""
    parts: Contributions = []
    if (target := grad(module.weight)) is not None:
        parts.append((module.weight, Outer(target, x, g) if transposed else Outer(target, g, x)))
    if (target := grad(module.bias)) is not None:
        parts.append((module.bias, Rows(target, g)))
    return parts


def adapted_linear(module: lora.MergedLinear, x: Tensor, g: Tensor, grad: Grad) -> Contributions:
    parts = linear(module, x, g, grad, module.fan_in_fan_out)
    if module.has_adapter():
        (p, q), slots = module.adapter_factors(x, wide(g))
        A, B = grad(module.lora_A), grad(module.lora_B)
        assert A is not None and B is not None  # adapters train
        parts.append((module.lora_A, Outer(A, p, q)))
        parts += [(module.lora_B, Outer(B[rows], p, q)) for rows, p, q in slots]
    return parts


def layer_norm(module: nn.LayerNorm, x: Tensor, g: Tensor, grad: Grad) -> Contributions:
    normalised = F.layer_norm(wide(x), module.normalized_shape, eps=module.eps)
    return [(module.weight, Rows(grad(module.weight), normalised * g)), (module.bias, Rows(grad(module.bias), g))]


def rms_norm(module: RMSNorm, x: Tensor, g: Tensor, grad: Grad) -> Contributions:
    """x, g (U, S, D), where S counts heads, too, if each is normalised by itself."""
    if (target := grad(module.weight)) is None:
        return []
    x = wide(x)
    inverse = inverse_rms(x.flatten(0, 1), module.eps).view(*x.shape[:2], 1)
    return [(module.weight, Rows(target, x * inverse * g))]


def embedding(module: nn.Embedding, ids: Tensor, g: Tensor, grad: Grad) -> Contributions:
    return [] if grad(module.weight) is None else [(module.weight, Lookup(grad(module.weight), ids, g))]


RULES: dict[type, Callable[..., Contributions]] = {
    nn.Linear: lambda module, x, g, grad: linear(module, x, g, grad, transposed=False),
    Conv1D: lambda module, x, g, grad: linear(module, x, g, grad, transposed=True),
    lora.MergedLinear: adapted_linear,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    RMSNorm: rms_norm,
}
