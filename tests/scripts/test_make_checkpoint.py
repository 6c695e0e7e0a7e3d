"""scripts/make_checkpoint.sh, in a copy of the repository whose programs say their words; its trainings, killed."""

import os
import shutil
import signal

import pytest

from helpers.interrupted_runs import UPDATE, kill
from helpers.processes import ROOT, assert_user_error, bash, fresh_copy
from helpers.small_runs import equal, flags, start_ranks, train, weights


def test_a_checkpoint_is_made_where_the_user_is_and_never_over_another(tmp_path):
    """From a folder of the user's; a second call goes on with the run."""
    copy, user = fresh_copy(tmp_path), tmp_path / "user"
    python = copy / ".venv/bin/python"
    for folder in (python.parent, user / "corpus", user / "taken", copy / "trained_models/webnlg_pretraining/run"):
        folder.mkdir(parents=True)
    python.write_text('#!/bin/bash\necho "$@"\n')
    python.chmod(0o755)
    (copy / "scripts/download_vocab.sh").write_text("")
    shutil.copy(ROOT / "requirements.txt", copy)

    def make(*arguments):
        return bash(copy / "scripts/make_checkpoint.sh", *arguments, cwd=user)

    assert_user_error(make("webnlg", "corpus"), "corpus", "train.json")
    for part in ("train", "dev"):
        (user / f"corpus/{part}.json").touch()
    assert_user_error(make("webnlg", "corpus", "taken"), "taken: is there already")
    assert_user_error(make("demo", "taken"), "taken: is there already")
    assert make("wiki").returncode == make("demo", "new", "more").returncode == 2

    llama = make("demo-llama", "new")
    assert llama.returncode == 0, llama.stderr
    for word in ("make_demo_data --domain public", "--model_card pretrained_checkpoints/demo-llama/config.json",
                 f"--output {user}/new --vocab {copy}/trained_models/demo-llama_pretraining/vocab --float16"):
        assert word in llama.stdout

    first = make("webnlg", "corpus", "new")
    assert first.returncode == 0, first.stderr
    for word in (f"format_converting_webnlg.py {user}/corpus/dev.json", f"--output {user}/new"):
        assert word in first.stdout
    assert "--resume" not in first.stdout
    (copy / "trained_models/webnlg_pretraining/run/privacy_ledger.jsonl").write_text("a step")
    assert "--resume" in make("webnlg", "corpus", "new").stdout


def test_the_english_base_is_made_in_steps_and_goes_on(tmp_path):
    """As above: packages, WebNLG, corpus, the long phase, the last one, export; each only where it is not done."""
    copy, user = fresh_copy(tmp_path), tmp_path / "user"
    python, apt = copy / ".venv/bin/python", tmp_path / "bin/apt-get"
    work = copy / "trained_models/english_pretraining"
    for folder in (python.parent, apt.parent, user / "webnlg", user / "text", user / "taken"):
        folder.mkdir(parents=True)
    for part in ("train", "dev"):
        (user / f"webnlg/{part}.json").write_text("{}")
    python.write_text('#!/bin/bash\n[ "${*: -1}" = --list ] && echo "a_1_all.deb a=1" || echo "$@"\n')
    apt.write_text('#!/bin/bash\necho apt "$@"\n[ -n "$APT_FAILS" ] && exit 100\ntouch "${2/=/_}_all.deb"\n')
    for program in (python, apt):
        program.chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", copy)
    path = f"{apt.parent}:{os.environ['PATH']}"

    def make(*arguments, **more):
        return bash(copy / "scripts/make_checkpoint.sh", "english", *arguments, cwd=user,
                    env={**os.environ, "PATH": path, **more})

    assert make("new", "more").returncode == make("--quick").returncode == 2
    assert_user_error(make("--text", "none"), "--text none", "no such folder")
    assert_user_error(make("--text"), "--text", "wants a folder")
    assert_user_error(make("taken"), "taken: is there already")
    assert_user_error(make("--mirror", "webnlg", "new", APT_FAILS="1"), "a=1", "--text DIR")
    assert_user_error(make("--mirror", "webnlg", "--finish", "new"), "--finish", "no checkpoint yet")

    (work / "stable").mkdir()
    (work / "stable/model.250.pt").touch()

    def programs(process):
        assert process.returncode == 0, process.stderr
        return [line for line in process.stdout.splitlines() if line.startswith(("apt", "-m", "s"))]

    def named(lines):
        words = ("make_english_corpus", "/stable --noise", "/form --noise", "export.py")
        return [next(word for word in words if word in line) for line in lines if any(word in line for word in words)]

    everything = ["make_english_corpus", "/stable --noise", "/form --noise", "export.py"]
    first = programs(make("--mirror", "webnlg", "new"))
    assert named(first) == everything and "--resume" not in " ".join(first)
    assert f"--text {work}/packages --webnlg {copy}/data/webnlg" in first[-4]
    assert f"--output {user}/new --vocab {work}/corpus/vocab --float16" in first[-1]
    given = make("--mirror", "webnlg", "--text", "text", "new")
    assert f"--text {user}/text" in given.stdout and "apt" not in given.stdout
    (work / "corpus").mkdir()
    (work / "corpus/corpus.json").touch()
    assert named(programs(make("--finish", "new"))) == everything[2:]
    (work / "stable/privacy_ledger.jsonl").write_text("a step")
    again = programs(make("new"))
    assert named(again) == everything[1:] and "--resume" in again[0] and "--resume" not in again[1]
    (work / "form").mkdir()  # begun: its initial weights stay what they were
    assert named(programs(make("new"))) == everything[2:]
    (work / "form/privacy.json").write_text('{"train_runtime": 1.0}')
    assert named(programs(make("new"))) == everything[3:]


PRETRAINING = dict(noise_multiplier=0, lora_dim=0, lora_alpha=None,
                   lora_dropout=None, scheduler="constant", warmup_step=3, weight_decay=0.1, no_decay_bias=True,
                   adam_beta2=0.98, clip=1.0, correct_bias=True, bf16=True, random_seed=1)


@pytest.mark.parametrize("phase", [{"init_checkpoint": None}, {"scheduler": "linear"}])  # the long one, the last one
def test_a_pretraining_that_is_killed_ends_as_one_that_is_not(tmp_path, phase):
    """Two ranks, without noise, in bfloat16: killed in step 4, a step after its checkpoint, then resumed."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(flags(whole, **{**PRETRAINING, **phase}), 2)
    ranks = start_ranks(flags(broken, **{**PRETRAINING, **phase}), 2, {0: [kill(UPDATE, "after", 4)]})
    killed, _ = [rank.wait() for rank in ranks]
    assert killed == -signal.SIGKILL
    assert (broken / "model.2.pt").exists() and not (broken / "model.4.pt").exists()
    train(flags(broken, **{**PRETRAINING, **phase}, resume=True), 2)
    assert equal(weights(whole), weights(broken))
    assert not equal(weights(whole), weights(whole, 4))
