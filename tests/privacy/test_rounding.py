"""What rounding does to norms and sums: sums that cancel or overflow, data made to align the errors, and the share of C
that the noise pays for."""

import math

import numpy as np
import pytest
import torch

from helpers.clipping_oracle import alone_from, draw_units, make_model, pack
from optimizer import FlatParameters
from privacy import unit_gradients as layers
from privacy.clipping import BookKeeping, ClippingRule, rounding_share
from privacy.opacus_engine import OpacusEngine
from privacy.unit_gradients import Lookup, Outer, Ragged, Rows


def test_a_sum_that_overflowed_to_minus_infinity_is_no_small_norm():
    """A ghost norm's terms may add up to -inf (found here by search): taken for 0, the unit were not clipped."""
    generator, seen = torch.Generator().manual_seed(0), 0
    for _ in range(3000):
        a = torch.randn(1, int(torch.randint(3, 40, (), generator=generator)), 1, generator=generator)
        p = (a - a.mean()) * 10 ** (18.0 + 1.6 * float(torch.rand((), generator=generator)))
        seen += bool(torch.isneginf((p @ p.mT).sum()))
        found = layers.gram_norm_sq(p @ p.mT, torch.ones(1, a.shape[1], a.shape[1]))
        factors, finite = ClippingRule("flat", 1.0).factors(found[:, None])
        size = float(factors) * abs(float(p.double().sum()))
        assert size <= 1.0 if finite else size == 0
    assert seen > 10


@pytest.mark.parametrize("eps", [1.25, 0.1, 1e-2, 1e-3, 1e-4])
def test_positions_that_cancel_in_float32(eps):
    """Two halves of a text with opposite gradients: rounding hides what is left, and the unit still gives at most C."""
    generator = torch.Generator().manual_seed(0)

    def contributed(gram=layers.gram, most: float = layers.CANCELLATION) -> float:
        """The largest contribution under C = 1, computed in float64, of 1,000 such units."""
        h, g, rest = (torch.randn(1000, 16, 16, generator=generator) * scale for scale in (10, 10, eps))
        p, q = torch.cat([h, h], 1), torch.cat([g, rest - g], 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "CANCELLATION", most)
            factors, _ = ClippingRule("flat", 1.0).factors(layers.gram_norm_sq(gram(p), gram(q))[:, None])
        return float(((p.double().mT @ q.double()).flatten(1).norm(dim=1) * factors[:, 0]).max())

    assert contributed() <= 1 + 1e-9
    if eps == 1e-2:
        assert contributed(most=math.inf) <= 1 + 1e-9
        assert contributed(lambda rows: (rows @ rows.mT).double(), math.inf) > 1.01  # negative control


def test_positions_that_cancel_more_than_allowed():
    """Such a unit is clipped by its positions: its part of the sum has positions of CANCELLATION C together at most."""
    generator = torch.Generator().manual_seed(0)
    h, g = torch.randn(50, 16, 12, generator=generator), torch.randn(50, 16, 20, generator=generator)
    p, q = torch.cat([h, h], 1), torch.cat([g, -g * (1 - 1e-4)], 1)
    factors, _ = ClippingRule("flat", 1.0).factors(layers.gram_norm_sq(layers.gram(p), layers.gram(q))[:, None])
    sizes = (p.norm(dim=2) * q.norm(dim=2)).sum(1) * factors[:, 0]
    assert sizes.max() <= layers.CANCELLATION * (1 + 1e-5)
    assert (sizes > layers.CANCELLATION * 0.99).all()


@pytest.mark.parametrize("kind", ["layer", "head"])
def test_float32_products_that_cancel_stay_below_C(kind, monkeypatch):
    """What is added of one unit, rounding of its float32 product included; without the raised norm it is above C."""
    alone_from(monkeypatch)

    def added(h, g) -> float:
        target = torch.zeros(h.shape[1], g.shape[1], dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "TRAFFIC_COST", math.inf)
            unit = (Outer(target, h[None], g[None]) if kind == "layer"
                    else Ragged(target, h, g, [len(h)], torch.zeros(len(h)).long()))
            factors, _ = ClippingRule("flat", 1e-6).factors(unit.norm_sq()[:, None])
        unit.add(factors[:, 0], None)
        return float(target.norm()) / 1e-6

    def largest() -> float:
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(300):
            h, g, rest = (torch.randn(64, 4, generator=generator) * scale for scale in (1, 1, 1e-6))
            found.append(added(torch.cat([h, h]), torch.cat([g, rest - g])))
        return max(found)

    monkeypatch.setattr(layers, "CANCELLATION", math.inf)
    monkeypatch.setattr(layers, "ROUNDING", -128**2)  # what is raised for float64's rounding would cover this, too
    assert largest() <= 1
    monkeypatch.setattr(layers, "rounding_alone", lambda pp, qq, positions: torch.zeros(pp.shape[:-2]))
    assert largest() > 1.001


@pytest.mark.parametrize("kind", ["layer", "head"])
def test_a_float32_product_that_would_overflow_adds_nothing(kind, monkeypatch):
    """Its Gram matrices are float64 and finite."""
    alone_from(monkeypatch)
    target = torch.zeros(2, 2, dtype=torch.float64)
    p, q = torch.full((3, 2), 1e25), torch.full((3, 2), 1e20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "TRAFFIC_COST", math.inf)
        unit = Outer(target, p[None], q[None]) if kind == "layer" else Ragged(target, p, q, [3], torch.zeros(3).long())
        factors, finite = ClippingRule("flat", 1.0).factors(unit.norm_sq()[:, None])
    assert finite.tolist() == [False] and float(factors) == 0
    unit.add(factors[:, 0], finite)
    assert not target.any()


def test_shared_gram_matrices_are_those_of_the_rows():
    """Of another view at the same address, after a change in place, and where memory is given to the next tensor."""
    grams, draw = layers.Grams(), torch.Generator().manual_seed(0)

    def asked(rows):
        torch.testing.assert_close(grams.of(rows), torch.einsum("usp,utp->ust", rows.double(), rows.double()))

    square = torch.randn(2, 16, 16, generator=draw)
    asked(square)
    asked(square.mT)
    asked(square.mul_(2))
    for _ in range(20):
        asked(torch.randn(2, 16, 16, generator=draw))  # freed by its caller at once


def test_lookups_and_head_that_cancel(monkeypatch):
    """In the tied embedding: together their squared norms stay below TIED_CANCELLATION times that of their sum."""
    model, seen = make_model(dtype=torch.float32), []
    flat = FlatParameters(model)
    engine = BookKeeping(model, flat, ClippingRule("flat", 1e-3))
    real = BookKeeping.add_cross_term

    def add_cross_term(self):
        column = self.norms_sq[:, self.column[id(self.model.lm_head.weight)]]
        before = column.clone()
        monkeypatch.setattr(Ragged, "cross", lambda head, table: -before * (1 - 1e-6) / 2)
        real(self)
        seen.append((before / column).max().item())

    monkeypatch.setattr(BookKeeping, "add_cross_term", add_cross_term)
    engine.accumulate(pack(draw_units(3), 2, torch.float32))
    assert seen == [pytest.approx(layers.TIED_CANCELLATION)]


def test_rounding_share_of_known_recipes():
    """The figures of PRIVACY.md. More units or longer texts never make it less."""
    for units, longest, kappa in ((128, 512, 3.2e-6), (1024, 128, 1.44e-5), (10_000, 1024, 7.0e-3)):
        assert rounding_share(units, longest, 1) == pytest.approx(kappa, rel=0.02)
    shares = [rounding_share(units, longest, rows) for units, longest, rows in
              ((1, 1, 1), (10, 1, 1), (10, 50, 1), (10, 50, 4), (100, 50, 4), (10_000, 50, 4))]
    assert shares == sorted(shares)


# ------------------------------------------------------------------ data made to align the errors of the sum


def walk(edge: int, count: int) -> list[float]:
    """`count` units' values, at most 1 each, that climb to 0.75 below `edge`, a power of two, and stay around there.

    With one unit of 1 before them the float32 sum stays just above the edge, where its numbers are twice as far apart:
    the values are chosen so that it then rounds up by half a distance each time, and without that unit nearly not.
    """
    distance = edge * 2.0**-23  # of float32 numbers above the edge
    tiny = distance / 512
    values = [1.0] * (edge - 1) + [0.25]
    up, down = (2**10 + 0.5) * distance + tiny, (2**10 + 0.5) * distance - tiny
    while len(values) < count:
        values.append(-down if len(values) % 2 else up)
    assert max(map(abs, values)) <= 1 and all(value == np.float32(value) for value in values)
    return values


def as_rows(values):
    return lambda target: Rows(target.view(1), torch.tensor(values).view(-1, 1, 1))


def as_outer(values):
    return lambda target: Outer(target, torch.tensor(values).view(-1, 1, 1), torch.ones(len(values), 1, 1))


def as_lookup(values):
    return lambda target: Lookup(target, torch.zeros(len(values), 1, dtype=torch.int64),
                                 torch.tensor(values).view(-1, 1, 1))


def as_ragged(values):
    return lambda target: Ragged(target, torch.tensor(values).view(-1, 1), torch.ones(len(values), 1),
                                 [1] * len(values), torch.arange(len(values)))


def summed(values: list[float], kind, together: int, dtype: torch.dtype = torch.float64) -> float:
    """The clipped sum (C = 1) of units with these gradients, `together` of them in a micro-batch, kept in `dtype`."""
    target = torch.zeros(1, 1, dtype=torch.float64)
    for start in range(0, len(values), together):
        contribution = kind(values[start:start + together])(target)
        factors, _ = ClippingRule("flat", 1.0).factors(contribution.norm_sq()[:, None])
        contribution.add(factors[:, 0], None)
        target.copy_(target.to(dtype))
    return target.item()


@pytest.mark.parametrize("kind", [as_rows, as_outer, as_lookup, as_ragged])
@pytest.mark.parametrize("cost", [0, 1e9], ids=["materialised", "ghost"])
@pytest.mark.parametrize("together, edge, count", [
    (1, 512, 1024), (8, 512, 1024), (1024, 512, 1024), pytest.param(1, 4096, 10_000, marks=pytest.mark.slow)])
def test_no_data_move_the_sum_by_more_than_the_noise_pays_for(kind, cost, together, edge, count, monkeypatch):
    monkeypatch.setattr(layers, "TRAFFIC_COST", cost)
    values = walk(edge, count)
    one, other = (summed(units, kind, together) for units in (values, [1.0, *values]))
    assert abs(one - math.fsum(values)) <= rounding_share(count, 1, 1) / 2
    assert abs(other - one) <= 1 + rounding_share(count, 1, 1)
    if together == 1:  # negative control: 1.0156 C, 2.44 C
        rough = [summed(units, kind, 1, torch.float32) for units in (values, [1.0, *values])]
        assert rough[1] - rough[0] > (1.015 if count == 1024 else 2.4)


@pytest.mark.parametrize("engine", [BookKeeping, OpacusEngine])
def test_engines_add_units_in_float64_alone(engine):
    model = make_model(dtype=torch.float32)
    with pytest.raises(ValueError, match="torch.float32: expected float64"):
        engine(model, FlatParameters(model, sums=torch.float32), ClippingRule("flat", 1.0))
