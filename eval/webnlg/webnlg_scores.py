"""Score texts as the WebNLG challenge of 2017 and DART do: BLEU, METEOR, TER, and chrF++ as the challenge of 2020 does.

    python eval/webnlg/webnlg_scores.py references pred.txt
    python eval/webnlg/webnlg_scores.py refs/all all.txt refs/seen seen.txt refs/unseen unseen.txt --json scores.json

REF is a folder of reference0, reference1, ...; SYS has an output a line: what src/gpt2_decode.py --ref_type webnlg (or
dart) --tokenize --lower writes, with --filter seen or unseen for some of the categories. Each further pair of REF and
SYS is a further line of the table, named as its folder. All scores are fractions: 0.55 is the challenge's 55.

BLEU    of sacrebleu: tokens between white space, lower case, not smoothed; it is that of multi-bleu.perl -lc.
METEOR  of the challenge's own jar, 1.5 -l en -norm, over all references.
TER     of sacrebleu, which follows tercom: the edits of all texts over their mean reference lengths. LoRA's example
        averages pyter's rates of single texts instead, which is another figure.
chrF++  of sacrebleu: 1 to 6 characters, 1 and 2 words, beta 2, of each text's best reference; smoothed as chrF++.py.

The challenge takes three references a text (--ref_num 3 of the decoder; LoRA's example takes six) and turns accented
letters into ASCII (unidecode), which the decoder does not.
"""

import argparse
import json
import os
import re
import sys
from itertools import chain, zip_longest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "e2e"))

import numpy as np
from sacrebleu.metrics import BLEU, CHRF, TER

import caption_metrics
import java
from command import Parser, check_files, run, whole_file
from segments import Segments, UserError, load_segments, note_unicode_forms

# Cells of sacrebleu's table of edits, words of an output times words of a reference: it takes 8 bytes for each, and
# keeps some tables. A text of this length has lost its line ends.
MOST_CELLS = 25_000_000
NAMES = ("BLEU", "METEOR", "TER", "chrF++")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("files", metavar="REF SYS", nargs="+", help="pairs: a folder of references, a file of outputs")
    args = parser.parse_args()
    if len(args.files) % 2:
        raise UserError(f"{args.files[-1]}: has no SYS beside it; want pairs of REF and SYS")
    args.pairs = {
        os.path.basename(os.path.normpath(ref)): (ref, out)
        for ref, out in zip(args.files[::2], args.files[1::2], strict=True)
    }
    if len(args.pairs) < len(args.files) // 2:
        raise UserError(f"REF: want a different name for each, got {' '.join(args.files[::2])}")
    check_files(args, args.files, json=args.json_file)
    return args


def score(segments: Segments, statistics: np.ndarray) -> tuple[dict[str, float], dict[str, str]]:
    """(scores as fractions, signatures) of one set. statistics: (N, 23) of METEOR."""
    streams = list(zip_longest(*segments.references))  # None where a text has fewer references
    metrics = {
        "BLEU": BLEU(lowercase=True, force=True, tokenize="none", smooth_method="none"),
        "TER": TER(),
        "chrF++": CHRF(word_order=2, eps_smoothing=True),
    }
    scores = {name: metric.corpus_score(segments.outputs, streams).score / 100 for name, metric in metrics.items()}
    scores["METEOR"] = float(caption_metrics.meteor_score(caption_metrics.summable_statistics(statistics).sum(axis=0)))
    signatures = {name: str(metric.get_signature()) for name, metric in metrics.items()}
    return {name: scores[name] for name in NAMES}, {**signatures, "METEOR": f"{java.versions()['meteor']} -l en -norm"}


def check_lengths(name: str, segments: Segments) -> None:
    """Raise UserError for a text whose TER would take more memory than a machine may have."""
    for number, (group, output) in enumerate(zip(segments.references, segments.outputs, strict=True), start=1):
        longest, words = max(len(reference.split()) for reference in group), len(output.split())
        if longest * words > MOST_CELLS:
            raise UserError(
                f"{name}: text {number}: {words} words against a reference of {longest}: TER would take memory for "
                f"their product, at most {MOST_CELLS}; were line ends lost?"
            )


def note_untokenized(name: str, segments: Segments) -> None:
    """Print a note where a reference was not tokenized: every score is then lower than the challenge's."""
    for number, reference in enumerate(chain.from_iterable(segments.references), start=1):
        found = next((word for word in reference.split() if re.search(r"\w[^\w\s]|[^\w\s]\w", word)), None)
        if found is not None:
            print(
                f"note: {name}: {found!r} of reference {number} is one token here; the challenge scores what "
                "gpt2_decode.py --tokenize --lower writes",
                file=sys.stderr,
            )
            return


def main() -> None:
    args = parse_arguments()
    sets = {name: load_segments(*pair) for name, pair in args.pairs.items()}
    for name, segments in sets.items():
        check_lengths(name, segments)
        note_untokenized(name, segments)
        note_unicode_forms(name, segments.references, segments.outputs)
    with java.Meteor(args.java_timeout) as meteor:
        rows = meteor.statistics(
            list(chain.from_iterable(s.references for s in sets.values())),
            list(chain.from_iterable(s.outputs for s in sets.values())),
        )
    parts = np.split(rows, np.cumsum([len(segments.outputs) for segments in sets.values()])[:-1])
    scored = {name: score(segments, part) for (name, segments), part in zip(sets.items(), parts, strict=True)}

    for name, (scores, _) in scored.items():
        if scores["TER"] > 1:
            print(f"note: {name}: TER above 1: the outputs need more edits than references have words", file=sys.stderr)
    width = max(map(len, sets))
    print(" " * width + "".join(f"{name:>9}" for name in NAMES) + "  segments  references")
    for name, (scores, _) in scored.items():
        counts = [len(group) for group in sets[name].references]
        print(
            f"{name:{width}}"
            + "".join(f"{scores[metric]:9.4f}" for metric in NAMES)
            + f"{len(counts):10,}{sum(counts):12,}"
        )
    if args.json_file:
        record = {
            "scores": {name: scores for name, (scores, _) in scored.items()},
            "signature": {
                name: {
                    "segments": len(sets[name].outputs),
                    "references": sum(map(len, sets[name].references)),
                    **signatures,
                }
                for name, (_, signatures) in scored.items()
            },
        }
        with whole_file(args.json_file) as handle:
            json.dump(record, handle, indent=2)
            handle.write("\n")


if __name__ == "__main__":
    sys.exit(run(main))
