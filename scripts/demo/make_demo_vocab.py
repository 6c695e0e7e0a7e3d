"""Train the demonstration's byte-level BPE and write it in GPT-2's file format: encoder.json and vocab.bpe.

    python scripts/start.py make_demo_vocab --train data/demo/public_train.txt --out vocab/demo
    python scripts/start.py make_demo_vocab --vocab vocab/demo --out DIR    # the same vocabulary as tokenizer.json

It reads only the *public* domain's text. A vocabulary is published with the model, and no noise protects it: if it came
from the private text, a merge could reveal a word of a single record, which the reported epsilon does not cover. The
price is a few more tokens for a private word.

As in GPT-2, ids 0..255 are the bytes, then come the merges in the order in which they were learnt, and <|endoftext|> is
the last id.
"""

import json
import os

import tokenizers

from base.errors import fail
from base.files import atomic_write, read_lines
from base.flags import Parser
from corpus.gpt2_tokenizer import ALPHABET, END_OF_TEXT, read_pair
from corpus.tokenizer import vocabulary_files


def training_texts(path: str) -> list[str]:
    """What gpt2_encode.py will encode: contexts, and completions with one space before them."""
    texts = []
    for number, line in read_lines(path, "--train"):
        context, bars, completion = line.partition("||")
        if not bars:
            fail(f"{path}:{number}: wanted context||completion, got {line[:60]!r}; make it with make_demo_data.py")
        texts += [context, f" {completion}"]
    if not texts:
        fail(f"--train {path}: is empty; make it with make_demo_data.py --domain public")
    return texts


def train(texts: list[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(symbol -> id, merges), `size` ids in all; UserError where the text has too few pairs for so many."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted(ALPHABET)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    vocab = bpe.get_vocab()
    if len(vocab) != size - 1:
        fail(f"--size {size}: the text only gives {len(vocab) + 1} ids; ask for fewer or give more text")
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    return {**vocab, END_OF_TEXT: size - 1}, merges


def write_vocabulary(
    folder: str, vocab: dict[str, int], merges: list[tuple[str, str]]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Write the two files into `folder`; returns what they hold, as it was given."""
    with atomic_write(os.path.join(folder, "encoder.json")) as out:
        out.write(json.dumps(dict(sorted(vocab.items(), key=lambda item: item[1]))))
    with atomic_write(os.path.join(folder, "vocab.bpe")) as out:
        out.write("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    return vocab, merges


def write_whole(source: str, folder: str) -> int:
    """Write the two files in `source` as tokenizer.json into `folder`, <|endoftext|> as a special token; the number of
    ids."""
    files = vocabulary_files(source)
    if len(files) != 2:
        fail(f"--vocab {source}: holds a {os.path.basename(files[0])} already; wanted encoder.json and vocab.bpe")
    read_pair(*files)  # a UserError for what is wrong with them
    whole = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    whole.decoder = tokenizers.decoders.ByteLevel()
    whole.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    with atomic_write(os.path.join(folder, "tokenizer.json")) as out:
        out.write(f"{whole.to_str()}\n")
    return whole.get_vocab_size()


def main() -> None:
    parser = Parser(description="train the demonstration's vocabulary")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--train", help="public text, context||completion a line")
    source.add_argument("--vocab", help="folder of encoder.json and vocab.bpe, to be written as tokenizer.json")
    parser.add_argument("--out", default="vocab/demo", help="folder of the files (default: vocab/demo)")
    parser.add_argument("--size", type=int, default=1500, help="ids in all, <|endoftext|> included (default: 1500)")
    args = parser.parse_args()
    if args.size <= len(ALPHABET) + 1:
        fail(f"--size {args.size}: wanted more than {len(ALPHABET) + 1}, the bytes and {END_OF_TEXT}")
    if not os.path.isdir(args.out):
        fail(f"--out {args.out}: no such folder; make it first")

    if args.vocab is not None:
        if os.path.realpath(args.out) == os.path.realpath(args.vocab):
            fail(f"--out {args.out}: is the folder of --vocab; name another, since one folder holds one form")
        print(f"{args.out}/tokenizer.json: {write_whole(args.vocab, args.out)} ids")
        return
    vocab, merges = write_vocabulary(args.out, *train(training_texts(args.train), args.size))
    print(f"{args.out}: {len(vocab)} ids, {len(merges)} merges")
