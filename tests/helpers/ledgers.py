"""Ledgers written record by record, and the epsilon of records by Google's accountant."""

import pytest

from privacy.ledger import Ledger

SETTINGS = {"unit": "example", "N": 40, "q": 0.2, "sigma": 0.8, "clip": 1.0, "mechanism": "gaussian",
            "sampling": "poisson", "steps_per_epoch": 5, "delta": 1e-5, "world_size": 1, "noise_source": "seeded"}


def make(folder, steps=(1, 2, 3), resume=False, changed=(), **settings) -> str:
    """Append records of `steps` to the ledger in `folder`; returns its path."""
    opened = Ledger(str(folder), {**SETTINGS, **settings}, resume, changed)
    for step in steps:
        opened.charge(step)
    opened.close()
    return opened.path


def pld_epsilon(records: list[dict], delta: float) -> float:
    """Google's accountant on raw records: an upper bound within 0.1 % of the truth."""
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    total = None
    for record in records:
        part = pld.from_gaussian_mechanism(record["sigma"], pessimistic_estimate=True,
                                           value_discretization_interval=1e-3,
                                           sampling_prob=record["q"])
        total = part if total is None else total.compose(part)
    return total.get_epsilon_for_delta(delta)
