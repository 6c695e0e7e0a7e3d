"""Judge synthetic texts: how like real text they are, and what they and their model give away of the private text.

    python eval/synthetic/judge_samples.py --samples samples.jsonl --private train_texts.jsonl \
        --held_out held_out_texts.jsonl --json judgement.json
    ... --losses losses.json --reference reference.json --secrets secrets.json --searched predict.jsonl

--samples is what src/generate.py writes. --private are the texts that were trained on, --held_out texts from the same
source that were not: a line a text, or JSON lines with text, completion or content. --losses and --reference are what
src/text_losses.py writes of the token files train.jsonl, held_out.jsonl and candidates.jsonl: of the model, and of one
that never saw them. --secrets is what src/plant_secrets.py planted, --searched what src/gpt2_beam.py finds behind its
contexts. --embedder adds MAUVE.

Every figure that reads private or held-out text carries a mark: epsilon says nothing of it. Those of the samples alone
follow from them; what stands beside them does not.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "e2e"))

import numpy as np

import attacks
import leaks
import likeness
from command import Parser, check_files, run, whole_file
from frontier import Embedder, mauve
from segments import UserError
from suffixes import Spans
from texts import WORD, check_apart, read_losses, read_secrets, read_texts, read_token_lines, words

FORMAT = 1
MARK = "not covered by epsilon; not to be let out"
YARDSTICK_ALONE = f"the right column alone: {MARK}"
SHOWN = 24  # samples that the JSON shows beside their nearest private text
PRIVATE, SUBSET, HELD_OUT = "private", "private, as many as held out", "held out"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__, java=False)
    parser.add_argument("--samples", required=True, metavar="FILE", help="the synthetic texts")
    parser.add_argument("--private", required=True, metavar="FILE", help="the texts that were trained on")
    parser.add_argument("--held_out", required=True, metavar="FILE", help="texts of the same source that were not")
    parser.add_argument("--losses", metavar="FILE", help="losses of the model: adds membership inference")
    parser.add_argument("--reference", metavar="FILE", help="losses of a model that saw none of the texts")
    parser.add_argument("--secrets", metavar="FILE", help="planted secrets, whose rivals --losses has")
    parser.add_argument("--searched", metavar="FILE", help="what a search found behind the secrets' contexts")
    parser.add_argument("--embedder", metavar="FOLDER", help="model for MAUVE, in Hugging Face's layout")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the texts that are drawn (default 0)")
    args = parser.parse_args()
    for flag, needs in (("reference", "losses"), ("secrets", "losses"), ("searched", "secrets")):
        if getattr(args, flag) is not None and getattr(args, needs) is None:
            raise UserError(f"--{flag}: means nothing without --{needs}; give both")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: want a whole number >= 0")
    names = "samples private held_out losses reference secrets searched".split()
    check_files(args, [path for name in names if (path := getattr(args, name))], json=args.json_file)
    return args


def drawn(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` of the texts by `seed`, in their order; all where there are no more."""
    return [texts[k] for k in sorted(np.random.default_rng(seed).permutation(len(texts))[:count])]


def judge_likeness(args: argparse.Namespace, samples: list[str], private: list[str], held_out: list[str]) -> dict:
    """Of equally many samples, private and held-out texts."""
    count = min(len(samples), len(private), len(held_out))
    sides = {
        name: drawn(texts, count, args.seed)
        for name, texts in (("samples", samples), (PRIVATE, private), (HELD_OUT, held_out))
    }
    split = {name: list(map(words, texts)) for name, texts in sides.items()}
    found: dict = {"texts": count}
    for name in ("samples", PRIVATE):
        found[name] = {
            "length": likeness.lengths(split[name], split[HELD_OUT]),
            "divergence": {str(n): likeness.divergence(split[name], split[HELD_OUT], n) for n in likeness.ORDERS},
            "distinct": {str(n): likeness.distinct(split[name], n) for n in likeness.ORDERS},
            "self_bleu": likeness.self_bleu(sides[name], args.seed),
        }
    if args.embedder is not None:
        embed = Embedder(args.embedder)
        states = {name: embed([text for text in texts if text]) for name, texts in sides.items()}
        for name in ("samples", PRIVATE):
            found[name]["mauve"] = mauve(states[name], states[HELD_OUT], args.seed)
    return found


def marked(text: str, start: int, length: int) -> list[int]:
    """[begin, end] in characters of `length` words from word `start` on."""
    places = [match.span() for match in WORD.finditer(text)]
    return [places[start][0], places[start + length - 1][1]] if length else [0, 0]


def examples(samples: list[str], private: list[str], spans: Spans, near: leaks.Nearest, seed: int) -> list[dict]:
    """The samples that are nearest to a private text, and as many drawn at random."""
    worst = np.lexsort((-spans.lengths, -near.likeness))[: SHOWN // 2].tolist()
    others = [k for k in np.random.default_rng(seed).permutation(len(samples)).tolist() if k not in worst]
    return [
        {
            "sample": samples[k],
            "nearest": private[near.texts[k]],
            "likeness": float(near.likeness[k]),
            "span": int(spans.lengths[k]),
            "marked": marked(samples[k], int(spans.starts[k]), int(spans.lengths[k])),
            "why": "nearest" if place < len(worst) else "drawn",
        }
        for place, k in enumerate([*worst, *others[: SHOWN - len(worst)]])
    ]


def judge_membership(args: argparse.Namespace, planted_lines: int) -> dict:
    """By loss, and by the difference to the reference model's. Planted lines, which end train.jsonl, are no members."""
    ours = read_losses(args.losses, "--losses")
    kept = len(ours["train"]) - planted_lines
    members, others = -ours["train"][:kept], -ours["held_out"]
    found = {"loss": attacks.membership(members, others)}
    if args.reference is not None:
        known = read_losses(args.reference, "--reference")
        for name in ("train", "held_out"):
            if len(known[name]) != len(ours[name]):
                raise UserError(
                    f"--reference {args.reference}: has {len(known[name])} losses of {name}, --losses has "
                    f"{len(ours[name])}; want both of the same files"
                )
        found["reference"] = attacks.membership(members + known["train"][:kept], others + known["held_out"])
    return found


def judge_secrets(args: argparse.Namespace) -> tuple[dict, int]:
    """(figures, how many lines of train.jsonl they are)."""
    secrets = read_secrets(args.secrets)
    losses = read_losses(args.losses, "--losses")["candidates"]
    each = secrets.others + 1
    if len(losses) != each * len(secrets.found):
        raise UserError(
            f"--losses {args.losses}: has {len(losses)} losses of candidates, want {each} for each of the "
            f"{len(secrets.found)} secrets of {args.secrets}; write both anew"
        )
    found = None
    if args.searched is not None:
        predictions = read_token_lines(args.searched, "--searched", "predict")
        if len(predictions) != len(secrets.found):
            raise UserError(
                f"--searched {args.searched}: {len(predictions)} lines, want one for each of the "
                f"{len(secrets.found)} secrets of {args.secrets}"
            )
        found = leaks.recovered(secrets.found, predictions)
    samples = read_token_lines(args.samples, "--samples", "tokens")
    figures = leaks.secret_figures(secrets.found, losses.reshape(-1, each), found, samples)
    return figures, secrets.repeats * sum(one.planted for one in secrets.found)


def judge(args: argparse.Namespace) -> dict:
    samples, private, held_out = (
        read_texts(getattr(args, name), f"--{name}") for name in ("samples", "private", "held_out")
    )
    check_apart(private, held_out, args.private, args.held_out)
    corpora: dict[str, Sequence[str]] = {
        PRIVATE: private,
        SUBSET: drawn(private, len(held_out), args.seed),
        HELD_OUT: held_out,
    }
    copies, found = leaks.compare(samples, corpora)
    result = {
        "format": FORMAT,
        "mark": MARK,
        "texts": {"samples": len(samples), "private": len(private), "held_out": len(held_out)},
        "likeness": judge_likeness(args, samples, private, held_out),
        "copies": copies,
    }
    planted_lines = 0
    if args.secrets is not None:
        result["secrets"], planted_lines = judge_secrets(args)
    if args.losses is not None:
        result["membership"] = judge_membership(args, planted_lines)
    result["examples"] = examples(samples, private, *found[PRIVATE], args.seed)
    result["table"] = [
        {
            "figure": name.removeprefix("~"),
            "value": value,
            "yardstick": other,
            "mark": YARDSTICK_ALONE if name.startswith("~") else MARK,
        }
        for name, value, other in lines_of(result)
    ]
    return result


def lines_of(result: dict) -> list[tuple[str, str, str]]:
    """(figure, value, its yardstick: the same where nothing can leak). Figures of the samples alone begin with "~"."""
    like, copies = result["likeness"], result["copies"]
    ours, real = like["samples"], like[PRIVATE]

    def share(one: dict | None) -> str:
        if one is None:
            return "- (too few)"
        return f"{one['value']:.3f} ({one['interval'][0]:.3f} to {one['interval'][1]:.3f})"

    lines = [("~mean length [words]", f"{ours['length']['mean']:.1f}", f"{real['length']['mean']:.1f}")]
    lines += [(f"~distinct-{n}", f"{ours['distinct'][n]:.3f}", f"{real['distinct'][n]:.3f}") for n in ours["distinct"]]
    lines += [("~self-BLEU", f"{ours['self_bleu']:.3f}", f"{real['self_bleu']:.3f}")]
    lines += [
        ("length, distance to held-out", f"{ours['length']['distance']:.3f}", f"{real['length']['distance']:.3f}")
    ]
    lines += [
        (f"{n}-grams, divergence to held-out [bits]", f"{value:.3f}", f"{real['divergence'][n]:.3f}")
        for n, value in ours["divergence"].items()
    ]
    if "mauve" in ours:
        lines.append(("MAUVE to held-out", f"{ours['mauve']:.3f}", f"{real['mauve']:.3f}"))
    for name, other in ((PRIVATE, ""), (SUBSET, HELD_OUT)):
        pair = [copies[one] if one else None for one in (name, other)]
        for key, title in (("mean", "mean copied span [words]"), ("longest", "longest copied span [words]")):
            cells = [f"{one['spans'][key]:.4g}" if one else "" for one in pair]
            lines.append((f"{title}, {name}", cells[0], cells[1]))
        for key in ("exact", "near"):
            cells = [share(one["duplicates"][key]) if one else "" for one in pair]
            lines.append((f"{key} duplicates, {name}", cells[0], cells[1]))
    for attack, found in result.get("membership", {}).items():
        low, high = found["area"]["interval"]
        lines.append(
            (f"membership by {attack}: area", f"{found['area']['value']:.3f} ({low:.3f} to {high:.3f})", "0.5")
        )
        for rate, one in found["true_positives"].items():
            lines.append((f"membership by {attack}: true positives at {float(rate):.1%} false", share(one), rate))
    for kind, groups in result.get("secrets", {}).items():
        planted, other = groups.get("planted"), groups.get("not planted")
        pair = [planted, other]
        for title, cell in (
            ("mean exposure [bits]", lambda one: f"{one['exposure']['mean']:.2f}"),
            (
                "rank 1 of " + str((planted or other)["rivals"] + 1),
                lambda one: f"{one['first']['found']} of {one['secrets']}",
            ),
            (
                "recovered by search",
                lambda one: f"{one['recovered']['found']} of {one['secrets']}" if "recovered" in one else "-",
            ),
        ):
            seen, unseen = (cell(one) if one else "" for one in pair)
            lines.append((f"secrets of {kind}: {title}", seen, unseen))
    return lines


def print_table(result: dict) -> None:
    lines = result["table"]
    rows = [("figure", "samples or model", "without a leak")]
    rows += [(line["figure"], line["value"], line["yardstick"]) for line in lines]
    marks = ["", *(line["mark"] for line in lines)]
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    for row, mark in zip(rows, marks, strict=True):
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), mark]).rstrip())


def main() -> None:
    args = parse_arguments()
    result = judge(args)
    print_table(result)
    if args.json_file is not None:
        with whole_file(args.json_file) as handle:
            json.dump(result, handle, indent=1, ensure_ascii=False)
            handle.write("\n")


if __name__ == "__main__":
    sys.exit(run(main))
