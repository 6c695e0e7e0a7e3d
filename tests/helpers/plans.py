"""Privacy plans of one process, and the settings that their tests share."""

import os

from base.distributed import World
from privacy.ledger import Ledger
from privacy.plan import PlanSettings, PrivacyPlan

SIGMA, CLIP, BATCH = 1.7, 0.5, 100
COORDINATES, STEPS = 1_000_001, 4  # a million, and not divisible by the ranks


def settings(**changes) -> PlanSettings:
    given = {"unit": "example", "N": 1003, "batch": BATCH, "steps": STEPS, "clip": CLIP, "sigma": SIGMA, "delta": 1e-5}
    return PlanSettings(**{**given, **changes})


def open_plan(folder, given: PlanSettings) -> PrivacyPlan:
    """A plan of one process, its ledger in `folder`."""
    os.makedirs(folder, exist_ok=True)
    return PrivacyPlan(given, World(), Ledger(str(folder), given.ledger_entries(1), resume=False))


SEEDED = {"noise_source": "seeded", "seed": 9}
