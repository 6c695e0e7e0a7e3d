"""Write a model as a folder in Hugging Face's layout, adapters merged: config.json, model.safetensors, tokenizer files.

    python src/export.py --init_checkpoint trained_models/e2e --output exported --vocab vocab
"""

import json
import os
import shutil
import sys

import safetensors.torch
from torch import Tensor

import loralib as lora
from checkpoint import load_model
from cli import Parser, atomic_write, fail, run_main
from model import GPT2Config, GPT2LMModel


def hugging_face_config(config: GPT2Config, end_of_text: int) -> dict:
    """config.json of a GPT2LMHeadModel of this shape; this project's GPT-2 has no dropout."""
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "vocab_size": config.vocab_size, "n_positions": config.n_positions, "n_ctx": config.n_positions,
        "n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head, "n_inner": config.n_inner,
        "layer_norm_epsilon": config.layer_norm_epsilon, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        "initializer_range": 0.02, "tie_word_embeddings": True, "bos_token_id": end_of_text, "eos_token_id": end_of_text,
    }


def merged_weights(model: GPT2LMModel) -> dict[str, Tensor]:
    """name -> float32 tensor, the adapters folded in; the head is the token embedding and is left out."""
    lora.merge(model)
    weights = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" not in name}
    lora.unmerge(model)
    return weights


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--init_checkpoint", required=True, help="a file or a training folder")
    parser.add_argument("--model_card", help="needed where the checkpoint does not say its shape")
    parser.add_argument("--base_checkpoint", help="the frozen weights under an adapter-only checkpoint, if they were moved")
    parser.add_argument("--vocab", help="folder with encoder.json and vocab.bpe, written as vocab.json and merges.txt")
    parser.add_argument("--output", required=True, help="folder to write; it must hold no model yet")
    args = parser.parse_args(sys.argv[1:])
    if os.path.exists(os.path.join(args.output, "model.safetensors")):
        fail(f"--output {args.output}: holds a model.safetensors; choose another folder")
    model = load_model(args.init_checkpoint, args.model_card, None, args.base_checkpoint).model
    names = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
    for name in names if args.vocab else ():
        if not os.path.isfile(os.path.join(args.vocab, name)):
            fail(f"--vocab {args.vocab}: holds no {name}")
    os.makedirs(args.output, exist_ok=True)
    for name, target in names.items() if args.vocab else ():
        shutil.copyfile(os.path.join(args.vocab, name), os.path.join(args.output, target))
    with atomic_write(os.path.join(args.output, "config.json")) as handle:
        json.dump(hugging_face_config(model.config, model.config.vocab_size - 1), handle, indent=1)
        handle.write("\n")
    with atomic_write(os.path.join(args.output, "model.safetensors"), "wb") as handle:
        handle.write(safetensors.torch.save(merged_weights(model), metadata={"format": "pt"}))
    print(f"wrote {args.output}: {sum(p.numel() for p in model.parameters())} parameters")


if __name__ == "__main__":
    run_main(main)
