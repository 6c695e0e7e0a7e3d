"""What a run's ledger is worth, and what a run will cost before it is paid for.

    python src/privacy_report.py trained_models/GPT2_M/e2e                       a training folder,
    python src/privacy_report.py trained_models/GPT2_M/e2e/privacy_ledger.jsonl  its ledger,
    python src/privacy_report.py trained_models/GPT2_M/e2e/privacy.json --delta 1e-6 1e-7   or its report
    python src/privacy_report.py trained_models/first trained_models/second      several runs together

    python src/privacy_report.py trained_models/GPT2_M/e2e --card card.html      and a page about it for others

    python src/privacy_report.py --plan 42061 128 20 --sigma 0.6 --delta 1e-5
    python src/privacy_report.py --plan 42061 128 20 --epsilon 8 --delta 1e-5 --plot plan.png
    python src/privacy_report.py --plan 42061 128 20 --epsilon 8 --delta 1e-5 --batches      which batch is the best?

Epsilon, and what an attacker can do at the most, are recomputed from the ledger alone, whose checksums are checked
first. A privacy.json beside it adds what the ledger does not know (what else was disclosed) and is compared with it.
Runs on the CPU in seconds.

Status: 0; 1 where privacy.json does not say what the ledger says; 2 for a ledger or a flag that cannot be used.
"""

import base.early  # noqa: F401  # isort: skip  # before slow imports

import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from base.errors import UserError, fail, run_main
from base.files import read_object
from base.flags import Parser
from privacy import accounting
from privacy.allocation import AnyPhase
from privacy.attack_risk import PRIOR, check_advantage, check_prior
from privacy.composition import compose
from privacy.ledger import FILE_NAME, NAMES, LedgerState, check_none_was_kept, noise_sources, read_ledger
from privacy.plan import Course, choose_sigma, participations, relation, spent, warnings
from privacy.sampled_gaussian import Phase
from run import batch_plan, card, risk_words
from run.composed import describe_composition, read_accounts, settings_lines
from run.plan_plots import draw, draw_batches
from run.provenance import REPORT_NAME, disagreements

TARGETS = (1.0, 2.0, 3.0, 8.0)  # epsilons that a plan prices beside its own
FACTORS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)  # of its sigma, likewise
METHODS = {
    "pld": "privacy loss on a grid",
    "prv": "PRV upper bound",
    "rdp": "RDP, where the PRV grid gives none or more",
    "gaussian": "analytic Gaussian, no amplification",
    "sampling": "delta covers every draw of the unit",
    "none": "no noise, or no steps",
}


# --- a ledger ---


def find_files(path: str) -> tuple[str, str | None]:
    """(ledger, privacy.json or None) of a training folder, a ledger or a privacy.json."""
    if os.path.isdir(path):
        folder, ledger = path, os.path.join(path, FILE_NAME)
        check_none_was_kept(ledger)
        if not os.path.exists(ledger):
            fail(f"{path}: holds no {FILE_NAME}; give a training folder, its ledger or its {REPORT_NAME}")
    elif os.path.basename(path) == REPORT_NAME:
        folder = os.path.dirname(path)
        ledger = os.path.join(folder, FILE_NAME)
        if not os.path.exists(path):
            fail(f"{path}: no such file")
        if not os.path.exists(ledger):
            fail(f"{path}: no {FILE_NAME} beside it; without the ledger nothing in it can be checked")
    else:
        folder, ledger = os.path.dirname(path), path
    report = os.path.join(folder, REPORT_NAME)
    return ledger, report if os.path.exists(report) else None


def epsilon_table(phases: Sequence[AnyPhase], deltas: dict[float, str]) -> str:
    """A line a delta: PRV, RDP, and where the first comes from."""
    lines = [f"{'delta':>12}  {'epsilon PRV':>12}  {'epsilon RDP':>12}  by"]
    for delta, origin in deltas.items():
        bound = accounting.epsilon_bound(phases, delta)
        rdp = accounting.epsilon_rdp(phases, delta)
        lines.append(f"{delta:12.6g}  {bound.epsilon:12.4f}  {rdp:12.4f}  {METHODS[bound.method]}; {origin}")
    return "\n".join(lines)


def report_ledger(path: str, deltas: list[float], prior: float, plot: str | None, card_path: str | None) -> int:
    ledger, report_path = find_files(path)
    state = read_ledger(ledger)
    if len(units := {record["unit"] for record in state.records}) > 1:
        fail(
            f"{ledger}: counts for one {' and for one '.join(sorted(units))}: no epsilon holds for both; keep one apart"
        )
    report = read_object(report_path, "the run's object; its next checkpoint writes it anew") if report_path else None
    if not state.records:
        print(f"ledger        {ledger}: no whole record; {state.charged} steps charged")
        if state.torn:
            fail(f"{ledger}: its only line is cut short: one step was charged, its sigma and q are not known")
        print("epsilon       0: nothing was drawn")
        write_card(card_path, ledger, state, report, prior)
        return 0
    last = state.last_step
    torn = ", one of them a last line cut short" if state.torn else ""
    attempts = f"{state.attempts} attempt" + ("s" if state.attempts > 1 else "")
    print(f"ledger        {ledger}: {len(state.records)} records, checksums whole from the first to the last")
    print(f"unit          one {last['unit']}")
    print(f"relation      {relation(last['unit'], {record['sampling'] for record in state.records})}")
    furthest = max(record["step"] for record in state.records)
    print(f"steps charged {state.charged} in {attempts}{torn}; the furthest is step {furthest}")
    for line in settings_lines(state):
        print(f"settings      {line}")
    for sigma, count in participations(state).items():
        print(f"shuffled      a unit took part at most {count} times under sigma {sigma:g}: in full, not amplified")
    wanted = {last["delta"]: "the run's delta", 1 / (10 * last["N"]): "1/(10 N)"}
    for delta in deltas:
        wanted.setdefault(delta, "--delta")
    phases = spent(state)
    print(epsilon_table(phases, wanted))
    for line in risk_words.lines(phases, last["delta"], prior):
        print(line)
    if plot:
        risk_words.write_plot(plot, phases, accounting.epsilon_prv(phases, last["delta"]), last["delta"])
        print(f"plot          {plot}")
    write_card(card_path, ledger, state, report, prior)
    sources = noise_sources(state)
    print(f"noise source  {' and '.join(sorted(sources))}")
    for words in warnings(state):
        print(f"warning       {words}")
    if report is None:
        print(f"{REPORT_NAME}  not there: what else was disclosed is not known")
        return 0
    disclosed = report.get("disclosed")
    for item in (disclosed if isinstance(disclosed, list) else [disclosed]) or ["nothing beside the model"]:
        print(f"disclosed     {item}")
    if isinstance(average := report.get("average"), str):
        print(f"average       {average}, in average.{{step}}.pt: post-processing, covered by the same epsilon")
    different = disagreements(report, state)
    for line in different:
        print(f"DISAGREES     {line}")
    verdict = "does NOT agree with the ledger: believe the ledger" if different else "agrees with the ledger"
    print(f"{REPORT_NAME}  {verdict}")
    return 1 if different else 0


def write_card(path: str | None, ledger: str, state: LedgerState, report: dict | None, prior: float) -> None:
    if path is not None:
        card.write(path, card.collect(ledger, state, report, prior))
        print(f"card          {path}")


def report_many(paths: list[str], deltas: list[float], prior: float) -> int:
    """One statement of several runs."""
    accounts, lines = read_accounts([find_files(path) for path in paths])
    print("\n".join(lines))
    if not accounts:
        print("epsilon       0: nothing was drawn")
        return 0
    composition = compose(accounts)
    for line in describe_composition(composition):
        print(line)
    last = [account.state.records[-1] for account in accounts]
    wanted = {
        min(record["delta"] for record in last): "the smallest of the runs' deltas",
        1 / (10 * max(record["N"] for record in last)): "1/(10 N) of the largest",
    }
    for delta in deltas:
        wanted.setdefault(delta, "--delta")
    for words, phases in composition.statements:
        print(f"epsilon       {words}")
        print(epsilon_table(phases, wanted))
        for line in risk_words.lines(phases, next(iter(wanted)), prior):
            print(line)
    for words in dict.fromkeys(words for account in accounts for words in warnings(account.state)):
        print(f"warning       {words}")
    return 0


# --- a plan ---


def plan(
    N: int,
    batch: int,
    epochs: float,
    sigma: float | None,
    target: float | None,
    advantage: float | None,
    delta: float,
    prior: float,
    plot: str | None,
) -> int:
    """Print what `epochs` epochs cost; draw it where `plot` says. Two of sigma, target and advantage are None."""
    q, steps = batch / N, round(epochs * N / batch)
    if steps < 1:
        fail(f"--plan {N} {batch} {epochs:g}: is no step at all; wanted at least batch / N = {q:.3g} epochs")
    per_epoch, strict = math.ceil(N / batch), 1 / (10 * N)
    uses = math.ceil(steps / per_epoch)
    counts = sorted({max(1, round(steps * share)) for share in (0.001, 0.01, 0.05, *(i / 10 for i in range(1, 11)))})
    targets = sorted({*TARGETS, *([target] if target is not None else [])})
    evaluations = (sigma is None) + 2 + len(counts) + len(FACTORS) + len(targets)
    bar = tqdm(total=evaluations, desc="accounting", leave=False, disable=not sys.stderr.isatty())

    def ticked(value: Any) -> Any:
        bar.update()
        return value

    if target is not None:
        sigma = ticked(choose_sigma(Course(N, batch, steps), delta, target, None))
    if advantage is not None:
        sigma = ticked(choose_sigma(Course(N, batch, steps), delta, None, advantage))
    assert sigma is not None
    phases = [Phase(sigma, q, steps)]
    bound = ticked(accounting.epsilon_bound(phases, delta))

    def prices(noise: float, count: int) -> tuple[float, ...]:
        """PRV, RDP, PRV at 1/(10 N), and shuffled, of `count` steps."""
        drawn = [Phase(noise, q, count)]
        shuffled = accounting.epsilon_shuffle(noise, math.ceil(count / per_epoch), delta)
        return ticked(
            (
                accounting.epsilon_prv(drawn, delta),
                accounting.epsilon_rdp(drawn, delta),
                accounting.epsilon_prv(drawn, strict),
                shuffled,
            )
        )

    by_steps = [(count, *prices(sigma, count)) for count in counts]
    by_sigma = [(sigma * factor, *prices(sigma * factor, steps)) for factor in FACTORS]
    needed = []
    for wanted in targets:
        needed.append(
            ticked(
                (
                    wanted,
                    sigma_or_none(wanted, delta, N, batch, steps, "poisson"),
                    sigma_or_none(wanted, delta, N, batch, steps, "shuffle"),
                )
            )
        )
    allocated = ticked(accounting.epsilon_prv(Course(N, batch, steps, "allocation").phases(sigma), delta))
    bar.close()

    print(f"plan          N {N}, expected batch {batch}, q {q:.8g}, {epochs:g} epochs = {steps} steps")
    for sampling in NAMES["sampling"]:
        print(f"relation      {relation('unit', [sampling])} ({sampling})")
    chosen = "" if target is None else f", the smallest that keeps epsilon within {target:g}"
    if advantage is not None:
        chosen = f", the smallest that keeps the membership advantage within {advantage:g}"
    print(f"sigma         {sigma:.6g}{chosen}")
    even = (batch / sigma) * (batch / sigma)  # not **, which has no infinity
    print(
        f"noise         sigma/batch {sigma / batch:.6g}, in units of C, a coordinate of a step; over d parameters its "
        f"norm is sqrt(d) times that, which reaches C, the most that the signal can have, at d = {even:.6g}"
    )
    deltas = {delta: "--delta", strict: "1/(10 N)"}
    print(epsilon_table(phases, deltas))
    for line in risk_words.lines(phases, delta, prior):
        print(line)
    shuffled = accounting.epsilon_shuffle(sigma, uses, delta)
    print(
        f"shuffled      the same noise, every unit {uses} times: epsilon {shuffled:.4f} at delta {delta:g}, "
        f"not amplified (Poisson {bound.epsilon:.4f})"
    )
    print(
        f"allocated     the same noise, every unit in one step of each epoch at random: epsilon {allocated:.4f} at "
        f"delta {delta:g}"
    )
    header = f"{'PRV':>10} {'RDP':>10} {'PRV 1/(10N)':>12} {'shuffled':>10}"
    print(f"\n{'steps':>10} {'epochs':>8} {header}")
    for count, *values in by_steps:
        print(f"{count:10d} {count * q:8.2f} " + table_values(values))
    print(f"\n{'sigma':>10} {'':8} {header}")
    for other, *values in by_sigma:
        print(f"{other:10.5g} {'':8} " + table_values(values))
    print(f"\n{'epsilon':>10} {'sigma, Poisson':>16} {'sigma, shuffled':>16}   at delta {delta:g}")
    for wanted, *sigmas in needed:
        print(f"{wanted:10.4g} {sigma_text(sigmas[0]):>16} {sigma_text(sigmas[1]):>16}")
    if plot:
        # A shuffled run pays for an epoch when it begins.
        begun = range(0, uses, max(1, uses // 200))
        stairs = [(index * per_epoch, accounting.epsilon_shuffle(sigma, index + 1, delta)) for index in begun]
        stairs.append((steps, shuffled))
        title = f"N = {N}, expected batch {batch}, {epochs:g} epochs"
        draw(plot, by_steps, by_sigma, stairs, sigma, delta, strict, title, phases)
        print(f"\nplot          {plot}")
    return 0


def plan_batches(
    courses: list[Course],
    epochs: float,
    sigma: float | None,
    target: float | None,
    advantage: float | None,
    delta: float,
    plot: str | None,
) -> int:
    """Print the noise of an update for each course, at equal privacy and compute; draw it where `plot` says."""
    N, sampling = courses[0].N, courses[0].sampling
    with tqdm(total=len(courses), desc="accounting", leave=False, disable=not sys.stderr.isatty()) as bar:
        rows = batch_plan.compare(courses, delta, sigma, target, advantage, bar.update)
    if advantage is not None:
        limit = f"membership advantage {advantage:g}"
    else:
        limit = f"epsilon {target or accounting.epsilon_prv(courses[0].phases(rows[0].sigma), delta):.6g} at {delta:g}"
    title = f"N = {N}, {epochs:g} epochs, {sampling} sampling, {limit}"
    print(f"plan          {title}: in each row\n" + "\n".join(batch_plan.lines(rows)))
    if plot:
        draw_batches(plot, rows, title)
        print(f"plot          {plot}")
    return 0


def sigma_or_none(target: float, delta: float, N: int, batch: int, steps: int, sampling: str) -> float | None:
    """choose_sigma, or None where it refuses."""
    try:
        return choose_sigma(Course(N, batch, steps, sampling), delta, target, None)
    except ValueError:
        return None


def sigma_text(sigma: float | None) -> str:
    return "out of range" if sigma is None else f"{sigma:.5g}"


def table_values(values: list[float]) -> str:
    return "{:10.4f} {:10.4f} {:12.4f} {:10.4f}".format(*values)


def main() -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("path", nargs="*", metavar="LEDGER|WORK_DIR|privacy.json", help="whose epsilon to recompute; several: composed")
    add("--delta", type=float, nargs="+", default=[], help="more deltas for a ledger; exactly one for a plan")
    add("--plan", type=float, nargs=3, metavar=("N", "BATCH", "EPOCHS"), help="units, expected batch, epochs to come")
    add("--sigma", type=float, help="plan with this noise multiplier")
    add("--epsilon", type=float, help="plan with the smallest noise multiplier that meets this")
    add("--advantage", type=float, help="plan with the smallest one that keeps the membership advantage within this")
    words = "plan: compare BATCH with these, or larger ones, at equal privacy and EPOCHS, by the noise of an update"
    add("--batches", type=int, nargs="*", metavar="B", help=words)
    add("--sampling", choices=NAMES["sampling"], help="of --batches (default poisson)")
    add("--prior", type=float, default=PRIOR, help="share of members before the attack, for a guess (default 0.5)")
    add("--plot", metavar="FILE.png", help="write the curves there: of an attacker, and of a plan's epsilon")
    add("--card", metavar="FILE.md|FILE.html", help="ledger: write a page on what is promised, for others to read")
    args = parser.parse_args()
    for delta in args.delta:
        if not 0 < delta < 1:
            fail(f"--delta {delta:g}: wanted a number above 0 and below 1, such as 1e-5")
    try:
        check_prior(args.prior)
        if args.advantage is not None:
            check_advantage(args.advantage)
    except UserError as mistake:
        fail(f"--{str(mistake).removeprefix('target ')}")
    if args.plot is not None:
        if not args.plot.endswith(".png"):
            fail(f"--plot {args.plot}: wanted a name that ends in .png")
        folder = os.path.dirname(args.plot) or "."
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            fail(f"--plot {args.plot}: {folder} is no folder that can be written to; make it first")
    if args.card is not None:
        card.check_path(args.card)
    if bool(args.path) == (args.plan is not None):
        fail("wanted either a ledger, training folder or privacy.json, or --plan N BATCH EPOCHS; see --help")
    if args.plan is None:
        for flag in ("sigma", "epsilon", "advantage", "batches", "sampling"):
            if getattr(args, flag) is not None:
                fail(f"--{flag}: goes with --plan N BATCH EPOCHS alone; a ledger has its own noise")
        if len(args.path) == 1:
            return report_ledger(args.path[0], args.delta, args.prior, args.plot, args.card)
        for flag in ("plot", "card"):
            if getattr(args, flag) is not None:
                fail(f"--{flag} {getattr(args, flag)}: goes with one ledger alone, and {len(args.path)} are given")
        return report_many(args.path, args.delta, args.prior)
    if args.card is not None:
        fail(f"--card {args.card}: goes with a ledger alone; a plan has promised nothing yet")

    N, batch, epochs = args.plan
    if not all(math.isfinite(value) and value > 0 for value in args.plan):
        fail(f"--plan {N:g} {batch:g} {epochs:g}: wanted three numbers above 0")
    if epochs * N / batch > 1e9:
        fail(f"--plan {N:g} {batch:g} {epochs:g}: more than 1e+09 steps; lower EPOCHS")
    if N > accounting.MOST_STEPS:
        fail(f"--plan {N:g} {batch:g} {epochs:g}: more than {accounting.MOST_STEPS:g} units; lower N")
    if N != int(N) or batch != int(batch):
        fail(f"--plan {N:g} {batch:g} {epochs:g}: N and BATCH count units, wanted whole numbers")
    if batch > N:
        fail(f"--plan {N:g} {batch:g} {epochs:g}: the batch is larger than the data; lower BATCH")
    if [args.sigma, args.epsilon, args.advantage].count(None) != 2:
        fail(
            "--plan: wanted exactly one of --sigma (what does it cost?), --epsilon and --advantage (what noise does it "
            "take?)"
        )
    if args.sigma is not None and not (0 < args.sigma < math.inf):
        fail(f"--sigma {args.sigma:g}: wanted a number above 0; without noise epsilon is infinite")
    if args.epsilon is not None and not (0 < args.epsilon < math.inf):
        fail(f"--epsilon {args.epsilon:g}: wanted a number above 0")
    if len(args.delta) != 1:
        fail(f"--delta: a plan wants exactly one, got {len(args.delta)}; 1/(10 N) is added by itself")
    noise = (args.sigma, args.epsilon, args.advantage)
    if args.batches is not None:
        courses = batch_plan.courses(int(N), int(batch), args.batches, epochs, args.sampling or "poisson")
        return plan_batches(courses, epochs, *noise, args.delta[0], args.plot)
    if args.sampling is not None:
        fail(f"--sampling {args.sampling}: goes with --batches alone; a plan of one batch prices every sampling")
    return plan(int(N), int(batch), epochs, *noise, args.delta[0], args.prior, args.plot)


if __name__ == "__main__":
    run_main(main)
