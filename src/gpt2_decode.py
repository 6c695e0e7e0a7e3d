"""Turn the tokens of beam search into text, and put each distinct context's references and prediction side by side.

    python src/gpt2_decode.py --vocab ./vocab \
        --sample_file ./trained_models/GPT2_M/e2e/predict.jsonl --input_file ./data/e2e/test_formatted.jsonl \
        --output_ref_file e2e_ref.txt --output_pred_file e2e_pred.txt

    python src/gpt2_decode.py --vocab ./vocab \
        --sample_file ./trained_models/GPT2_M/webnlg/predict.jsonl --input_file ./data/webnlg/test_formatted.jsonl \
        --ref_type webnlg --ref_num 6 --tokenize --lower --filter unseen \
        --output_ref_file webnlg_refs --output_pred_file webnlg_pred.txt

A text is cut at <|endoftext|> (a prediction at the end of text of --vocab) and then at its first blank line, and
stripped; a line break, a NUL or a byte-order mark left inside becomes a space, for a line is a text in all files
written here. Contexts stand in the order of their first appearance in --input_file.
"""

import base.early  # noqa: F401  # isort: skip  # before slow imports

import argparse
import contextlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from base.errors import fail, run_main
from base.files import BOM, atomic_write, check_link, is_text, read_lines
from base.flags import Parser
from corpus.gpt2_tokenizer import END_OF_TEXT
from corpus.tokenizer import VOCAB_HELP, Tokenizer, load_tokenizer

DEFAULT_REF_NUM = 4
# Whatever any reader could take for the end of a line, and what the scorers refuse: a model can generate any byte.
LINE_BREAKS = re.compile(f"[\0\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029{BOM}]+")


@dataclass
class Example:
    """A line of --input_file: where it stands, its context and reference, and which filter keeps it."""

    where: str
    context: str
    reference: str
    seen: bool | None


@dataclass
class Group:
    """All references of one context, and the last prediction for it."""

    where: str
    context: str
    references: list[str] = field(default_factory=list)
    prediction: str | None = None


def cut(text: str) -> str:
    """The part of a text that counts, on one line."""
    return LINE_BREAKS.sub(" ", text.split(END_OF_TEXT)[0].split("\n\n")[0]).strip()


def post_process(text: str, tokenize: bool, lower: bool) -> str:
    """Lower-case a text and split every non-word character off, as asked."""
    if lower:
        text = text.lower()
    if tokenize:
        text = " ".join(re.sub(r"(\W)", r" \1 ", text).split())
    return text


def parse_line(where: str, line: str, form: str) -> dict:
    """The JSON object of a line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        fail(f"{where}: not JSON, got {line[:60]!r}; want {form}")
    if not isinstance(record, dict):
        fail(f"{where}: got {line[:60]!r}; want {form}")
    return record


def read_examples(path: str, needs_category: bool) -> list[Example]:
    """Read the formatted examples; each has a reference that is not empty after the cut."""
    form = '{"context": "...", "completion": "..."}'
    examples = []
    for number, line in read_lines(path, "--input_file"):
        where = f"{path}:{number}"
        record = parse_line(where, line, form)
        context, completion, seen = record.get("context"), record.get("completion"), record.get("cate")
        if not isinstance(context, str) or not isinstance(completion, str):
            fail(f"{where}: got {line[:60]!r}; want {form}, both strings, as format_converting_*.py writes them")
        if needs_category and not isinstance(seen, bool):
            fail(f"{where}: --filter needs the field cate, true or false, got {seen!r}; format the data again")
        reference = cut(completion)
        if not reference:
            fail(f"{where}: the completion is empty, and an empty line would end a group; remove the example")
        if not is_text(reference):
            fail(f"{where}: the completion holds half of a surrogate pair, which is no text; format the data again")
        examples.append(Example(where, context, reference, seen))
    if not examples:
        fail(f"--input_file {path}: is empty; want a line of {form} an example")
    return examples


def read_keys(path: str, examples: list[Example]) -> list[int]:
    """Read the group of each example: a whole number a line."""
    keys = []
    for number, line in read_lines(path, "--ref_unique_file"):
        try:
            keys.append(int(line))
        except ValueError:
            fail(f"{path}:{number}: got {line[:60]!r}; want a whole number, the group of that line of --input_file")
    if len(keys) != len(examples):
        fail(f"--ref_unique_file {path}: has {len(keys)} lines, --input_file has {len(examples)}; want one for each")
    return keys


def read_predictions(path: str, examples: int, tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """Read (line of --input_file from 0, predicted text) of each line."""
    form = '{"id": 0, "predict": [tokens]}'
    predictions = []
    for number, line in read_lines(path, "--sample_file"):
        where = f"{path}:{number}"
        record = parse_line(where, line, form)
        index, tokens = record.get("id"), record.get("predict")
        if type(index) is not int or not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
            fail(f"{where}: got {line[:60]!r}; want {form} of whole numbers")
        if not 0 <= index < examples:
            fail(f"{where}: id {index}, but --input_file ends at {examples - 1}; give the file searched over")
        wrong = [token for token in tokens if not 0 <= token < tokenizer.vocab_size]
        if wrong:
            fail(
                f"{where}: token {wrong[0]} is outside --vocab's {tokenizer.vocab_size}; give the one searched with, "
                f"or, where the model has padded rows, search with gpt2_beam.py --vocab_size {tokenizer.vocab_size}"
            )
        predictions.append((index, cut(tokenizer.decode_generated(tokens))))
    return predictions


def group_examples(
    examples: list[Example], keys: Sequence[int | str], predictions: list[tuple[int, str]], keep: str
) -> list[Group]:
    """Group the references that the filter keeps by key and give each group its last prediction."""
    groups: dict[int | str, Group] = {}
    for key, example in zip(keys, examples, strict=True):
        if keep == "all" or example.seen == (keep == "seen"):
            groups.setdefault(key, Group(example.where, example.context)).references.append(example.reference)
    for index, text in predictions:
        if keys[index] in groups:
            groups[keys[index]].prediction = text
    for group in groups.values():
        if group.prediction is None:
            what = f"{group.where}, {group.context[:60]!r}"
            fail(f"--sample_file: has no prediction for {what}; search over all of --input_file")
    if not groups:
        fail(f"--filter {keep}: keeps none of the {len(examples)} examples; want another filter or other data")
    return list(groups.values())


def reference_files(groups: list[Group], ref_type: str, folder_or_file: str, ref_num: int) -> dict[str, list[str]]:
    """The lines of each reference file: one file of groups for e2e, else `ref_num` parallel files in a folder."""
    if ref_type == "e2e":
        return {folder_or_file: [line for group in groups for line in (*group.references, "")]}
    return {
        os.path.join(folder_or_file, f"reference{i}"): [
            group.references[i if i < len(group.references) else 0] for group in groups
        ]
        for i in range(ref_num)
    }


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", required=True, help=VOCAB_HELP)
    parser.add_argument("--sample_file", required=True, help="what gpt2_beam.py wrote")
    parser.add_argument("--input_file", required=True, help="the formatted examples that were searched over")
    parser.add_argument("--output_ref_file", required=True, help="references to write; a folder for webnlg and dart")
    parser.add_argument("--output_pred_file", required=True, help="predictions to write, a line a group")
    parser.add_argument("--ref_unique_file", help="a number a line of --input_file: its group (default: by context)")
    parser.add_argument("--ref_type", default="e2e", choices=["e2e", "webnlg", "dart"], help="form of the references")
    parser.add_argument("--ref_num", type=int, help=f"webnlg, dart: reference files (default {DEFAULT_REF_NUM})")
    parser.add_argument("--tokenize", action="store_true", help="split off every non-word character")
    parser.add_argument("--lower", action="store_true", help="lower-case")
    parser.add_argument(
        "--filter",
        default="all",
        choices=["all", "seen", "unseen"],
        help="keep categories seen in training, or unseen ones (the field cate)",
    )
    args = parser.parse_args()
    if args.ref_type == "e2e" and args.ref_num is not None:
        fail("--ref_num: means nothing for --ref_type e2e, which writes all references; leave it out")
    args.ref_num = DEFAULT_REF_NUM if args.ref_num is None else args.ref_num
    if args.ref_num < 1:
        fail(f"--ref_num {args.ref_num}: want at least 1")
    if args.ref_type == "e2e" and os.path.isdir(args.output_ref_file):
        fail(f"--output_ref_file {args.output_ref_file}: is a folder, want a file for --ref_type e2e")
    if args.ref_type != "e2e" and os.path.exists(args.output_ref_file) and not os.path.isdir(args.output_ref_file):
        fail(f"--output_ref_file {args.output_ref_file}: is a file, want a folder for --ref_type {args.ref_type}")
    for flag, path in (("--output_ref_file", args.output_ref_file), ("--output_pred_file", args.output_pred_file)):
        if path.lower().endswith((".csv", ".tsv")):
            fail(f"{flag} {path}: a line is a text, and the scorers take .csv and .tsv for tables; name it .txt")
    read = {os.path.realpath(path) for path in (args.sample_file, args.input_file, args.ref_unique_file) if path}
    written = [os.path.realpath(path) for path in (args.output_ref_file, args.output_pred_file)]
    if written[0] == written[1] or read.intersection(written):
        fail("--output_ref_file, --output_pred_file: want two files that are none of the files read")
    return args


def main() -> None:
    args = parse_arguments()
    tokenizer = load_tokenizer(args.vocab)
    examples = read_examples(args.input_file, needs_category=args.filter != "all")
    keys = read_keys(args.ref_unique_file, examples) if args.ref_unique_file else [e.context for e in examples]
    predictions = read_predictions(args.sample_file, len(examples), tokenizer)
    groups = group_examples(examples, keys, predictions, args.filter)

    files = reference_files(groups, args.ref_type, args.output_ref_file, args.ref_num)
    files[args.output_pred_file] = [group.prediction or "" for group in groups]
    if args.ref_type != "e2e":
        check_link(args.output_ref_file, "--output_ref_file")
        os.makedirs(args.output_ref_file, exist_ok=True)
    with contextlib.ExitStack() as stack:  # all are renamed to their names once all are written
        for path, lines in files.items():
            handle = stack.enter_context(atomic_write(path))
            handle.writelines(f"{post_process(line, args.tokenize, args.lower)}\n" for line in lines)

    references = sum(len(group.references) for group in groups)
    print(f"{len(groups)} contexts, {references} references")
    left_out = sum(max(0, len(group.references) - args.ref_num) for group in groups)
    if left_out and args.ref_type != "e2e":
        print(f"{left_out} of the references are beyond --ref_num {args.ref_num} and left out")
    empty = sum(not group.prediction for group in groups)
    if empty:
        print(f"{empty} of the predictions are empty")
    if args.ref_type != "e2e":
        for name in os.listdir(args.output_ref_file):
            if re.fullmatch(r"reference\d+", name) and int(name[9:]) >= args.ref_num:  # of an earlier call
                os.unlink(os.path.join(args.output_ref_file, name))
        print(f"score: python eval/webnlg/webnlg_scores.py {args.output_ref_file} {args.output_pred_file}")


if __name__ == "__main__":
    run_main(main)
