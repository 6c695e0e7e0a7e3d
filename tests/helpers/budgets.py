"""Runs that name a budget file, in this process and without a model: the plan draws, and nothing is trained."""

import hashlib
import json
import os
import pathlib
from collections import Counter

from base.distributed import World
from base.files import atomic_write
from privacy.budget import create_budget, read_budget
from privacy.ledger import Ledger
from privacy.plan import PlanSettings, PrivacyPlan
from run import spending

DATA, OTHER_DATA = "d" * 64, "e" * 64
STEPS = 4
GIVEN = PlanSettings(unit="example", N=40, batch=8, steps=STEPS, clip=1.0, sigma=0.8, delta=1e-5)
KEY = ("gaussian", "poisson", 0.8, 0.2)


CREATED = {"format": 1, "kind": "create", "unit": "example", "data": DATA, "epsilon": 8.0, "delta": 1e-5}

RESERVED = {"format": 1, "kind": "reserve", "reservation": "a", "ledger": "x", "uses": [[*KEY, 5]]}
CLOSED = {"format": 1, "kind": "close", "reservation": "a"}
RELEASED = {"format": 1, "kind": "release", "reservation": "a", "uses": [[*KEY, 3]]}
VOID = {"format": 1, "kind": "void", "text": "{"}


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the product catches it."""


def budget_file(folder: pathlib.Path, epsilon: float = 50.0, unit: str = "example", data: str = DATA) -> str:
    path = str(folder / "budget.jsonl")
    create_budget(path, unit, data, epsilon, 1e-5)
    return path


def run(folder: pathlib.Path, budget: str, resume: bool = False, given: PlanSettings = GIVEN, done: int = 0,
        drawn: Counter | None = None, data: str = DATA, end: bool = True, last: int | None = None,
        changed: tuple[str, ...] = ()) -> PrivacyPlan:
    """A run as build_trainer and Trainer have it. drawn: counts the masks, by key. end: it finishes and releases."""
    os.makedirs(folder, exist_ok=True)
    name = spending.choose_name(budget, str(folder), given.unit, data, resume)
    ledger = Ledger(str(folder), given.ledger_entries(1), resume, changed)
    try:
        with atomic_write(str(folder / "args.json")) as handle:
            json.dump({"reservation": name, "train_sha256": data}, handle)
        plan = PrivacyPlan(given, World(), ledger, done)
        spending.reserve(budget, name, plan, data, last or given.steps, done)
        draw, (key,) = plan.sampler.draw, given.cost(given.steps)

        def counted(step: int):
            if drawn is not None:
                drawn[key] += 1
            return draw(step)

        plan.sampler.draw = counted
        while done < (last or given.steps) and plan.open_step(done + 1) is not None:
            plan.open = None  # as release() leaves it
            done += 1
        if end:
            plan.said = spending.settle(plan.hold, ledger)
        plan.reached = done
        return plan
    finally:
        ledger.close()  # a killed process loses its locks


def counted(budget: str) -> Counter:
    """What the file counts; nothing where it is not whole."""
    return read_budget(budget).counted


def chained(*records: dict) -> str:
    """The lines of a budget file, by nothing of the product."""
    lines, previous = [], ""
    for record in records:
        body = json.dumps(record, sort_keys=True)
        previous = hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()[:16]
        lines.append(json.dumps({**record, "checksum": previous}) + "\n")
    return "".join(lines)
