"""The clipped sum of the units' gradients, exactly, from one backward pass.

Book-keeping (Bu et al., 2023, arXiv:2210.00038): during the backward pass every layer notes its input and the gradient
at its output; autograd computes no weight gradient. From these notes come the norms, then the clip factors c, then
every weight gradient once, as the sum over units of c_u g_u. What a layer contributes is said by unit_gradients.py.
Norms, factors and sums over units are float64, so rounding has a small bound for all data (rounding_share).
This file knows layers and units, not privacy: the plan chooses C and accounts for it.

Shapes: U units, n trained parameters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from base.device import read_back
from base.errors import fail
from base.products import BLOCK_ROWS, row_blocks
from base.recompute import Forgotten, recomputed
from language_model import Head, LanguageModel, TiedHead
from losses import MicroBatch, unit_losses
from optimizer import FlatParameters
from privacy.unit_gradients import (
    CANCELLATION,
    RULES,
    TIED_CANCELLATION,
    Contributions,
    Grams,
    Lookup,
    Outer,
    Ragged,
    by_units,
    unless_all,
)

HEADS = (Head, TiedHead)
CLIPPING_RULES = ("flat", "per_layer", "automatic")
# Notes of a recomputed block stay where they take at most so many times the memory of its input and the gradient at its
# output, from which they can be had again. The notes of whole matrices take 7 or 8 times that; those of adapters less,
# where their per-unit gradients are formed.
WORTH_KEEPING = 4


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
    sums has twice as much. A product that is formed alone (unit_gradients.add_alone) is one term: float32 rounds it
    before it is added, the same way in any company, and its norm counts that rounding. Beside it 10^-6, more than
    rounding can do to the norm of the one unit: its notes are exact, the square of a materialised entry errs by 2^-24
    of itself, all else by float64.
    The noise is added in float64, too. What comes after it is computed from what was released.
    """
    t = math.log(1e18)
    m = units + math.sqrt(2 * t * units) + t
    n = (m * longest * rows_per_unit + 2) * 2.0**-53
    return 2 * n / (1 - n) * m * math.sqrt(2 * TIED_CANCELLATION) * CANCELLATION + 1e-6


class BookKeeping:
    """Adds the clipped sum of units' gradients to `flat.grad`, micro-batch by micro-batch.

    Refuses, by name, a module with a trainable parameter and no rule, and a parameter shared in any way but the tied
    embedding's.

    recompute: blocks keep their inputs alone, and the backward pass runs each of them again. A block's notes are the
    larger part where whole matrices train: such a block runs a third time when the factors are known, and its notes are
    added at once. All bits are the same. Notes that are not the same the second time end the run.
    """

    def __init__(
        self,
        model: LanguageModel,
        flat: FlatParameters,
        rule: ClippingRule,
        smoothing: float = 0.0,
        recompute: bool = False,
    ):
        if flat.sums.dtype != torch.float64:
            raise ValueError(f"sums of units in {flat.sums.dtype}: expected float64, whose rounding the noise pays for")
        self.model, self.flat, self.rule, self.smoothing = model, flat, rule, smoothing
        self.column = {id(parameter): k for k, (_, parameter) in enumerate(flat.named)}
        self.head_trains = id(model.lm_head.weight) in self.column
        self.tied_trains = self.head_trains and model.tied
        self.batch: MicroBatch | None = None
        self.again = False  # whether blocks run for their notes alone, norms and factors being known
        self.norms_sq = torch.empty(0)
        self.noted: Contributions = []
        self.grams = Grams()
        self.waiting: set[nn.Module] = set()
        self.seen: dict[nn.Module, Tensor | None] = {}  # that ran -> witness() of what it noted
        self.forgotten: list[tuple[Forgotten, Tensor]] = []  # blocks to run again, with the gradient at their output
        model.transformer.run_block = self.run_block if recompute else None
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
            if type(module) not in (*RULES, *HEADS):
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
        if self.batch is None or not torch.is_grad_enabled():  # the pass of a block that will run again
            return
        if module in self.seen:
            raise RuntimeError(
                f"a {type(module).__name__} ran twice in one micro-batch: its norm would miss cross terms"
            )
        self.seen[module] = None
        self.waiting.add(module)
        if not output.requires_grad:
            output.requires_grad_()  # nothing trained lies below: the graph begins here
        held = [inputs[0].detach()]  # taken out: autograd keeps the hook itself until the whole pass is done
        output.register_hook(lambda g: self.note(module, held.pop(), g))

    def note(self, module: nn.Module, x: Tensor, g: Tensor) -> None:
        """Add what the module contributes, from its input x and the gradient g at its output."""
        assert self.batch is not None
        self.waiting.remove(module)
        self.seen[module] = None if self.model.transformer.run_block is None else witness(x, g)
        with torch.autocast(g.device.type, enabled=False):
            if isinstance(module, Head):
                contributions: Contributions = [
                    (module.weight, Ragged(self.flat.grad_of(module.weight), g, x, self.batch.counts, self.batch.unit))
                ]
            else:
                U = self.batch.units
                x = x.reshape(U, -1) if x.dtype == torch.int64 else x.reshape(U, -1, x.shape[-1])
                contributions = RULES[type(module)](module, x, g.reshape(U, -1, g.shape[-1]), self.flat.grad_of)
            if not self.again:
                for parameter, contribution in contributions:
                    if isinstance(contribution, Outer):
                        contribution.grams = self.grams
                    self.norms_sq[:, self.column[id(parameter)]] += contribution.norm_sq()
        self.noted += contributions

    def run_block(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return recomputed(function, x, self.differentiate)

    def differentiate(self, block: Forgotten, grad: Tensor) -> Tensor | None:
        """Backward pass of a block. Where its notes are large they are dropped, and how to get them is kept."""
        before = len(self.noted)
        found = block.differentiate(grad)
        entries = sum(contribution.entries for _, contribution in self.noted[before:])
        if entries > WORTH_KEEPING * (block.x.numel() + grad.numel()):
            self.forgotten.append((block, grad))
            del self.noted[before:]
        return found

    def add_forgotten(self, factors: Tensor, mask: Tensor | None) -> None:
        """Run the blocks whose notes were dropped, and add what they contribute."""
        if not self.forgotten:
            return
        first, self.seen, self.again = self.seen, {}, True
        while self.forgotten:
            block, grad = self.forgotten.pop()
            block.needs = False
            block.differentiate(grad)
            self.add(factors, mask)
        if not same(self.seen, first):
            fail(
                "--recompute: this machine computes a block in another way each time, so its gradient is not the "
                "one whose norm is known; leave --recompute out"
            )

    def add(self, factors: Tensor, mask: Tensor | None) -> None:
        """Add what was noted, each unit by its factor, without units that are not finite."""
        with torch.no_grad(), torch.autocast(factors.device.type, enabled=False):
            for parameter, contribution in self.noted:
                contribution.add(factors[:, self.column[id(parameter)]], mask)
        self.noted = []

    def add_cross_term(self) -> None:
        """The tied embedding counts once: |E + H|^2 = |E|^2 + |H|^2 + 2 <E, H>.

        (|E|^2 + |H|^2)/TIED_CANCELLATION at least: as positions in gram_norm_sq(), the two may cancel only so far.
        Where float32 moves H by r at most (head.slack), |H| here is raised by r already, which leaves 2 r |E| for the
        square of the sum's norm; |E| is at most the root of |E|^2 + |H|^2.
        """
        weight = self.model.lm_head.weight
        head = next(c for parameter, c in self.noted if parameter is weight and isinstance(c, Ragged))
        table = next(c for parameter, c in self.noted if parameter is weight and isinstance(c, Lookup))
        column = self.norms_sq[:, self.column[id(weight)]]
        least = column / TIED_CANCELLATION
        column += 2 * (head.cross(table) + head.slack * column.sqrt())
        column.copy_(torch.maximum(column, least))

    def accumulate(self, batch: MicroBatch) -> Tensor:
        """Add the clipped gradients of a micro-batch's units to `flat.grad`; return their losses, (U,) float32.

        A unit whose gradient is NaN or infinite adds nothing.
        """
        if not len(batch.targets):  # texts cut down to their contexts: nothing is scored, the gradients are zero
            return torch.zeros(batch.units, device=batch.ids.device)
        self.batch, self.noted, self.seen, self.again, self.grams = batch, [], {}, False, Grams()
        self.norms_sq = torch.zeros(batch.units, len(self.column), device=batch.ids.device, dtype=torch.float64)
        try:
            with self.flat.frozen(), row_blocks(BLOCK_ROWS[batch.ids.device.type]):
                losses = unit_losses(self.model, batch, self.smoothing, self.head_trains)
                losses.sum().backward()
                if self.waiting:
                    raise RuntimeError(f"{len(self.waiting)} trained modules got no gradient: their norms are unknown")
                with torch.no_grad(), torch.autocast(batch.ids.device.type, enabled=False):
                    if self.tied_trains:
                        self.add_cross_term()
                    factors, finite = self.rule.factors(self.norms_sq)
                    mask = unless_all(finite)
                self.add(factors, mask)
                self.add_forgotten(factors, mask)
        finally:
            self.batch, self.noted, self.waiting, self.seen, self.forgotten = None, [], set(), {}, []
            self.grams = Grams()
        return losses.detach()


def witness(x: Tensor, g: Tensor) -> Tensor:
    """Sums of a module's input and of the gradient at its output, by which other ones are noticed."""
    return torch.stack([x.sum(dtype=torch.float64), g.sum(dtype=torch.float64)])


def same(again: dict[nn.Module, Tensor | None], first: dict[nn.Module, Tensor | None]) -> bool:
    """Whether every module that ran again has a witness of the same bits as the first time; NaN is the same as NaN."""
    differ = []
    for module, one in again.items():
        other = first.get(module)
        if one is None or other is None:  # no gradient came to it
            return False
        differ.append((one.view(torch.int64) != other.view(torch.int64)).any())
    return not read_back("recompute", torch.stack(differ).any())


class NonPrivate:
    """Non-private training with the same model and loss: adds the sum of the units' gradients, without clipping."""

    def __init__(self, model: LanguageModel, flat: FlatParameters, smoothing: float = 0.0, recompute: bool = False):
        self.model, self.flat, self.smoothing = model, flat, smoothing
        model.transformer.run_block = recomputed if recompute else None
        self.head_trains = model.lm_head.weight.requires_grad

    def accumulate(self, batch: MicroBatch) -> Tensor:
        """Add the gradient of the sum of the units' losses to `flat.grad`; return the losses, (U,)."""
        for _, parameter in self.flat.named:
            parameter.grad = self.flat.grad_of(parameter)
        losses = unit_losses(self.model, batch, self.smoothing, self.head_trains)
        losses.sum().backward()
        return losses.detach()
