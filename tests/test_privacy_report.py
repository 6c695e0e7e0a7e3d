"""The report of a ledger, against dp_accounting on its raw records; the plan, against the accountant; refusals."""

import json
import math
import re
import subprocess
import sys
import time

import pytest

import privacy_report
from base.errors import run_main
from helpers.calibration import calibrate_sigma
from helpers.processes import ROOT, assert_user_error, run_script
from privacy import accounting, attack_risk
from privacy.accounting import Phase
from privacy.ledger import FILE_NAME, Ledger
from privacy.plan import Course, epsilons
from privacy.sampled_gaussian import ORDERS

SCRIPT = ROOT / "src" / "privacy_report.py"
SETTINGS = {"unit": "example", "N": 2000, "q": 0.02, "sigma": 0.8, "clip": 1.5, "mechanism": "gaussian",
            "sampling": "poisson", "steps_per_epoch": 50, "delta": 1e-5, "world_size": 2,
            "noise_source": "os"}
PLAN = ("--plan", 42061, 128, 20, "--delta", 1e-5)


@pytest.fixture
def report(capsys, monkeypatch):
    """report(ARGUMENTS...) runs the script inside this process: starting it takes longer than what it does."""

    def run(*arguments) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_main(privacy_report.main)
        return subprocess.CompletedProcess(sys.argv, ended.value.code, *capsys.readouterr())

    return run


def write_ledger(folder, attempts, **changed) -> Ledger:
    """A ledger by the run's own writer. attempts: (first step, last step, settings that this attempt changes)."""
    for number, (first, last, changes) in enumerate(attempts):
        ledger = Ledger(str(folder), {**SETTINGS, **changed, **changes}, resume=number > 0, changed=tuple(changes))
        for step in range(first, last + 1):
            ledger.charge(step)
        ledger.close()
    return ledger


def write_report(folder, ledger: Ledger, **changed) -> None:
    """privacy.json with the keys that the specification names."""
    last = ledger.state.records[-1]
    prv, rdp = epsilons(ledger.state, last["delta"])
    report = {key: last[key] for key in ("unit", "N", "q", "sigma", "clip", "sampling", "delta")}
    report |= {"relation": "add or remove one example", "steps_charged": ledger.state.charged, "epsilon_prv": prv,
               "epsilon_rdp": rdp, "noise_source": "os", "disclosed": ["validation loss of every epoch"]}
    (folder / "privacy.json").write_text(json.dumps(report | changed))


def printed(output: str) -> dict[float, tuple[float, float]]:
    """delta -> (PRV, RDP) of the report's table."""
    rows = re.findall(r"^ *([\d.e-]+) +([\d.]+|inf) +([\d.]+|inf)  \S", output, re.MULTILINE)
    return {float(delta): (float(prv), float(rdp)) for delta, prv, rdp in rows}


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_epsilon_of_raw_records_by_dp_accounting(report, tmp_path):
    """Two attempts, the second with other noise; steps 31 to 40 were redone and are charged twice."""
    dp_accounting = pytest.importorskip("dp_accounting")
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    write_ledger(tmp_path, [(1, 40, {}), (31, 70, {"sigma": 1.0})])
    process = report(tmp_path, "--delta", 1e-6)
    assert process.returncode == 0, process.stderr
    records = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert len(records) == 80
    counts = {}
    for record in records:
        counts[record["sigma"], record["q"]] = counts.get((record["sigma"], record["q"]), 0) + 1
    total, rdp = None, dp_accounting.rdp.RdpAccountant(list(ORDERS))
    for (sigma, q), steps in counts.items():
        part = pld.from_gaussian_mechanism(sigma, sampling_prob=q).self_compose(steps)
        total = part if total is None else total.compose(part)
        rdp.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps)
    table = printed(process.stdout)
    assert set(table) == {1e-5, 5e-5, 1e-6}  # the run's, 1/(10 N), --delta
    for delta, (by_prv, by_rdp) in table.items():
        truth = total.get_epsilon_for_delta(delta)
        assert 0.999 * truth < by_prv < truth + 0.012
        assert by_rdp == pytest.approx(rdp.get_epsilon(delta), rel=0.01)
    for words in ("80 in 2 attempts", "furthest is step 70", "sigma 0.8", "sigma 1,", "one example", "C 1.5", "N 2000",
                  "add or remove one example", "40 steps of sampling poisson", "privacy.json  not there"):
        assert words in process.stdout, process.stdout


def test_each_way_to_name_a_run(report, tmp_path):
    ledger = write_ledger(tmp_path, [(1, 30, {})])
    write_report(tmp_path, ledger)
    before = contents(tmp_path)
    outputs = set()
    for path in (tmp_path, tmp_path / FILE_NAME, tmp_path / "privacy.json"):
        process = report(path)
        assert process.returncode == 0, process.stdout + process.stderr
        outputs.add(process.stdout)
    assert len(outputs) == 1
    (output,) = outputs
    for words in ("noise source  os", "disclosed     validation loss of every epoch", "agrees with the ledger"):
        assert words in output
    assert contents(tmp_path) == before
    # From the folder itself, and after the ledger was copied away from its run.
    assert run_script(SCRIPT, "privacy.json", cwd=tmp_path).returncode == 0
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "ledger_of_monday"
    copy.write_bytes(before[FILE_NAME])
    assert printed(report(copy).stdout) == printed(output)


@pytest.mark.parametrize(
    "changed",
    [{"epsilon_prv": 0.1}, {"steps_charged": 29}, {"sigma": 0.9}, {"N": 4000}, {"unit": "author"},
     {"epsilon_rdp": "inf"}, {"epsilon_prv": None}, {"noise_source": "secure"}, {"attempts": 2}, {"clip": True}],
)
def test_a_report_that_says_something_else(report, tmp_path, changed):
    write_report(tmp_path, write_ledger(tmp_path, [(1, 30, {})]), **changed)
    process = report(tmp_path)
    assert process.returncode == 1
    assert "does NOT agree" in process.stdout and f"DISAGREES     {next(iter(changed))}:" in process.stdout


def test_shuffled_and_mixed_ledgers(report, tmp_path):
    """55 steps of 50 an epoch begin a second epoch; a resumed attempt in it shuffles afresh, which is a third use."""
    write_ledger(tmp_path, [(1, 55, {}), (54, 60, {})], sampling="shuffle", sigma=2.0)
    process = report(tmp_path)
    prv, rdp = printed(process.stdout)[1e-5]
    assert prv == pytest.approx(accounting.epsilon_gaussian(math.sqrt(3) / 2, 1e-5), abs=1e-4)
    assert rdp > prv and "at most 3 times" in process.stdout and "zero-out" in process.stdout
    # Then Poisson on top: the two compose.
    write_more = Ledger(str(tmp_path), {**SETTINGS, "sigma": 2.0}, resume=True, changed=("sampling",))
    for step in range(61, 101):
        write_more.charge(step)
    write_more.close()
    mixed = printed(report(tmp_path).stdout)[1e-5][0]
    assert mixed == pytest.approx(accounting.epsilon_prv([Phase(2.0, 1.0, 3), Phase(2.0, 0.02, 40)], 1e-5), abs=1e-4)
    assert mixed > prv


def test_no_noise_no_steps_and_a_torn_line(report, tmp_path):
    write_ledger(tmp_path, [(1, 3, {})], sigma=0.0)
    assert printed(report(tmp_path).stdout)[1e-5] == (math.inf, math.inf)
    path = tmp_path / FILE_NAME
    path.unlink()
    write_ledger(tmp_path, [(1, 30, {})])
    whole = printed(report(tmp_path).stdout)
    path.write_bytes(path.read_bytes()[:-40])
    process = report(tmp_path)
    assert "steps charged 30 in 1 attempt, one of them a last line cut short" in process.stdout
    assert printed(process.stdout) == whole
    path.write_bytes(b"")
    assert "nothing was drawn" in report(tmp_path).stdout
    path.write_bytes(b'{"step": 1')
    assert_user_error(report(tmp_path), "cut short", "charged")


def test_damage_is_refused(report, tmp_path):
    write_ledger(tmp_path, [(1, 30, {})])
    path = tmp_path / FILE_NAME
    lines = path.read_text().splitlines(keepends=True)
    damages = {
        "a changed sigma": [*lines[:9], lines[9].replace('"sigma": 0.8', '"sigma": 1.8'), *lines[10:]],
        "a lost line": lines[:9] + lines[10:],
        "a doubled line": [*lines[:10], *lines[9:]],
        "swapped lines": [*lines[:9], lines[10], lines[9], *lines[11:]],
        "a cut line inside": [*lines[:9], lines[9][:50] + "\n", *lines[10:]],
        "an empty line": [*lines[:9], "\n", *lines[9:]],
    }
    for name, damaged in damages.items():
        path.write_text("".join(damaged))
        process = report(tmp_path)
        assert process.stdout == "", name
        assert_user_error(process, f"{FILE_NAME}:1", "damaged")
    path.write_text("".join(lines))
    (tmp_path / "privacy.json").write_text("{")
    assert_user_error(report(tmp_path), "privacy.json", "not JSON")
    (tmp_path / "privacy.json").write_text("[3]")
    assert_user_error(report(tmp_path), "privacy.json", "object")


def test_what_an_attacker_can_do_is_said(report, tmp_path):
    """In words, the plot and the card, of two attempts; a privacy.json that says other figures does not agree."""
    ledger = write_ledger(tmp_path, [(1, 40, {}), (31, 70, {"sigma": 1.0})])
    phases = [Phase(0.8, 0.02, 40), Phase(1.0, 0.02, 40)]
    figures = attack_risk.figures(phases, 1e-5)
    write_report(tmp_path, ledger, attack_risk=figures)
    process = report(tmp_path, "--prior", 0.2, "--plot", tmp_path / "x.png", "--card", tmp_path / "card.html")
    assert process.returncode == 0, process.stdout + process.stderr
    risk = attack_risk.attack_risk(phases)
    for rate in (0.001, 0.01, 0.05):
        shown = re.search(rf"^attack risk   with {rate * 100:g} % .* at most ([\d.]+) % .*removed ([\d.]+) %, added "
                          rf"([\d.]+) %", process.stdout, re.M).groups()
        for words, direction in zip(shown, ("worse", "removed", "added")):
            value = float(risk.power(rate, direction))
            assert value <= float(words) / 100 <= 1.011 * value  # rounded up
    assert float(re.search(r"^advantage     at most ([\d.]+):", process.stdout, re.M)[1]) == pytest.approx(
        risk.advantage, abs=1e-4)
    assert re.search(r"^prior 0\.2 .* \(80 % without the model\);", process.stdout, re.M)
    assert "agrees with the ledger" in process.stdout
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "card.html").read_text()
    before = (tmp_path / "card.html").read_text()
    assert_user_error(report(tmp_path, "--card", tmp_path / "card.html"), "--card", "is there already")
    assert (tmp_path / "card.html").read_text() == before
    for changed in ({"advantage": 0.9 * figures["advantage"]}, {"tpr": {}}, {"prior": "0.5"}):
        write_report(tmp_path, ledger, attack_risk=figures | changed)
        process = report(tmp_path)
        assert process.returncode == 1 and "DISAGREES     attack_risk:" in process.stdout


def test_a_ledger_of_two_units_is_refused(report, tmp_path):
    """No run leaves one: its checksums are right, and no number holds for both."""
    ledger = write_ledger(tmp_path, [(1, 3, {})])
    record = ledger.chained({**ledger.state.records[-1], "step": 4, "unit": "author"})
    with open(tmp_path / FILE_NAME, "a") as handle:
        handle.write(json.dumps(record) + "\n")
    assert_user_error(report(tmp_path), FILE_NAME, "one author and for one example")


# --- plans ---


def test_plan_with_sigma(report, tmp_path):
    plot = tmp_path / "plan.png"
    process = report(*PLAN, "--sigma", 0.6, "--plot", plot)
    assert process.returncode == 0, process.stderr
    table = printed(process.stdout)
    assert table[1e-5] == (pytest.approx(5.4253, abs=1e-4), pytest.approx(6.3534, abs=1e-4))
    assert "= 6572 steps" in process.stdout and "epsilon 58.7774 at delta 1e-05" in process.stdout
    assert "sigma/batch 0.0046875," in process.stdout and "at d = 45511.1" in process.stdout  # (128/0.6)^2
    # The last row of the table over steps is the run itself; the middle one of the table over sigma too.
    run = r"5\.4253 +6\.3534 +6\.0246 +58\.7774"
    assert re.search(rf"^ +6572 +20\.00 +{run}$", process.stdout, re.MULTILINE)
    assert re.search(rf"^ +0\.6 +{run}$", process.stdout, re.MULTILINE)
    # Needed noise: what calibration says, for both samplers.
    for target in (1, 2, 3, 8):
        row = re.search(rf"^ +{target} +([\d.]+) +([\d.]+)$", process.stdout, re.MULTILINE)
        poisson, shuffled = map(float, row.groups())
        assert accounting.epsilon_prv([Phase(poisson, 128 / 42061, 6572)], 1e-5) == pytest.approx(target, rel=0.006)
        assert accounting.epsilon_shuffle(shuffled, 20, 1e-5) == pytest.approx(target, rel=0.006)
    image = plot.read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n") and len(image) > 20_000


def test_the_curves_are_those_of_the_tables(report, tmp_path, monkeypatch):
    """What draw() gets, and not only that it draws something: epsilon grows with steps, shuffled or not."""
    drawn = {}
    monkeypatch.setattr(privacy_report, "draw", lambda path, *rows: drawn.update(rows=rows))
    assert report("--plan", 2000, 50, 3, "--delta", 1e-5, "--sigma", 0.9, "--plot", tmp_path / "x.png").returncode == 0
    by_steps, by_sigma, stairs, sigma = drawn["rows"][:4]
    for column in range(1, 5):
        values = [row[column] for row in by_steps]
        assert values == sorted(values) and by_sigma[0][column] > by_sigma[-1][column]
    assert [step for step, _ in stairs] == [0, 40, 80, 120] and sigma == 0.9
    assert [epsilon for _, epsilon in stairs] == [accounting.epsilon_shuffle(0.9, uses, 1e-5) for uses in (1, 2, 3, 3)]


def test_plan_with_advantage(report):
    process = report(*PLAN, "--advantage", 0.2)
    sigma = float(re.search(r"^sigma +([\d.]+), the smallest that keeps the membership", process.stdout, re.M).group(1))
    assert 0.99 * 0.2 < attack_risk.advantage([Phase(sigma, 128 / 42061, 6572)]) <= 0.2 * (1 + 1e-5)


def test_plan_with_epsilon(report):
    process = report(*PLAN, "--epsilon", 8)
    sigma = float(re.search(r"^sigma +([\d.]+), the smallest", process.stdout, re.MULTILINE).group(1))
    assert 0.995 * 8 <= printed(process.stdout)[1e-5][0] <= 8
    assert sigma == pytest.approx(calibrate_sigma(8, 1e-5, 128 / 42061, 6572), rel=1e-5)
    assert list(printed(process.stdout))[1] == pytest.approx(1 / 420610, rel=1e-4)


def test_a_plan_with_next_to_no_noise_is_infinite(report, tmp_path):
    process = report(*PLAN, "--sigma", "1e-160", "--plot", tmp_path / "plan.png")
    assert process.returncode == 0 and process.stdout.count(" inf ") > 50 and (tmp_path / "plan.png").exists()


# --- which batch ---


def batch_rows(output: str) -> dict[int, list[float]]:
    """batch -> steps, q, sigma, sigma/batch, times less, noise of the mean, times less."""
    rows = re.findall(r"^ +(\d+ +\d+ +0\.\d+ .*?)(?:  least.*)?$", output, re.M)
    return {int(row.split()[0]): list(map(float, row.split()[1:])) for row in rows}


def test_a_larger_batch_at_equal_epsilon_and_compute(report, tmp_path, monkeypatch):
    """1,024 for 128: sigma 0.905, 5.3 times less noise in 8 times fewer steps. All sigmas by calibration, to the 0.5 %
    of epsilon that a target is met to."""
    drawn, began = {}, time.process_time()
    monkeypatch.setattr(privacy_report, "draw_batches", lambda path, rows, title: drawn.update(rows=rows))
    process = report(*PLAN, "--sigma", 0.6, "--batches", "--plot", tmp_path / "x.png")
    assert process.returncode == 0 and time.process_time() - began < 5
    rows = batch_rows(process.stdout)
    assert list(rows) == [128 * factor for factor in (1, 2, 4, 8, 16, 64, 256)] == [
        row.course.batch for row in drawn["rows"]]
    steps, _, sigma, noise, less = rows[1024][:5]
    assert (steps, round(6572 / steps)) == (822, 8) and sigma == pytest.approx(0.905, abs=1e-3) and less == 5.31
    for batch, (steps, q, sigma, noise, less, mean, less_mean) in rows.items():
        assert q == pytest.approx(batch / 42061, rel=1e-5) and steps == round(20 * 42061 / batch)
        assert sigma == pytest.approx(calibrate_sigma(5.42533, 1e-5, q, int(steps)), rel=4e-3)
        assert noise == pytest.approx(sigma / batch, rel=1e-4) and less == pytest.approx(0.0046875 / noise, rel=6e-3)
        assert mean == pytest.approx(noise / math.sqrt(steps), rel=1e-4)
        assert less_mean == pytest.approx(0.0046875 / math.sqrt(6572) / mean, rel=6e-3)
    assert re.search(r"^ +32768 .*  least  least of the mean$", process.stdout, re.M)


@pytest.mark.parametrize("sampling, more", [
    ("allocation", ("--epsilon", 3)), ("shuffle", ("--epsilon", 3)), ("poisson", ("--advantage", 0.2))])
def test_batches_keep_the_target(report, tmp_path, sampling, more):
    """Every row meets it, and nearly uses it up; the smallest batch need not be the first."""
    plot = tmp_path / "x.png"
    process = report("--plan", 2000, 100, 4, "--delta", 1e-5, *more, "--batches", 500, 25, "--sampling", sampling,
                     "--plot", plot)
    assert process.returncode == 0, process.stderr
    rows = batch_rows(process.stdout)
    assert list(rows) == [100, 500, 25] and f"{sampling} sampling" in process.stdout
    for batch, (steps, _, sigma, *_) in rows.items():
        phases = Course(2000, batch, int(steps), sampling).phases(sigma)
        value = accounting.epsilon_prv(phases, 1e-5) if more[0] == "--epsilon" else attack_risk.advantage(phases)
        assert 0.985 * more[1] < value < 1.0005 * more[1]  # sigma is printed to five digits
    assert re.search(r"^ +500 .*  least  least of the mean$", process.stdout, re.M)
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and plot.stat().st_size > 20_000


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((*PLAN, "--sigma", "0.6", "--batches", "50000"), "--batches 50000: expected 1 to 42061"),
        ((*PLAN, "--sigma", "0.6", "--batches", "0"), "--batches 0"),
        ((*PLAN, "--sigma", "0.6", "--batches", "x"), "--batches"),
        ((*PLAN, "--sigma", "1e-160", "--batches"), "--sigma 1e-160: gives epsilon inf"),
        ((*PLAN, "--sigma", "0.6", "--sampling", "allocation"), "--sampling allocation: goes with --batches"),
        (("--plan", 100, 1, 0.1, "--sigma", "1", "--delta", "1e-5", "--batches", "90"), "--batches 90: 0.1 epochs"),
        (("{tmp}/binary", "--batches", "8"), "--batches: goes with --plan"),
        ((), "--plan"),
        (("{tmp}/nothing",), "cannot be read"),
        (("{tmp}",), FILE_NAME),
        (("{tmp}/privacy.json",), "no such file"),
        (("{tmp}/lonely/privacy.json",), "without the ledger"),
        (("{tmp}/binary",), "damaged"),
        (("{tmp}/binary", "--delta", "0"), "--delta"),
        (("{tmp}/binary", "--delta", "nan"), "--delta"),
        (("{tmp}/binary", "--delta", "x"), "--delta"),
        (("{tmp}/binary", "--sigma", "1"), "--sigma"),
        (("{tmp}/binary", *PLAN), "or --plan"),
        ((*PLAN,), "exactly one of --sigma"),
        ((*PLAN, "--sigma", "1", "--epsilon", "8"), "exactly one of --sigma"),
        ((*PLAN, "--sigma", "0"), "--sigma 0"),
        ((*PLAN, "--sigma", "-1"), "--sigma -1"),
        ((*PLAN, "--sigma", "nan"), "--sigma nan"),
        ((*PLAN, "--epsilon", "0"), "--epsilon 0"),
        ((*PLAN, "--epsilon", "inf"), "--epsilon inf"),
        ((*PLAN, "--epsilon", "1e9"), "next to no privacy"),
        ((*PLAN, "--sigma", "1", "--plot", "{tmp}/no/such/plan.png"), "--plot"),
        (("--plan", 100, 10, 3, "--sigma", "1"), "--delta"),
        (("--plan", 100, 10, 3, "--sigma", "1", "--delta", "1e-5", "1e-6"), "exactly one"),
        (("--plan", 100, 200, 3, "--sigma", "1", "--delta", "1e-5"), "larger than the data"),
        (("--plan", 100, 10.5, 3, "--sigma", "1", "--delta", "1e-5"), "whole numbers"),
        (("--plan", "1e300", 1, "1e-295", "--sigma", "1", "--delta", "1e-5"), "1e+15 units"),
        (("--plan", 100, 0, 3, "--sigma", "1", "--delta", "1e-5"), "above 0"),
        (("--plan", "nan", 10, 3, "--sigma", "1", "--delta", "1e-5"), "above 0"),
        (("--plan", 100, 10, 0.001, "--sigma", "1", "--delta", "1e-5"), "no step"),
        (("--plan", 100, 10, "--sigma", "1", "--delta", "1e-5"), "--plan"),
        (("--plam", 100, 10, 1), "--plam"),
        (("{tmp}/binary", "--prior", "1"), "--prior 1"),
        (("{tmp}/binary", "--card", "{tmp}/card.txt"), ".md or .html"),
        (("{tmp}/binary", "--card", "{tmp}/binary"), ".md or .html"),
        (("{tmp}/binary", "--plot", "{tmp}/no/such.png"), "--plot"),
        (("{tmp}/binary", "--plot", "{tmp}/plot.txt"), "ends in .png"),
    ],
)
def test_bad_input(report, tmp_path, arguments, words):
    (tmp_path / "binary").write_bytes(bytes(range(256)) + b"\n\xff\n")
    (tmp_path / "lonely").mkdir()
    (tmp_path / "lonely" / "privacy.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    process = report(*(str(argument).replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert_user_error(process, words)
    assert process.stdout == "" and sorted(tmp_path.rglob("*")) == before
