"""A run that an error ends, and what has changed when it is resumed."""

import errno
import os
import shutil

import pytest
import safetensors.torch

from base.errors import UserError
from base.files import check_link
from helpers.interrupted_runs import CHARGE, DRAW, check_resumed, interrupted, kill
from helpers.small_runs import STEPS, flags, ledger, material, start_ranks, train, write_tokens
from run.log import WorkDir

RARE = {"save_interval": 100}


# ------------------------------------------------------------------ what is charged and done is saved


def test_a_rank_that_dies_costs_one_step(tmp_path):
    work = tmp_path / "run"
    ranks = interrupted(work, 2, {1: [kill(DRAW, "before", 4)]}, **RARE)
    assert ranks[0].status == 2 and "another rank died" in ranks[0].error and "model.3.pt" in ranks[0].stdout
    assert [record["step"] for record in ledger(work)] == [1, 2, 3, 4]
    check_resumed(work, 2)
    assert len(ledger(work)) == STEPS + 1


def test_a_log_that_cannot_be_written_costs_no_step(tmp_path):
    work = tmp_path / "run"
    full = ["error", {"point": "run.log:WorkDir.append_metrics", "nth": 2, "number": errno.ENOSPC}]
    ranks = interrupted(work, 1, {0: [full]}, **RARE)
    assert ranks[0].status == 2 and "No space left" in ranks[0].error
    assert sorted(path.name for path in work.glob("*.pt")) == ["model.4.pt", "optimizer.4.pt"]
    check_resumed(work, 1)
    assert len(ledger(work)) == STEPS


@pytest.mark.parametrize("point, saved", [("run.loop:norm", ["model.2.pt"]), ("optimizer:AdamW.step", [])])
def test_a_half_made_step_is_not_saved(tmp_path, point, saved):
    """An error in step 3, before the update and in it: then the parameters may be those of two steps."""
    fault = ["error", {"point": point, "nth": 3, "number": errno.EIO}]
    assert interrupted(tmp_path / "run", 1, {0: [fault]}, **RARE)[0].status == 2
    assert [path.name for path in (tmp_path / "run").glob("model.*")] == saved


# ------------------------------------------------------------------ what has changed


def test_other_frozen_weights_are_refused(tmp_path):
    """The file was replaced by another one of the same name and shape: the adapters were trained on the first."""
    work, tiny = tmp_path / "run", tmp_path / "tiny"
    shutil.copytree(material() / "tiny", tiny)
    interrupted(work, 1, {0: [kill(CHARGE, "before", 4)]}, init_checkpoint=tiny)
    charged, content = len(ledger(work)), (tiny / "model.safetensors").read_bytes()
    found = safetensors.torch.load(content)
    found["wte.weight"] = found["wte.weight"] + 0.01
    safetensors.torch.save_file(found, str(tiny / "model.safetensors"))
    settings = (work / "args.json").read_bytes()
    rank, = interrupted(work, 1, {}, resume=True, init_checkpoint=tiny, lr=0.5, resume_changed=["lr"])
    assert (work / "args.json").read_bytes() == settings
    assert rank.status == 2 and "model.2.pt: its adapters were trained on other frozen weights than" in rank.error
    assert str(tiny / "model.safetensors") in rank.error and len(ledger(work)) == charged
    (tiny / "model.safetensors").write_bytes(content)
    train(flags(work, resume=True, init_checkpoint=tiny))


def test_another_training_file_is_named(tmp_path):
    """By the words, not by N and q alone, which nobody gave."""
    work, data = tmp_path / "run", write_tokens(tmp_path / "train.jsonl", 40, seed=5)
    train(flags(work, train_data=data, max_step=2))
    with open(data, "a") as handle:
        handle.write('{"context": [1], "completion": [2]}\n')
    rank, = start_ranks(flags(work, train_data=data, max_step=2, resume=True))
    assert rank.wait() == 2 and "N 40 there, 41 here" in rank.error and "training data have changed" in rank.error


# ------------------------------------------------------------------ a work folder that is no good


def refused(path, *words: str, must_exist: bool = False) -> None:
    with pytest.raises(UserError) as caught:
        WorkDir(str(path), must_exist)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("resume", [False, True])
def test_a_link_to_nowhere(tmp_path, resume):
    (tmp_path / "work").symlink_to("gone")
    refused(tmp_path / "work", "--work_dir", "is a link to gone, which is not there", must_exist=resume)
    with pytest.raises(UserError, match="--output .*is a link to gone"):
        check_link(str(tmp_path / "work"), "--output")
    (tmp_path / "gone").mkdir()
    check_link(str(tmp_path / "work"), "--output")
    WorkDir(str(tmp_path / "work"), resume).lock.close()


@pytest.mark.parametrize("name", [".lock", "args.json", "metrics.jsonl", "privacy.json"])
def test_a_file_that_cannot_be_written_is_named_before_a_step(tmp_path, name):
    """As where another user has it; root may write everything but a folder."""
    os.mkdir(tmp_path / name)
    refused(tmp_path, f"--work_dir {tmp_path}: cannot be written (Is a directory: {tmp_path / name})")
