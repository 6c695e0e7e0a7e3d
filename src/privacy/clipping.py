"""The clipped sum of the units' gradients, exactly, from one backward pass.

Book-keeping (Bu et al., 2023, arXiv:2210.00038): during the backward pass every layer notes its input and the gradient
at its output; autograd computes no weight gradient. From these notes come the norms, then the clip factors c, then
every weight gradient once, as the sum over units of c_u g_u. A layer's per-unit gradient is one of three kinds: a sum
of outer products (linear layers, adapters), a sum of rows (biases, layer norms), or rows sent to a table (embeddings).
Norms, factors and sums over units are float64, so rounding has a small bound for all data (rounding_share).
For an outer product the cheaper of two ways to the norm is taken:
  ghost        |sum_s p_s q_s'|^2 = sum_{s,t} <p_s,p_t> <q_s,q_t>          S^2 (P+Q) multiply-adds   (Goodfellow, 2015)
  materialise  form the (P, Q) gradient of every unit and keep it          S P Q, and memory traffic of P Q
This file knows layers and units, not privacy: the plan chooses C and accounts for it.

Shapes: U units, S positions of a unit (rows_per_unit x T), P x Q a weight, n scored positions, D width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loralib as lora
from base.products import BLOCK_ROWS, by_rows, row_blocks
from losses import MicroBatch, unit_losses
from model import Conv1D, GPT2LMModel, TiedHead
from optimizer import FlatParameters

# Writing, squaring and summing one entry of a materialised gradient costs about as much as this many multiply-adds of a
# matrix product (measured on 2 cores: 90 GMAC/s against 4 GB/s a pass of three).
TRAFFIC_COST = 75
# Units whose norms one kernel call takes, the last call filled up with zeros: see by_units().
UNITS = 8
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


CLIPPING_RULES = ("flat", "per_layer", "automatic")


@dataclass(frozen=True)
class ClippingRule:
    """How a unit's gradient is bounded: its norm over all parameters together never exceeds C.

    flat        times min(1, C/|g|)
    per_layer   each of the n parameters' gradients times min(1, (C/sqrt n)/|g_k|)
    automatic   times C/(|g| + gamma), gamma = 0.01 (Bu et al., 2022, arXiv:2206.07136)
    """

    kind: str
    C: float
    gamma: float = 0.01

    def factors(self, norms_sq: Tensor) -> tuple[Tensor, Tensor]:
        """norms_sq (U, n) float64, the squared norms by parameter -> (factors (U, n), finite (U,) bool).

        A unit whose gradient is NaN or infinite gets factors of zero.
        """
        finite = torch.isfinite(norms_sq.sum(1))  # before the clamp: -inf is an overflow, not a zero
        norms_sq = norms_sq.clamp(min=0)
        total = by_units(lambda rows: rows.sum(1), norms_sq)
        if self.kind == "per_layer":
            bound = self.C / math.sqrt(norms_sq.shape[1])
            factors = bound / norms_sq.sqrt().clamp(min=bound)
        elif self.kind == "flat":
            factors = (self.C / total.sqrt().clamp(min=self.C))[:, None].expand_as(norms_sq)
        elif self.kind == "automatic":
            factors = (self.C / (total.sqrt() + self.gamma))[:, None].expand_as(norms_sq)
        else:
            raise ValueError(f"clipping {self.kind!r}: expected one of {', '.join(CLIPPING_RULES)}")
        return torch.where(finite[:, None], factors, 0.0), finite


def rounding_share(units: float, longest: int, rows_per_unit: int) -> float:
    """kappa: the clipped sums with and without one unit differ by (1 + kappa) C at most, rounding included, for all
    data.

    units    the expected draw of a step, over all ranks
    longest  inputs of the longest text

    A worst-case bound, no probability in it but that of the draw: one of more than m = units + sqrt(2 t units) + t
    units, t = log 10^18, has a probability below 10^-18 (Bernstein).
    Each coordinate of the sum is a sum of n terms c p q or c g, where p, q and g are float32 and the same bits whoever
    else is drawn, c is float64, and n <= m longest rows_per_unit. In any order of float64 additions, in micro-batches,
    matrix products, over ranks, the error is at most gamma_(n+2) times the sum of the terms' sizes, gamma_k = k u/(1 -
    k u), u = 2^-53 (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, (3.5) and (4.4); two roundings make
    a term). Of a unit the norm of the terms' sizes is at most sqrt(2 TIED_CANCELLATION) CANCELLATION C: c sees to that
    (gram_norm_sq, add_cross_term). So the error of a sum is at most gamma_(n+2) m times that, and the difference of two
    sums has twice as much. Beside it 10^-6, more than rounding can do to the norm of the one unit: its notes are exact,
    the square of a materialised entry errs by 2^-24 of itself, all else by float64.
    The noise is added in float64, too. What comes after it is computed from what was released.
    """
    t = math.log(1e18)
    m = units + math.sqrt(2 * t * units) + t
    n = (m * longest * rows_per_unit + 2) * 2.0**-53
    return 2 * n / (1 - n) * m * math.sqrt(2 * TIED_CANCELLATION) * CANCELLATION + 1e-6


# ------------------------------------------------------------------ the three kinds of per-unit gradient


class Outer:
    """sum_s p_s q_s' for each unit: p (U, S, P), q (U, S, Q), added into `target` (P, Q)."""

    def __init__(self, target: Tensor, p: Tensor, q: Tensor):
        self.target, self.p, self.q, self.grads = target, p, q, None

    def norm_sq(self) -> Tensor:
        p, q = wide(self.p), wide(self.q)
        (_, S, P), Q = p.shape, q.shape[2]
        if S * S * (P + Q) < TRAFFIC_COST * P * Q:
            return by_units(lambda p, q: gram_norm_sq(gram(p), gram(q)), p, q)
        self.grads = by_units(lambda p, q: p.mT @ q, p, q)  # (U, P, Q)
        self.p = self.q = None
        return by_units(sum_of_squares, self.grads)

    def add(self, factor: Tensor, finite: Tensor | None) -> None:
        if self.grads is not None:
            add_units(self.target, factor, zero_rows(self.grads, finite))
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
        self.target, self.grads = target, by_units(lambda rows: rows.sum(1), wide(rows))

    def norm_sq(self) -> Tensor:
        return by_units(sum_of_squares, self.grads)

    def add(self, factor: Tensor, finite: Tensor | None) -> None:
        add_units(self.target, factor, zero_rows(self.grads, finite))


class Lookup:
    """Rows (U, S, D) sent to the entries `ids` (U, S) of a table `target` (V, D)."""

    def __init__(self, target: Tensor, ids: Tensor, rows: Tensor):
        self.target, self.ids, self.rows = target, ids, wide(rows)

    def norm_sq(self) -> Tensor:
        def of_units(ids: Tensor, rows: Tensor) -> Tensor:
            same = ids[:, :, None] == ids[:, None, :]  # (U, S, S): two positions add up where they share an entry
            return gram_norm_sq(gram(rows), same.double())

        return by_units(of_units, self.ids, self.rows)

    def add(self, factor: Tensor, finite: Tensor | None) -> None:
        rows = zero_rows(self.rows, finite) * factor[:, None, None]
        self.target.index_add_(0, self.ids.flatten(), rows.flatten(0, 1))


class Ragged:
    """sum_s b_s h_s' over the scored positions of each unit: b (n, V) and h (n, D), `counts` positions a unit."""

    def __init__(self, target: Tensor, b: Tensor, h: Tensor, counts: list[int]):
        self.target, self.b, self.h, self.counts = target, b, wide(h), counts

    def by_unit(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(b (n_u, V), h (n_u, D)) of each unit, one unit a product: its shape is the unit's own."""
        return zip(self.b.split(self.counts), self.h.split(self.counts), strict=True)

    def norm_sq(self) -> Tensor:
        return torch.stack([gram_norm_sq(gram(b), gram(h)) for b, h in self.by_unit()])

    def cross(self, table: Lookup) -> Tensor:
        """<this gradient, that of the same table's lookups>: sum_{s,t} b_t[x_s] <h_t, e_s>, for each unit."""
        units = zip(self.by_unit(), table.ids, table.rows, strict=True)
        return torch.stack([(b[:, ids].double() * (h.double() @ rows.double().T)).sum() for (b, h), ids, rows in units])

    def add(self, factor: Tensor, finite: Tensor | None) -> None:
        counts = torch.tensor(self.counts, device=self.h.device)
        b, h = self.b, self.h * factor.repeat_interleave(counts)[:, None]
        if finite is not None:
            bad = ~finite.repeat_interleave(counts)[:, None]
            b, h = b.masked_fill(bad, 0), h.masked_fill(bad, 0)
        add_product(self.target, b, h)


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
    sizes = (pp.diagonal(dim1=-2, dim2=-1) * qq.diagonal(dim1=-2, dim2=-1)).sqrt().sum(-1)
    roundings = ROUNDING + pp.shape[-1] ** 2
    norm_sq = (pp * qq).sum((-2, -1)) + roundings * torch.finfo(pp.dtype).eps / 2 * sizes.square()
    return torch.maximum(norm_sq, (sizes / CANCELLATION).square())  # NaN stays NaN


def by_units(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """function(*operands) for operands (U, ...), unit by unit independent, on UNITS units at a time: (U, ...).

    A batched product or a reduction of another number of units may be another kernel, with its sums in another order.
    """
    return by_rows(function, *operands, rows=UNITS)


def sum_of_squares(grads: Tensor) -> Tensor:
    """(U, ...) -> (U,) float64."""
    return grads.flatten(1).square().sum(1, dtype=torch.float64)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: what a unit contributes never rounds to a half-precision type."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


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


def embedding(module: nn.Embedding, ids: Tensor, g: Tensor, grad: Grad) -> Contributions:
    return [] if grad(module.weight) is None else [(module.weight, Lookup(grad(module.weight), ids, g))]


RULES: dict[type, Callable[..., Contributions]] = {
    nn.Linear: lambda module, x, g, grad: linear(module, x, g, grad, transposed=False),
    Conv1D: lambda module, x, g, grad: linear(module, x, g, grad, transposed=True),
    lora.MergedLinear: adapted_linear,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
}


class BookKeeping:
    """Adds the clipped sum of units' gradients to `flat.grad`, micro-batch by micro-batch.

    Refuses, by name, a module with a trainable parameter and no rule, and a parameter shared in any way but the tied
    embedding's.
    """

    def __init__(self, model: GPT2LMModel, flat: FlatParameters, rule: ClippingRule, smoothing: float = 0.0):
        if flat.sums.dtype != torch.float64:
            raise ValueError(f"sums of units in {flat.sums.dtype}: expected float64, whose rounding the noise pays for")
        self.model, self.flat, self.rule, self.smoothing = model, flat, rule, smoothing
        self.column = {id(parameter): k for k, (_, parameter) in enumerate(flat.named)}
        self.head_trains = id(model.lm_head.weight) in self.column
        self.batch: MicroBatch | None = None
        self.norms_sq = torch.empty(0)
        self.noted: Contributions = []
        self.waiting: set[nn.Module] = set()
        for module in self.supported_modules():
            module.register_forward_hook(self.watch)

    def supported_modules(self) -> list[nn.Module]:
        """Every module with a trainable parameter of its own."""
        found: list[nn.Module] = []
        owners: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, module in self.model.named_modules():
            own = [p for p in module.parameters(recurse=False) if id(p) in self.column]
            if not own:
                continue
            if type(module) not in RULES and not isinstance(module, TiedHead):
                raise ValueError(
                    f"{name} ({type(module).__name__}) has trainable parameters and no per-unit gradient rule"
                )
            if isinstance(module, nn.LayerNorm) and len(own) != 2:
                raise ValueError(f"{name}: a layer norm is trained with both weight and bias, or not at all")
            if isinstance(module, nn.Embedding) and (
                module.padding_idx is not None or module.max_norm is not None or module.scale_grad_by_freq
            ):
                raise ValueError(
                    f"{name}: an embedding with padding_idx, max_norm or scale_grad_by_freq has no per-unit rule"
                )
            found.append(module)
            for parameter in own:
                owners.setdefault(id(parameter), []).append((name, module))
        for places in owners.values():
            kinds = sorted(type(module).__name__ for _, module in places)
            if len(places) > 1 and kinds != ["Embedding", "TiedHead"]:
                raise ValueError(
                    f"{' and '.join(name for name, _ in places)} share a parameter: no per-unit rule for that"
                )
        if len(owners) != len(self.column):
            raise ValueError("a trainable parameter belongs to no module")
        return found

    # ---------------------------------------------------------------- the backward pass

    def watch(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook: arrange that the gradient at `output` is noted together with the input."""
        if self.batch is None:
            return
        if module in self.waiting:
            raise RuntimeError(
                f"a {type(module).__name__} ran twice in one micro-batch: its norm would miss cross terms"
            )
        self.waiting.add(module)
        if not output.requires_grad:
            output.requires_grad_()  # nothing trained lies below: the graph begins here
        x = inputs[0].detach()
        output.register_hook(lambda g: self.note(module, x, g))

    def note(self, module: nn.Module, x: Tensor, g: Tensor) -> None:
        """Add what the module contributes, from its input x and the gradient g at its output."""
        assert self.batch is not None
        self.waiting.remove(module)
        with torch.autocast(g.device.type, enabled=False):
            if isinstance(module, TiedHead):
                contributions: Contributions = [
                    (module.weight, Ragged(self.flat.grad_of(module.weight), g, x, self.batch.counts))
                ]
            else:
                U = self.batch.units
                x = x.reshape(U, -1) if x.dtype == torch.int64 else x.reshape(U, -1, x.shape[-1])
                contributions = RULES[type(module)](module, x, g.reshape(U, -1, g.shape[-1]), self.flat.grad_of)
            for parameter, contribution in contributions:
                self.norms_sq[:, self.column[id(parameter)]] += contribution.norm_sq()
        self.noted += contributions

    def add_cross_term(self) -> None:
        """The tied embedding counts once: |E + H|^2 = |E|^2 + |H|^2 + 2 <E, H>.

        (|E|^2 + |H|^2)/TIED_CANCELLATION at least: as positions in gram_norm_sq(), the two may cancel only so far.
        """
        weight = self.model.lm_head.weight
        head = next(c for parameter, c in self.noted if parameter is weight and isinstance(c, Ragged))
        table = next(c for parameter, c in self.noted if parameter is weight and isinstance(c, Lookup))
        column = self.norms_sq[:, self.column[id(weight)]]
        least = column / TIED_CANCELLATION
        column.add_(head.cross(table), alpha=2)
        column.copy_(torch.maximum(column, least))

    def accumulate(self, batch: MicroBatch) -> Tensor:
        """Add the clipped gradients of a micro-batch's units to `flat.grad`; return their losses, (U,) float32.

        A unit whose gradient is NaN or infinite adds nothing.
        """
        if not len(batch.targets):  # texts cut down to their contexts: nothing is scored, the gradients are zero
            return torch.zeros(batch.units, device=batch.ids.device)
        self.batch, self.noted = batch, []
        self.norms_sq = torch.zeros(batch.units, len(self.column), device=batch.ids.device, dtype=torch.float64)
        try:
            with self.flat.frozen(), row_blocks(BLOCK_ROWS[batch.ids.device.type]):
                losses = unit_losses(self.model, batch, self.smoothing, self.head_trains)
                losses.sum().backward()
            if self.waiting:
                raise RuntimeError(f"{len(self.waiting)} trained modules got no gradient: their norms are unknown")
            with torch.no_grad(), torch.autocast(batch.ids.device.type, enabled=False):
                if self.head_trains:
                    self.add_cross_term()
                factors, finite = self.rule.factors(self.norms_sq)
                mask = None if bool(finite.all()) else finite
                for parameter, contribution in self.noted:
                    contribution.add(factors[:, self.column[id(parameter)]], mask)
        finally:
            self.batch, self.noted, self.waiting = None, [], set()
        return losses.detach()


class NonPrivate:
    """Non-private training with the same model and loss: adds the sum of the units' gradients, without clipping."""

    def __init__(self, model: GPT2LMModel, flat: FlatParameters, smoothing: float = 0.0):
        self.model, self.flat, self.smoothing = model, flat, smoothing
        self.head_trains = model.lm_head.weight.requires_grad

    def accumulate(self, batch: MicroBatch) -> Tensor:
        """Add the gradient of the sum of the units' losses to `flat.grad`; return the losses, (U,)."""
        for _, parameter in self.flat.named:
            parameter.grad = self.flat.grad_of(parameter)
        losses = unit_losses(self.model, batch, self.smoothing, self.head_trains)
        losses.sum().backward()
        return losses.detach()
