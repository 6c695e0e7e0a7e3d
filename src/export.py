"""Write a model for Hugging Face's libraries: whole, with the adapters merged, or the adapter alone for peft.

    python src/export.py --init_checkpoint trained_models/e2e --output exported --vocab vocab
    python src/export.py --init_checkpoint trained_models/e2e --output adapter --format peft --base_name gpt2-medium

merged  config.json and model.safetensors, for transformers' from_pretrained; --vocab adds the tokenizer's files, and
        --float16 rounds the weights to half the size (to 11 bits; every script here computes with them in float32).
peft    adapter_config.json and adapter_model.safetensors, for peft's PeftModel.from_pretrained(base, folder).

Where the weights come from runs with a ledger, what each of them spent is said in the weights' metadata and in a
privacy.json beside them, so that a run that starts from here can name it (run/provenance.py). README.md is a model
card: it says what the training promises (run/card.py), or that nothing is claimed.
"""

import base.early  # noqa: F401  # isort: skip  # before slow imports

import json
import math
import os
import re
import sys

import safetensors.torch
import torch
from torch import Tensor

import loralib as lora
from base.errors import fail, run_main
from base.files import atomic_write, check_link, open_text, read_object
from base.flags import Parser, check_least, check_positive
from corpus.gpt2_tokenizer import END_OF_TEXT
from corpus.tokenizer import (
    FORMS,
    check_vocabulary_fits,
    companion_files,
    foreign_vocabulary,
    has_gpt2_form,
    load_tokenizer,
)
from families import PARTS
from language_model import EVERY_PART, LanguageModel, Shape, is_adapter
from privacy.ledger import FILE_NAME
from run import card, provenance
from weights import peft_format
from weights.checkpoint import Loaded, load_trained
from weights.foreign import PREFIX, WEIGHT_FILES, fingerprint

WEIGHTS = {"merged": "model.safetensors", "peft": "adapter_model.safetensors"}
README = "README.md"
# The tokenizer's files: OpenAI's names, and Hugging Face's for the same content.
VOCABULARY = dict(zip(*FORMS[:2], strict=True))


def tokenizer_config(config: Shape) -> dict:
    """tokenizer_config.json. <|endoftext|> inside a text is the special token there, as with every GPT-2 of
    transformers; for gpt2_encode.py it is text. All other texts get the same ids."""
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "model_max_length": config.n_positions,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
    }


def base_weights(model: LanguageModel) -> dict[str, Tensor]:
    """name -> float32 tensor, a view of the frozen weight; a head that is the token embedding is left out."""
    return {name: value.detach() for name, value in model.named_parameters() if not is_adapter(name)}


def merged_weights(model: LanguageModel) -> dict[str, Tensor]:
    """base_weights() with the adapters folded in, under Hugging Face's names."""
    lora.merge(model)
    weights = {
        name.replace(PREFIX, model.HUGGING_FACE, 1): value.clone() for name, value in base_weights(model).items()
    }
    lora.unmerge(model)
    return weights


def to_float16(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float16. UserError where one is beyond its range."""
    for name, value in weights.items():
        if not bool((value.abs() <= torch.finfo(torch.float16).max).all()):
            fail(f"--float16: {name} holds a weight beyond 65504, float16's largest; leave the flag out")
    return {name: value.half() for name, value in weights.items()}


def name_base(loaded: Loaded, given: str | None) -> str:
    """base_model_name_or_path: what --base_name says, else where the frozen weights lie, as a folder where transformers
    would find them by it."""
    if given is not None:
        return given
    if loaded.base is None:
        fail(
            f"{loaded.path}: holds the frozen weights beside its adapters, so no file of them can be named; give "
            "--base_name, or export --format merged"
        )
    folder, name = os.path.split(loaded.base["absolute"])
    whole = name in WEIGHT_FILES and os.path.isfile(os.path.join(folder, "config.json"))
    return folder if whole else loaded.base["absolute"]


def write_text(path: str, text: str) -> None:
    with atomic_write(path) as handle:
        handle.write(text)


def write_json(path: str, content: dict) -> None:
    with atomic_write(path) as handle:
        json.dump(content, handle, indent=1, ensure_ascii=False)
        handle.write("\n")


def write_tokenizer(vocab: str, output: str, config: Shape) -> None:
    """GPT-2's vocabulary by Hugging Face's names, with a tokenizer_config.json; any other's files as they are."""
    for path in companion_files(vocab):
        with open(path, "rb") as source:
            content = source.read()
        name = os.path.basename(path)
        with atomic_write(os.path.join(output, VOCABULARY.get(name, name)), "wb") as handle:
            handle.write(content)
    if has_gpt2_form(vocab):
        write_json(os.path.join(output, "tokenizer_config.json"), tokenizer_config(config))


def model_card(loaded: Loaded, spent: dict | None, form: str, base_name: str | None) -> str:
    """README.md: front matter for the hub, how to read the folder, and what its training promises."""
    library = {"merged": "transformers", "peft": "peft"}[form]
    matter = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if base_name is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_name) and not os.path.exists(base_name):
        matter.append(f"base_model: {base_name}")
    found = provenance.ledger_of(loaded, spent)
    unchecked = [] if spent is None else [card.UNCHECKED]
    promise = card.collect(*found, spent_beside(found[0], spent)) if found else card.Card([card.NO_CLAIM, *unchecked])
    kind = loaded.model.config.to_hugging_face(None)["model_type"]
    matter += [
        "tags:",
        f"- {kind}",
        *(["- differential-privacy"] if promise.epsilon < math.inf and promise.rows else []),
    ]
    use = {
        "merged": "Read it with `transformers.AutoModelForCausalLM.from_pretrained(folder)`.",
        "peft": "An adapter: read it with `peft.PeftModel.from_pretrained(base, folder)`.",
    }[form]
    front = "\n".join(["---", *matter, "---"])
    return f"{front}\n\n# {kind}, fine-tuned\n\n{use}\n\n{card.as_markdown(promise, level=2)}"


def spent_beside(ledger: str, spent: dict | None) -> dict | None:
    """What the privacy.json beside a ledger says, with the runs before that the weights themselves name."""
    path = os.path.join(os.path.dirname(ledger), provenance.REPORT_NAME)
    report = read_object(path, "the run's object") if os.path.exists(path) else {"disclosed": ["not known"]}
    return {**report, "initial_weights": (spent or {}).get("initial_weights", [])}


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--init_checkpoint",
        required=True,
        help="a file (an average.{step}.pt, too) or folder: a training's, Hugging Face's or PEFT's",
    )
    add("--model_card", help="needed where the checkpoint does not say its shape")
    add("--base_checkpoint", help="the frozen weights under an adapter-only checkpoint, if not where it says")
    add("--lora_dim", type=int, help="rank of the adapters, where a checkpoint of the published code does not say it")
    add("--lora_alpha", type=float, help="their alpha, likewise")
    add("--lora_target", nargs="+", choices=(*PARTS, EVERY_PART), help="their parts, likewise (default query value)")
    add(
        "--vocab",
        help="folder of the vocabulary: adds the tokenizer's files (default: beside the weights, unless GPT-2's)",
    )
    add("--float16", action="store_true", help="for merged: weights in float16, half the size")
    add("--format", choices=tuple(WEIGHTS), default="merged", help="what to write (default merged)")
    add(
        "--base_name",
        metavar="NAME",
        help="for peft: what the adapter names as its base, a name or a folder (default: where its frozen weights lie)",
    )
    add("--output", required=True, help="folder to write; it must hold no model yet")
    args = parser.parse_args(sys.argv[1:])
    check_least(args, lora_dim=0)
    check_positive(args, lora_alpha=math.inf)
    if args.base_name is not None and args.format != "peft":
        fail(f"--base_name {args.base_name}: means nothing with --format {args.format}")
    if args.float16 and args.format != "merged":
        fail(f"--float16: means nothing with --format {args.format}")
    for name in (*WEIGHTS.values(), FILE_NAME):
        if os.path.exists(os.path.join(args.output, name)):
            fail(f"--output {args.output}: holds a {name}; choose another folder")
    adapter = (args.lora_dim, args.lora_alpha, args.lora_target)
    loaded = load_trained(args.init_checkpoint, args.model_card, args.base_checkpoint, *adapter)
    model = loaded.model
    if model.lora_config.bottleneck:
        fail(
            f"--init_checkpoint {loaded.path}: holds bottleneck adapters (--adapter_dim), which cannot be merged into "
            "the weights nor written for peft; use the checkpoint itself, or train with --lora_dim"
        )
    places = (args.init_checkpoint, args.base_checkpoint, loaded.base_path)
    vocab = args.vocab or foreign_vocabulary(*places)
    tokenizer = load_tokenizer(vocab) if vocab else None
    if vocab and tokenizer:
        named = f"--init_checkpoint {args.init_checkpoint}"
        check_vocabulary_fits(vocab, tokenizer.vocab_size, model.config.vocab_size, named, *places)
    spent = provenance.spent_report(loaded)
    metadata = {"format": "pt", **({"privacy": json.dumps(spent)} if spent else {})}
    if args.format == "peft":
        if not lora.adapted_layers(model):
            fail(f"--format peft: {loaded.path} holds no adapter; leave --format out")
        name, (config, weights) = peft_format.CONFIG, peft_format.from_ours(model, name_base(loaded, args.base_name))
        # so that no other base is taken for it
        metadata["base_fingerprint"] = loaded.base["fingerprint"] if loaded.base else fingerprint(base_weights(model))
    else:
        end_of_text = tokenizer.end_of_text if tokenizer else None
        name, config, weights = "config.json", model.config.to_hugging_face(end_of_text), merged_weights(model)
        if args.float16:
            config, weights = {**config, "dtype": "float16"}, to_float16(weights)

    report = os.path.join(args.output, provenance.REPORT_NAME)
    # A killed export has left the same one.
    if os.path.exists(report) and read_object(report, "what another export wrote", "--output") != spent:
        fail(f"--output {args.output}: holds a {provenance.REPORT_NAME} of other weights; choose another folder")
    readme, text = os.path.join(args.output, README), model_card(loaded, spent, args.format, args.base_name)
    if os.path.exists(readme):
        with open_text(readme, "--output") as page:
            if page.read() != text:
                fail(f"--output {args.output}: holds a {README} of something else; choose another folder")
    check_link(args.output, "--output")
    os.makedirs(args.output, exist_ok=True)
    write_text(readme, text)
    if spent:
        write_json(report, spent)
    if vocab:
        write_tokenizer(vocab, args.output, model.config)
    write_json(os.path.join(args.output, name), config)
    # The weights come last: they make the folder whole.
    with atomic_write(os.path.join(args.output, WEIGHTS[args.format]), "wb") as handle:
        handle.write(safetensors.torch.save(weights, metadata=metadata))
    print(
        f"wrote {args.output}: {sum(value.numel() for value in weights.values())} parameters in "
        f"{'float16' if args.float16 else 'float32'}"
        + (f", to be put on {config['base_model_name_or_path']}" if args.format == "peft" else "")
        + (f"; {provenance.REPORT_NAME} says what the runs behind them spent" if spent else "")
    )
    if args.format == "peft" and loaded.base and "dtype" in loaded.base:
        print(
            "the adapter was trained on a base rounded to bfloat16 (--base_dtype bf16); read in bfloat16, the base has "
            "the same weights"
        )
    if not vocab:
        print("no tokenizer was found beside the weights, and none was written; --vocab FOLDER adds one")


if __name__ == "__main__":
    run_main(main)
