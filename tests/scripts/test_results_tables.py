"""The Markdown of results/: rows that are written and read, means over seeds, the tables of the README."""

import json
import statistics

import pytest

from base.errors import UserError
from helpers.processes import assert_user_error, run_script
from helpers.result_rows import lines_of, synthetic
from row import write_row


def test_the_table_of_rows(tmp_path):
    folder = tmp_path / "2026-01-02_e2e"
    scores = [0.41, 0.47, 0.44]
    for seed, score in enumerate(scores):
        synthetic(folder, seed=seed, scores={"BLEU": score, "NIST": 6, "METEOR": 0.4, "ROUGE_L": 0.6, "CIDEr": 2})
    e2e = {"train_sha256": "dbc41b098ac523651894eabb7fe140f272445efe3bb4654d4666f2a1976c86b2"}
    free = {"epsilon_prv": "inf", "delta": 1e-5, "train_runtime": 9.0, "peak_memory_bytes": 10**9,
            "relation": "add or remove one example", "sampling": "shuffle"}
    synthetic(folder, epsilon="inf", privacy=free, settings=e2e)
    synthetic(folder, epsilon="inf", privacy=free, settings=e2e, method="full")
    synthetic(folder, epsilon="inf", privacy=free, settings=e2e, model="gpt2.sm")
    synthetic(folder, epsilon="8", settings=e2e, method="full")
    untrained = synthetic(folder, epsilon="0", method="none")
    del untrained["privacy"], untrained["settings"]
    done = run_script("scripts/results_tables.py", folder)
    assert done.returncode == 0, done.stderr
    table = {(line["model"], line["method"], line["epsilon"]): line for line in lines_of(done.stdout)}
    assert len(table) == 6
    line = table["gpt2.md", "LoRA", "7.96"]
    assert line["BLEU"] == f"{statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f}"
    assert (line["seeds"], line["memory [GB]"].split()[0], line["delta"]) == ("3", "2.50", "1e-05")
    assert table["gpt2.md", "untrained", "0"]["time [s]"] == "-"
    known = {key: line["published BLEU"] for key, line in table.items() if line["published BLEU"]}
    assert known == {("gpt2.md", "LoRA", "inf"): "0.704", ("gpt2.md", "full", "inf"): "0.682"}
    assert "4 processes on 2 machines of 4 x A100; commit aaaaaaaa; torch 2.13.0" in done.stdout
    assert "Epsilon (PRV upper bound): add or remove one example; poisson sampling. ±" in done.stdout


def test_the_columns_of_webnlg_and_dart(tmp_path):
    """One for each score and set, none for categories that the test set lacks."""
    scores = {name: number for number, name in enumerate(("BLEU", "METEOR", "TER", "chrF++"))}
    for task, sets, expected in (("dart", ["all"], ["BLEU", "METEOR", "TER", "chrF++"]),
                                 ("webnlg", ["all", "seen"], [f"{name} {part}" for name in scores
                                                              for part in ("all", "seen")])):
        synthetic(tmp_path / task, task=task, scores={part: scores for part in sets})
        (line,) = lines_of(run_script("scripts/results_tables.py", tmp_path / task).stdout)
        assert [head for head in line if head.split()[0] in scores] == expected and line[expected[-1]] == "3.0000"


def test_a_metric_that_the_scores_gained_has_its_column(tmp_path):
    first = synthetic(tmp_path)
    synthetic(tmp_path, epsilon="3", scores={**first["scores"], "new": 0.25})
    three, eight = lines_of(run_script("scripts/results_tables.py", tmp_path).stdout)
    assert list(eight)[8:10] == ["CIDEr", "new"] and (three["new"], eight["new"]) == ("0.2500", "-")


def test_no_row_of_a_run_that_is_not_done(tmp_path):
    for report, words in ((None, "privacy.json"), ("[]", "privacy.json"), ('{"N": 1}', "has not come to an end")):
        if report is not None:
            (tmp_path / "privacy.json").write_text(report)
            (tmp_path / "args.json").write_text("{}")
        with pytest.raises(UserError, match=words):
            write_row(str(tmp_path / "row.json"), str(tmp_path), {}, trained=True, scored=False)
    with pytest.raises(UserError, match="scores.json"):
        write_row(str(tmp_path / "row.json"), str(tmp_path), {}, trained=False, scored=True)
    assert not (tmp_path / "row.json").exists()


def test_a_mean_is_over_seeds_alone(tmp_path):
    for seed, rate, processes in ((1, 0.01, 2), (2, 0.01, 4)):
        synthetic(tmp_path, seed=seed, settings={"lr": rate, "random_seed": seed, "world_size": processes})
    assert lines_of(run_script("scripts/results_tables.py", tmp_path).stdout)[0]["seeds"] == "2"
    synthetic(tmp_path, seed=3, settings={"lr": 0.02, "random_seed": 3, "world_size": 2})
    assert_user_error(run_script("scripts/results_tables.py", tmp_path), "seeds 1 and 3", "lr: 0.01 and 0.02", "--name")


def test_the_readme_s_tables(tmp_path):
    """The newest folder of a name, between the marks alone; twice changes nothing; --check tells."""
    for date, score in (("2026-01-02", 0.1), ("2026-02-01", 0.2)):
        scores = dict.fromkeys(("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"), score)
        synthetic(tmp_path / f"results/{date}_e2e", scores=scores)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table e2e -->\nold\n<!-- end -->\nafter\n")
    command = ["scripts/results_tables.py", "--readme", readme, "--results", tmp_path / "results"]
    assert run_script(*command, "--check").returncode == 1 and "old" in readme.read_text()
    assert run_script(*command).returncode == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- table e2e -->\n| model") and text.endswith("\n<!-- end -->\nafter\n")
    assert "0.2000" in text and "0.1000" not in text and "old" not in text and "published" not in text
    assert run_script(*command, "--check").returncode == 0 and readme.read_text() == text
    readme.write_text("<!-- table none -->\n<!-- end -->\n")
    assert_user_error(run_script(*command), "table none", "there is no")
    readme.write_text("<!-- table e2e -->\n")
    assert_user_error(run_script(*command), "has no <!-- end -->")
    assert_user_error(run_script("scripts/results_tables.py", tmp_path), "holds no rows")
    sound = synthetic(tmp_path / "sound")
    damaged = [{name: sound[name] for name in sound if name != part} for part in ("scores", "privacy", "commit")]
    damaged += [{**sound, "task": "author", "epsilon": "0", "privacy": {}}, {**sound, "scores": {"BLEU": 1.0}}]
    for damage in ("{", "[]", '{"task": "e2e"}', *map(json.dumps, damaged)):
        (tmp_path / "results/2026-02-01_e2e/rows/0.json").write_text(damage)
        assert_user_error(run_script("scripts/results_tables.py", tmp_path / "results/2026-02-01_e2e"), "rows/0.json")
