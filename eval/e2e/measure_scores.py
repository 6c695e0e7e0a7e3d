"""Score a system's outputs as the E2E NLG challenge does: BLEU, NIST, METEOR, ROUGE-L, CIDEr.

    python eval/e2e/measure_scores.py e2e_ref.txt e2e_pred.txt -p
    python eval/e2e/measure_scores.py e2e_ref.txt dp_pred.txt -p --compare baseline_pred.txt --json scores.json

The scores agree with the challenge's own script to all four decimals. With --compare, a paired bootstrap over segments
says how certain the difference to another system's outputs for the same references is.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np

import caption_metrics
import java
import ngrams
from bootstrap import Comparison, Metric, compare
from command import Parser, check_files, run, whole_file
from segments import Segments, UserError, load_segments, note_unicode_forms

RULE = "=============="


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "ref_file",
        metavar="REF",
        help="references: groups parted by empty lines, .tsv/.csv, or a folder of reference0, ...",
    )
    parser.add_argument("sys_file", metavar="SYS", help="system outputs, one a line; or .tsv/.csv")
    parser.add_argument(
        "-l",
        "--sent-level",
        "--seg-level",
        "--sentence-level",
        "--segment-level",
        dest="segment_file",
        metavar="FILE",
        help="also write the scores of each segment as TSV",
    )
    parser.add_argument("-s", "--src-file", metavar="SRC", help="sources, one a line, that a TSV/CSV SYS must repeat")
    parser.add_argument(
        "-p",
        "--python",
        action="store_true",
        help="BLEU and NIST in Python, which they always are; accepted for the published command",
    )
    parser.add_argument("-t", "--table", action="store_true", help="print a TSV line in place of the list")
    parser.add_argument("-H", "--header", action="store_true", help="with -t: print the TSV's header first")
    parser.add_argument("--compare", metavar="OTHER", help="outputs of another system, to compare with by bootstrap")
    parser.add_argument("--bootstrap_samples", type=int, metavar="B", help="with --compare: resamples (default 1000)")
    parser.add_argument("--bootstrap_seed", type=int, metavar="S", help="with --compare: their seed (default 0)")
    args = parser.parse_args()
    if args.header and not args.table:
        raise UserError("-H: is the header of -t's table; give -t as well")
    if args.compare is None and (args.bootstrap_samples is not None or args.bootstrap_seed is not None):
        raise UserError("--bootstrap_samples, --bootstrap_seed: mean nothing without --compare OTHER")
    args.bootstrap_samples = 1000 if args.bootstrap_samples is None else args.bootstrap_samples
    args.bootstrap_seed = 0 if args.bootstrap_seed is None else args.bootstrap_seed
    if args.bootstrap_samples < 100:
        raise UserError(f"--bootstrap_samples {args.bootstrap_samples}: want at least 100 for a 95 % interval")
    if args.bootstrap_seed < 0:
        raise UserError(f"--bootstrap_seed {args.bootstrap_seed}: want an integer >= 0")
    read = [path for path in (args.ref_file, args.sys_file, args.src_file, args.compare) if path]
    check_files(args, read, l=args.segment_file, json=args.json_file)
    return args


def score_systems(references: list[list[str]], systems: Sequence[list[str]], patience: float) -> list[list[Metric]]:
    """The five metrics of each system. METEOR starts up while the texts are tokenized and the rest is scored.

    references: the references of each of N segments. systems: N outputs each. patience: seconds, as in JavaProgram.
    """
    # Left in this order: METEOR is killed before the pool waits for the thread that reads from it.
    with ThreadPoolExecutor(1) as pool, java.Meteor(patience) as meteor:
        flat, *outputs = java.tokenize_ptb([list(itertools.chain.from_iterable(references)), *systems], patience)
        remaining = iter(flat)
        groups = [list(itertools.islice(remaining, len(group))) for group in references]
        asked = pool.submit(meteor.statistics, groups * len(systems), list(itertools.chain.from_iterable(outputs)))
        rouge = [caption_metrics.rouge_l_segments(groups, tokens) for tokens in outputs]
        cider = [caption_metrics.cider_segments(groups, tokens) for tokens in outputs]
        counted = ngrams.References(references)
        bleu = [ngrams.bleu_statistics(counted, texts) for texts in systems]
        nist = [ngrams.nist_statistics(counted, texts) for texts in systems]
        rows = np.split(caption_metrics.summable_statistics(asked.result()), len(systems))
    return [
        [
            Metric("BLEU", bleu[i], ngrams.bleu_score),
            Metric("NIST", nist[i], ngrams.nist_score),
            Metric("METEOR", rows[i], caption_metrics.meteor_score),
            Metric("ROUGE_L", caption_metrics.mean_statistics(rouge[i]), caption_metrics.mean_score),
            Metric("CIDEr", caption_metrics.mean_statistics(cider[i]), caption_metrics.mean_score),
        ]
        for i in range(len(systems))
    ]


def note_short_outputs(path: str, outputs: Sequence[str]) -> None:
    """Print a note where outputs have fewer tokens than BLEU's longest n-grams."""
    short = sum(len(ngrams.tokenize_13a(text)) < ngrams.BLEU_ORDER for text in outputs)
    if short:
        print(
            f"note: {path}: {short:,} of {len(outputs):,} outputs have fewer than {ngrams.BLEU_ORDER} tokens: the "
            "challenge's script counts a negative number of n-grams in them, which raises NIST and can raise BLEU "
            "above 1",
            file=sys.stderr,
        )


def signature(references: list[list[str]]) -> dict[str, object]:
    """What must be equal for two scores to be comparable."""
    counts = [len(group) for group in references]
    versions = java.versions()
    captions = f"PTB ({versions['ptb']}), no punctuation, lower case, pycocoevalcap {versions['pycocoevalcap']}"
    mteval = "mteval-v13a tokens, lower case"
    return {
        "segments": len(references),
        "references": {"total": sum(counts), "least": min(counts), "most": max(counts)},
        "BLEU": f"{mteval}, {ngrams.BLEU_ORDER}-grams, closest reference length, not smoothed",
        "NIST": f"{mteval}, {ngrams.NIST_ORDER}-grams, information from all references, mean reference length",
        "METEOR": f"{versions['meteor']} -l en -norm; {captions}",
        "ROUGE_L": f"beta 1.2; {captions}",
        "CIDEr": f"4-grams, sigma 6, document frequencies of these references; {captions}",
    }


def write_segment_scores(path: str, segments: Segments, metrics: Sequence[Metric]) -> None:
    """Write a TSV of each segment's source, output and scores; its NIST takes the information of its own references."""
    bleu, nist, *captions = metrics
    counted = ngrams.References(segments.references)
    columns = {
        "BLEU": bleu.score(bleu.statistics),
        "sentBLEU": ngrams.bleu_score(bleu.statistics, smoothing=1.0),
        "NIST": nist.score(ngrams.nist_statistics(counted, segments.outputs, each_alone=True)),
        **{metric.name: metric.score(metric.statistics) for metric in captions},
    }
    with whole_file(path) as handle:
        handle.write("\t".join(["src", "sys_out", *columns]) + "\n")
        for source, output, *scores in zip(segments.sources, segments.outputs, *columns.values(), strict=True):
            texts = [text.translate({**java.LINE_ENDS, ord("\t"): " "}) for text in (source, output)]
            handle.write("\t".join([*texts, *(f"{score:.4f}" for score in scores)]) + "\n")


def print_table(args: argparse.Namespace, metrics: Sequence[Metric], comparisons: Sequence[Comparison]) -> None:
    """Print TSV lines: the system and, with --compare, the other system and what the bootstrap says."""
    if args.header:
        print("\t".join(["File", *(metric.name for metric in metrics)]))
    print("\t".join([args.sys_file, *(f"{metric.total():.4f}" for metric in metrics)]))
    if comparisons:
        print("\t".join([args.compare, *(f"{one.second:.4f}" for one in comparisons)]))
        for name in ("difference", "low", "high", "p_value"):
            print("\t".join([name, *(f"{getattr(one, name):.4f}" for one in comparisons)]))


def print_list(args: argparse.Namespace, metrics: Sequence[Metric], comparisons: Sequence[Comparison]) -> None:
    """Print the scores a line each as the challenge's script does and, with --compare, what the bootstrap says."""
    print(f"SCORES:\n{RULE}")
    for metric in metrics:
        print(f"{metric.name}: {metric.total():.4f}")
    print()
    if comparisons:
        print(f"DIFFERENCE: {args.sys_file} - {args.compare}")
        print(f"paired bootstrap, {args.bootstrap_samples} samples, seed {args.bootstrap_seed}\n{RULE}")
        for one in comparisons:
            interval = f"95% [{one.low:+.4f}, {one.high:+.4f}]"
            print(f"{one.name}: {one.difference:+.4f}  {interval}  p {one.p_value:.4f}  other {one.second:.4f}")
        print()


def main() -> None:
    args = parse_arguments()
    segments = load_segments(args.ref_file, args.sys_file, args.src_file)
    systems = [segments.outputs]
    if args.compare is not None:
        other = load_segments(args.ref_file, args.compare, args.src_file)
        if other.references != segments.references:
            raise UserError(f"--compare {args.compare}: wants the sources of {args.sys_file} in their order")
        systems.append(other.outputs)
    if not args.python:
        print("note: BLEU and NIST are computed in Python, as with -p", file=sys.stderr)

    for path, texts in zip((args.sys_file, args.compare), systems, strict=False):
        note_short_outputs(path, texts)
        note_unicode_forms(path, segments.references, texts)
    metrics, *others = score_systems(segments.references, systems, args.java_timeout)
    comparisons = compare(metrics, others[0], args.bootstrap_samples, args.bootstrap_seed) if others else []

    if args.segment_file:
        write_segment_scores(args.segment_file, segments, metrics)
    if args.json_file:
        record: dict[str, object] = {"scores": {metric.name: metric.total() for metric in metrics}}
        if comparisons:
            record["compare"] = {
                "other": args.compare,
                "samples": args.bootstrap_samples,
                "seed": args.bootstrap_seed,
                "metrics": [asdict(one) for one in comparisons],
            }
        record["signature"] = signature(segments.references)
        with whole_file(args.json_file) as handle:
            json.dump(record, handle, indent=2)
            handle.write("\n")
    (print_table if args.table else print_list)(args, metrics, comparisons)


if __name__ == "__main__":
    sys.exit(run(main))
