"""How many samples of each mix of public fields generate.py draws: by a table that is given, or by the labels of the
private data, counted with noise that the run's ledger pays for.

A table has a line of JSON a mix: {"stars": 5, "category": "books", "count": 20}, or with "weight" in place of "count".
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from base.errors import fail
from base.files import atomic_write, decode_line, read_lines, read_object
from corpus.records import PSEUDO_AUTHORS, Source, field_values, read_record, split_fields, with_form
from privacy import accounting, attack_risk
from privacy.label_counts import CLIP, NOISE_SOURCE, noisy_counts, totals
from privacy.ledger import FILE_NAME, LABEL_COUNTS, MUST_MATCH, Ledger, read_ledger
from privacy.plan import relation, spent
from privacy.sampled_gaussian import Phase
from run.log import read_args
from run.provenance import REPORT_NAME, by_ledger

PRIVATE = "private"
LARGEST = 10**15  # count or weight of a mix; sums of them are exact enough
Mix = tuple[str, ...]  # a value for each field


@dataclass(frozen=True)
class Private:
    """What a histogram of private labels needs. target: the epsilon that training and histogram may cost together;
    None: what the run was given."""

    folder: str
    train_file: str
    domain: str
    sigma: float
    target: float | None


def read_table(path: str, flag: str, names: Sequence[str], amounts: bool) -> tuple[list[Mix], list[float], bool]:
    """(mixes, their counts or weights, whether these are counts) of a table. amounts: False for a mere list of mixes,
    all of weight 1."""
    mixes: dict[Mix, float] = {}
    kinds: set[str] = set()
    for number, line in read_lines(path, flag):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            fail(f"{where}: wanted an object with {', '.join(names)}{' and a count' if amounts else ''}")
        mix = field_values(record, names, where)
        if mix in mixes:
            fail(f"{where}: {' | '.join(mix)} stands in an earlier line; give each mix once")
        kind = [key for key in ("count", "weight") if key in record and key not in names]
        if (len(kind) == 1) != amounts:
            wanted = "one of 'count' and 'weight'" if amounts else "no count: the domain is a public list"
            fail(f"{where}: got {line[:60]!r}; wanted {wanted}")
        if extra := sorted(record.keys() - {*names, *kind}):
            fail(f"{where}: {extra[0]!r} is none of the --prompt_fields {','.join(names)}; remove it, or name it there")
        value = record[kind[0]] if amounts else 1
        allowed = (int,) if kind == ["count"] else (int, float)
        if type(value) not in allowed or not 0 <= value <= LARGEST:
            wanted = "a whole number" if allowed == (int,) else "a number"
            fail(f"{where}: {kind[0]} is {json.dumps(value)[:40]}, wanted {wanted} from 0 to {LARGEST:.0e}")
        mixes[mix] = float(value)
        kinds.update(kind)
    if len(kinds) > 1:
        fail(f"{flag} {path}: has counts and weights; give one of them")
    if not sum(mixes.values()):
        fail(f"{flag} {path}: names no mix that is to be drawn; wanted a line a mix")
    return list(mixes), list(mixes.values()), kinds == {"count"}


def positive_part(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Weights without the negative ones, which are 0; all are 1 where none is positive."""
    kept = np.clip(np.asarray(weights, np.float64), 0.0, None)
    return kept if kept.any() else np.ones(len(kept))


def shared_out(weights: Sequence[float], total: int) -> list[int]:
    """`total` samples shared out by positive_part() of the weights, by largest remainder."""
    share = positive_part(weights)
    exact = share / share.sum() * total
    counts = np.floor(exact).astype(int)
    for place in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[place] += 1
    return counts.tolist()


# ------------------------------------------------------------------ counted from private data


def private_weights(
    private: Private, names: Sequence[str], output: str, resume: bool, check: Callable[[list[Mix]], object]
) -> tuple[list[Mix], list[float]]:
    """(mixes, positive_part() of their noisy counts). The charge is in the run's ledger, on disk, before the noise is
    drawn. check: raises UserError for mixes that cannot be drawn, before the charge.

    They are written to `output` before anything uses them; `resume` takes them from there. A kill between the charge
    and the file costs the charge: the next call charges again.
    """
    if os.path.exists(output):
        if not resume:
            fail(
                f"--label_counts private: {output} holds labels that were drawn and paid for; give it as "
                "--label_counts, or remove it to pay again"
            )
        mixes, weights, _ = read_table(output, "--label_counts", names, True)
        return mixes, weights
    if resume:
        fail(f"--resume: nothing to resume, there is no {output}; leave --resume out")
    mixes, _, _ = read_table(private.domain, "--label_domain", names, False)
    check(mixes)
    args = checked_args(private, names)
    total = count(private, args, names, mixes)
    path = os.path.join(private.folder, FILE_NAME)
    ledger = charged(path, private, args)
    try:
        weights = positive_part(noisy_counts(total, private.sigma)).tolist()
    finally:
        ledger.close()
    with atomic_write(output) as out:  # a table that read_table() takes
        for mix, value in zip(mixes, weights, strict=True):
            out.write(json.dumps({**dict(zip(names, mix, strict=True)), "weight": value}) + "\n")
    update_report(private.folder, path)
    return mixes, weights


def checked_args(private: Private, names: Sequence[str]) -> dict:
    """The args.json of the run. UserError where the histogram would not be of that run's data and fields, or would pass
    by its budget file."""
    args, folder = read_args(private.folder), private.folder
    if not os.path.exists(os.path.join(folder, FILE_NAME)) or not args:
        fail(
            f"--label_counts private: {folder} is no folder of a private training (its args.json and {FILE_NAME} pay "
            "for the labels); give the run's folder as --init_checkpoint"
        )
    fields = args.get("prompt_fields")
    if not isinstance(fields, str) or split_fields(fields) != tuple(names):
        fail(f"--label_counts private: {folder} was trained with --prompt_fields {fields}, not {','.join(names)}")
    if args.get("reservation") or args.get("budget"):
        fail(
            f"--label_counts private: the run in {folder} has a share of the budget file {args.get('budget')}, which "
            "does not hold the labels' price; give a table of your own, or train without --budget"
        )
    with open_binary(private.train_file) as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != args.get("train_sha256"):
        fail(
            f"--train_file {private.train_file}: is not the file that {folder} was trained on (sha256 {digest[:12]}, "
            f"there {str(args.get('train_sha256'))[:12]}); give that one"
        )
    return args


def open_binary(path: str):
    try:
        return open(path, "rb")
    except OSError as error:
        fail(f"--train_file {path}: cannot be read ({error.strerror})")


def count(private: Private, args: dict, names: Sequence[str], mixes: Sequence[Mix]) -> np.ndarray:
    """totals() of the training file. A text with a mix outside the domain counts nowhere, and nobody is told."""
    source = Source(
        private.train_file,
        "--train_file",
        vocab="",
        length=2,
        author_field=args["author_field"],
        content_field=args["content_field"],
        unit_field=args["unit_field"],
        prompt_fields=tuple(names),
    )
    source, cell = with_form(source), {mix: place for place, mix in enumerate(mixes)}
    labels = []
    with open_binary(private.train_file) as handle:
        for number, line in enumerate(handle, start=1):
            where = f"{private.train_file}:{number}"
            record = read_record(decode_line(line, private.train_file, number), source, where)
            if record.unit is None or (source.unit_field is None and record.unit in PSEUDO_AUTHORS):
                continue
            unit = number if source.owner_field is None else record.unit
            if record.fields in cell:
                labels.append((unit, cell[record.fields]))
    return totals(labels, len(mixes))


def charged(path: str, private: Private, args: dict) -> Ledger:
    """The run's ledger, open, with the histogram's record on disk. UserError where it passes the budget, where the
    run's epsilon says nothing, and where another process writes there."""
    state = read_ledger(path)
    if not state.records:
        fail(f"--label_counts private: {path} holds no step; train first")
    last = state.last_step
    sampling = "shuffle" if last["sampling"] == "shuffle" else "poisson"
    samplings = {record["sampling"] for record in state.records}
    if relation(last["unit"], samplings) != relation(last["unit"], {sampling}):
        fail(f"--label_counts private: {path} holds samplers of two relations, and no epsilon holds for both")
    delta, target = last["delta"], private.target
    if target is None:
        target = args.get("target_epsilon")
    phases = [*spent(state), Phase(private.sigma, 1.0, 1)]
    before, after = (accounting.epsilon_prv(some, delta) for some in (phases[:-1], phases))
    if not math.isfinite(before):
        fail(f"--label_counts private: {path} charges steps without noise; such a run has no budget to draw from")
    if target is None or after > target:
        limit = "the run has no --target_epsilon" if target is None else f"that is beyond {target:g}"
        fail(
            f"--label_noise_multiplier {private.sigma:g}: brings epsilon from {before:.4f} to {after:.4f} at delta "
            f"{delta:g}, and {limit}; give more noise, or the epsilon that both may cost as --target_epsilon"
        )
    settings = {
        **{key: last[key] for key in MUST_MATCH},
        "mechanism": LABEL_COUNTS,
        "sampling": sampling,
        "q": 1.0,
        "sigma": float(private.sigma),
        "clip": CLIP,
        "steps_per_epoch": 1,
        "world_size": 1,
        "noise_source": NOISE_SOURCE,
    }
    ledger = Ledger(private.folder, settings, resume=True, changed=MUST_MATCH, flag="--init_checkpoint")
    if ledger.state.last_checksum != state.last_checksum:  # a step was charged between the reading and the lock
        ledger.close()
        fail(f"--label_counts private: {path} has changed; start again when nothing writes there")
    ledger.charge(last["step"])
    print(
        f"labels        drawn with noise {private.sigma:g}: epsilon {before:.4f} becomes {after:.4f} at delta {delta:g}"
    )
    return ledger


def update_report(folder: str, ledger: str) -> None:
    """Write what the ledger now says into privacy.json, where there is one."""
    path = os.path.join(folder, REPORT_NAME)
    if not os.path.exists(path):
        return
    report, state = read_object(path, "what the run wrote; restore it"), read_ledger(ledger)
    with atomic_write(path) as out:
        risk = report.get("attack_risk")
        if isinstance(risk, dict) and isinstance(prior := risk.get("prior"), float):
            report["attack_risk"] = attack_risk.figures(spent(state), state.last_step["delta"], prior)
        json.dump({**report, **by_ledger(report, state)}, out, indent=1)
        out.write("\n")
