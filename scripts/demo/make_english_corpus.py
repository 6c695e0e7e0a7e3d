"""The corpus and the vocabulary of the english base (scripts/make_checkpoint.sh english).

    python scripts/start.py make_english_corpus --text DIR --webnlg DIR --out DIR
    python scripts/start.py make_english_corpus --list      # the packages: file name, and name=version for apt-get

Of Debian's packages in --text (english_sources.py) and of WebNLG 2017's train.json and dev.json in --webnlg it makes
what follows, in --out. The sha256 of the packages, and of the texts that WebNLG gives, are checked.

    vocab/                 encoder.json and vocab.bpe: a byte-level BPE learned from the training texts below alone
    text_{train,valid}.jsonl   token file of the English: documents in random order with <|endoftext|> between them,
                           cut into blocks of --block ids; a document in --held_out is for validation
    form_{train,valid}_formatted.jsonl, form_{train,valid}.jsonl   WebNLG as E2E writes its facts and texts
    mixed_train.jsonl      form_train.jsonl, and half as many blocks of text_train.jsonl as it has lines
    corpus.json            what was read and made: packages, documents, blocks, and the bytes that the scored tokens
                           spell, by which a loss per token becomes one per byte

Nothing is read but what --text and --webnlg name. The same input gives the same bytes.
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Iterator
from typing import Any

from base.errors import fail
from base.files import atomic_write
from base.flags import Parser
from corpus.gpt2_tokenizer import GPT2Tokenizer
from corpus.triples import read_data
from english_sources import PACKAGES, Package, tidy, unpack
from make_demo_vocab import train, write_vocabulary

SEED = 1  # of the order of documents, and of which are held out
WEBNLG = {"train": "train.json", "valid": "dev.json"}
# Of form_{train,valid}_formatted.jsonl: what WebNLG's files say, however they write it.
FORM_SHA256 = {
    "train": "4e22d2870c415acbf5c8847fd882b88471ffa438d3c3a48d761f663010b10cd1",
    "valid": "fb090f934acbd9064fdb32da5cca7643a9d4cc11b2f88b9a39dd2847448846fa",
}


# ---------------------------------------------------------------- the English


def read_packages(folder: str, packages: tuple[Package, ...] = PACKAGES) -> tuple[list[str], list[dict]]:
    """(documents, a row about each package) of the packages in `folder`; UserError where one is absent or another."""
    documents, rows = [], []
    for package in packages:
        path = os.path.join(folder, package.file)
        try:
            with open(path, "rb") as handle:
                content = handle.read()
        except OSError as error:
            fail(
                f"--text {path}: {error.strerror}; fetch it: apt-get download {package.name}={package.version} on "
                "Debian 12"
            )
        digest = hashlib.sha256(content).hexdigest()
        if digest != package.sha256:
            fail(f"--text {path}: has the sha256 {digest}, wanted {package.sha256}; fetch it again")
        own = [line for text in package.documents(unpack(content, path)) if (line := tidy(text))]
        size = sum(len(text.encode()) for text in own)
        rows.append(
            {
                "package": package.name,
                "version": package.version,
                "sha256": digest,
                "documents": len(own),
                "bytes": size,
            }
        )
        print(f"{package.name}: {len(own)} documents, {size} bytes", flush=True)
        documents += own
    return list(dict.fromkeys(documents)), rows


def hold_out(documents: list[str], held_out: int) -> dict[str, list[str]]:
    """part -> documents in random order; one in `held_out` is for validation."""
    mixed = list(documents)
    random.Random(SEED).shuffle(mixed)
    return {"train": mixed[len(mixed) // held_out :], "valid": mixed[: len(mixed) // held_out]}


def cut_blocks(texts: list[str], tokenizer: GPT2Tokenizer, block: int) -> Iterator[list[int]]:
    """The documents' ids with <|endoftext|> before each, in blocks of `block` ids; the rest of the last is left out."""
    waiting: list[int] = []
    for ids in tokenizer.encode_batch(texts):
        waiting += [tokenizer.end_of_text, *ids]
        while len(waiting) >= block:
            yield waiting[:block]
            del waiting[:block]


# ---------------------------------------------------------------- WebNLG in E2E's form


def tokenised(text: str) -> str:
    """Spaces as in E2E's texts: around every mark but a point inside a number; an apostrophe begins a word."""
    return " ".join(re.findall(r"\d+(?:[.,]\d+)+|'?[^\W_]+|[^\w\s]", text))


def plain(name: str) -> str:
    """An entity of DBpedia as words: `"Aarhus,_Denmark"` -> Aarhus , Denmark."""
    return tokenised(name.strip('"').replace("_", " "))


def attribute(relation: str) -> str:
    """A relation of DBpedia as words: elevationAboveTheSeaLevel_(in_metres) -> elevation above the sea level."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", re.sub(r"\(.*\)", "", relation).replace("_", " "))
    return tokenised(words.lower())


def facts(triples: list[dict]) -> str:
    """`name : X | attribute : value | ...`: the facts about each subject behind its name."""
    parts, subject = [], None
    for triple in sorted(triples, key=lambda one: [other["subject"] for other in triples].index(one["subject"])):
        if triple["subject"] != subject:
            subject = triple["subject"]
            parts.append(f"name : {plain(subject)}")
        parts.append(f"{attribute(triple['property'])} : {plain(triple['object'])}")
    return " | ".join(parts)


def read_webnlg(path: str) -> list[dict[str, str]]:
    """{"context", "completion"} of each text that was judged good."""
    wanted = f"--webnlg {path}: wanted WebNLG 2017's JSON, as scripts/create_datasets.sh webnlg fetches it"
    examples = []
    try:
        content: Any = read_data(path, "its JSON")
        for entry in content["entries"]:
            for record in entry.values():
                context = facts(record["modifiedtripleset"])
                texts = [one["lex"] for one in record["lexicalisations"] if one["comment"] == "good"]
                examples += [{"context": context, "completion": text} for text in map(tokenised, texts) if text]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        fail(f"{wanted}; {type(error).__name__}: {error}")
    if not examples:
        fail(f"{wanted}; it holds no text")
    return examples


# ---------------------------------------------------------------- the files


def as_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def encode_forms(forms: list[dict[str, str]], tokenizer: GPT2Tokenizer) -> list[dict[str, list[int]]]:
    """The examples as gpt2_encode.py --add_bos --add_eos writes them."""
    end = [tokenizer.end_of_text]
    contexts = tokenizer.encode_batch([one["context"] for one in forms])
    completions = tokenizer.encode_batch([f" {one['completion']}" for one in forms])
    return [
        {"context": context + end, "completion": completion + end}
        for context, completion in zip(contexts, completions, strict=True)
    ]


def make(
    documents: list[str], forms: dict[str, list[dict[str, str]]], out: str, size: int, block: int, held_out: int
) -> dict:
    """Write all files but corpus.json; returns what it says of them. forms: part -> WebNLG's examples."""
    texts = hold_out(documents, held_out)
    learned_from = [text for one in forms["train"] for text in (one["context"], f" {one['completion']}")]
    os.makedirs(os.path.join(out, "vocab"), exist_ok=True)
    vocabulary = train([*texts["train"], *learned_from], size)
    tokenizer = GPT2Tokenizer(*write_vocabulary(os.path.join(out, "vocab"), *vocabulary))
    report: dict = {"vocabulary": tokenizer.vocab_size}
    files: dict[str, list] = {}
    for part in texts:
        blocks = [{"context": ids[:1], "completion": ids[1:]} for ids in cut_blocks(texts[part], tokenizer, block)]
        if not blocks:
            fail(f"--block {block}: the texts for {part} fill none; lower it or --held_out")
        encoded = encode_forms(forms[part], tokenizer)
        files[f"text_{part}"], files[f"form_{part}"], files[f"form_{part}_formatted"] = blocks, encoded, forms[part]
        spelled = (tokenizer.decode([i for i in one["completion"] if i != tokenizer.end_of_text]) for one in blocks)
        report[f"text_{part}"] = {
            "documents": len(texts[part]),
            "blocks": len(blocks),
            "scored_tokens": len(blocks) * (block - 1),
            "scored_bytes": sum(len(text.encode()) for text in spelled),
        }
        report[f"form_{part}"] = {
            "contexts": len({one["context"] for one in forms[part]}),
            "examples": len(encoded),
            "scored_tokens": sum(len(one["completion"]) for one in encoded),
            "scored_bytes": sum(len(f" {one['completion']}".encode()) for one in forms[part]),
        }
    blocks, encoded = files["text_train"], files["form_train"]
    files["mixed_train"] = [*encoded, *random.Random(SEED).sample(blocks, min(len(blocks), len(encoded) // 2))]
    seen = {token for one in [*blocks, *encoded] for token in (*one["context"], *one["completion"])}
    report["pieces_seen"] = len(seen)
    for name, records in files.items():
        with atomic_write(os.path.join(out, f"{name}.jsonl")) as handle:
            handle.write(as_lines(records))
    return report


def check_forms(forms: dict[str, list[dict[str, str]]]) -> None:
    """UserError where the examples are not those of WebNLG 2017."""
    for part, examples in forms.items():
        digest = hashlib.sha256(as_lines(examples).encode()).hexdigest()
        if digest != FORM_SHA256[part]:
            fail(
                f"--webnlg {WEBNLG[part]}: its {len(examples)} texts have the sha256 {digest}, wanted "
                f"{FORM_SHA256[part]}, WebNLG 2017's as LoRA's NLG example has it; fetch it again"
            )


def main() -> None:
    parser = Parser(description="corpus and vocabulary of the english base")
    parser.add_argument("--list", action="store_true", help="print the packages and end")
    parser.add_argument("--text", help="folder of Debian's packages")
    parser.add_argument("--webnlg", help="folder of WebNLG 2017's train.json and dev.json")
    parser.add_argument("--out", help="folder of what is made; made where it is missing")
    parser.add_argument("--size", type=int, default=8192, help="ids of the vocabulary (default: 8192)")
    parser.add_argument("--block", type=int, default=256, help="ids of a block (default: 256)")
    parser.add_argument("--held_out", type=int, default=200, help="one document in so many (default: 200)")
    args = parser.parse_args()
    if args.list:
        print("".join(f"{package.file} {package.name}={package.version}\n" for package in PACKAGES), end="")
        return
    for name in ("text", "webnlg", "out"):
        if getattr(args, name) is None:
            fail(f"--{name}: give a folder; --text, --webnlg and --out are needed")
    for name, least in (("size", 258), ("block", 2), ("held_out", 2)):
        if getattr(args, name) < least:
            fail(f"--{name} {getattr(args, name)}: wanted at least {least}")
    documents, packages = read_packages(args.text)
    forms = {part: read_webnlg(os.path.join(args.webnlg, file)) for part, file in WEBNLG.items()}
    check_forms(forms)
    report = {"packages": packages, **make(documents, forms, args.out, args.size, args.block, args.held_out)}
    with atomic_write(os.path.join(args.out, "corpus.json")) as handle:  # last: it makes the folder whole
        handle.write(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
