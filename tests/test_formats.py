"""Formats: every file says which one it has, those of earlier versions still read, an unknown one is refused by name.

fixtures/unnumbered was written before formats had numbers: a seeded run of gpt2_ft.py that was stopped after step 3 of
6, the weights of the same run uninterrupted, and a ledger of three attempts with other settings and a torn last line.
"""

import hashlib
import json
import os
import pathlib
import shutil

import pytest
import torch

from base.errors import UserError
from base.files import check_format
from helpers.processes import ROOT
from helpers.small_runs import contents, ledger, metrics, read, server, weights
from privacy.ledger import FORMAT, KEYS, NAMES, TYPES, Ledger, read_ledger
from privacy.mechanism import MECHANISMS
from privacy.plan import epsilons
from privacy.randomness import KINDS
from privacy.sampling import SAMPLERS

UNNUMBERED = ROOT / "tests" / "fixtures" / "unnumbered"
NAME = "privacy_ledger.jsonl"
RECORD = {
    "format": 2,
    "step": 1,
    "attempt": 1,
    "unit": "example",
    "N": 40,
    "q": 0.2,
    "sigma": 0.8,
    "clip": 1.0,
    "mechanism": "gaussian",
    "sampling": "poisson",
    "steps_per_epoch": 5,
    "delta": 1e-5,
    "world_size": 1,
    "noise_source": "seeded",
}
FLAGS = (
    "--train_data train.jsonl --valid_data valid.jsonl --train_batch_size 6 --noise_multiplier 0.8 "
    "--noise_source seeded --noise_seed 1 --model_card tiny --init_checkpoint tiny --seq_len 16 --max_step 6 "
    "--lora_dim 2 --lora_alpha 8 --lr 0.01 --scheduler linear --save_interval 2 --log_interval 2 --lora_dropout 0.1 "
    "--work_dir run"
).split()


def chained(*records: dict) -> bytes:
    """The lines of a ledger, by nothing of the product."""
    lines, previous = [], ""
    for record in records:
        body = json.dumps(record, sort_keys=True)
        previous = hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()[:16]
        lines.append(json.dumps({**record, "checksum": previous}))
    return "".join(f"{line}\n" for line in lines).encode()


def without(*keys: str) -> dict:
    return {key: value for key, value in RECORD.items() if key not in keys}


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("found, number", [(None, 1), (1, 1), (2, 2), (3, 3)])
def test_a_known_format_is_its_number(found, number):
    assert check_format(found, 3, "file") == number


@pytest.mark.parametrize("found", [4, 10**30, 0, -1, True, 2.0, "2", [2], {}])
def test_an_unknown_format_is_refused_by_name(found):
    with pytest.raises(UserError, match="^some/file:7: format ") as caught:
        check_format(found, 3, "some/file:7")
    message = str(caught.value)
    assert repr(found) in message and "\n" not in message
    assert ("newer than this version reads (3); use the version that wrote it" in message) == (found in (4, 10**30))


# ------------------------------------------------------------------ the ledger's


def test_the_ledger_knows_what_it_may_name():
    """A name without a class would not be priced, a class without a name never be charged."""
    assert set(NAMES["mechanism"]) == set(MECHANISMS) and set(NAMES["sampling"]) == set(SAMPLERS)
    assert NAMES["noise_source"] == KINDS
    assert sorted(KEYS) == list(range(1, FORMAT + 1)) and KEYS[FORMAT] == set(TYPES)


@pytest.mark.parametrize("last", [{**RECORD, "step": 2}, {**without("format", "mechanism"), "step": 2}])
@pytest.mark.parametrize("first", [RECORD, without("format", "mechanism")])
def test_formats_may_follow_each_other(tmp_path, first, last):
    path = tmp_path / NAME
    path.write_bytes(chained(first, last))
    state = read_ledger(str(path))
    assert [set(record) for record in state.records] == [set(TYPES)] * 2
    assert [record["format"] for record in state.records] == [first.get("format", 1), last.get("format", 1)]
    assert state.records[0]["mechanism"] == "gaussian" and state.size == path.stat().st_size


@pytest.mark.parametrize("number", [3, 99])
def test_a_ledger_of_an_unknown_format_is_refused(tmp_path, number):
    """Its keys may mean something else, though they are those of today."""
    path = tmp_path / NAME
    path.write_bytes(chained(RECORD, {**RECORD, "step": 2, "format": number}))
    with pytest.raises(UserError, match=rf"^{path}:2: format {number} is newer than this version reads \(2\); use the"):
        read_ledger(str(path))


@pytest.mark.parametrize(
    "record, words",
    [
        ({**RECORD, "format": 0}, "format 0 is none"),
        ({**RECORD, "format": "2"}, "format '2' is none"),
        ({**RECORD, "format": True}, "format True is none"),
        ({**RECORD, "format": 1}, "damaged: its keys are not step, attempt, .*clip, sampling"),
        ({**RECORD, "format": None}, "damaged: its keys are not step, attempt, .*clip, sampling"),
        (without("format"), "damaged: its keys are not step, attempt, .*clip, sampling"),
        (without("mechanism"), "damaged: its keys are not format, step, .*clip, mechanism, sampling"),
        ({**RECORD, "seed": 1}, "damaged: its keys are not format, step"),
    ],
)
def test_each_format_has_its_keys(tmp_path, record, words):
    path = tmp_path / NAME
    path.write_bytes(chained(record))
    with pytest.raises(UserError, match=f"^{path}:1: {words}"):
        read_ledger(str(path))


# ------------------------------------------------------------------ what earlier versions wrote


@pytest.fixture
def mixed(tmp_path) -> pathlib.Path:
    return shutil.copytree(UNNUMBERED / "mixed_ledger", tmp_path / "mixed")


def test_a_ledger_without_format_numbers_counts_as_it_did(mixed):
    """expected.json: what the version that wrote the ledger said of it."""
    state, expected = read_ledger(str(mixed / NAME)), read(mixed, "expected.json")
    assert state.torn and state.charged == expected["charged"] and state.attempts == expected["attempts"]
    assert state.last_checksum == expected["last_checksum"]
    for delta, then in expected["epsilons"].items():
        assert epsilons(state, float(delta)) == pytest.approx(tuple(then), rel=1e-9)


def settings_of(folder: pathlib.Path) -> dict:
    return {**ledger(folder)[-1], "mechanism": "gaussian"}


def test_a_torn_line_of_an_earlier_format_is_mended(mixed):
    before = (mixed / NAME).read_bytes()
    opened = Ledger(str(mixed), settings_of(mixed), resume=True)
    opened.charge(8)
    opened.close()
    after, (*old, mended, new) = (mixed / NAME).read_bytes(), ledger(mixed)
    whole = before[: before.rfind(b"\n") + 1]
    assert after.startswith(whole) and len(old) == whole.count(b"\n")
    assert (mended["format"], mended["step"], mended["attempt"]) == (2, 7, 3)
    assert (new["format"], new["step"], new["attempt"]) == (2, 8, 4) and read_ledger(str(mixed / NAME)).charged == 9
    records = [{key: record[key] for key in record if key != "checksum"} for record in (*old, mended, new)]
    assert chained(*records) == after


def test_what_is_kept_of_an_earlier_format_is_what_was_written(mixed):
    """A run whose ledger is taken away leaves its lines beside it: those of the earlier format, too, as they were."""
    opened = Ledger(str(mixed), settings_of(mixed), resume=True)
    opened.charge(8)
    written = (mixed / NAME).read_bytes()
    os.unlink(mixed / NAME)
    with pytest.raises(UserError, match=f"what this run charged is in {mixed / NAME}.kept"):
        opened.charge(9)
    opened.close()
    assert (mixed / f"{NAME}.kept").read_bytes() == written


def test_a_run_without_format_numbers_is_reported_and_resumed(tmp_path):
    """To the weights and the epsilon of the run that nothing interrupted, which are of that version as well."""
    place = shutil.copytree(UNNUMBERED, tmp_path / "place")
    work, before = place / "run", contents(UNNUMBERED / "run")
    reported = server().start("src/privacy_report.py", [work])
    assert reported.wait() == 0, reported.stdout + reported.stderr
    assert "steps charged 3 in 1 attempt" in reported.stdout and "3 steps are of ledger format 1" in reported.stdout
    assert "agrees with the ledger" in reported.stdout and contents(work) == before
    resumed = server().start("src/gpt2_ft.py", [*FLAGS, "--resume"], cwd=place)
    assert resumed.wait() == 0, resumed.stdout + resumed.stderr
    assert (work / NAME).read_bytes().startswith(before[NAME])
    assert [(record["step"], record["attempt"], record.get("format")) for record in ledger(work)] == [
        (1, 1, None), (2, 1, None), (3, 1, None), (4, 2, 2), (5, 2, 2), (6, 2, 2)
    ]
    whole = torch.load(place / "whole.6.pt", weights_only=True)["model_state_dict"]
    found = weights(work, 6)
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert read(work)["epsilon_prv"] == pytest.approx(7.1951, abs=1e-4) == metrics(work)[-2]["epsilon"]
    assert read(work)["attempts"] == 2 and read(work)["steps_charged"] == 6
    assert "3 steps are of ledger format 1" in read(work)["warning"] and "not proven" in read(work)["warning"]
    reported = server().start("src/privacy_report.py", [work])
    assert reported.wait() == 0 and "agrees with the ledger" in reported.stdout, reported.stdout + reported.stderr


@pytest.mark.parametrize("change, words", [
    ({"format": 3}, "args.json: format 3 is newer than this version reads (2)"),
    ({"obj": None}, None),  # a flag that did not exist when the run began
    ({"lr": None}, "lr 1e-05 there, 0.01 here"),  # likewise, but this run gives another value than the default
])
def test_args_json_of_another_format(tmp_path, change, words):
    place = shutil.copytree(UNNUMBERED, tmp_path / "place")
    path = place / "run" / "args.json"
    kept = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))
    resumed = server().start("src/gpt2_ft.py", [*FLAGS, "--resume"], cwd=place)
    assert resumed.wait() == (2 if words else 0), resumed.stdout + resumed.stderr
    assert words is None or words in resumed.error
