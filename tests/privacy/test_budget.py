"""The budget file: what its records hold, what breaks the chain, and that its total never under-counts."""

import dataclasses
import hashlib
import json
from collections import Counter

import pytest

import privacy_budget
from base.errors import UserError, run_main
from helpers.budgets import (
    CLOSED,
    CREATED,
    GIVEN,
    KEY,
    OTHER_DATA,
    RELEASED,
    RESERVED,
    VOID,
    budget_file,
    chained,
    counted,
    run,
)
from helpers.ledgers import pld_epsilon
from helpers.small_runs import ledger
from privacy.budget import Transaction, new_name, read_budget, transaction
from privacy.ledger import Ledger
from privacy.plan import PlanSettings


def altered(**changes) -> PlanSettings:
    return dataclasses.replace(GIVEN, **changes)


# ------------------------------------------------------------------ records


def test_a_file_holds_what_a_run_does(tmp_path):
    """Its lines, written out by hand: the run reserves all, draws three of four steps, and releases one."""
    path = budget_file(tmp_path, 8.0)
    run(tmp_path / "run", path, last=3, given=GIVEN)
    run(tmp_path / "more", path, given=GIVEN, end=False)
    name, more = list(read_budget(path).reservations)
    work = str(tmp_path.resolve() / "run" / "privacy_ledger.jsonl")
    other = str(tmp_path.resolve() / "more" / "privacy_ledger.jsonl")
    assert open(path).read() == chained(
        CREATED, {**RESERVED, "reservation": name, "ledger": work, "uses": [[*KEY, 3]]},
        {**CLOSED, "reservation": name}, {**RELEASED, "reservation": name},
        {**RESERVED, "reservation": more, "ledger": other, "uses": [[*KEY, 4]]})


@pytest.mark.parametrize("records, total", [
    ((), {}), ((RESERVED,), {KEY: 5}), ((RESERVED, VOID, CLOSED), {KEY: 5}), ((RESERVED, CLOSED, RELEASED), {KEY: 3}),
    ((RESERVED, RESERVED), {KEY: 10}), ((RESERVED, CLOSED, RELEASED, RESERVED), {KEY: 8}),
    ((RESERVED, CLOSED, RESERVED), {KEY: 10}), ((RESERVED, {**RESERVED, "reservation": "b"}), {KEY: 10}),
])
def test_what_counts(tmp_path, records, total):
    path = tmp_path / "budget.jsonl"
    path.write_text(chained(CREATED, *records))
    assert counted(str(path)) == Counter(total)


def test_the_total_is_an_upper_bound_by_an_independent_accountant(tmp_path):
    path = tmp_path / "budget.jsonl"
    other = [["gaussian", "poisson", 1.1, 0.05, 30]]
    path.write_text(chained(CREATED, RESERVED, CLOSED, RELEASED, {**RESERVED, "reservation": "b", "uses": other}))
    records = [{"sigma": 0.8, "q": 0.2}] * 3 + [{"sigma": 1.1, "q": 0.05}] * 30
    truth = pld_epsilon(records, 1e-5)
    assert 0.999 * truth < read_budget(str(path)).total() < truth + 0.012


def test_every_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "budget.jsonl"
    whole = chained(CREATED, RESERVED, CLOSED, RELEASED).encode()
    for place, byte in enumerate(whole):
        if byte == ord(" "):
            continue
        path.write_bytes(whole[:place] + bytes([byte ^ 1]) + whole[place + 1:])
        if place == len(whole) - 1:
            assert read_budget(str(path)).torn
            continue
        with pytest.raises(UserError, match=rf"{path}:[1234]: (damaged|format )"):
            read_budget(str(path))


@pytest.mark.parametrize("records", [
    [RESERVED], [CREATED, CREATED], [CREATED, CLOSED], [CREATED, RELEASED], [CREATED, RESERVED, RELEASED],
    [CREATED, RESERVED, CLOSED, CLOSED], [CREATED, RESERVED, {**RESERVED, "ledger": "y"}],
    *([CREATED, {**RESERVED, "uses": [use]}] for use in (
        [*KEY, 0], [*KEY, -1], [*KEY, 1.0], [*KEY, True], [*KEY], 3, ["laplace", *KEY[1:], 1],
        ["gaussian", "dice", 0.8, 0.2, 1], [*KEY[:2], -0.1, 0.2, 1], [*KEY[:2], 0.8, 0.0, 1],
        [*KEY[:2], 0.8, 1.1, 1], [[], "poisson", 0.8, 0.2, 1], [*KEY, 10**16])),
    *([{**CREATED, key: value}] for key, value in (
        ("epsilon", 0), ("epsilon", float("inf")), ("epsilon", float("nan")), ("epsilon", True), ("delta", 1),
        ("unit", " "), ("unit", "a\nb"), ("data", None), ("kind", "make"), ("kind", []), ("format", 0), ("format", 2),
        ("format", None))),
])
def test_records_that_no_run_writes_are_refused(tmp_path, records):
    """Even under right checksums."""
    path = tmp_path / "budget.jsonl"
    path.write_text(chained(*records))
    with pytest.raises(UserError, match=rf"^{path}:{len(records)}: (damaged: |format )"):
        read_budget(str(path))


@pytest.mark.parametrize("content, words", [
    (None, "no such budget; make one with"), ("", "holds no budget"), ('{"format": 1', "holds no budget")])
def test_no_budget(tmp_path, content, words):
    if content is not None:
        (tmp_path / "budget.jsonl").write_text(content)
    for action in (read_budget, Transaction):
        with pytest.raises(UserError, match=f"--budget {tmp_path}/budget.jsonl: {words}"):
            action(str(tmp_path / "budget.jsonl"), "--budget")


def test_a_budget_is_created_once(tmp_path):
    before = open(budget_file(tmp_path)).read()
    with pytest.raises(UserError, match="is there already"):
        budget_file(tmp_path, 99)
    assert open(tmp_path / "budget.jsonl").read() == before


def test_torn_anywhere_in_the_last_line(tmp_path):
    """What is left of it counts for nothing, since whoever wrote it had drawn nothing for it, and stays as a note."""
    path, before = tmp_path / "budget.jsonl", chained(CREATED, RESERVED).encode()
    whole = chained(CREATED, RESERVED, {**RESERVED, "reservation": "b"}).encode()
    for end in range(len(before), len(whole)):
        path.write_bytes(whole[:end])
        assert counted(str(path)) == Counter({KEY: 5})
        with transaction(str(path)) as opened:
            opened.write("reserve", reservation="c", ledger="z", uses=[[*KEY, 2]])
        state = read_budget(str(path))
        assert state.counted == Counter({KEY: 7}) and not state.torn
        if end > len(before):
            assert json.loads(path.read_text().splitlines()[2])["text"] == whole[len(before):end].decode()


# ------------------------------------------------------------------ limits


def test_reserved_charged_and_released(tmp_path):
    """Epsilon of 4 steps is 5.4, of 8 is 6.9, of 12 is 8.0: two runs fit into 7.5, a third does not, and leaves
    nothing."""
    path = budget_file(tmp_path, 7.5)
    run(tmp_path / "a", path, end=False)
    run(tmp_path / "b", path)
    before, drawn = open(path).read(), Counter()
    with pytest.raises(UserError, match=r"4 more uses with sigma 0.8 would bring the total to epsilon 8\.\d+ at delta "
                                        r"1e-05, beyond its limit 7.5 \(6\.\d+ is spent or reserved\)"):
        run(tmp_path / "c", path, drawn=drawn)
    assert not drawn and open(path).read() == before and not ledger(tmp_path / "c")
    with pytest.raises(UserError, match="beyond its limit"):  # no noise
        run(tmp_path / "d", path, given=altered(sigma=0.0))


@pytest.mark.parametrize("made, changed, words", [
    ({}, {"data": OTHER_DATA}, "is of other data .sha256 dddddddddddd there, eeeeeeeeeeee of the training file"),
    ({"unit": "author"}, {}, "is for one author, this run for one example"),
    ({}, {"given": altered(sampling="shuffle")}, "its runs hold where you add or remove one example, this run .*zero"),
])
def test_what_is_no_budget_for_a_run(tmp_path, made, changed, words):
    path = budget_file(tmp_path, **made)
    if not made and "data" not in changed:
        run(tmp_path / "first", path)
    before = open(path).read()
    with pytest.raises(UserError, match=f"--budget {path}: {words}"):
        run(tmp_path / "run", path, **changed)
    assert open(path).read() == before
    assert not (tmp_path / "run/privacy_ledger.jsonl").exists() or not ledger(tmp_path / "run")


def test_a_run_goes_on_within_its_own_reservation(tmp_path):
    """Stopped after step 2 with a checkpoint of step 1: three steps are to come, and two of them are reserved. Where
    there is room the third is reserved, too; where there is none the run ends a step early."""
    for epsilon, charged, reached in ((50.0, 5, 4), (5.6, 4, 3)):
        folder = tmp_path / str(epsilon)
        folder.mkdir()
        path, drawn = budget_file(folder, epsilon), Counter()
        run(folder / "run", path, last=2, end=False, drawn=drawn)
        with transaction(path) as opened:  # as if it had planned all four
            (held,) = opened.state.reservations.values()
            opened.write("reserve", reservation=held.name, ledger=held.ledger, uses=[[*KEY, 2]])
        plan = run(folder / "run", path, resume=True, done=1, drawn=drawn)
        assert drawn[KEY] == charged == len(ledger(folder / "run")) == counted(path)[KEY]
        assert plan.reached == reached and read_budget(path).total() <= epsilon
    with pytest.raises(UserError, match="beyond its limit"):  # what it released is gone
        run(folder / "run", path, resume=True, done=3)


def test_a_run_that_changes_its_noise_pays_for_both(tmp_path):
    path = budget_file(tmp_path)
    run(tmp_path / "run", path, last=2, end=False)
    run(tmp_path / "run", path, resume=True, done=2, given=altered(sigma=2.0), changed=("sigma",), end=False)
    assert counted(path) == Counter({KEY: 2, ("gaussian", "poisson", 2.0, 0.2): 2})


def test_shuffled_epochs_are_counted_as_the_ledger_counts_them(tmp_path):
    """7 steps are two epochs of 5; resumed in the second, it is shuffled and paid for again."""
    given, drawn = altered(sampling="shuffle", steps=7), Counter()
    path = budget_file(tmp_path, 500.0)
    run(tmp_path / "run", path, given=given, last=7, end=False)
    key = ("gaussian", "shuffle", 0.8, 1.0)
    assert counted(path) == Counter({key: 2})
    run(tmp_path / "run", path, given=given, resume=True, done=6, drawn=drawn)
    assert counted(path) == Counter({key: 3})


# ------------------------------------------------------------------ the command


@pytest.fixture
def command(capsys, monkeypatch):
    def start(*arguments):
        monkeypatch.setattr("sys.argv", ["src/privacy_budget.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_main(privacy_budget.main)
        return ended.value.code or 0, *capsys.readouterr()

    return start


def test_create_show_and_release(tmp_path, command):
    (tmp_path / "train.jsonl").write_text("{}\n")
    data = hashlib.sha256(b"{}\n").hexdigest()
    path = tmp_path / "budget.jsonl"
    create = ["create", path, "--train_data", tmp_path / "train.jsonl", "--epsilon", 8, "--delta", 1e-5]
    assert command(*create)[0] == 0
    run(tmp_path / "run", str(path), data=data)
    run(tmp_path / "dead", str(path), data=data, end=False, last=2)
    status, out, _ = command("show", path)
    for words in (f"sha256 {data}", "one example", "add or remove one example", "charged ", "reserved ",
                  "of 8 at delta", str(tmp_path / "dead"), f"{read_budget(str(path)).total():.4f}"):
        assert status == 0 and words in out, out
    status, out, _ = command("release", path)
    assert status == 0 and f"{tmp_path}/dead: released; 2 uses" in out
    live = Ledger(str(tmp_path / "dead"), GIVEN.ledger_entries(1), resume=True)
    with transaction(str(path)) as opened:
        name = new_name()
        (tmp_path / "dead/args.json").write_text(json.dumps({"reservation": name}))
        opened.write("reserve", reservation=name, ledger=str((tmp_path / "dead").resolve() / "privacy_ledger.jsonl"),
                     uses=[[*KEY, 1]])
    status, out, _ = command("release", path)
    assert status == 0 and "counted in full: it is running" in out
    live.close()


@pytest.mark.parametrize("arguments, words", [
    (["create", "@new", "--train_data", "@absent", "--epsilon", 8, "--delta", 1e-5], "--train_data"),
    (["create", "@new", "--train_data", "@train.jsonl", "--epsilon", 0, "--delta", 1e-5], "--epsilon 0"),
    (["create", "@new", "--train_data", "@train.jsonl", "--epsilon", "nan", "--delta", 1e-5], "--epsilon nan"),
    (["create", "@new", "--train_data", "@train.jsonl", "--epsilon", 8, "--delta", 1], "delta 1"),
    (["create", "@new", "--train_data", "@train.jsonl", "--epsilon", 8], "--delta"),
    (["create", "@budget.jsonl", "--train_data", "@train.jsonl", "--epsilon", 8, "--delta", 1e-5], "is there already"),
    (["show", "@new"], "no such budget"), (["show", "@train.jsonl"], "train.jsonl:1: damaged"),
    (["release", "@budget.jsonl", "@absent"], "no run in"), (["spend", "@budget.jsonl"], "spend"),
    ([], "create|show|release"),
])
def test_mistakes_are_one_line(tmp_path, command, arguments, words):
    (tmp_path / "train.jsonl").write_text("{}\n")
    budget_file(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    status, _, err = command(*(str(tmp_path / word[1:]) if str(word).startswith("@") else word for word in arguments))
    assert status == 2 and err.count("\n") == 1 and words in err, err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
