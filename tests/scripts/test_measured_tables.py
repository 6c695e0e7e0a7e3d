"""Tables of what the benchmark and the audit measured, and the notes of rows."""

import json

import pytest

from helpers.processes import assert_user_error, run_script
from helpers.result_rows import lines_of, synthetic

TABLES = "scripts/results_tables.py"


def tables(*arguments: object) -> list[list[dict[str, str]]]:
    """The printed tables, each as lines of head -> cell."""
    done = run_script(TABLES, *arguments)
    assert done.returncode == 0, done.stderr
    return [found for found in map(lines_of, done.stdout.split("\n\n")) if found]


def test_a_row_s_note_stands_in_its_line(tmp_path):
    for seed, note in ((1, "bf16"), (2, "bf16"), (3, "another")):
        synthetic(tmp_path, seed=seed, note=note)
    synthetic(tmp_path, method="full")
    (lines,) = tables(tmp_path)
    assert {line["method"]: (line["note"], line["seeds"]) for line in lines} == {
        "LoRA": ("bf16; another", "3"), "full": ("", "1")}
    synthetic(tmp_path, method="full", seed=9, note=["no text"])
    assert_user_error(run_script(TABLES, tmp_path), "not a row of results")


def test_without_notes_there_is_no_column(tmp_path):
    synthetic(tmp_path)
    (lines,) = tables(tmp_path)
    assert "note" not in lines[0]


def side(units_per_s: float, share: float, seconds: list[float]) -> dict:
    return {"units_per_s": units_per_s, "tokens_per_s": 50 * units_per_s, "peak_gb": 1.5, "share_of_matmul_rate": share,
            "units": 8, "seconds": seconds}


def write_benchmark(folder) -> dict:
    rows = [{"task": "e2e_lora", "variant": variant, "ratio_median": ratio, "ratio_min": ratio / 2,
             "ratio_max": 2 * ratio, "ours": side(8, share, [1.0, 1.0]),
             "other": side(8 / ratio, 0.1, [ratio, ratio]), **note}
            for variant, ratio, share, note in (("ghost", 2.0, 1.5, {}), ("ordinary", 0.5, 0.25, {"note": "busy"}),
                                                ("ordinary", 0.75, 0.5, {}))]
    options = {"model_card": "gpt2.sm", "bf16": False}
    found = {"device": "a machine", "torch": "2.13.0", "options": options, "rows": rows}
    folder.mkdir()
    (folder / "one.json").write_text(json.dumps(found))
    scaled = [{"task": "author_full", "units": 4, "length": 32, "tokens": 1200, "seconds": [1.0, 3.0, 2.0]}]
    (folder / "two.json").write_text(json.dumps({**found, "rows": scaled}))
    return found


def test_the_benchmark_s_table(tmp_path):
    """Sorted by task and variant, rows without a note first; a rate that other jobs spoiled gives no share."""
    found = write_benchmark(tmp_path / "2026-01-02_speed")
    compared, scaled = tables(tmp_path / "2026-01-02_speed")
    assert [(line["ours/other"], line["range"], line["share of the floor"], line["note"]) for line in compared] == [
        ("0.75", "0.38 to 1.50", "0.50", ""), ("0.50", "0.25 to 1.00", "0.25", "busy"),
        ("2.00", "1.00 to 4.00", "-", "")]
    assert compared[0]["other [units/s]"] == "10.67" and compared[0]["steps"] == "2"
    assert (scaled[0]["step [s]"], scaled[0]["ours [tokens/s]"]) == ("2.00", "600")
    page = tmp_path / "page.md"
    page.write_text("<!-- table speed -->\n<!-- end -->\n")
    assert run_script(TABLES, "--readme", page, "--results", tmp_path).returncode == 0
    assert "gpt2.sm on a machine; torch 2.13.0. Command and every figure: `2026-01-02_speed/`." in page.read_text()
    found["options"]["bf16"] = True
    (tmp_path / "2026-01-02_speed/one.json").write_text(json.dumps(found))
    assert tables(tmp_path / "2026-01-02_speed")[0][0]["task"] == "E2E, LoRA, bf16"


@pytest.mark.parametrize("fault, refuted, verdict", [
    ("none", False, "not refuted"), ("none", True, "REFUTED, and should not be"), ("noise off", True, "refuted"),
    ("noise off", False, "NOT SEEN")])
def test_the_audit_s_table(tmp_path, fault, refuted, verdict):
    row = {"fault": fault, "setting": "text", "canaries": 1000, "canary_kind": "text", "delta": 1e-5,
           "refuted": refuted, "epsilon_claimed": 0.7, "epsilon_lower": 3.675, "guesses_right": 249,
           "guesses_made": 2500, "cpu_seconds": 41.2, "decides": "2023",
           "gaussian": {"epsilon_lower": 4.0, "guesses_right": 50, "guesses_made": 60}}
    (tmp_path / "faults.json").write_text(json.dumps([row]))
    ((line,),) = tables(tmp_path)
    assert line["claim"] == verdict and line["canaries"] == "1,000 text"
    assert line["bound of 2023"] == "**3.67** (249 of 2,500)" and line["Gaussian bound"] == "4.00 (50 of 60)"
    (tmp_path / "made_with.json").write_text(json.dumps({"device": "a machine", "commit": "b" * 40, "torch": "2.13.0"}))
    assert "a machine; commit bbbbbbbb; torch 2.13.0." in run_script(TABLES, tmp_path).stdout


@pytest.mark.parametrize("file, content", [
    ("one.json", "{"), ("one.json", "[]"), ("one.json", "3"), ("one.json", '{"rows": []}'),
    ("one.json", '[{"fault": "none"}]'), ("made_with.json", "[1]"), ("made_with.json", '{"commit": 7}'),
    ("one.json", '{"rows": [{"task": "e2e_lora", "variant": "new"}]}')])
def test_what_is_no_result_is_one_line(tmp_path, file, content):
    write_benchmark(tmp_path / "speed")
    (tmp_path / "speed" / file).write_text(content)
    assert_user_error(run_script(TABLES, tmp_path / "speed"), f"{tmp_path}/speed",
                      "scripts/benchmarks/benchmark_training.py")


def test_several_files_are_rewritten(tmp_path):
    """--check names each stale file; one that is up to date is not written."""
    synthetic(tmp_path / "results/2026-01-02_e2e")
    pages = [tmp_path / "one.md", tmp_path / "two.md", tmp_path / "none.md"]
    for page in pages[:2]:
        page.write_text("<!-- table e2e -->\n<!-- end -->\n")
    pages[2].write_text("no table\n")
    command = [TABLES, "--results", tmp_path / "results", "--readme", *pages]
    stale = run_script(*command, "--check")
    assert stale.returncode == 1 and [str(page) in stale.stdout for page in pages] == [True, True, False]
    assert run_script(*command).returncode == 0 and "0.5000" in pages[0].read_text() + pages[1].read_text()
    assert pages[0].read_text() == pages[1].read_text() and run_script(*command, "--check").returncode == 0
