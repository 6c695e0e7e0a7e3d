"""A privacy card: what one run's training promises, for two audiences, in the terms of NIST SP 800-226.

`collect` takes every figure from the ledger; a privacy.json and an args.json beside it add what the ledger does not
know. `as_markdown` and `as_html` write it. A card names no folder of this machine.
"""

import hashlib
import html
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from base.errors import fail
from base.files import atomic_write
from base.markdown import markdown
from privacy import accounting, attack_risk
from privacy.allocation import AnyPhase
from privacy.attack_risk import ADDED, REMOVED, permitted_by_epsilon
from privacy.ledger import LABEL_COUNTS, LedgerState, noise_sources
from privacy.plan import relation, spent, warnings
from run.log import read_args
from run.risk_words import exact_percent, percent, up

SUFFIXES = (".md", ".html")
TITLE = "Differential privacy"
MECHANISMS = {
    "gaussian": "Gaussian: noise on the sum of the clipped gradients of a step (DP-SGD), sigma times C",
    LABEL_COUNTS: "Gaussian, once: noise on the histogram of the public labels, to which each unit adds at most 1",
}
SAMPLERS = {
    "poisson": "Poisson: each unit in each step with probability q, independently; who took part is secret",
    "allocation": "random allocation: each unit in one step of each epoch, uniform and independent; who took part "
    "is secret",
    "shuffle": "shuffling: each unit once an epoch, in a fresh order; no amplification is claimed",
}
SEEDS = {
    "os": "noise and sampling from a statistical generator, seeded anew by the operating system; no seed is kept",
    "secure": "noise and sampling from a cryptographic stream (AES-256), keyed by the operating system; no key is kept",
    "seeded": "noise and sampling from a seed that someone knows: NO PRIVACY against anyone who knows it",
}
NOT_COVERED = (
    "other files of the run (logs, losses, times), and whatever else was told of the data",
    "validation and held-out data, the vocabulary, and the data of the initial weights",
    "the choice among several runs or settings by their results, and other models of the same data: epsilons add up",
    "what many units say together: the model may state it, although each of them is protected",
    "a person behind several units: k units have k times epsilon, and more delta",
    "side channels (time, memory), attacks on floating-point noise, and whoever could read the data or the noise",
)
NO_CLAIM = (
    "Nothing is claimed. No ledger of a private training of these weights is known, so nothing is said here of how "
    "well they protect the data that they were trained on. Take the model for one without differential privacy."
)
UNCHECKED = "privacy.json says what an earlier run reported; without the run's ledger none of it can be checked."


@dataclass(frozen=True)
class Card:
    """plain: sentences for everybody. rows: (term, what holds). curve: (false-positive rate, the largest true-positive
    rate of the worse direction, of `removed`, of `added`, what epsilon alone would permit)."""

    plain: list[str]
    rows: list[tuple[str, str]] = field(default_factory=list)
    curve: list[tuple[float, ...]] = field(default_factory=list)
    phases: tuple[AnyPhase, ...] = ()
    epsilon: float = 0.0
    delta: float = 0.0


def check_path(path: str, flag: str = "--card") -> None:
    """UserError unless a card can be written there: its suffix, its folder, and no file that would be lost."""
    if not path.endswith(SUFFIXES):
        fail(f"{flag} {path}: wanted a name that ends in {' or '.join(SUFFIXES)}")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        fail(f"{flag} {path}: {folder} is no folder that can be written to; make it first")
    if os.path.lexists(path):
        fail(f"{flag} {path}: is there already, and is not overwritten; name another file, or remove it")


def write(path: str, card: Card) -> None:
    """Write the card: HTML or Markdown by its suffix."""
    with atomic_write(path) as handle:
        handle.write(as_html(card) if path.endswith(".html") else as_markdown(card))


def versions_beside(ledger: str) -> dict:
    """The versions in the args.json beside a ledger; {} where there is none."""
    found = read_args(os.path.dirname(ledger)).get("versions")
    return found if isinstance(found, dict) else {}


def collect(ledger: str, state: LedgerState, report: dict | None, prior: float = attack_risk.PRIOR) -> Card:
    """The card of a ledger that was read and checked. report: of its privacy.json, or None."""
    if not state.records:
        return Card([NO_CLAIM])
    last, phases = state.records[-1], spent(state)
    unit, delta, strict = last["unit"], last["delta"], 1 / (10 * last["N"])
    bound, strict_bound = (accounting.epsilon_bound(phases, at) for at in (delta, strict))
    found = attack_risk.figures(phases, delta, prior)
    samplings = sorted({record["sampling"] for record in state.records})
    sources = sorted(noise_sources(state))
    with open(ledger, "rb") as handle:
        digest = hashlib.sha256(handle.read()).hexdigest()
    rows = [
        ("Privacy unit", f"one {unit}; N = {last['N']} units, a public constant"),
        ("Neighbouring relation", relation(unit, samplings)),
        ("Variant", "approximate differential privacy, (epsilon, delta)"),
        ("Privacy loss budget", f"epsilon {bound.epsilon:.4f} at delta {delta:.6g}, the run's (upper bound)"),
        ("", f"epsilon {strict_bound.epsilon:.4f} at delta {strict:.6g} = 1/(10 N) (upper bound)"),
        (
            "Privacy loss accounting",
            f"{state.charged} steps charged in {state.attempts} attempt(s), repeated steps "
            "included; all of them composed",
        ),
        *(("Mechanism", MECHANISMS[name]) for name in sorted({record["mechanism"] for record in state.records})),
        *(("Sampling", SAMPLERS[name]) for name in samplings),
        *(("Parameters", line) for line in parameters(state)),
        ("Trust model", "central: who trained the model held the data; it protects against all who see the model only"),
        *(("Seeds", SEEDS[name]) for name in sources),
    ]
    rows += [
        (f"Attack, {exact_percent(rate)} false positives", f"at most {percent(worst)} of the members found")
        for rate, worst in found["tpr"].items()
    ]
    rows += [
        ("Membership advantage", f"at most {up(found['advantage'])} (true-positive less false-positive rate)"),
        (
            f"Guess, prior {prior:g}",
            f"right at most {percent(found['guess'])} of the time; without the model {percent(max(prior, 1 - prior))}",
        ),
        (
            f"Posterior, prior {prior:g}",
            f"at most {up(found['posterior'])}, but for an event of probability {delta:.3g}",
        ),
        *(
            (f"Reconstruction, {exact_percent(chance)} without the model", f"at most {percent(most)} with it")
            for chance, most in found["reconstruction"].items()
        ),
        *(("Warning", words) for words in warnings(state)),
        *(("Not covered", words) for words in NOT_COVERED),
        *beside(report),
        ("Versions", ", ".join(f"{name} {value}" for name, value in versions_beside(ledger).items()) or "not recorded"),
        (
            "Ledger digest",
            f"SHA-256 {digest} of {len(state.records)} records; checksum of the last {state.last_checksum}",
        ),
        ("Terms", "as in NIST SP 800-226, Guidelines for Evaluating Differential Privacy Guarantees"),
    ]
    risk, rates = attack_risk.attack_risk(phases), np.array(attack_risk.CURVE)
    curve = np.stack(
        [
            rates,
            risk.power(rates),
            risk.power(rates, REMOVED),
            risk.power(rates, ADDED),
            permitted_by_epsilon(bound.epsilon, delta, rates),
        ]
    )
    return Card(
        in_plain_words(last["N"], unit, prior, found, sources, bound.epsilon),
        rows,
        [tuple(map(float, point)) for point in curve.T],
        tuple(phases),
        bound.epsilon,
        delta,
    )


def parameters(state: LedgerState) -> list[str]:
    """The settings that were charged, each with its steps."""
    keys = ("mechanism", "q", "sigma", "clip", "N")
    groups = Counter(tuple(record[key] for key in keys) for record in state.charges)
    kinds = {LABEL_COUNTS: "histograms of labels"}
    return [
        f"{count} {kinds.get(mechanism, 'steps')} with q {q:.8g} (expected batch {q * N:.6g}), sigma {sigma:g}, "
        f"C {clip:g}"
        for (mechanism, q, sigma, clip, N), count in groups.items()
    ]


def in_plain_words(N: int, unit: str, prior: float, found: dict, sources: list[str], epsilon: float) -> list[str]:
    if epsilon == math.inf:
        return [
            "Nothing is claimed: steps of this training had no noise, and the model may show what it was trained on."
        ]
    one = percent(found["tpr"]["0.01"])
    words = [
        f"The model was trained on {N} {unit}s, each of which is protected by differential privacy.",
        f"Suppose that an attacker tries to find out which {unit}s were used, and knows everything else. An attack "
        f"that wrongly names 1 % of the {unit}s that were not used finds at most {one} of those that were; by chance "
        "it would be 1 %.",
        f"Where {unit}s were used with a probability of {prior:g}, the best guess is right at most "
        f"{percent(found['guess'])} of the time; without the model it is right {percent(max(prior, 1 - prior))} of it.",
        f"This holds for every method, known or not, and for each single {unit}. It says nothing of what many of them "
        "have in common, nor of other models of the same data.",
    ]
    if "seeded" in sources:
        words.append("It does NOT hold against anyone who knows the seed of the noise.")
    return words


def beside(report: dict | None) -> list[tuple[str, str]]:
    """What privacy.json adds: earlier runs, and what was disclosed without noise."""
    if report is None:
        return [("Disclosed beside the model", "not known: there is no privacy.json beside the ledger")]
    before = report.get("initial_weights")
    rows = [
        (
            "Initial weights",
            f"of an earlier run, with {account.get('steps_charged')} steps: epsilon {account.get('epsilon_prv')} at "
            f"delta {account.get('delta')} for one {account.get('unit')}; not counted here, it adds up where the data "
            "are the same",
        )
        for account in (before if isinstance(before, list) else [])
        if isinstance(account, dict)
    ]
    if isinstance(average := report.get("average"), str):
        rows.append(
            (
                "Average of iterates",
                f"{average}, in average.{{step}}.pt: computed from the released gradients alone (post-processing), and "
                "covered by the same epsilon",
            )
        )
    disclosed, public = report.get("disclosed"), report.get("public_fields")
    rows += [
        ("Public context", f"the field {name}: taken for public, not scored")
        for name in (public if isinstance(public, list) else [])
    ]
    return rows + [
        ("Disclosed beside the model", str(item))
        for item in (disclosed if isinstance(disclosed, list) else [])
        if not str(item).startswith("initial weights of ")  # names its folder; said above
    ]


# --- forms ---


def shown(point: tuple[float, ...]) -> list[str]:
    """The cells of a line of the curve."""
    rate, worst, removed, added, permitted = point
    return [exact_percent(rate), *(percent(value) for value in (worst, removed, added, permitted))]


HEAD = ("false positives", "members found, at most", "unit removed", "unit added", "epsilon alone would permit")


def escaped(text: str) -> str:
    """For a cell of Markdown."""
    return re.sub(r"([\\`|<>*_\[\]])", r"\\\1", " ".join(text.split()))


def as_markdown(card: Card, level: int = 1) -> str:
    """The card, its title a heading of `level`."""
    parts = [f"{'#' * level} {TITLE}\n", "\n".join(map(escaped, card.plain)) + "\n"]
    if card.rows:
        parts.append(markdown(("", "what holds"), [(escaped(term), escaped(words)) for term, words in card.rows]))
        parts.append("How much any attack can find out (upper bounds):\n")
        parts.append(markdown(HEAD, [shown(point) for point in card.curve]))
    return "\n".join(parts)


STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;vertical-align:top}"
    "svg{max-width:100%;height:auto}"
)


def as_html(card: Card) -> str:
    """A page that needs no other file, no network and no script."""

    def table(lines: list[list[str]], head: tuple[str, ...] = ()) -> str:
        cells = [("th", list(head))] * bool(head) + [("td", line) for line in lines]
        return (
            "<table>\n"
            + "".join(
                "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in line) + "</tr>\n"
                for kind, line in cells
            )
            + "</table>\n"
        )

    body = f"<h1>{TITLE}</h1>\n<p>{html.escape(' '.join(card.plain))}</p>\n"
    if card.rows:
        body += table([list(row) for row in card.rows])
        body += "<h2>How much any attack can find out</h2>\n" + svg(card) + table(list(map(shown, card.curve)), HEAD)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{TITLE}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def svg(card: Card, size: int = 360, margin: int = 50) -> str:
    """The curve as inline SVG, beside what epsilon alone would permit and beside guessing. size, margin: pixels."""
    rates = np.concatenate([np.geomspace(1e-5, 0.01, 40), np.linspace(0.01, 1, 100)[1:]])

    def line(values: np.ndarray, style: str) -> str:
        places = " ".join(
            f"{margin + x * size:.1f},{margin + (1 - y) * size:.1f}" for x, y in zip(rates, values, strict=True)
        )
        return f'<polyline points="{places}" fill="none" {style}/>\n'

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x:g}" y="{y:g}" font-size="13" {more}>{html.escape(words)}</text>\n'

    permitted = permitted_by_epsilon(card.epsilon, card.delta, rates)
    end, low = margin + size, 2 * margin + size
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size + 240} {low}" width="{size + 240}" role="img" '
        'aria-label="the largest true-positive rate at each false-positive rate">\n'
        f'<rect x="{margin}" y="{margin}" width="{size}" height="{size}" fill="none" stroke="#888"/>\n'
        + line(rates, 'stroke="#888"')
        + line(permitted, 'stroke="#c33" stroke-dasharray="6 4"')
        + line(attack_risk.attack_risk(card.phases).power(rates), 'stroke="#06c" stroke-width="2"')
        + text(margin + size / 2, low - 8, "false-positive rate, from 0 to 1", 'text-anchor="middle"')
        + text(0, 0, "true-positive rate, from 0 to 1", f'transform="translate(30 {end}) rotate(-90)"')
        + text(end + 12, margin + 20, "any attack, at most", 'fill="#06c"')
        + text(end + 12, margin + 42, f"epsilon {card.epsilon:.3g} alone", 'fill="#c33"')
        + text(end + 12, margin + 64, "guessing", 'fill="#666"')
        + "</svg>\n"
    )
