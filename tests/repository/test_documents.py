"""README.md and docs/ cannot go stale: files, flags, tables and figures that they name are those of the repository."""

import json
import re
import shlex
import statistics
import sys

import pytest

import project_scaling
from helpers.processes import ROOT, run_script
from helpers.published_command import COMMAND
from helpers.result_rows import lines_of

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in
         [ROOT / "README.md", ROOT / "PRIVACY.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
          *sorted((ROOT / "docs").glob("*.md"))]}
README, RESULTS = PAGES["README.md"], ROOT / "results"
# flags of programs that are not ours: torchrun, sbatch, tensorboard, pytest
OTHERS = set("nproc_per_node nnodes rdzv_backend rdzv_endpoint rdzv_id max_restarts standalone nodes gpus-per-node "
             "logdir".split())
SOURCES = "\n".join(path.read_text(encoding="utf-8") for folder in ("src", "eval", "scripts")
                    for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh"))
BEFORE_THE_FIX = ("ee15b720", "43148901")  # commits of rows whose bfloat16 gradients depended on other units
MARK = "bf16 before the fix: sensitivity not proven"


def commands(text: str) -> list[str]:
    """The commands in a page's blocks of code, a line each."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  # ")[0].split("    #")[0] for line in lines if re.match("(python|bash|torchrun) ", line)]


def test_the_readme_is_a_page():
    assert README.count("\n") <= 150
    assert {name for name in PAGES if name.startswith("docs/")} == set(re.findall(r"\((docs/\w+\.md)\)", README))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_are_there(page):
    text = PAGES[page]
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (folder / target).exists(), target
    for file in re.findall(r"\b((?:src|eval|scripts|tests)/[\w./-]+\.(?:py|sh))\b", text):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("page", PAGES)
def test_scripts_and_flags_of_commands_are_there(page):
    for command in commands(PAGES[page]):
        script = re.search(r"[\w./-]+(?:\.py|\.sh|/run)\b", command)
        assert "torch.distributed" in command or (ROOT / script[0]).exists(), command
    for flag in re.findall(r"(?<![\w-])--([A-Za-z][\w-]*)", PAGES[page]):
        field = rf"^    {flag}: .* = flag\(|(?:spelled\(|names=\(|, )\"{flag}\""  # of a settings class
        assert flag in OTHERS or re.search(rf"--{flag}\b|{field}", SOURCES, re.M), f"--{flag}"


def test_the_files_of_each_change_are_there():
    """The table "Where a change goes": changes of at most two files each, which contain the names beside them."""
    table = lines_of(PAGES["CONTRIBUTING.md"].split("## Where a change goes")[1].split("\n## ")[0])
    assert len(table) >= 10
    for line in table:
        for alternative in line["files, tests aside"].split("; "):
            files = re.findall(r"`((?:src|eval|scripts)/[\w./-]+)`(?: \(([^)]*)\))?", alternative)
            assert 1 <= len(files) - alternative.count(" or ") <= 2, line
            for file, names in files:
                text = (ROOT / file).read_text(encoding="utf-8")
                for name in re.findall(r"`([\w.]+)`", names):
                    assert re.search(rf"\b{name.split('.')[-1]}\b", text), f"{file}: {name}"


def test_the_controls_of_these_checks():
    text = "```\npython src/gpt2_ft.py --lr 1  # a word\nls\n```\n"
    assert commands(text) == ["python src/gpt2_ft.py --lr 1"] and commands(README)
    assert not re.search(r"--no_such_flag\b", SOURCES)


def test_the_first_command_of_the_readme_is_the_published_one():
    published = " ".join(shlex.split(COMMAND))
    assert published in [" ".join(shlex.split(command)) for command in commands(README)]


# ------------------------------------------------------------------ figures


def test_the_tables_are_those_of_the_results():
    assert run_script("scripts/results_tables.py", "--check", "--readme", *PAGES).returncode == 0
    assert sum(text.count("<!-- table ") for text in PAGES.values()) == 9


def test_private_rows_in_bf16_carry_the_mark():
    marked = set()
    for path in RESULTS.glob("*/rows/*.json"):
        row = json.loads(path.read_text(encoding="utf-8"))
        old = (row["commit"]["hash"] or "").startswith(BEFORE_THE_FIX)
        bf16 = row.get("settings", {}).get("bf16", False) and row["epsilon"] not in ("0", "inf")
        assert (row.get("note") == MARK) == (old and bf16), path
        marked |= {path.parts[-3]} if old and bf16 else set()
    assert all(f"<!-- table {name[11:]} -->" in PAGES["docs/results.md"] for name in marked) and len(marked) == 2


def test_the_speed_that_the_readme_names():
    """Against non-private training of the same code: rows without a note, and on a quiet machine."""
    rows = [row for path in sorted(RESULTS.glob("*_benchmark_training/*.json"))
            for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    ratios = [(row["task"], f"{row['ratio_median']:.2f}") for row in rows
              if row.get("variant") == "ordinary" and "note" not in row]
    full, lora = re.search(r"a private step of GPT-2 small runs at ([\d.]+) times \(whole model, authors\) and "
                           r"([\d.]+) times \(LoRA, E2E\)\s+the speed", README).groups()
    assert sorted(ratios) == [("author_full", full), ("e2e_lora", lora)]


def test_the_validation_losses_of_the_results():
    losses: dict[tuple[str, str], list[float]] = {}
    for path in RESULTS.glob("2026-11-25_e2e-webnlg*/rows/*.json"):
        row = json.loads(path.read_text(encoding="utf-8"))
        if row["epsilon"] != "0":
            method = {"full": "full", "lora": "LoRA"}[row["method"]] + ", longer" * ("longer" in path.parts[-3])
            losses.setdefault((method, row["epsilon"]), []).append(row["privacy"]["eval_loss"])
    text = PAGES["docs/results.md"].split("Validation loss of the runs in the tables")[1].split("**")[0]
    said = {(line["method"], epsilon): line[head] for line in lines_of(text) for head, epsilon in
            (("epsilon 3", "3"), ("epsilon 8", "8"), ("without privacy", "inf")) if line[head] != "-"}
    assert said == {key: f"{statistics.mean(found):.2f}" for key, found in losses.items()}


@pytest.mark.parametrize("flags", [[], ["--shard", "optimizer"]])
def test_the_projection(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["project_scaling.py", *flags])
    project_scaling.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert "\n".join(printed) in PAGES["docs/clusters.md"] and len(printed) == 9
