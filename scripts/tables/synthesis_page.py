"""The page of scripts/synthesize.sh: one HTML file that needs no other and no network."""

import base64
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from base.files import atomic_write, read_object
from plot_run import draw, read_delta, read_metrics
from synthesis_table import NO_PRIVACY, PRIVATE, TITLES, WRITTEN, lines_of

NAMES = {PRIVATE: "with privacy", NO_PRIVACY: "without privacy"}
COLOURS = {PRIVATE: "C0", NO_PRIVACY: "C3"}
MARK = "not covered by epsilon; not to be let out"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 1em; color: #222 }
h1 { font-size: 1.6em } h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; font-size: 0.87em } .wide { overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: 0.25em 0.7em; border-bottom: 1px solid #e2e2e2 }
th { background: #f5f5f5 } .mark { color: #a00 } .quiet { color: #666 }
.banner { background: #fdecea; border-left: 5px solid #a00; padding: 0.6em 1em; margin: 1em 0 }
.promise { background: #eaf3fd; border-left: 5px solid #1463a5; padding: 0.6em 1em; margin: 1em 0 }
.texts { table-layout: fixed; width: 100% } .texts td { overflow-wrap: anywhere }
mark { background: #ffe08a } img { max-width: 100%; height: auto } summary { cursor: pointer; font-weight: bold }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd } th { background: #262626 } td, th { border-color: #3a3a3a }
  .banner { background: #3a1d1b } .promise { background: #16293a } .mark { color: #f88 } mark { background: #7a6200;
  color: #fff } .quiet { color: #aaa } img { background: #fff } }
"""


def escape(text: object) -> str:
    """A text as HTML shows it; characters that no HTML file may hold become U+FFFD."""
    shown = "".join(letter if letter >= " " or letter in "\n\t" else "\ufffd" for letter in str(text))
    return html.escape(shown)


def table(head: Sequence[str], lines: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already."""
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>\n" for line in lines)
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table class="{kind}">\n<tr>{heads}</tr>\n{rows}</table></div>\n'


def picture(figure: Any, words: str) -> str:
    """A figure inside the page. words: what it shows, for those who cannot see it."""
    with io.BytesIO() as out:
        figure.savefig(out, format="png", dpi=110)
        plt.close(figure)
        data = base64.b64encode(out.getvalue()).decode()
    return f'<p><img alt="{escape(words)}" src="data:image/png;base64,{data}"></p>\n'


def draw_leaks(judged: Mapping[str, dict], bounds: Mapping[str, float]) -> Any:
    """ROC curves of membership inference, and the exposure of planted secrets. bounds: false-positive rate -> the
    largest true-positive rate that the private run's ledger permits."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for name, found in judged.items():
        for attack, style in (("loss", ":"), ("reference", "-")):
            curve = found["membership"].get(attack, {}).get("curve")
            if curve:
                left.plot(
                    curve["false"], curve["true"], style, color=COLOURS[name], label=f"{NAMES[name]}, by {attack}"
                )
    grid = np.geomspace(1e-3, 1, 50)
    left.plot(grid, grid, color="0.7", linewidth=1, label="a guess")
    permitted = sorted((float(rate), most) for rate, most in bounds.items())
    left.plot(*zip(*permitted, strict=True), "k--", linewidth=1, label="with privacy at most, by the ledger")
    left.set(
        xscale="log",
        yscale="log",
        xlim=(1e-3, 1),
        ylim=(1e-3, 1.1),
        title="membership inference",
        xlabel="false-positive rate",
        ylabel="true-positive rate",
    )
    left.legend(fontsize=8)
    places: list[int] = []
    labels: list[str] = []
    for name, found in judged.items():
        for kind, groups in found.get("secrets", {}).items():
            for group, marker in (("planted", "o"), ("not planted", "x")):
                if group in groups:
                    one, place = groups[group], len(places)
                    exposure = [math.log2(one["rivals"] + 1) - math.log2(rank) for rank in one["ranks"]]
                    spread = np.linspace(-0.25, 0.25, len(exposure)) if len(exposure) > 1 else [0.0]
                    right.plot([place + by for by in spread], exposure, marker, color=COLOURS[name], markersize=5)
                    places.append(place)
                    labels.append(f"{NAMES[name]}\n{kind}\n{group}")
    right.set_xticks(places, labels, fontsize=7, rotation=60)
    right.set(title="exposure of secrets [bits]", ylim=(-0.3, None))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def promise(report: Mapping[str, Any]) -> str:
    """What epsilon is, and what it covers."""
    epsilon, delta = float(report["epsilon_prv"]), float(report["delta"])
    unit = escape(report["unit"])
    return (
        f'<div class="promise"><b>epsilon &le; {epsilon:.4f}</b> at delta {delta:.3g} for one {unit} of '
        f"{report['N']} ({escape(report['relation'])}).<br>"
        f"<b>Covered:</b> the model <i>{NAMES[PRIVATE]}</i>, and with it everything that is computed from it alone and "
        "from public contexts: its samples, and the small model that was trained on them.<br>"
        "<b>Not covered:</b> a person with several lines (k lines have k times epsilon); validation, test and held-out "
        "text; the choice of settings by their results; the model <i>without privacy</i>; and every figure and text on "
        "this page that reads the private text.</div>\n"
    )


def side_by_side(example: Mapping[str, Any]) -> list[str]:
    begin, end = example["marked"]
    text = example["sample"]
    shown = f"{escape(text[:begin])}<mark>{escape(text[begin:end])}</mark>{escape(text[end:])}"
    facts = f"{example['likeness']:.2f}, {example['span']} words<br><span class='quiet'>{escape(example['why'])}</span>"
    return [shown, escape(example["nearest"]), facts]


def figures(judged: Mapping[str, dict]) -> str:
    """Every figure of both judgements."""
    pairs = zip(*(found["table"] for found in judged.values()), strict=True)
    lines = [
        [
            escape(first["figure"]),
            *(escape(one["value"]) for one in (first, *others)),
            escape(
                first["yardstick"]
                if len({one["yardstick"] for one in (first, *others)}) == 1
                else " / ".join(one["yardstick"] for one in (first, *others))
            ),
            f'<span class="mark">{escape(first["mark"])}</span>',
        ]
        for first, *others in pairs
    ]
    heads = ["figure", *(NAMES[name] for name in judged), "without a leak", "mark"]
    return table(heads, lines)


def write_page(path: str, runs: str, rows: list[dict]) -> None:
    """Write the page of a finished folder of scripts/synthesize.sh."""
    folders = {name: os.path.join(runs, name) for name in (PRIVATE, NO_PRIVACY)}
    judged = {name: read_object(os.path.join(folder, "judgement.json"), WRITTEN) for name, folder in folders.items()}
    report = read_object(os.path.join(folders[PRIVATE], "privacy.json"), WRITTEN)
    secrets = read_object(os.path.join(runs, "planted", "secrets.json"), WRITTEN)["secrets"]
    lines = lines_of(rows)
    heads = [head for head in lines[0] if any(line[head] for line in lines)]
    training = draw(
        {NAMES[name]: read_metrics(folder) for name, folder in folders.items()}, {read_delta(folders[PRIVATE])}, "epoch"
    )
    parts = [
        "<h1>Synthetic text, and what it gives away</h1>\n",
        f'<div class="banner">This page shows private text and figures of it: <b>{MARK}</b>.</div>\n',
        promise(report),
        "<h2>What the samples are worth, and what they and their model leak</h2>\n",
        table(heads, [[escape(line[head]) for head in heads] for line in lines]),
        "<p>A small model was trained on each text in equally many steps, and tested on real text that no training "
        "saw. In brackets: the same figure of what was not trained on (secrets that were not planted, held-out "
        f'texts). <span class="mark">All but epsilon and seconds: {MARK}.</span></p>\n',
        "<h2>Plots</h2>\n",
        picture(training, "training and validation loss, epsilon and gradient norms of both trainings"),
        picture(
            draw_leaks(judged, report["attack_risk"]["curve"]),
            "ROC curves of membership inference, and the exposure of secrets",
        ),
        "<h2>Samples beside their nearest private text</h2>\n",
        "<p>Likeness is the Jaccard index of word triples, from 0 to 1. The longest span that the sample shares with "
        "any private text is marked. Templates of a domain are shared without any leak: compare both models.</p>\n",
    ]
    for name, found in judged.items():
        opened = " open" if name == PRIVATE else ""
        parts += [
            f"<details{opened}><summary>{escape(TITLES[name])}</summary>\n",
            table(
                ["sample", "nearest private text", "likeness, span"],
                list(map(side_by_side, found["examples"])),
                "texts",
            ),
            "</details>\n",
        ]
    parts += [
        "<h2>Planted secrets</h2>\n",
        table(
            ["secret", "of", "planted"],
            [[escape(one["text"]), escape(one["kind"]), "yes" if one["planted"] else "no"] for one in secrets],
        ),
        "<h2>Every figure</h2>\n",
        figures(judged),
    ]
    with atomic_write(path) as out:
        out.write(
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n<title>Synthetic text</title>\n'
            f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style></head>\n<body>\n'
        )
        out.writelines(parts)
        out.write("</body></html>\n")
