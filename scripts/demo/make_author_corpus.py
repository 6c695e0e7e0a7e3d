"""Write a generated corpus with authors, {"author", "content"} a line; author r writes 1/r^s of what the first does.

    python scripts/start.py make_author_corpus --authors 600 --records 6000 --words 40 --out authors.jsonl
    python scripts/start.py make_author_corpus --authors 304279 --records 500000 --words 270 --out reddit_size.jsonl

The second is as large as the part of the Reddit corpus that training uses. The texts are made with the demonstration's
grammar (scripts/demo/demo_grammar.py); an author writes about a few restaurants of their own, so authors differ.
The same arguments give the same bytes, with the pinned numpy.
"""

import json
import math
import sys

import numpy as np
from tqdm import tqdm

import demo_grammar
from base.errors import fail
from base.files import atomic_write
from base.flags import Parser
from demo_grammar import Draw
from make_demo_data import choose_meaning, say

MEANINGS, TEXTS = 1200, 6  # in the pool of sentences, and how often each is said
OWN = 4  # meanings of an author


def sizes_by_zipf(authors: int, records: int, exponent: float, generator: np.random.Generator) -> np.ndarray:
    """(authors,) texts of each author, at least one, the rest shared out at random in proportion to rank^-exponent."""
    weights = np.arange(1, authors + 1, dtype=np.float64) ** -exponent
    return 1 + generator.multinomial(records - authors, weights / weights.sum())


def sentence_pool(seed: int) -> list[list[str]]:
    """MEANINGS restaurants, each said in TEXTS ways."""
    draw = Draw(f"authors {seed}")
    kind = demo_grammar.restaurants(draw)
    meanings = [choose_meaning(draw, kind) for _ in range(MEANINGS)]
    return [[say(draw, kind, meaning) for _ in range(TEXTS)] for meaning in meanings]


def main() -> None:
    parser = Parser(description="Write a generated corpus with authors.")
    parser.add_argument("--authors", type=int, default=600)
    parser.add_argument("--records", type=int, default=6000)
    parser.add_argument("--words", type=int, default=40, help="mean words of a text, log-normal (default 40)")
    parser.add_argument("--exponent", type=float, default=1.0, help="s of the Zipf law (default 1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", required=True, help="file to write")
    args = parser.parse_args()
    for name in ("authors", "words"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.seed < 0:
        fail(f"--seed {args.seed}: expected at least 0")
    if not 0 <= args.exponent < math.inf:
        fail(f"--exponent {args.exponent:g}: expected a number from 0")
    if args.records < args.authors:
        fail(f"--records {args.records}: expected at least one for each of the {args.authors} --authors")

    generator = np.random.Generator(np.random.PCG64(args.seed))
    sizes = sizes_by_zipf(args.authors, args.records, args.exponent, generator)
    owners = generator.permutation(np.repeat(np.arange(args.authors), sizes))
    lengths = np.maximum(1, args.words * generator.lognormal(-0.18, 0.6, args.records)).astype(int)  # of mean `words`
    own = generator.integers(MEANINGS, size=(args.authors, OWN))
    pool = sentence_pool(args.seed)
    # Which sentences come next is decided for many at once: a call of the generator costs more than a sentence.
    picks = generator.integers(OWN * TEXTS, size=1 << 16)
    place = 0
    bar = tqdm(zip(owners, lengths, strict=True), total=args.records, unit=" records", disable=not sys.stderr.isatty())
    with atomic_write(args.out) as out, bar:
        for owner, length in bar:
            sentences, words = [], 0
            while words < length:
                pick = picks[place]
                place = (place + 1) % len(picks)
                sentence = pool[own[owner, pick // TEXTS]][pick % TEXTS]
                sentences.append(sentence)
                words += sentence.count(" ") + 1
            out.write(json.dumps({"author": f"author{owner}", "content": " ".join(sentences)}) + "\n")
    print(
        f"{args.out}: {args.records} records by {args.authors} authors, the most by one {sizes.max()}, "
        f"median {int(np.median(sizes))}"
    )
