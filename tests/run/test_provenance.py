"""A run names every earlier run whose privacy its initial weights cost, however they are named, moved or handed on."""

import json
import os
import pathlib
import shutil
import signal

import pytest
import safetensors.torch
import torch

from helpers import author_runs
from helpers.checkpoints import export
from helpers.interrupted_runs import UPDATE
from helpers.ledgers import pld_epsilon
from helpers.small_runs import STEPS, flags, ledger, material, read, server, start_ranks, train
from run import provenance
from weights.checkpoint import Loaded, load_model

WHOLE = {"lora_dim": 0, "lora_dropout": 0, "max_step": 2}
LORA = {"max_step": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> pathlib.Path:
    """A folder with A (the whole model, from public weights) and B (LoRA, from A). Their ledgers are the same bytes."""
    folder = tmp_path_factory.mktemp("runs")
    train(flags(folder / "A", **WHOLE))
    train(flags(folder / "B", init_checkpoint=folder / "A", **LORA))
    assert (folder / "A/privacy_ledger.jsonl").read_bytes() == (folder / "B/privacy_ledger.jsonl").read_bytes()
    return folder


@pytest.fixture
def chain(runs, tmp_path) -> pathlib.Path:
    """A copy of it, to be moved about. B finds its frozen weights by the path from folder to folder."""
    return pathlib.Path(shutil.copytree(runs, tmp_path / "chain"))


def named(init: os.PathLike | None, work: pathlib.Path, steps: tuple[int, ...], **changed) -> list[dict]:
    """A run from `init`: its report's accounts, as many as `steps`, and the screen and `disclosed` say each of them."""
    (rank,) = train(flags(work, init_checkpoint=init, **{**LORA, **changed}))
    report = read(work)
    before = report["initial_weights"]
    assert [account["steps_charged"] for account in before] == list(steps)
    assert len({account["run"] for account in [*before, report]}) == len(before) + 1
    said = [item for item in report["disclosed"] if item.startswith("initial weights of ")]
    assert len(said) == len(before) == rank.stdout.count("WARNING: initial weights of ")
    for account, line in zip(before, said):
        assert account["unit"] == "example" and f"epsilon {account['epsilon_prv']:.4f} at delta 1e-05" in line
        assert f"own ledger charges {account['steps_charged']} steps: not counted here" in line
        assert f"WARNING: {line}" in rank.stdout
    return before


def forget(folder: pathlib.Path) -> None:
    """As an older version left a run: without its name."""
    report = read(folder)
    (folder / "privacy.json").write_text(json.dumps({name: report[name] for name in report
                                                     if name not in ("run", "initial_weights", "ledger_checksum")}))
    for path in folder.glob("model.*.pt"):
        content = torch.load(path, weights_only=True)
        del content["privacy"]
        torch.save(content, path)


# ------------------------------------------------------------------ the chain


def test_the_whole_chain_is_named(runs, tmp_path):
    """C from B from A. Epsilon of each by another accountant, from its raw records."""
    a, b = named(runs / "B", tmp_path / "C", (2, 2))
    assert [one["folder"] for one in (a, b)] == [str(runs / name) for name in "AB"]
    for name, account in (("A", a), ("B", b)):
        records = ledger(runs / name)
        truth = pld_epsilon(records, 1e-5)
        assert 0.999 * truth < account["epsilon_prv"] < truth + 0.011 and account["delta"] == 1e-5
        assert account["ledger_checksum"] == records[-1]["checksum"]
        assert account["run"] == read(runs / name)["run"] and account["relation"] == "add or remove one example"
    assert "initial_weights" in read(runs / "A") and not read(runs / "A")["initial_weights"]
    assert [one["run"] for one in read(runs / "B")["initial_weights"]] == [a["run"]]
    c = read(tmp_path / "C")["run"]  # and on to the next one
    assert [one["run"] for one in named(tmp_path / "C", tmp_path / "D", (2, 2, 2))] == [a["run"], b["run"], c]


def test_the_chain_outlives_its_folders(chain, tmp_path):
    """Whole models, whose files need no other: A and B are gone when D starts, and nothing but a file is left of C."""
    named(chain / "A", chain / "whole", (2,), **WHOLE)
    shutil.rmtree(chain / "A")
    named(chain / "whole", chain / "C", (2, 2), **WHOLE)
    shutil.rmtree(chain / "whole")
    shutil.copy(chain / "C/model.2.pt", tmp_path / "start.pt")
    shutil.rmtree(chain / "C")
    named(tmp_path / "start.pt", tmp_path / "D", (2, 2, 2), **WHOLE)


def test_a_folder_that_was_moved_is_no_other_run(chain, tmp_path):
    a, b = named(chain / "B", tmp_path / "C", (2, 2))
    shutil.move(chain, tmp_path / "moved")
    again = named(tmp_path / "moved/B", tmp_path / "D", (2, 2))
    assert [one["run"] for one in again] == [a["run"], b["run"]]
    assert [one["folder"] for one in again] == [str(tmp_path / "moved" / name) for name in "AB"]
    os.rename(tmp_path / "moved/A", tmp_path / "elsewhere")
    base = {"base_checkpoint": tmp_path / "elsewhere/model.2.pt"}
    again = named(tmp_path / "moved/B", tmp_path / "E", (2, 2), **base)
    assert [one["folder"] for one in again] == [str(tmp_path / name) for name in ("elsewhere", "moved/B")]


@pytest.mark.parametrize("both", [False, True])
def test_runs_of_an_older_version_are_known_by_their_folder(chain, tmp_path, both):
    """Whether they, or the run after them alone, are of this one; their ledgers are still the same bytes."""
    forget(chain / "A")
    train(flags(tmp_path / "B", init_checkpoint=chain / "A", **LORA))
    if both:
        forget(tmp_path / "B")
    (rank,) = train(flags(tmp_path / "C", init_checkpoint=tmp_path / "B", **LORA))
    before = read(tmp_path / "C")["initial_weights"]
    assert [one["folder"] for one in before] == [str(chain / "A"), str(tmp_path / "B")]
    assert ["run" in one for one in before] == [False, not both]
    assert rank.stdout.count("WARNING: initial weights of ") == 2


def test_runs_with_the_same_settings_have_names_of_their_own(runs, tmp_path):
    free = {"noise_source": None, "noise_seed": None, **LORA}
    for name in "XY":
        train(flags(tmp_path / name, **free))
    names = [read(tmp_path / name)["run"] for name in "XY"] + [read(runs / name)["run"] for name in "AB"]
    assert len(set(names)) == 4 and all(len(name) == 16 for name in names)


# ------------------------------------------------------------------ links


LINKS = {
    "a file": ("ln -s {A}/model.2.pt {t}/start.pt", "start.pt"),
    "a folder": ("ln -s {A} {t}/start", "start"),
    "a file in a folder": ("ln -s {A} {t}/start", "start/model.2.pt"),
    "links to links, by relative paths": (
        "mkdir {t}/x && ln -s {A} {t}/x/a && ln -s a/model.2.pt {t}/x/b && ln -s x/b {t}/start.pt", "start.pt"),
    "a link in another folder": ("mkdir {t}/x && ln -s {A}/model.2.pt {t}/x/model.7.pt", "x"),
    "weights that lie elsewhere": ("mv {A}/model.2.pt {t}/blob && ln -s {t}/blob {A}/model.2.pt", "{A}/model.2.pt"),
    "weights that lie elsewhere, by another link": (
        "mv {A}/model.2.pt {t}/blob && ln -s {t}/blob {A}/model.2.pt && ln -s {A}/model.2.pt {t}/start.pt", "start.pt"),
}


@pytest.mark.parametrize("how", LINKS)
@pytest.mark.parametrize("old", [False, True])
def test_weights_under_a_link(chain, tmp_path, how, old):
    """old: of a run whose checkpoint does not say by itself what it cost; then it is its folder that does."""
    if old:
        forget(chain / "A")
    command, path = (part.format(A=chain / "A", t=tmp_path) for part in LINKS[how])
    assert os.system(command) == 0
    found = provenance.spent_before(load_model(str(tmp_path / path)))
    assert [(one["steps_charged"], one["folder"]) for one in found] == [(2, str(chain / "A"))]


def test_a_base_checkpoint_under_a_link(chain, tmp_path):
    os.symlink(chain / "A", tmp_path / "link")
    for name in "AB":
        forget(chain / name)
    found = provenance.spent_before(load_model(str(chain / "B"), base_checkpoint=str(tmp_path / "link/model.2.pt")))
    assert [one["folder"] for one in found] == [str(chain / name) for name in "AB"]


def test_a_run_under_a_link_says_so(runs, tmp_path):
    os.symlink(runs / "A/model.2.pt", tmp_path / "start.pt")
    (account,) = named(tmp_path / "start.pt", tmp_path / "C", (2,), **WHOLE)
    assert account["folder"] == str(runs / "A")


# ------------------------------------------------------------------ exports


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_a_run_from_an_export_names_what_was_exported(runs, tmp_path, form):
    folder = export(runs / "B", tmp_path / "out", "--format", form)
    a, b = (read(runs / name) for name in "AB")
    report = json.loads((folder / "privacy.json").read_text())
    page = (folder / "README.md").read_text()
    assert page.startswith(f"---\nlibrary_name: {'peft' if form == 'peft' else 'transformers'}\n")
    assert "- differential-privacy\n" in page and str(tmp_path) not in page and str(runs) not in page
    assert f"epsilon {b['epsilon_prv']:.4f} at delta" in page and b["ledger_checksum"] in page
    assert f"of an earlier run, with {a['steps_charged']} steps" in page
    for key in ("run", "unit", "relation", "steps_charged", "delta", "epsilon_prv", "epsilon_rdp", "ledger_checksum"):
        assert report[key] == b[key] and report["initial_weights"][0][key] == a[key]
    assert set(report) == {*provenance.TYPES, *provenance.OPTIONAL, "initial_weights"}
    assert [one["run"] for one in named(folder, tmp_path / "C", (2, 2))] == [a["run"], b["run"]]
    shutil.copytree(folder, tmp_path / "copy", ignore=lambda *_: ["privacy.json"])  # the weights know it, too
    found = provenance.spent_before(load_model(str(tmp_path / "copy")))
    assert [(one["run"], one["folder"]) for one in found] == [(a["run"], str(runs / "A")), (b["run"], str(runs / "B"))]
    if form == "merged":
        os.symlink(folder / "model.safetensors", tmp_path / "x.safetensors")
        found = provenance.spent_before(load_model(str(tmp_path / "x.safetensors"), str(folder)))
        assert [one["run"] for one in found] == [a["run"], b["run"]]
        again = export(folder, tmp_path / "again")  # without the run's ledger nothing is claimed of it
        assert "Nothing is claimed" in (page := (again / "README.md").read_text()) and "cannot be checked" not in page
        assert "none of it can be checked" in page and "differential-privacy" not in page
        assert json.loads((again / "privacy.json").read_text()) == report


def test_an_adapter_of_others_on_an_exported_base(runs, tmp_path):
    """Its configuration names the base, whose folder says what it cost."""
    base = export(runs / "A", tmp_path / "base")
    train(flags(tmp_path / "B", init_checkpoint=base, **LORA))
    folder = export(tmp_path / "B", tmp_path / "adapter", "--format", "peft")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    (folder / "privacy.json").unlink()  # as peft itself would have saved it
    factors = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(factors), factors, {"format": "pt"})
    assert [one["run"] for one in named(folder, tmp_path / "C", (2,))] == [read(runs / "A")["run"]]


def test_public_weights_are_exported_without_a_word(tmp_path):
    folder = export(material() / "tiny", tmp_path / "out")
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert "Nothing is claimed" in (folder / "README.md").read_text()
    assert provenance.spent_before(load_model(str(folder))) == provenance.spent_before(Loaded(None, None, None)) == []


def test_an_export_overwrites_no_report(chain, tmp_path):
    """Neither that of a run, nor what another export left; its own, left by a kill, gives way."""
    arguments = ["--init_checkpoint", chain / "B", "--output"]
    kill = ["signal", {"point": "safetensors.torch:save", "when": "before", "nth": 1}]
    assert server().start("src/export.py", [*arguments, tmp_path / "out"], faults=[kill]).wait() == -signal.SIGKILL
    left = (tmp_path / "out/privacy.json").read_bytes()
    export(chain / "B", tmp_path / "out")
    assert (tmp_path / "out/privacy.json").read_bytes() == left
    (tmp_path / "other").mkdir()
    (tmp_path / "other/privacy.json").write_text(json.dumps(read(chain / "A")))
    (tmp_path / "page").mkdir()
    (tmp_path / "page/README.md").write_text("mine")
    for folder, words in ((chain / "A", "holds a privacy_ledger.jsonl"), (tmp_path / "other", "of other weights"),
                          (tmp_path / "page", "README.md of something else")):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        run = server().start("src/export.py", [*arguments, folder])
        assert run.wait() == 2 and words in run.error
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------ resumed runs


def test_a_resumed_run_does_not_count_itself(chain, tmp_path):
    """It keeps its name and what it came from, though the folder that told it is gone; and has itself as no ancestor,
    though its initial weights are now said to be its own."""
    init = export(chain / "A", tmp_path / "init")
    stop = ["signal", {"point": UPDATE, "when": "after", "nth": 2, "number": int(signal.SIGTERM)}]
    (rank,) = start_ranks(flags(tmp_path / "R", init_checkpoint=init), 1, {0: [stop]})
    assert rank.wait() == 128 + signal.SIGTERM
    before = read(tmp_path / "R")
    (init / "privacy.json").unlink()
    (rank,) = start_ranks([*flags(tmp_path / "R", resume=True, init_checkpoint=tmp_path / "R"), "--resume_changed",
                           "init_checkpoint"], 1, {0: [["signal", {"point": UPDATE, "when": "after", "nth": 2,
                                                                   "number": int(signal.SIGTERM)}]]})
    assert rank.wait() == 128 + signal.SIGTERM, rank.stderr
    (rank,) = train(flags(tmp_path / "R", resume=True, init_checkpoint=tmp_path / "R"))
    after = read(tmp_path / "R")
    assert (after["run"], after["initial_weights"]) == (before["run"], before["initial_weights"])
    assert len(after["initial_weights"]) == 1 and after["steps_charged"] == STEPS
    assert rank.stdout.count("WARNING: initial weights of ") == 1
    assert [one["steps_charged"] for one in provenance.spent_before(load_model(str(tmp_path / "R")))] == [2, STEPS]


def test_a_resumed_run_of_an_older_version_does_not_count_itself(tmp_path):
    stop = ["signal", {"point": UPDATE, "when": "after", "nth": 2, "number": int(signal.SIGTERM)}]
    (rank,) = start_ranks(flags(tmp_path / "R"), 1, {0: [stop]})
    assert rank.wait() == 128 + signal.SIGTERM
    forget(tmp_path / "R")
    train([*flags(tmp_path / "R", resume=True, init_checkpoint=tmp_path / "R"), "--resume_changed", "init_checkpoint"])
    assert read(tmp_path / "R")["initial_weights"] == [] and len(read(tmp_path / "R")["run"]) == 16


def test_killed_between_the_first_checkpoint_and_the_first_report(chain, tmp_path):
    """The folder's ledger and the checkpoint's own word are of one run."""
    kill = ["signal", {"point": "run.log:WorkDir.write_json", "when": "before", "nth": 2}]
    (rank,) = start_ranks(flags(tmp_path / "R", init_checkpoint=chain / "B"), 1, {0: [kill]})
    assert rank.wait() == -signal.SIGKILL and not (tmp_path / "R/privacy.json").exists()
    named(tmp_path / "R", tmp_path / "C", (2, 2, 2))


# ------------------------------------------------------------------ authors, and what is damaged


def test_authors_runs_name_them_too(tmp_path):
    folder = tmp_path / "first"
    author_runs.train(author_runs.flags(folder, max_steps=2))
    os.symlink(folder, tmp_path / "link")
    (rank,) = author_runs.train(author_runs.flags(tmp_path / "next", model_name=tmp_path / "link", max_steps=2))
    (account,) = read(tmp_path / "next")["initial_weights"]
    assert account["unit"] == "author" and account["folder"] == str(folder) and account["run"] == read(folder)["run"]
    assert f"WARNING: initial weights of {folder}, whose own ledger charges 2 steps: not counted here" in rank.stdout


def spoil_metadata(A: pathlib.Path) -> None:
    """Public weights in the place of A's, whose metadata say something that is no JSON."""
    weights = safetensors.torch.load_file(material() / "tiny/model.safetensors")
    safetensors.torch.save_file(weights, A / "model.safetensors", {"privacy": "[" * 100_000})
    (A / "model.2.pt").unlink()


@pytest.mark.parametrize("spoil, words", [
    (lambda A: (A / "privacy.json").write_text("{"), "privacy.json: not JSON"),
    (lambda A: (A / "privacy.json").write_text('{"unit": "example"}'), "privacy.json: does not say what its run spent"),
    (lambda A: (A / "privacy.json").write_text(json.dumps({**read(A), "initial_weights": [3]})), "does not say what"),
    (lambda A: os.truncate(A / "privacy_ledger.jsonl", 0) or (A / "privacy.json").write_text("[]"), "holds a list"),
    (lambda A: (A / "privacy_ledger.jsonl").write_text("{}\n"), "privacy_ledger.jsonl:1: damaged"),
    (lambda A: (A / "privacy_ledger.jsonl").rename(A / "privacy_ledger.jsonl.kept"), "holds what a run charged"),
    (lambda A: spoil_metadata(A), "model.safetensors: its entry 'privacy': does not say what its run spent"),
    (lambda A: torch.save({**torch.load(A / "model.2.pt"), "privacy": {"run": 3}}, A / "model.2.pt"),
     "model.2.pt: its entry 'privacy': does not say what its run spent"),
])
def test_what_cannot_be_read_is_not_passed_over(chain, tmp_path, spoil, words):
    spoil(chain / "A")
    (rank,) = start_ranks(flags(tmp_path / "C", init_checkpoint=chain / "A", **WHOLE))
    assert rank.wait() == 2 and words in rank.error and not (tmp_path / "C").exists()


def test_a_ledger_that_lost_records_is_not_believed(chain):
    forget(chain / "A")
    (chain / "A/privacy_ledger.jsonl").write_text((chain / "A/privacy_ledger.jsonl").read_text().splitlines(True)[0])
    (account,) = provenance.spent_before(load_model(str(chain / "A")))
    assert account["steps_charged"] == 2 and account["epsilon_prv"] == read(chain / "A")["epsilon_prv"]


def test_a_report_alone_speaks_for_its_run(chain, tmp_path):
    """Where the ledger was deleted; and where all was deleted beside the weights in another's format, nothing does."""
    weights = {name: value.clone() for name, value in load_model(str(chain / "A")).model.state_dict().items()
               if "lm_head" not in name}
    for path in chain.glob("A/*.pt"):
        path.unlink()
    safetensors.torch.save_file(weights, chain / "A/model.safetensors")
    (chain / "A/privacy_ledger.jsonl").unlink()
    (account,) = named(chain / "A", tmp_path / "C", (2,), **WHOLE)
    assert account["run"] == read(chain / "A")["run"]
    (chain / "A/privacy.json").unlink()
    named(chain / "A", tmp_path / "D", (), **WHOLE)
