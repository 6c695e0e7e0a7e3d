"""A step of the training loop is the mechanism that the plan promises: against its definition, written out.

The seeded noise source makes mask and noise known, so the released gradient itself is compared with a loop of autograd.
"""

import math
import signal

import numpy as np
import pytest
import torch

import gpt2_ft
from base.distributed import World
from corpus.batching import PublicLengths
from corpus.examples import Examples
from helpers.clipping_oracle import Text, clipped_sum, distance, draw_units, make_model, norm, sums_of, unit_gradients
from helpers.plans import SEEDED, SIGMA, open_plan, settings
from model import LoRAConfig
from optimizer import AdamW, FlatParameters
from privacy import plan as plan_module
from privacy.clipping import BookKeeping, ClippingRule
from privacy.ledger import read_ledger
from privacy.plan import PlanSettings
from privacy.randomness import NoiseSource
from run.log import WorkDir
from run.loop import EXTRA, Trainer
from run.task import Learner, Position, Task
from weights.checkpoint import Loaded

LENGTHS = (4, 8, 13, 20)


def examples(units) -> Examples:
    texts = [unit[0] for unit in units]
    lengths = [len(text.ids) for text in texts]
    tokens = np.concatenate([np.array(text.ids, dtype=np.int32) for text in texts])
    return Examples(tokens, np.concatenate([[0], np.cumsum(lengths)]), np.array([text.first for text in texts]), 0, 0)


@pytest.fixture(autouse=True)
def signals():
    """A Trainer in this process takes over the signals of pytest."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


class Recorder(AdamW):
    """Keeps the released gradients that it is given."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.given = []

    def step(self, grad, lr):
        self.given.append(grad.clone())
        super().step(grad, lr)


def make_trainer(folder, given: PlanSettings, units, lora=LoRAConfig(3, 8.0), budget=40, rate=0.0) -> Trainer:
    model = make_model(lora, dtype=torch.float32)
    flat = FlatParameters(model, extra=EXTRA)
    plan = open_plan(folder, given)
    task = Task(unit="example", data=examples(units), valid=None, longest=20, steps=given.steps, lr=lambda t: rate,
                delta=given.delta, disclosed=[], digests={})
    learner = Learner(Loaded(model, None, None), flat, BookKeeping(model, flat, plan.clipping_rule, 0.1),
                      Recorder(flat, (0.9, 0.98), 1e-6, 0.0, True), PublicLengths(LENGTHS, budget))
    told = gpt2_ft.parse("--train_data x --valid_data x --log_interval 1000 --save_interval 1000".split())
    return Trainer(World(), told, task, learner, plan, WorkDir(str(folder)), Position())


UNITS = [unit[:1] for unit in draw_units(24, 1, 2, 20)]


@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(3, 8.0)], ids=["full", "lora"])
def test_no_cut_into_micro_batches_changes_the_sum(lora):
    """In float64, token budgets from one text at a time to all at once."""
    model = make_model(lora)
    flat = FlatParameters(model)
    engine, data, first = BookKeeping(model, flat, ClippingRule("flat", 0.3)), examples(UNITS), None
    for budget in (1, 7, 20, 33, 60, 150, 10**9):
        flat.sums.zero_()
        batches = list(data.micro_batches(torch.arange(24), PublicLengths(LENGTHS, budget)))
        assert sum(batch.units for batch in batches) == 24
        for batch in batches:
            engine.accumulate(batch)
        first = first or sums_of(flat)
        assert distance(sums_of(flat), first) < 1e-10


@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(3, 8.0)], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("budget", [1, 60, 10**9])
def test_a_step_is_the_mechanism_written_out(tmp_path, lora, kind, budget):
    """(sum over the drawn units of the clipped gradient + sigma C noise) / expected batch, for draws of all sizes, the
    empty ones included, however the draw is cut: from the seed's own mask and noise, and a loop of autograd.
    """
    given = settings(N=24, batch=3, steps=8, clipping=kind, clip=0.3, **SEEDED)
    trainer = make_trainer(tmp_path, given, UNITS, lora, budget)
    assert trainer.run() == 0
    gradients = unit_gradients(make_model(lora), UNITS, 0.1)[1]
    assert sum(norm(gradient) > given.clip for gradient in gradients) > 6
    mask, noise, sizes = NoiseSource("seeded", "mask", 0, 9), NoiseSource("seeded", "noise", 0, 9), set()
    names = [name for name, _ in trainer.learner.flat.named]
    for step, grad in enumerate(trainer.learner.optimizer.given, start=1):
        mask.begin_step(step), noise.begin_step(step)
        drawn = [u for u, uniform in enumerate(mask.uniform(24).tolist()) if uniform < 3 / 24]
        sizes.add(len(drawn))
        expected = torch.zeros(trainer.learner.flat.size, dtype=torch.float64)
        noise.add_normal_(expected, SIGMA * given.clip)
        if drawn:
            sums = clipped_sum([gradients[u] for u in drawn], trainer.plan.clipping_rule)
            expected += torch.cat([sums[name].flatten() for name in names])
        # float32 sums of a few units of norm 0.3 on top of noise of order 1
        torch.testing.assert_close(grad.double(), expected / 3, rtol=1e-4, atol=2e-5)
    assert step == 8 and 0 in sizes and len(sizes) > 2


def test_an_empty_run_takes_all_its_steps(tmp_path, monkeypatch):
    reduced = []
    real = World.all_reduce

    def all_reduce(self, buffer):
        reduced.append(buffer.numel())
        return real(self, buffer)

    monkeypatch.setattr(World, "all_reduce", all_reduce)
    trainer = make_trainer(tmp_path, settings(N=24, batch=1e-9, steps=7), UNITS, rate=0.01)
    flat, optimizer = trainer.learner.flat, trainer.learner.optimizer
    before = flat.data.clone()
    assert trainer.run() == 0
    assert reduced.count(flat.size + EXTRA) == 7 == len(optimizer.given) == optimizer.steps
    assert len(read_ledger(trainer.plan.ledger.path).records) == 7
    assert all((grad != 0).all() for grad in optimizer.given) and not torch.equal(flat.data, before)


def test_a_unit_without_a_finite_gradient_gives_nothing_and_the_step_counts(tmp_path):
    """Token 5 makes the states of its texts NaN: the others' sum, the noise, the record and the update are as ever."""
    spoilt = [any(5 in text.ids[:-1] for text in unit) for unit in UNITS]
    assert 2 < sum(spoilt) < 20
    given = settings(N=24, batch=24, steps=3, clip=0.3, **SEEDED)
    trainer = make_trainer(tmp_path / "a", given, UNITS)

    def poison(module, inputs):
        return inputs[0].masked_fill((trainer.ids == 5).any(1)[:, None, None], math.nan), *inputs[1:]

    def note_ids(module, inputs):
        trainer.ids = inputs[0]

    trainer.model.transformer.register_forward_pre_hook(note_ids)
    trainer.model.transformer.h[0].register_forward_pre_hook(poison)
    assert trainer.run() == 0
    blank = [[Text(unit[0].ids[:2], 2)] if bad else unit for unit, bad in zip(UNITS, spoilt)]  # nothing scored there
    clean = make_trainer(tmp_path / "b", given, blank)
    assert clean.run() == 0
    for left, right in zip(trainer.learner.optimizer.given, clean.learner.optimizer.given, strict=True):
        assert left.isfinite().all()
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    assert trainer.learner.optimizer.steps == 3 == trainer.plan.ledger.state.charged


@pytest.mark.parametrize("source", ["os", "seeded"])
def test_dropout_masks_are_no_function_of_the_random_seed(tmp_path, source, monkeypatch):
    """One more unit changes the others' masks, so masks that anyone can draw again would break the bound on a unit."""
    monkeypatch.setattr(plan_module.NoiseSource, "add_normal_", lambda *_: None)  # what is left are the masks
    given = settings(N=24, batch=24, steps=3, **(SEEDED if source == "seeded" else {}))
    runs = []
    for run in range(2):
        trainer = make_trainer(tmp_path / str(run), given, UNITS, LoRAConfig(3, 8.0, 0.5))
        trainer.run()
        runs.append(trainer.learner.optimizer.given)
    assert [torch.equal(left, right) for left, right in zip(*runs)] == [source == "seeded"] * 3
    assert not torch.equal(runs[0][0], runs[0][1])


def test_one_more_unit_moves_the_released_sum_by_at_most_c(tmp_path, monkeypatch):
    """Neighbours through the whole path of a step: the mask draws the new unit beside the others, the noise stays."""
    big = [Text(tuple([3] * 19 + [7]), 19)]
    sums = {}
    for units in (UNITS, [*UNITS, big]):
        given = settings(N=len(units), batch=len(units), steps=1, clip=0.01, **SEEDED)
        trainer = make_trainer(tmp_path / str(len(units)), given, units, LoRAConfig())
        trainer.run()
        sums[len(units)] = trainer.learner.optimizer.given[0].double() * len(units)
    moved = float((sums[25] - sums[24]).norm())
    assert moved <= 0.01 * 1.01 and moved == pytest.approx(0.01, rel=0.01)  # float32 beside noise of 0.017 a coordinate
