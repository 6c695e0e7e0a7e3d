"""Weight files of others: Hugging Face's pytorch_model.bin and model.safetensors with the config.json beside them.

They are read strictly: nothing in a file is executed, every weight of the file finds its place in the model, and every
weight of the model gets a value. Each function takes `flag`, the flag that gave the path, for its messages.
"""

import dataclasses
import hashlib
import json
import os
import pickle
import re
import warnings

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from base.errors import fail
from base.files import read_object
from model import MODEL_CARDS, GPT2Config, GPT2LMModel

PREFIX = "transformer."  # of this project's names; Hugging Face's files of the bare GPT2Model lack it
# Constant buffers of Hugging Face's older files (the causal mask), not weights.
MASK_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
HEAD_NAMES = ("lm_head.weight", "lm_head.decoder.weight")


def read_file(path: str, flag: str = "--init_checkpoint") -> dict:
    """The dict inside a weight file. Nothing in it is executed: tensors and plain values alone are accepted."""
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on the pickle's dialect
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        fail(f"{flag} {path}: cannot be read ({error.strerror or error})")
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else "it is no pickle of tensors"
        fail(f"{flag} {path}: refused, {reason}; nothing in it was run; wanted tensors and plain values alone")
    except Exception as error:  # the parsers raise whatever bytes of another kind lead them to
        fail(
            f"{flag} {path}: not a checkpoint, or a truncated one ({type(error).__name__}); "
            "wanted a .safetensors, a pytorch_model.bin or a model.{step}.pt"
        )
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        fail(f"{flag} {path}: not a checkpoint: holds a {type(content).__name__}, wanted a dict of named tensors")
    return content


def privacy_entry(path: str, content: dict) -> object:
    """What a weight file says of the runs behind it (run/provenance.py): the entry `privacy` of a file of ours, the
    JSON of that name in the metadata of an exported one; None where it says nothing. Not checked."""
    if not path.endswith(".safetensors"):
        return content.get("privacy")
    with safetensors.safe_open(path, framework="pt") as handle:
        text = (handle.metadata() or {}).get("privacy")
    try:
        return text and json.loads(text)
    except (ValueError, RecursionError):
        return text


def canonical_weights(content: dict, path: str, flag: str) -> dict[str, Tensor]:
    """A file's weights under this project's names, without constant buffers and the copy of the tied embedding."""
    raw = content.get("model_state_dict", content)
    if not isinstance(raw, dict) or not all(isinstance(name, str) for name in raw):
        fail(f"{flag} {path}: its entry 'model_state_dict' is no dict of named tensors")
    weights: dict[str, Tensor] = {}
    head: Tensor | None = None
    for name, value in raw.items():
        name = name.removeprefix("module.")
        bare = name.removeprefix(PREFIX)
        if MASK_BUFFERS.fullmatch(bare):
            continue
        if not isinstance(value, Tensor):
            fail(f"{flag} {path}: {name} is a {type(value).__name__}, wanted a tensor")
        if value.device.type != "cpu" or value.layout != torch.strided or not value.is_floating_point():
            fail(
                f"{flag} {path}: {name} is {value.dtype}, {value.layout}, {value.device}, "
                "wanted a dense floating-point tensor"
            )
        if name in HEAD_NAMES:
            head = value
        elif PREFIX + bare in weights:
            fail(f"{flag} {path}: holds {bare} twice, with and without the prefix {PREFIX!r}")
        else:
            weights[PREFIX + bare] = value
    embedding = weights.get(PREFIX + "wte.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        fail(f"{flag} {path}: its head lm_head.weight differs from wte.weight; only a tied head is supported")
    return weights


def load_strictly(model: GPT2LMModel, weights: dict[str, Tensor], path: str, flag: str) -> None:
    """Copy every weight of the file into the model and leave none of the model's without a value, except that a file
    without any adapter leaves the model's adapters as they were initialised.

    Raises UserError naming up to three weights that found no place, no value or another shape.
    """
    wanted = dict(model.named_parameters())
    lora_absent = not any("lora_" in name for name in weights)
    missing = [name for name in wanted if name not in weights and not (lora_absent and "lora_" in name)]
    unknown = [name for name in weights if name not in wanted]
    shaped = [
        f"{name} {tuple(weights[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    for names, what in ((shaped, "has another shape"), (missing, "lacks"), (unknown, "holds unknown")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            fail(
                f"{flag} {path}: {what}: {', '.join(names[:3])}{more}; does --model_card or --lora_dim match the file?"
            )
    with torch.no_grad():
        for name, value in weights.items():
            wanted[name].copy_(value)


def fingerprint(weights: dict[str, Tensor]) -> str:
    """A digest of every bit (as float32; half a second a gigabyte): any change of the frozen weights is noticed."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name]
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.float().contiguous().numpy())
    return digest.hexdigest()


def resolve_card(card: str) -> GPT2Config:
    """The shape that --model_card names: a card, or a folder or file in Hugging Face's layout."""
    return MODEL_CARDS[card] if card in MODEL_CARDS else read_config(card, "--model_card")


def read_config(path: str, flag: str = "--model_card") -> GPT2Config:
    """The GPT-2 shape in Hugging Face's config.json: `path` is that file, its folder, or a weight file beside it."""
    wanted = f"wanted one of {', '.join(MODEL_CARDS)} or a folder with config.json"
    if not os.path.exists(path):
        fail(f"{flag} {path}: no such file or folder; {wanted}")
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    file = path if path.endswith(".json") else os.path.join(folder, "config.json")
    if not os.path.exists(file):
        fail(f"{flag} {path}: there is no {file}; {wanted}")
    content = read_object(file, "the config.json of a GPT-2", flag)
    for key, only in (
        ("model_type", "gpt2"),
        ("activation_function", "gelu_new"),
        ("tie_word_embeddings", True),
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if content.get(key, only) != only:
            fail(f"{flag} {file}: {key} is {content[key]!r}; supported is {only!r} alone")
    known = {field.name for field in dataclasses.fields(GPT2Config)}
    return checked_config({key: value for key, value in content.items() if key in known}, f"{flag} {file}")


def checked_config(values: dict, where: str) -> GPT2Config:
    """GPT2Config(**values); a UserError that begins with `where` names what is missing or not a positive number."""
    for field in dataclasses.fields(GPT2Config):
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                fail(f"{where}: {field.name} is missing, so this is not the shape of a GPT-2")
            continue
        value = values[field.name]
        kinds = (int, float) if field.name == "layer_norm_epsilon" else (int,)
        optional = field.name == "n_inner" and value is None
        if not optional and (type(value) not in kinds or not 0 < value < 2**31):
            fail(f"{where}: {field.name} is {value!r}, wanted a positive {'' if float in kinds else 'whole '}number")
    try:
        config = GPT2Config(**values)
    except TypeError as error:
        fail(f"{where}: not the shape of a GPT-2 ({error})")
    if config.n_embd % config.n_head:
        fail(f"{where}: n_head is {config.n_head}, wanted a divisor of n_embd {config.n_embd}")
    return config


def same_shape(a: GPT2Config, b: GPT2Config) -> bool:
    return dataclasses.replace(a, n_inner=a.inner) == dataclasses.replace(b, n_inner=b.inner)
