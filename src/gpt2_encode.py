"""Encode formatted examples with GPT-2's byte-level BPE, or with the tokenizer in a model's folder.

    python src/gpt2_encode.py --vocab vocab --input data/e2e/train_formatted.jsonl --output data/e2e/train.jsonl \
        --add_bos --add_eos

Input: JSON lines with the strings "context" and "completion" (other keys are ignored). Output, a line an input line:
`{"context": [ids], "completion": [ids]}`, the completion encoded with one space before it. --add_bos appends the
tokenizer's bos token to the context, --add_eos its eos token to the completion; both are <|endoftext|> for GPT-2. The
context begins with the tokens that transformers puts in front of a text: none for GPT-2, bos for Llama. The output is
written whole or not at all.
"""

import base.early  # noqa: F401  # isort: skip  # before slow imports

import itertools
import json
import sys
from collections.abc import Iterator

from tqdm import tqdm

from base.errors import fail, run_main
from base.files import BOM, atomic_write, is_text, read_lines
from base.flags import Parser, check_output
from corpus.tokenizer import CHAT_TEMPLATE_HELP, VOCAB_HELP, load_tokenizer

# Lines handed to the library at a time: enough to keep its threads busy, few enough for the progress bar to move.
CHUNK = 2048


def read_example(line: str, where: str) -> tuple[str, str]:
    """(context, completion) of one line of JSON. where: "file:line". UserError where it is not such an example."""
    try:
        example = json.loads(line)
    except (ValueError, RecursionError) as error:
        fail(f"{where}: is not a line of JSON ({error}), got {line[:60]!r}; make it with format_converting_*.py")
    if not isinstance(example, dict):
        fail(f"{where}: wanted a JSON object with context and completion, got {line[:60]!r}")
    for key in ("context", "completion"):
        if not isinstance(example.get(key), str) or not example[key].strip():
            fail(f"{where}: wanted a text that is not empty as {key!r}, got {str(example.get(key))[:60]!r}")
        if not is_text(example[key]):
            fail(f"{where}: {key!r} holds half of a surrogate pair, which is not text; correct or remove the line")
    return example["context"], example["completion"]


def read_examples(path: str) -> Iterator[tuple[str, str]]:
    for number, line in read_lines(path, "--input"):
        context, completion = read_example(line, f"{path}:{number}")
        if number == 1 and context.startswith(BOM):  # it stood at the start of the source; elsewhere it may be a text's
            fail(f"{path}:1: 'context' begins with a byte-order mark (U+FEFF); format its source again")
        yield context, completion


def marker(token: int | None, kind: str, vocab: str) -> int:
    """The id of a special token; UserError where the tokenizer has none."""
    if token is None:
        fail(f"--add_{kind}: the tokenizer in --vocab {vocab} names no {kind} token; leave the flag out")
    return token


def main() -> None:
    parser = Parser(description="GPT-2 BPE of formatted examples")
    parser.add_argument("--vocab", default="vocab", help=f"{VOCAB_HELP} (default: vocab)")
    parser.add_argument("--input", required=True, help="formatted JSON lines to read")
    parser.add_argument("--output", required=True, help="JSON lines of token ids to write")
    parser.add_argument(
        "--add_bos", action="store_true", help="append the bos token, GPT-2's <|endoftext|>, to the context"
    )
    parser.add_argument(
        "--add_eos", action="store_true", help="append the eos token, GPT-2's <|endoftext|>, to the completion"
    )
    parser.add_argument("--chat_template", nargs="?", const="", help=CHAT_TEMPLATE_HELP)
    args = parser.parse_args()
    if args.chat_template is not None:
        fail(f"--chat_template: {CHAT_TEMPLATE_HELP}")
    check_output(args.output, args.input, "--output")
    tokenizer = load_tokenizer(args.vocab)
    bos = [marker(tokenizer.begin_of_text, "bos", args.vocab)] if args.add_bos else []
    eos = [marker(tokenizer.end_of_text, "eos", args.vocab)] if args.add_eos else []

    count = tokens = 0
    examples = read_examples(args.input)
    bar = tqdm(desc="encode", unit=" lines", disable=not sys.stderr.isatty())
    with atomic_write(args.output) as out, bar:
        while chunk := list(itertools.islice(examples, CHUNK)):
            contexts = tokenizer.encode_batch([context for context, _ in chunk])
            completions = tokenizer.encode_batch([" " + completion for _, completion in chunk], after=True)
            for context, completion in zip(contexts, completions, strict=True):
                encoded = {"context": [*tokenizer.prefix, *context, *bos], "completion": completion + eos}
                out.write(json.dumps(encoded) + "\n")
                tokens += len(encoded["context"]) + len(encoded["completion"])
            count += len(chunk)
            bar.update(len(chunk))
        if count == 0:
            fail(f"--input {args.input}: is empty, wanted a JSON object a line; make the file again")
    print(f"{args.output}: {count} examples, {tokens / count:.1f} tokens each on average")


if __name__ == "__main__":
    run_main(main)
