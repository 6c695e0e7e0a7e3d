"""What float32 does to norms and sums: sums that cancel or overflow, and the share of C that the noise pays for."""

import math

import pytest
import torch

from privacy import clipping
from privacy.clipping import MOST_TOKENS, ClippingRule, rounding_share


def test_a_sum_that_overflowed_to_minus_infinity_is_no_small_norm():
    """A ghost norm's terms may add up to -inf (found here by search): taken for 0, the unit were not clipped."""
    generator, seen = torch.Generator().manual_seed(0), 0
    for _ in range(3000):
        a = torch.randn(1, int(torch.randint(3, 40, (), generator=generator)), 1, generator=generator)
        p = (a - a.mean()) * 10 ** (18.0 + 1.6 * float(torch.rand((), generator=generator)))
        seen += bool(torch.isneginf((p @ p.mT).sum()))
        found = clipping.gram_norm_sq(p @ p.mT, torch.ones(1, a.shape[1], a.shape[1]))
        factors, finite = ClippingRule("flat", 1.0).factors(found[:, None])
        size = float(factors) * abs(float(p.double().sum()))
        assert size <= 1.0 if finite else size == 0
    assert seen > 10


@pytest.mark.parametrize("eps", [1.25, 0.1, 1e-2, 1e-3, 1e-4])
def test_positions_that_cancel_in_float32(eps):
    """Two halves of a text with opposite gradients: rounding hides what is left, and the unit still gives at most C."""
    generator = torch.Generator().manual_seed(0)

    def contributed(rounding: int, most: float = clipping.CANCELLATION) -> float:
        """The largest contribution under C = 1, computed in float64, of 1,000 such units."""
        h, g, rest = (torch.randn(1000, 16, 16, generator=generator) * scale for scale in (10, 10, eps))
        p, q = torch.cat([h, h], 1), torch.cat([g, rest - g], 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clipping, "ROUNDING", rounding)
            patch.setattr(clipping, "CANCELLATION", most)
            factors, _ = ClippingRule("flat", 1.0).factors(clipping.gram_norm_sq(p @ p.mT, q @ q.mT)[:, None])
        return float(((p.double().mT @ q.double()).flatten(1).norm(dim=1) * factors[:, 0]).max())

    assert contributed(clipping.ROUNDING) <= 1 + 1e-6
    if eps == 1e-2:
        assert contributed(clipping.ROUNDING, math.inf) <= 1 + 1e-6
        assert contributed(0, math.inf) > 1.01  # negative control


def test_positions_that_cancel_more_than_allowed():
    """Such a unit is clipped by its positions: its part of the sum has positions of CANCELLATION C together at most."""
    generator = torch.Generator().manual_seed(0)
    h, g = torch.randn(50, 16, 12, generator=generator), torch.randn(50, 16, 20, generator=generator)
    p, q = torch.cat([h, h], 1), torch.cat([g, -g * (1 - 1e-4)], 1)
    factors, _ = ClippingRule("flat", 1.0).factors(clipping.gram_norm_sq(p @ p.mT, q @ q.mT)[:, None])
    sizes = (p.norm(dim=2) * q.norm(dim=2)).sum(1) * factors[:, 0]
    assert sizes.max() <= clipping.CANCELLATION * (1 + 1e-5)
    assert (sizes > clipping.CANCELLATION * 0.99).all()


def test_rounding_share_of_known_recipes():
    """E2E's batch of 128: 0.2 %; 1,024 authors: about 1 %. More units or longer texts never make it less."""
    assert 1e-3 < rounding_share(128, 511, 1, 2048) < 3e-3
    assert 5e-3 < rounding_share(1024, 127, 1, 2048) < 1.5e-2
    shares = [rounding_share(units, longest, rows, 2048) for units, longest, rows in
              ((1, 1, 1), (10, 1, 1), (10, 50, 1), (10, 50, 4), (100, 50, 4), (10_000, 50, 4))]
    assert shares == sorted(shares) and rounding_share(10, 50, 1, 1) == rounding_share(10, 50, 1, MOST_TOKENS)
