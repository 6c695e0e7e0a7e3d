"""Write a model for Hugging Face's libraries: whole, with the adapters merged, or the adapter alone for peft.

    python src/export.py --init_checkpoint trained_models/e2e --output exported --vocab vocab
    python src/export.py --init_checkpoint trained_models/e2e --output adapter --format peft --base_name gpt2-medium

merged  config.json and model.safetensors, for transformers' from_pretrained; --vocab adds the tokenizer's files.
peft    adapter_config.json and adapter_model.safetensors, for peft's PeftModel.from_pretrained(base, folder).

Where the weights come from runs with a ledger, what each of them spent is said in the weights' metadata and in a
privacy.json beside them, so that a run that starts from here can name it (run/provenance.py).
"""

import base.early  # noqa: F401  # isort: skip  # before slow imports

import json
import math
import os
import sys

import safetensors.torch
from torch import Tensor

import loralib as lora
from base.errors import fail, run_main
from base.files import atomic_write, check_link, read_object
from base.flags import Parser, check_least, check_positive
from corpus.tokenizer import END_OF_TEXT, FORMS, Tokenizer, load_tokenizer, vocabulary_files
from model import SLOTS, GPT2Config, GPT2LMModel
from privacy.ledger import FILE_NAME
from run import provenance
from weights import peft_format
from weights.checkpoint import Loaded, load_trained
from weights.foreign import WEIGHT_FILES, fingerprint

WEIGHTS = {"merged": "model.safetensors", "peft": "adapter_model.safetensors"}
# The tokenizer's files: OpenAI's names, and Hugging Face's for the same content.
VOCABULARY = dict(zip(*FORMS[:2], strict=True))


def hugging_face_config(config: GPT2Config, end_of_text: int) -> dict:
    """config.json of a GPT2LMHeadModel of this shape; this project's GPT-2 has no dropout."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_ctx": config.n_positions,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_inner,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


def tokenizer_config(config: GPT2Config) -> dict:
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


def base_weights(model: GPT2LMModel) -> dict[str, Tensor]:
    """name -> float32 tensor, a view of the frozen weight; the head is the token embedding and is left out."""
    return {name: value.detach() for name, value in model.named_parameters() if "lora_" not in name}


def merged_weights(model: GPT2LMModel) -> dict[str, Tensor]:
    """base_weights() with the adapters folded in."""
    lora.merge(model)
    weights = {name: value.clone() for name, value in base_weights(model).items()}
    lora.unmerge(model)
    return weights


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


def write_json(path: str, content: dict) -> None:
    with atomic_write(path) as handle:
        json.dump(content, handle, indent=1, ensure_ascii=False)
        handle.write("\n")


def write_tokenizer(vocab: str, output: str, config: GPT2Config) -> None:
    for path in vocabulary_files(vocab):
        with open(path, "rb") as source:
            content = source.read()
        name = os.path.basename(path)
        with atomic_write(os.path.join(output, VOCABULARY.get(name, name)), "wb") as handle:
            handle.write(content)
    write_json(os.path.join(output, "tokenizer_config.json"), tokenizer_config(config))


def open_vocabulary(folder: str, config: GPT2Config) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        fail(f"--vocab {folder}: has {tokenizer.vocab_size} ids, the model {config.vocab_size}; give the model's own")
    return tokenizer


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--init_checkpoint", required=True, help="a file or folder: a training's, Hugging Face's or PEFT's")
    add("--model_card", help="needed where the checkpoint does not say its shape")
    add("--base_checkpoint", help="the frozen weights under an adapter-only checkpoint, if not where it says")
    add("--lora_dim", type=int, help="rank of the adapters, where a checkpoint of the published code does not say it")
    add("--lora_alpha", type=float, help="their alpha, likewise")
    add("--lora_target", nargs="+", choices=SLOTS, help="their parts, likewise (default query value)")
    add("--vocab", help="folder of the vocabulary: adds the tokenizer's files")
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
    for name in (*WEIGHTS.values(), FILE_NAME):
        if os.path.exists(os.path.join(args.output, name)):
            fail(f"--output {args.output}: holds a {name}; choose another folder")
    adapter = (args.lora_dim, args.lora_alpha, args.lora_target)
    loaded = load_trained(args.init_checkpoint, args.model_card, args.base_checkpoint, *adapter)
    model = loaded.model
    tokenizer = open_vocabulary(args.vocab, model.config) if args.vocab else None
    spent = provenance.spent_report(loaded)
    metadata = {"format": "pt", **({"privacy": json.dumps(spent)} if spent else {})}
    if args.format == "peft":
        if not lora.adapted_layers(model):
            fail(f"--format peft: {loaded.path} holds no adapter; leave --format out")
        name, (config, weights) = peft_format.CONFIG, peft_format.from_ours(model, name_base(loaded, args.base_name))
        metadata["base_fingerprint"] = fingerprint(base_weights(model))  # so that no other base is taken for it
    else:
        end_of_text = tokenizer.end_of_text if tokenizer else model.config.end_of_text
        name, config, weights = "config.json", hugging_face_config(model.config, end_of_text), merged_weights(model)

    report = os.path.join(args.output, provenance.REPORT_NAME)
    # A killed export has left the same one.
    if os.path.exists(report) and read_object(report, "what another export wrote", "--output") != spent:
        fail(f"--output {args.output}: holds a {provenance.REPORT_NAME} of other weights; choose another folder")
    check_link(args.output, "--output")
    os.makedirs(args.output, exist_ok=True)
    if spent:
        write_json(report, spent)
    if tokenizer:
        write_tokenizer(args.vocab, args.output, model.config)
    write_json(os.path.join(args.output, name), config)
    # The weights come last: they make the folder whole.
    with atomic_write(os.path.join(args.output, WEIGHTS[args.format]), "wb") as handle:
        handle.write(safetensors.torch.save(weights, metadata=metadata))
    print(
        f"wrote {args.output}: {sum(value.numel() for value in weights.values())} parameters"
        + (f", to be put on {config['base_model_name_or_path']}" if args.format == "peft" else "")
        + (f"; {provenance.REPORT_NAME} says what the runs behind them spent" if spent else "")
    )


if __name__ == "__main__":
    run_main(main)
