"""Write the demonstration's text: a private restaurant domain, and a public domain to pre-train on.

    python scripts/start.py make_demo_data --domain restaurants --out data/demo    # train.txt valid.txt test.txt
    python scripts/start.py make_demo_data --domain public --out data/demo         # public_train.txt public_valid.txt

Both are in E2E's line format, `field : value | field : value||text`, and come from one small generator (Reiter and
Dale, 1997: choose what to say, plan the sentences, choose the words) with the two vocabularies of demo_grammar.py. A
meaning is a set of fields; a text says every field once. Fields become adjectives, attributes behind the noun, a
fronted phrase, or verb phrases that are gathered into one to three sentences. The same seed gives the same bytes on
every machine: all choices come from random.Random.random(), whose sequence Python promises to keep.
"""

import os
import re
import sys

from tqdm import tqdm

import demo_grammar
from base.errors import fail
from base.files import atomic_write
from base.flags import Parser
from demo_grammar import Draw, Kind

Meaning = list[tuple[str, str]]  # (field, value) in the order of the context; name and Type come first

# Lines, and least and most texts a meaning. Valid and test list the texts of a meaning one after another, as E2E does.
RESTAURANT_PARTS = {"train": (6000, 3, 8), "valid": (600, 4, 8), "test": (400, 5, 8)}
PUBLIC_PARTS = {"public_train": (30000, 1, 2), "public_valid": (600, 1, 2)}


def phrases(kind: Kind, field: str, value: str, role: str) -> list[str]:
    """The ways to say field = value in a role (pre, post, front or verb); those of the one value go first."""
    table = kind.phrases.get(f"{field}={value}") or kind.phrases[field]
    return [text.replace("@", value) for text in table.get(role, ())]


def post_rank(text: str) -> int:
    """Order of attributes behind a noun: what a thing is of, where it is, what it is with, and last a clause."""
    return {"of": 0, "with": 2, "without": 2, "that": 3}.get(text.split()[0], 1)


def take(draw: Draw, kind: Kind, left: Meaning, role: str, unlike: str = "") -> str:
    """Say one of the fields `left` in this role and take it off the list; "" where none can be said so.

    unlike: an attribute beside which a second "with" or a second clause would read badly and is not chosen.
    """
    barred = post_rank(unlike) if unlike and post_rank(unlike) > 1 else None
    ways = [(item, text) for item in left for text in phrases(kind, *item, role)]
    able = [(item, text) for item, text in ways if barred is None or post_rank(text) != barred]
    if not able:
        return ""
    item, text = draw.pick(able)
    left.remove(item)
    return text


def first_sentence(draw: Draw, kind: Kind, name: str, type_: str, left: Meaning) -> str:
    """One of the kind's openers with its places filled; what it says is taken off `left`."""
    able = [
        opener
        for opener in kind.openers
        if all(any(phrases(kind, *item, role) for item in left) for role in ("front", "verb") if f"<{role}>" in opener)
    ]
    sentence = draw.pick(able).replace("<name>", name).replace("<type>", type_)
    for role in ("front", "verb"):
        if f"<{role}>" in sentence:
            sentence = sentence.replace(f"<{role}>", take(draw, kind, left, role))
    before = take(draw, kind, left, "pre") if draw.chance(0.6) else ""
    sentence = sentence.replace("<pre>", f"{before} " if before else "")
    if "<post>" in sentence:
        behind = take(draw, kind, left, "post") if draw.chance(0.75) else ""
        second = take(draw, kind, left, "post", unlike=behind) if behind and draw.chance(0.4) else ""
        both = sorted(filter(None, (behind, second)), key=post_rank)
        sentence = sentence.replace("<post>", "".join(f" {text}" for text in both))
    return sentence


def later_sentences(draw: Draw, kind: Kind, type_: str, left: Meaning) -> list[str]:
    """What is left, as verb phrases in one or two sentences."""
    left = draw.shuffled(left) if draw.chance(0.5) else left
    cut = len(left) if len(left) < 2 or draw.chance(0.6) else 1 + draw.below(len(left) - 1)
    sentences = []
    for number, part in enumerate((left[:cut], left[cut:])):
        if part:
            verbs = [draw.pick(phrases(kind, *item, "verb")) for item in part]
            said = verbs[0] if len(verbs) == 1 else f"{' , '.join(verbs[:-1])} and {verbs[-1]}"
            sentences.append(f"{draw.pick(kind.subjects[number])} {said}".replace("<type>", type_))
    return sentences


def say(draw: Draw, kind: Kind, meaning: Meaning) -> str:
    """One text of a meaning: every field is said once."""
    (_, name), (_, type_), *left = meaning
    opening = first_sentence(draw, kind, name, type_, left)
    sentences = [opening, *later_sentences(draw, kind, type_, left)]
    text = " ".join(f"{sentence[0].upper()}{sentence[1:]} ." for sentence in sentences)
    return re.sub(r"\b([Aa])\(n\) (?=(\w))", lambda m: m[1] + ("n " if m[2].lower() in "aeiou" else " "), text)


def choose_meaning(draw: Draw, kind: Kind) -> Meaning:
    """A name, a type and a few of the kind's other fields, in the kind's order."""
    chosen = draw.shuffled(list(kind.values))[: draw.pick(kind.sizes)]
    others = [(field, kind.values[field](draw)) for field in kind.values if field in chosen]
    return [("name", kind.name(draw)), ("Type", kind.type(draw)), *others]


def make_part(draw: Draw, kinds: list[Kind], size: tuple[int, int, int], seen: set[str], label: str) -> list[str]:
    """`size` = (lines, least, most texts a meaning). No context in `seen` is used; the new ones are added to it."""
    lines, least, most = size
    part: list[str] = []
    with tqdm(total=lines, desc=label, unit=" lines", disable=not sys.stderr.isatty()) as bar:
        while len(part) < lines:
            kind = draw.pick(kinds)
            meaning = choose_meaning(draw, kind)
            context = " | ".join(f"{field} : {value}" for field, value in meaning)
            if context in seen:
                continue
            wanted = min(least + draw.below(most - least + 1), lines - len(part))
            texts: dict[str, None] = {}
            for _ in range(20 * wanted):
                if len(texts) < wanted:
                    texts[say(draw, kind, meaning)] = None
            if len(texts) < wanted:
                continue  # too plain a meaning for so many different texts
            seen.add(context)
            part += [f"{context}||{text}" for text in texts]
            bar.update(len(texts))
    return part


def make_domain(domain: str, seed: int) -> dict[str, list[str]]:
    """File stem -> lines. No context is in two files; a train file is shuffled."""
    draw = Draw(f"{domain} {seed}")
    if domain == "restaurants":
        kinds, parts = [demo_grammar.restaurants(draw)], RESTAURANT_PARTS
    else:
        kinds, parts = demo_grammar.public_kinds(), PUBLIC_PARTS
    seen: set[str] = set()
    made = {stem: make_part(draw, kinds, size, seen, stem) for stem, size in parts.items()}
    return {stem: draw.shuffled(lines) if "train" in stem else lines for stem, lines in made.items()}


def main() -> None:
    parser = Parser(description="generate the demonstration's text")
    parser.add_argument("--domain", choices=("restaurants", "public"), required=True)
    parser.add_argument("--seed", type=int, default=1, help="default: 1, which gives the repository's files")
    parser.add_argument("--out", default="data/demo", help="folder of the files (default: data/demo)")
    args = parser.parse_args()
    if not os.path.isdir(args.out):
        fail(f"--out {args.out}: no such folder; make it first")

    for stem, lines in make_domain(args.domain, args.seed).items():
        path = os.path.join(args.out, f"{stem}.txt")
        with atomic_write(path) as out:
            out.writelines(f"{line}\n" for line in lines)
        print(f"{path}: {len(lines)} lines, {len({line.split('||')[0] for line in lines})} contexts")
