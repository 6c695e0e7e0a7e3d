"""scripts/sweep.py: what it tries, what its totals are, what is left of a private selection, and what it refuses.

The trials are real runs, started as forks of the test server in place of new interpreters.
"""

import json
import os
import pathlib
import sys
from collections import Counter

import pytest

import sweep
from base.errors import UserError, run_main
from helpers import author_runs
from helpers.ledgers import pld_epsilon
from helpers.processes import ROOT, run_script
from helpers.small_runs import STEPS, contents, flags, ledger, material, read, server
from privacy import accounting
from privacy.accounting import Phase
from privacy.budget import create_budget, read_budget
from privacy.selection import Trials, selection_epsilon
from sweep_space import read_space
from sweep_table import positions, table

TRAIN = str(ROOT / "src/gpt2_ft.py")
BASE = flags("x", noise_source=None, noise_seed=None, lr=None, work_dir=None, eval_interval=3)
PHASE = Phase(0.8, 0.2, STEPS)


class Killed(BaseException):
    """Stands for SIGKILL of the sweep."""


@pytest.fixture
def command(capsys, monkeypatch):
    """command(SCRIPT, OPTIONS, FLAGS) -> (status, standard output, standard error); command.started: trials begun."""

    def start(words: list[str]):
        script = os.path.relpath(words[1], ROOT)
        return server().start(script, words[2:])

    def ask(words):
        run = start(words)
        return run.wait(), run.stdout, run.stderr

    def wait(words, output):
        run_sweep.started.append(words)
        if len(run_sweep.started) == run_sweep.kill_at:
            raise Killed
        run = start(words)
        status = run.wait()
        output.write(run.stdout + run.stderr)
        if len(run_sweep.started) == -run_sweep.kill_at:
            raise Killed
        return status

    def run_sweep(*options, script=TRAIN, base=BASE):
        monkeypatch.setattr(sys, "argv", ["scripts/sweep.py", script, *map(str, options), "--", *map(str, base)])
        with pytest.raises((SystemExit, Killed)) as ended:
            run_main(sweep.main)
        status = None if ended.type is Killed else ended.value.code or 0
        return status, *capsys.readouterr()

    run_sweep.started, run_sweep.kill_at = [], 0
    monkeypatch.setattr(sweep, "ask", ask)
    monkeypatch.setattr(sweep, "wait", wait)
    return run_sweep


# ------------------------------------------------------------------ composition


def test_a_grid_is_run_and_composed(command, tmp_path):
    """Four trials, of which two take half the steps; the total by dp_accounting from the ledgers' raw records."""
    out = tmp_path / "out"
    grid = ["--out", out, "--grid", "lr=0.01,0.1", "--grid", "max_step=6,3"]
    base = flags("x", noise_source=None, noise_seed=None, lr=None, work_dir=None, max_step=None)
    status, priced, err = command(*grid, "--dry-run", base=base)
    assert status == 0 and not out.exists() and not command.started, err
    status, said, err = command(*grid, "--validation", "public", base=base)
    assert status == 0, err
    records = [record for name in ("0001", "0002", "0003", "0004") for record in ledger(out / name)]
    truth = pld_epsilon(records, 1e-5)
    expected = accounting.epsilon_prv([Phase(0.8, 0.2, 18)], 1e-5)
    assert len(records) == 18 and 0.999 * truth < expected < truth + 0.012
    assert f"epsilon {expected:.4f} at delta 1e-05" in priced and f"epsilon       {expected:.4f} at delta" in said
    assert "18 in 4 runs" in said and "by valid_loss is covered by the total" in said
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| 0")]
    values = [[cell.strip() for cell in row] for row in rows]
    assert sorted(row[1:3] for row in values) == sorted([lr, steps] for lr in ("0.01", "0.1") for steps in ("3", "6"))
    assert [float(row[3]) for row in values] == sorted(float(row[3]) for row in values)
    for name, *chosen, score, _ in values:
        args = read(out / name, "args.json")
        assert [args["lr"], args["max_step"]] == list(map(float, chosen))
        lines = map(json.loads, (out / name / "metrics.jsonl").read_text().splitlines())
        losses = [line["valid_loss"] for line in lines if "valid_loss" in line]
        assert float(score) == pytest.approx(losses[-1], rel=1e-4)
    assert (out / "table.md").read_text() in said and (out / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    status, _, err = command(*grid, base=base)
    assert status == 2 and "is not empty; continue that sweep with --resume" in err


def test_random_trials_resumed_after_kills(command, tmp_path):
    """Killed before the first trial, between two, and after one had trained; each trial is run once, as drawn."""
    out = tmp_path / "out"
    search = ["--out", out, "--random", 3, "--range", "lr=1e-4:1e-1:log", "--grid", "weight_decay=0,0.1"]
    for kill_at, resume in ((1, []), (3, ["--resume"]), (-4, ["--resume"])):
        command.kill_at = kill_at
        command.started[:] = [None] * (abs(kill_at) - (1 if kill_at != 3 else 2))
        assert command(*search, *resume)[0] is None
    drawn = [trial["values"] for trial in read(out, "sweep.json")["trials"]]
    command.kill_at = 0
    status, said, err = command(*search, "--resume")
    assert status == 0, err
    assert drawn == [trial["values"] for trial in read(out, "sweep.json")["trials"]]
    for number, values in enumerate(drawn, start=1):
        assert len(ledger(out / f"{number:04d}")) == STEPS and values["lr"] in said
        assert 1e-4 <= float(values["lr"]) <= 0.1 and values["weight_decay"] in ("0", "0.1")
    assert len({values["lr"] for values in drawn}) == 3
    status, _, err = command(*search[:-1], "weight_decay=0,0.2", "--resume")
    assert status == 2 and "is of another sweep: grid" in err


def test_trials_reserve_in_a_budget(command, tmp_path):
    """Room for two of three: refused before anything is reserved. With room for all, all are charged."""
    from hashlib import sha256
    data = sha256((material() / "train.jsonl").read_bytes()).hexdigest()
    for epsilon, fits in ((8.5, False), (10.0, True)):
        path = tmp_path / f"{fits}.jsonl"
        create_budget(str(path), "example", data, epsilon, 1e-5)
        before = path.read_bytes()
        out = tmp_path / f"out-{fits}"
        status, _, err = command("--out", out, "--grid", "lr=0.001,0.01,0.1", "--budget", path)
        if fits:
            assert status == 0, err
            assert read_budget(str(path)).counted == Counter({("gaussian", "poisson", 0.8, 0.2): 3 * STEPS})
        else:
            assert status == 2 and "beyond its limit 8.5; try fewer" in err
            assert path.read_bytes() == before and not out.exists()
    before = path.read_bytes()
    status, _, err = command("--out", tmp_path / "allocated", "--grid", "sampling=poisson,allocation", "--budget", path)
    assert status == 2 and "refused with --sampling allocation" in err  # before the first trial
    assert path.read_bytes() == before and not (tmp_path / "allocated").exists()


def test_a_trial_that_fails_counts(command, tmp_path):
    """A learning rate that overflows the parameters: charged, in the table, and the others go on."""
    status, said, err = command("--out", tmp_path / "out", "--grid", "lr=1e38,0.01")
    assert status == 0, err
    charged = len(ledger(tmp_path / "out/0001"))
    assert "failed" in said and 0 < charged < STEPS and f"{charged + STEPS} in 2 runs" in said


# ------------------------------------------------------------------ private selection


def select(out: pathlib.Path, *more: object) -> list:
    return ["--out", out, "--select", "poisson", "--mean", 2, "--validation", "public", "--grid", "lr=0.001,0.1", *more]


def test_only_the_best_is_left(command, tmp_path, monkeypatch):
    """Three trials; the folder holds one run and the price, and nothing tells of the others or of their number."""
    monkeypatch.setattr(Trials, "draw", lambda self: 3)
    points = iter([{"lr": "0.001"}, {"lr": "0.1"}, {"lr": "0.001"}])
    monkeypatch.setattr("sweep_space.Space.draw", lambda self: next(points))
    monkeypatch.setattr("sweep.Space.all", lambda self: [{"lr": "0.001"}, {"lr": "0.1"}])
    scores = iter([3.0, 1.0, 2.0])

    def read_score(place, _):
        for path in pathlib.Path(place).rglob("*"):
            os.utime(path, (1e9, 1e9))  # a trial of long ago
        return next(scores)

    monkeypatch.setattr(sweep, "read_score", read_score)
    out = tmp_path / "out"
    points = iter([{"lr": "0.001"}] * 2 + [{"lr": "0.001"}, {"lr": "0.1"}, {"lr": "0.001"}])
    status, said, err = command(*select(out))
    assert status == 0 and len(command.started) == 3, err
    assert sorted(os.listdir(out)) == ["best", "selection.json", "table.md"]
    ends = [path.lstat().st_mtime - (out / "table.md").stat().st_mtime for path in [*out.rglob("*")]]
    assert max(map(abs, ends)) < 5  # the files of the best do not tell how long ago it ended
    epsilon = selection_epsilon([[PHASE]], Trials(2), 1e-5)
    result = read(out, "selection.json")
    assert result["values"] == {"lr": "0.1"} and result["score"] == 1.0 and read(out / "best", "args.json")["lr"] == 0.1
    assert result["epsilon"] == pytest.approx(epsilon) and f"epsilon {epsilon:.4f} at delta 1e-05 (RDP)" in said
    assert "does not pay for" in " ".join(read(out / "best")["disclosed"])
    assert accounting.epsilon_rdp([PHASE], 1e-5) < epsilon < accounting.epsilon_rdp([PHASE] * 3, 1e-5)
    everything = said + "".join(content.decode(errors="replace") for name, content in contents(out).items()
                                if name.endswith((".json", ".md")) and "privacy" not in name and "args" not in name)
    assert "3 trials" not in everything and "0.001" not in everything
    reported = server().start("src/privacy_report.py", [out / "best"])
    assert reported.wait() == 0 and "chosen by private selection" in reported.stdout
    status, _, err = command(*select(out, "--resume"))
    assert status == 2 and "holds a selection that is done" in err


@pytest.mark.parametrize("kill_at", [1, -1, 2, -3])
def test_a_selection_that_is_killed_goes_on(command, tmp_path, monkeypatch, kill_at):
    """The number, the draws and the best so far are kept; nothing is shown; a trial is not run again."""
    monkeypatch.setattr(Trials, "draw", lambda self: 3)
    out, command.kill_at = tmp_path / "out", kill_at
    status, said, _ = command(*select(out))
    assert status is None and "trial" not in said.replace("random number", "").split("planned")[0]
    assert not (out / "table.md").exists() and os.stat(out / "private").st_mode & 0o077 == 0
    state = read(out / "private", "sweep.json")
    command.kill_at = 0
    command.started.clear()
    status, said, err = command(*select(out, "--resume"))
    assert status == 0 and len(state["trials"]) == 3, err
    assert len(command.started) == 3 - sum("uses" in trial for trial in state["trials"])
    assert sorted(os.listdir(out)) == ["best", "selection.json", "table.md"]
    assert len(ledger(out / "best")) == STEPS


@pytest.mark.parametrize("best", [0, 1])
@pytest.mark.parametrize("moment", ["written", "removed", "renamed"])
def test_killed_while_the_best_is_put_aside(command, tmp_path, monkeypatch, best, moment):
    """After the second trial: its score is written, the old best removed, the new one renamed."""
    monkeypatch.setattr(Trials, "draw", lambda self: 2)
    scores = [1.0 if number == best else 2.0 for number in range(2)]
    monkeypatch.setattr(sweep, "read_score", lambda *_: scores[len(command.started) - 1])
    out, keep, rename = tmp_path / "out", sweep.Sweep.keep, os.rename

    def dying(source, target):
        if moment == "removed":
            raise Killed
        rename(source, target)
        raise Killed

    def killed(self, number):
        if number == 1:
            if moment == "written":
                raise Killed
            monkeypatch.setattr(os, "rename", dying)
        keep(self, number)

    monkeypatch.setattr(sweep.Sweep, "keep", killed)
    command(*select(out))
    values = None if not (out / "private").exists() else read(out / "private", "sweep.json")["trials"][best]["values"]
    monkeypatch.setattr(sweep.Sweep, "keep", keep)
    monkeypatch.setattr(os, "rename", rename)
    if values is not None:
        assert command(*select(out, "--resume"))[0] == 0 and len(command.started) == 2
        assert read(out, "selection.json")["values"] == values
        assert read(out / "best", "args.json")["lr"] == float(values["lr"])
    assert read(out, "selection.json")["score"] == 1.0


@pytest.mark.parametrize("options", [[], ["--select", "poisson", "--mean", 2, "--validation", "public"]])
def test_a_terminal_sees_progress_but_no_secret_number(command, tmp_path, monkeypatch, options):
    """Ctrl-C says how to go on. A bar counts the trials unless their number is secret."""
    def stop(words, output):
        raise SystemExit(130)

    monkeypatch.setattr(Trials, "draw", lambda self: 3)
    monkeypatch.setattr(sweep, "wait", stop)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, said, err = command("--out", tmp_path / "out", "--grid", "lr=0.001,0.1", *options)
    assert status == 130 and "stopped: the same command with --resume continues" in err
    assert "pricing" in err and ("0/2" in err.split("trials:")[-1] if not options else "trials:" not in err)
    assert "/3" not in said + err and ("their number is secret" in said) == bool(options)


def test_no_trial_at_all(command, tmp_path, monkeypatch):
    monkeypatch.setattr(Trials, "draw", lambda self: 0)
    status, said, _ = command(*select(tmp_path / "out"))
    assert status == 0 and "nothing is chosen" in said and os.listdir(tmp_path / "out") == ["table.md"]


def test_the_number_is_drawn_from_the_system_s_entropy(monkeypatch):
    """No seed of a program decides it."""
    import random
    drawn = []
    for _ in range(30):
        random.seed(1)
        drawn.append(Trials(20).draw())
    assert len(set(drawn)) > 3


# ------------------------------------------------------------------ refused


AUTHOR = str(ROOT / "src/fine-tune-dp.py")
SELECT = ["--select", "poisson", "--mean", 3]


@pytest.mark.parametrize("options, words", [
    (["--grid", "lr=1,2", *SELECT], "--score valid_loss: reads validation data: it is not private, so no choice by it"),
    (["--grid", "lr=1,2", *SELECT, "--validation", "public", "--score", "loss"],
     "reads training data without noise, so no choice by it is private; choose --score grad_norm, or leave"),
    (["--grid", "lr=1,2", "--score", "bleu"], "--score bleu: no such column"),
    ([], "--grid"), (["--grid", "lr"], "--grid lr"), (["--grid", "lr=1,1"], "--grid lr=1,1"),
    (["--grid", "=1"], "--grid"),
    (["--range", "lr=1:2"], "--range"), (["--range", "lr=2:1", "--random", 2], "--range lr=2:1"),
    (["--range", "lr=0:1:log", "--random", 2], "--range lr=0:1:log"), (["--range", "lr=a:b", "--random", 2], "lr=a:b"),
    (["--grid", "lr=1", "--range", "lr=1:2", "--random", 2], "given twice"),
    (["--grid", "lr=1,2", "--random", 0], "--random 0"), (["--grid", "work_dir=a,b"], "--work_dir"),
    (["--grid", "budget=a,b"], "--budget"), (["--grid", "seq_len=8,16"], "--seq_len: is tried, and given"),
    (["--grid", "lr=1,2", "--mean", 3], "--mean"), (["--grid", "lr=1,2", "--select", "poisson"], "--mean"),
    (["--grid", "lr=1,2", *SELECT, "--shape", 1], "--shape 1"),
    (["--grid", "lr=1,2", *SELECT, "--random", 3], "--random"),
    (["--grid", "lr=1,2", *SELECT, "--budget", "x"], "--budget"),
    (["--grid", "tensorboard=,1", *SELECT, "--validation", "public"], "--tensorboard"),
    (["--grid", "lr=1,2", "--select", "tnb", "--mean", 1], "--mean 1"),
    (["--range", "sigma=1:2", *SELECT, "--validation", "public"], "--range sigma: changes what a trial costs"),
    (["--grid", "lr=1,2", "--delta", 1], "delta 1"), (["--grid", "no_such=1,2"], "no_such"),
    (["--grid", "lr=1,-2"], "--lr -2"), (["--grid", "lr=1,2", "--resume"], "leave --resume out"),
    (["--grid", "lr=1,2", "--budget", "@absent"], "no such budget"),
])
def test_mistakes_are_one_line_and_nothing_is_written(command, tmp_path, options, words):
    options = [str(tmp_path / option[1:]) if str(option).startswith("@") else option for option in options]
    status, _, err = command("--out", tmp_path / "out", *options)
    assert status == 2 and words in err and err.count("\n") == 1, err
    assert not os.listdir(tmp_path) and not command.started


def test_held_out_authors_are_private_whatever_is_said(command, tmp_path):
    """They are in the training file. With texts of their own, which are said to be public, the choice is covered."""
    base = author_runs.flags("x", noise_source=None, noise_seed=None, learning_rate=None, output_dir=None)
    options = ["--out", tmp_path / "out", "--grid", "learning_rate=0.01,0.1", "--validation", "public", "--dry-run"]
    status, _, err = command(*options, *SELECT, script=AUTHOR, base=base)
    assert status == 2 and "authors of --train_file are held out" in err
    status, said, err = command(*options, script=AUTHOR, base=base)
    assert status == 0 and "by valid_loss is NOT private" in said, err
    base = [*author_runs.flags("x", noise_source=None, noise_seed=None, learning_rate=None, output_dir=None,
                               eval_fraction=None), "--eval_file", author_runs.material() / "eval.jsonl"]
    status, said, err = command(*options, *SELECT, script=AUTHOR, base=base)
    assert status == 0 and "is covered by the total" in said, err


def test_seeded_noise_and_other_scripts(command, tmp_path):
    for base in (flags("x", work_dir=None, lr=None), ["--noise_source=seeded"]):
        status, _, err = command("--out", tmp_path / "out", "--grid", "lr=1,2", base=base)
        assert status == 2 and "--noise_source seeded: trials of one seed share their noise" in err
    status, _, err = command("--out", tmp_path / "out", "--grid", "lr=1,2", script=str(ROOT / "src/export.py"))
    assert status == 2 and "export.py: is no training script" in err


# ------------------------------------------------------------------ space, table, plot


def test_a_grid_is_a_product_and_a_range_is_uniform():
    space = read_space(["lr=1,2", "b=x,y,z"], ["c=1:3", "d=1e-4:1:log"])
    assert len(space.all()) == 6 and space.flags == ["lr", "b", "c", "d"]
    points = [space.draw() for _ in range(2000)]
    assert Counter(point["b"] for point in points).keys() == {"x", "y", "z"}
    # 1/2 of the draws, with a standard error of 0.011
    assert abs(sum(float(point["c"]) < 2 for point in points) / 2000 - 0.5) < 0.06
    assert abs(sum(float(point["d"]) < 1e-2 for point in points) / 2000 - 0.5) < 0.06


@pytest.mark.parametrize("values, places", [
    (["1", "2", "3"], [0, 0.5, 1]), (["0.001", "0.01", "0.1"], [0, 0.5, 1]), (["b", "a"], [1, 0]),
    (["5", "5"], [0.5] * 2),
    (["-1", "1"], [0, 1]), (["nan", "1"], [1, 0])])
def test_places_on_an_axis(values, places):
    found, ticks = positions(values)
    assert found == pytest.approx(places) and {label for _, label in ticks} == set(values)


def test_the_best_comes_first_and_what_failed_last():
    trials = [{"name": str(n), "values": {"lr": "1"}, "score": score, "epsilon": "1"} for n, score in
              enumerate((2.0, None, 1.0))]
    assert [line.split("|")[1].strip() for line in table(trials, ["lr"], "x").splitlines()[2:]] == ["2", "0", "1"]


def test_it_starts_as_a_command(tmp_path):
    process = run_script("scripts/sweep.py", "src/gpt2_ft.py", "--out", tmp_path / "out")
    assert process.returncode == 2 and process.stderr.startswith("error: --grid")
    with pytest.raises(UserError, match="--grid"):
        read_space([], [])
