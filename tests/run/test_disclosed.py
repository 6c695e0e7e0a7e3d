"""PRIVACY.md's table of what is shown: it names every file and entry that real runs leave, and between runs on
neighbouring data only those differ that it says to depend on the data."""

import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import zipfile

import pytest
import torch

from corpus.examples import count_shared, read_examples
from helpers import author_runs, small_runs
from helpers.budgets import CLOSED, CREATED, RELEASED, RESERVED, VOID, chained
from helpers.disclosed import Left, differing, e2e_flags, table
from helpers.small_runs import metrics, read, server, start_ranks, train
from row import write_row

# Beside noise of this scale whatever is clipped to C = 1 is less than half a unit in the last place of a float32, so a
# released gradient is the same bits with and without a unit, and so is all that follows from it.
OVERWHELMING = 1e14


# ------------------------------------------------------------------ what a run leaves


# ------------------------------------------------------------------ the runs


def e2e(folder: pathlib.Path, changed_unit: bool = False, resumed: bool = False, **changed: object) -> Left:
    """A run in `folder`, named by relative paths alone, that uses every unit in every step. changed_unit: the first
    unit is another one, and longer; it is a validation example in any case."""
    folder.mkdir()
    lines = (small_runs.material() / "train.jsonl").read_text().splitlines(True)
    valid = (small_runs.material() / "valid.jsonl").read_text()
    other = '{"context": [3, 1, 4], "completion": [' + ", ".join(["5"] * 20) + "]}\n"
    (folder / "train.jsonl").write_text("".join([other if changed_unit else lines[0], *lines[1:]]))
    (folder / "valid.jsonl").write_text(valid + lines[0])
    arguments = small_runs.flags("run", **{"train_data": "train.jsonl", "valid_data": "valid.jsonl",
                                           "train_batch_size": small_runs.N, **changed})
    if resumed:
        torn = ["tear", {"point": "torch:save", "nth": 5}]  # the model of step 4, whose average is there
        assert start_ranks(arguments, 1, {0: [torn]}, cwd=folder)[0].wait() == -signal.SIGKILL
        assert list((folder / "run").glob("model.4.pt.*.partial"))
        assert not Left(folder, e2e_flags()).unnamed()
        arguments.append("--resume")
    train(arguments, cwd=folder)
    return Left(folder, e2e_flags())


def authors(folder: pathlib.Path, changed_unit: bool = False, **changed: object) -> Left:
    """The same of fine-tune-dp.py: an author of the training data has written other texts, and more of them."""
    folder.mkdir()
    lines = list(map(json.loads, (author_runs.material() / "train.jsonl").read_text().splitlines()))
    if changed_unit:
        lines = [line for line in lines if line["author"] != "author 0"] + [
            {"author": "author 0", "content": "tea and " * n} for n in range(1, 12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = author_runs.flags("run", **{
        "train_file": "train.jsonl", "per_device_train_batch_size": author_runs.AUTHORS - author_runs.HELD_OUT,
        "samples_per_author": 2, **changed})
    author_runs.train(arguments, cwd=folder)
    return Left(folder, frozenset(author_runs.script().parse(["--output_dir", "x"]).given.values), authors=True)


RUNS = {
    "LoRA": (e2e, {}), "whole model, resumed, events": (
        e2e, {"lora_dim": 0, "tensorboard": True, "resumed": True, "average": "tail:0.5"}),
    "authors, LoRA, events": (authors, {
        "tensorboard": True, "eval_strategy": "steps", "eval_steps": 3, "average": "ema:0.9"}),
    "authors, whole model": (authors, {"enable_lora": None, "lora_dim": None})}


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """left(name, changed_unit, sigma) -> what a run of RUNS left, made once."""
    root = tmp_path_factory.mktemp("left")

    @functools.cache
    def make(name: str, changed_unit: bool, sigma: float) -> Left:
        function, changed = RUNS[name]
        folder = root / f"{list(RUNS).index(name)}-{changed_unit:d}-{sigma:g}"
        return function(folder, changed_unit, noise_multiplier=sigma, **changed)

    return lambda name, changed_unit=False, sigma=OVERWHELMING: make(name, changed_unit, sigma)


def started(script: str, *arguments: object, **options) -> object:
    run = server().start(script, [str(argument) for argument in arguments], **options)
    assert run.wait() == 0, run.stdout + run.stderr
    return run


@pytest.fixture(scope="module")
def after(left):
    """What is made of a run: a search (and one that was killed), exports, a row of a table; of both neighbours."""
    for changed_unit in (False, True):
        run = left("LoRA", changed_unit).folder / "run"
        search = ["--data", run.parent / "valid.jsonl", "--init_checkpoint", run, "--seq_len", 40, "--eval_len", 8,
                  "--output_file", "predict.jsonl", "--batch_size", 1, "--token_budget", 0]
        kill = ["signal", {"point": "decoding.tree_decoder:TreeDecoder.advance", "when": "after", "nth": 40}]
        killed = server().start("src/gpt2_beam.py", [*map(str, search), "--work_dir", run / "killed"], faults=[kill])
        assert killed.wait() == -signal.SIGKILL
        started("src/gpt2_beam.py", *search, "--work_dir", run)
        started("src/export.py", "--init_checkpoint", run, "--output", run / "merged")
        started("src/export.py", "--init_checkpoint", run, "--output", run / "peft", "--format", "peft")
        (run / "budget.jsonl").write_text(chained(CREATED, RESERVED, CLOSED, RELEASED, VOID))
        (run / "scores.json").write_text('{"scores": {}, "signature": {}}')
        row(run, "e2e")
        row(left("authors, whole model", changed_unit).folder / "run", "author")
    return left


def row(run: pathlib.Path, task: str) -> None:
    """Write the run's row of a table."""
    (run / "commands.txt").write_text("python src/gpt2_ft.py\n")
    (run / "rows").mkdir(exist_ok=True)
    facts = {"task": task, "model": "tiny", "method": "lora", "epsilon": "8", "seed": 1, "processes": 1}
    write_row(str(run / "rows" / "run.json"), str(run), facts, trained=True, scored=task == "e2e")


# ------------------------------------------------------------------ names


@pytest.mark.parametrize("name", RUNS)
def test_every_file_and_entry_is_named(left, name):
    assert not left(name).unnamed()


@pytest.mark.parametrize("place", [
    "run/notes.txt", "run/privacy.json", "run/metrics.jsonl", "run/args.json", "run/privacy_ledger.jsonl",
    "run/model.6.pt", "run/optimizer.6.pt", "run/train_loss in privacy.json"])
def test_what_is_not_named_is_seen(left, tmp_path, place):
    """Negative controls: one more file; one more entry of each; the training loss, which the report of authors has."""
    folder = tmp_path / "copy"
    shutil.copytree(left("LoRA").folder, folder)
    name = "train_loss" if "train_loss" in place else "mean_norm_of_the_units"
    path = folder / place.replace("train_loss in ", "")
    if path.suffix == ".json":
        path.write_text(json.dumps({**json.loads(path.read_text()), name: 1.0}))
    elif path.suffix == ".pt":
        torch.save({**torch.load(path, weights_only=True), name: 1.0}, path)
    else:
        with path.open("a") as handle:
            handle.write(json.dumps({name: 1.0}) + "\n")
    ((file, entry),) = Left(folder, e2e_flags()).unnamed()
    assert folder / file == path and entry in (name, "")


def test_the_report_lists_what_it_holds_without_noise(left):
    for name in ("LoRA", "authors, whole model"):
        one = left(name)
        bare = {entry.split(".")[0] for (file, entry), row in one.rows().items()
                if file == "run/privacy.json" and row.covered == "no"}
        said = " ".join(read(one.folder / "run")["disclosed"])
        assert {"train_runtime", "peak_memory_bytes"} <= bare and all(entry in said for entry in bare), bare
        assert ("train_loss" in bare) == one.authors


def test_an_audit_s_files_are_named(tmp_path):
    run = tmp_path / "run"
    started("src/privacy_audit.py", "--train_data", small_runs.material() / "train.jsonl", "--model_card",
            small_runs.material() / "tiny", "--init_checkpoint", small_runs.material() / "tiny", "--seq_len", 32,
            "--noise_multiplier", 1, "--max_step", 2, "--canaries", 100, "--lora_dim", 2, "--work_dir", run)
    assert (run / "audit_scores.npz").exists() and not Left(tmp_path, e2e_flags("privacy_audit")).unnamed()


def test_what_is_made_of_a_run_is_named_and_no_row_is_of_nothing(after, left):
    """Each row with entries, and each entry, is met in one of the runs."""
    runs, met = [left(name) for name in RUNS], set()
    for one in runs:
        assert not one.unnamed()
        met |= {(row, entry.split(".")[0]) for (_, entry), row in one.rows().items()}
    assert any(re.search(r"predict\.jsonl\.journal", file) for file in runs[0].files())
    missing = {(row.files[0].pattern, entry) for row in table() if row.entries for entry in row.entries
               if (row, entry) not in met}
    assert not missing


# ------------------------------------------------------------------ neighbours


@pytest.mark.parametrize("name", RUNS)
def test_nothing_that_is_covered_follows_from_one_unit_but_through_the_noise(after, left, name):
    """Where the noise leaves nothing of the gradients, neighbours differ in what is shown without noise alone: losses,
    the digest, times; nothing in a row that says "yes" or "public", to the last bit."""
    one, other = left(name), left(name, changed_unit=True)
    assert differing(one, other).keys() == {"no"}
    assert read(one.folder / "run", "args.json")["train_sha256"] != read(other.folder / "run", "args.json")[
        "train_sha256"]
    losses = [[line["loss"] for line in metrics(run.folder / "run") if "loss" in line] for run in (one, other)]
    assert losses[0] != losses[1]  # the unit was there


@pytest.mark.parametrize("name", ["LoRA", "authors, whole model"])
def test_public_entries_are_the_same_under_ordinary_noise(left, name):
    """The control of the test above: with sigma 0.8 the weights and what follows from them show the unit."""
    assert differing(left(name, False, 0.8), left(name, True, 0.8)).keys() == {"no", "yes"}


@pytest.mark.parametrize("entry, covered", [("eval_loss", "yes"), ("steps_charged", "public"), ("disclosed", "public")])
def test_an_entry_that_follows_from_the_data_is_seen(left, tmp_path, entry, covered):
    """Negative control: a figure without noise under a name that is said to be covered."""
    copy = Left(tmp_path / "copy", e2e_flags())
    shutil.copytree(left("LoRA", True).folder, copy.folder)
    path = copy.folder / "run" / "privacy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: metrics(copy.folder / "run")[0]["loss"]}))
    assert differing(left("LoRA"), copy)[covered] == {("run/privacy.json", entry)}


def test_a_row_of_a_table_keeps_no_private_digest(after, left):
    run = left("LoRA").folder / "run"
    assert "train_sha256" in read(run, "args.json") and "train_sha256" not in read(run, "rows/run.json")["settings"]


# ------------------------------------------------------------------ files of tensors


def test_files_of_tensors_hold_nothing_beside_their_entries(left):
    """No paths, times or keys in the records of a .pt file, no bytes of a buffer that a tensor is a view of."""
    for path in (left("LoRA").folder / "run").glob("*.pt"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                assert info.date_time == (1980, 0, 0, 0, 0, 0) and not info.comment
                assert re.fullmatch(r"archive/(data\.pkl|data/\d+|version|byteorder|\.format_version"
                                    r"|\.storage_alignment|\.data/serialization_id)", info.filename), info.filename
        tensors = [value for value in torch.load(path, weights_only=True).values() if isinstance(value, torch.Tensor)]
        for value in tensors or torch.load(path, weights_only=True)["model_state_dict"].values():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    (path,) = (left("LoRA").folder / "run").glob("optimizer.*.pt")
    assert torch.load(path, weights_only=True).keys() == {"format", "steps", "m", "v", "progress"}


# ------------------------------------------------------------------ validation data that are training data


def test_shared_texts_are_those_of_a_plain_loop(tmp_path):
    """Files of a few tokens, so that much is shared, cut at 6 tokens: a copy counts each time that it is validated, and
    where the context ends does not matter."""
    draw = random.Random(0)
    texts: dict[str, list[list[int]]] = {"train": [], "valid": []}
    for name, found in texts.items():
        with open(tmp_path / f"{name}.jsonl", "w") as handle:
            for _ in range(200):
                context, completion = ([draw.randrange(2) for _ in range(draw.randint(1, 5))] for _ in range(2))
                handle.write(json.dumps({"context": context, "completion": completion}) + "\n")
                found.append((context + completion)[:6])
    expected = sum(any(text == other for other in texts["train"]) for text in texts["valid"])
    assert 100 < expected < 200
    train, valid = (read_examples(str(tmp_path / f"{name}.jsonl"), "--x", 2, 6, objective)
                    for name, objective in (("train", "jlm"), ("valid", "clm")))
    assert count_shared(valid, train) == expected
    assert count_shared(valid, valid) == 200


@pytest.mark.parametrize("script, flag", [("e2e", "train_data"), ("e2e", "valid_data"), ("authors", "train_file")])
def test_data_from_a_pipe_are_refused(tmp_path, script, flag):
    """The file is read again for its digest. From a pipe that is the digest of nothing: a resumed run would not notice
    other data, nor a run that its validation data are its training data. A named pipe would be waited for."""
    reader, writer = os.pipe()
    try:
        pipe = f"/proc/{os.getpid()}/fd/{reader}"
        if script == "e2e":
            run, = start_ranks(small_runs.flags(tmp_path / "work", **{flag: pipe}))
        else:
            run, = author_runs.start(author_runs.flags(tmp_path / "work", **{flag: pipe}))
        assert run.wait() == 2
        assert f"--{flag} {pipe}: is a pipe" in run.error and not (tmp_path / "work").exists()
    finally:
        os.close(reader)
        os.close(writer)
