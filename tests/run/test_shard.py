"""--shard optimizer: the ranks share out noise, update and moments; the result is that of a run without it."""

import signal

import pytest
import torch

from base.distributed import World
from helpers import author_runs
from helpers.interrupted_runs import CHARGE, UPDATE, check_resumed, interrupted, kill
from helpers.small_runs import STEPS, equal, flags, start_ranks, train, weights
from optimizer import AdamW, FlatParameters

SHARD = {"shard": "optimizer"}
GATHER = "base.distributed:World.all_gather"


def moments(work, step: int = STEPS) -> dict[str, torch.Tensor]:
    state = torch.load(work / f"optimizer.{step}.pt", weights_only=True)
    return {name: state[name] for name in ("m", "v")}


@pytest.mark.parametrize("size, changed", [
    (2, {}), (3, {"lora_dim": 0, "lora_dropout": 0, "weight_decay": 0.1, "no_decay_bias": True}),
    (2, {"noise_multiplier": 0}),
])
def test_the_same_bits(tmp_path, size, changed):
    """3 ranks do not divide the parameters. Decay ends within a share."""
    for name, shard in (("whole", {}), ("shares", SHARD)):
        train(flags(tmp_path / name, **changed, **shard), size)
    assert equal(weights(tmp_path / "shares"), weights(tmp_path / "whole"))
    assert equal(moments(tmp_path / "shares"), moments(tmp_path / "whole"))


def test_a_bound_on_the_norm_is_of_all_shares(tmp_path):
    for name, shard in (("whole", {}), ("shares", SHARD)):
        train(flags(tmp_path / name, clip=0.1, **shard), 2)
    found, wanted = weights(tmp_path / "shares"), weights(tmp_path / "whole")
    # The factor differs by the rounding of a float64 norm, which may move a float32 gradient by one place.
    assert max((found[name] - wanted[name]).abs().max() for name in wanted) < 1e-6


def test_authors(tmp_path):
    for name, shard in (("whole", {}), ("shares", SHARD)):
        author_runs.train(author_runs.flags(tmp_path / name, **shard), 2)
    states = [moments(tmp_path / name, author_runs.STEPS) for name in ("whole", "shares")]
    assert equal(*states)


@pytest.mark.parametrize("point, when, nth, number", [
    (CHARGE, "before", 4, signal.SIGKILL), (UPDATE, "before", 4, signal.SIGKILL), (GATHER, "before", 4, signal.SIGKILL),
    (UPDATE, "after", 4, signal.SIGTERM), ("base.distributed:World.reduce_scatter", "before", 4, signal.SIGKILL),
])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill(tmp_path, rank, point, when, nth, number):
    """Resumed without shares: the checkpoint is whole. Rank 1 charges nothing. Without shares nothing is scattered, and
    that kill would not come."""
    if rank == 1 and point == CHARGE:
        point = "privacy.sampling:PoissonSampler.draw"
    interrupted(tmp_path / "run", 2, {rank: [kill(point, when, nth, number)]}, **SHARD)
    assert not (tmp_path / "run" / f"model.{STEPS}.pt").exists()
    check_resumed(tmp_path / "run", 2)


def test_another_number_of_ranks(tmp_path):
    """Begun with shares of 3 ranks, continued with those of 2: as without shares."""
    for name, shard in (("whole", {}), ("shares", SHARD)):
        faults = {rank: [kill("run.loop:Trainer.after_step", "after", 3, signal.SIGTERM)] for rank in range(3)}
        ranks = start_ranks(flags(tmp_path / name, **shard), 3, faults)
        assert [rank.wait() for rank in ranks] == [128 + signal.SIGTERM] * 3
        train(flags(tmp_path / name, resume=True, resume_changed=["world_size", "train_batch_size"],
                    train_batch_size=12, **shard), 2)
    assert equal(weights(tmp_path / "shares"), weights(tmp_path / "whole"))


def test_moments_are_of_the_own_share_alone():
    model = torch.nn.Linear(10, 10)  # 110 coordinates, 28 a rank
    flat = FlatParameters(model, extra=2, sharers=World(1, 4))
    optimizer = AdamW(flat, (0.9, 0.99), 1e-8, 0.0, True)
    assert optimizer.m.shape == optimizer.v.shape == (28,) and flat.own == slice(28, 56)
    assert flat.sums.shape == (114,) and flat.data.shape == (110,)
    state = {"steps": 3, "m": torch.arange(110.0), "v": torch.arange(110.0) + 1}
    optimizer.load_state_dict(state)
    assert optimizer.m.tolist() == list(range(28, 56))
    flat = FlatParameters(model, sharers=World(3, 4))
    optimizer = AdamW(flat, (0.9, 0.99), 1e-8, 0.0, True)
    optimizer.load_state_dict(state)
    assert optimizer.v.tolist() == [*range(85, 111), 0, 0]
