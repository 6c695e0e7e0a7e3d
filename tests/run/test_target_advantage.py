"""--target_advantage through both training scripts: met, never passed, counted over attempts, refused as an epsilon."""

import pytest

from helpers import author_runs
from helpers.interrupted_runs import DRAW, kill
from helpers.small_runs import STEPS, flags, ledger, read, server, start_ranks, train
from privacy import attack_risk
from privacy.accounting import Phase
from run.risk_words import up

TARGET = {"noise_multiplier": None, "target_advantage": 0.2}


def advantage_of(work) -> float:
    counts: dict = {}
    for record in ledger(work):
        counts[record["sigma"], record["q"]] = counts.get((record["sigma"], record["q"]), 0) + 1
    return attack_risk.advantage([Phase(sigma, q, count) for (sigma, q), count in counts.items()])


@pytest.mark.parametrize("sampling", ["poisson", "shuffle", "allocation"])
def test_the_target_is_met_and_reported(tmp_path, sampling):
    (rank,) = train(flags(tmp_path / "run", **TARGET, sampling=sampling))
    report = read(tmp_path / "run")
    assert f"membership advantage at most {up(report['attack_risk']['advantage'])}, of the target 0.2" in rank.stdout
    assert report["target_advantage"] == 0.2 and report["target_epsilon"] is None
    assert 0.995 * 0.2 <= report["attack_risk"]["advantage"] <= 0.2 and report["steps_charged"] == STEPS
    if sampling == "poisson":
        assert advantage_of(tmp_path / "run") == pytest.approx(report["attack_risk"]["advantage"], abs=1e-9)
    run = server().start("src/privacy_report.py", [tmp_path / "run"])
    assert run.wait() == 0 and "agrees with the ledger" in run.stdout


def test_redone_steps_come_out_of_the_budget(tmp_path):
    """Killed in step 4 with a checkpoint of step 2: two of the six steps are spent twice. Another target needs its
    change said."""
    work = tmp_path / "run"
    (rank,) = start_ranks(flags(work, **TARGET), 1, {0: [kill(DRAW, "after", 4)]})
    assert rank.wait() == -9
    (rank,) = start_ranks(flags(work, **{**TARGET, "target_advantage": 0.3}, resume=True))
    assert rank.wait() == 2 and "--resume_changed" in rank.error and len(ledger(work)) == 4
    (rank,) = train(flags(work, **TARGET, resume=True))
    assert "the privacy budget permits no step after 4" in rank.stdout
    assert len(ledger(work)) == 6 and advantage_of(work) <= 0.2


def test_no_target_is_met_after_steps_without_noise(tmp_path):
    work = tmp_path / "run"
    train(flags(work, noise_multiplier=0, sampling="poisson", max_step=2))
    assert read(work)["attack_risk"]["advantage"] == 1 == read(work)["attack_risk"]["tpr"]["0.01"]
    (rank,) = start_ranks([*flags(work, **TARGET, sampling="poisson", resume=True), "--resume_changed", "sigma",
                           "noise_multiplier", "steps", "max_step", "target_advantage"])
    assert rank.wait() == 2 and "--target_advantage 0.2: " in rank.error and "2 steps without noise" in rank.error


def test_authors(tmp_path):
    author_runs.train(author_runs.flags(tmp_path / "run", **TARGET))
    assert 0.995 * 0.2 <= read(tmp_path / "run")["attack_risk"]["advantage"] <= 0.2
    for changed, words in (({"target_epsilon": 8}, "--target_epsilon and --target_advantage: give exactly one"),
                           ({"target_advantage": 1}, "--target_advantage 1:")):
        (rank,) = author_runs.start(author_runs.flags(tmp_path / "other", **{**TARGET, **changed}))
        assert rank.wait() == 2 and words in rank.error
