"""Weight files of others: Hugging Face's pytorch_model.bin and model.safetensors, whole or in shards with an index,
with the config.json beside them; and files of models that something had wrapped when they were saved.

They are read strictly: nothing in a file is executed, every weight of the file finds its place in the model, and every
weight of the model gets a value. Each function takes `flag`, the flag that gave the path, for its messages.
"""

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
from base.files import check_pointer, folder_below, read_object
from families import DEFAULT, family_of, of_model_type, of_names
from language_model import LanguageModel, Shape, is_adapter, reset_adapters
from model import MODEL_CARDS

PREFIX = "transformer."  # of this project's names; Hugging Face's files of the bare model lack it, or have another
HEAD = "lm_head.weight"
HEAD_NAMES = (HEAD, "lm_head.decoder.weight")
# Parts of names that wrappers put in and that change no arithmetic. No weight's name has them in its model's file, but
# for the prefix of Hugging Face's Llamas, "model.".
WRAPPERS = {
    "module",  # DistributedDataParallel and DataParallel
    "_module",  # Opacus's GradSampleModule
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",  # activation checkpointing
    "_forward_module",  # Lightning Fabric
    "model",  # the usual attribute of a LightningModule
    "base_model",  # PEFT's "base_model.model."
}
# Where a file holds more than weights, the entry that holds them: the published code's, Lightning's, nanoGPT's and
# DeepSpeed's.
ENTRIES = ("model_state_dict", "state_dict", "model", "module")
MERGE = "merge the adapter into its base with peft (merge_and_unload(), save_pretrained()) and load that"
INDEX = ".index.json"
SHARD = re.compile(r".*-\d{5}-of-\d{5}\.(safetensors|bin)")
# Hugging Face's weight files, in the order in which transformers looks for them.
WEIGHT_FILES = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")


def read_file(path: str, flag: str = "--init_checkpoint") -> dict:
    """The dict inside a weight file, or of all shards of an index. Nothing in it is executed: tensors and plain values
    alone are accepted."""
    if path.endswith(INDEX):
        return read_shards(path, flag)
    check_pointer(path, flag)
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
        fail(
            f"{flag} {path}: refused, {reason}; nothing in it was run; wanted tensors and plain values alone, as "
            "torch.save(model.state_dict(), ...) writes them"
        )
    except Exception as error:  # the parsers raise whatever bytes of another kind lead them to
        fail(
            f"{flag} {path}: not a checkpoint, or a truncated one ({type(error).__name__}); "
            "wanted a .safetensors, a pytorch_model.bin or a model.{step}.pt"
        )
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        fail(f"{flag} {path}: not a checkpoint: holds a {type(content).__name__}, wanted a dict of named tensors")
    return content


def shards(path: str, flag: str) -> dict[str, set[str]]:
    """file -> names of its weights, of the files beside an index that hold the weights."""
    wanted = "the index of a model's shards: fetch it again"
    names = read_object(path, wanted, flag).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        fail(f"{flag} {path}: its weight_map is no object of weight: file; wanted {wanted}")
    found: dict[str, set[str]] = {}
    for name, file in names.items():
        if os.path.basename(file) != file or not file.endswith((".safetensors", ".bin")):
            fail(f"{flag} {path}: {name} is in {file!r}, wanted a .safetensors or .bin beside the index")
        found.setdefault(os.path.join(os.path.dirname(path), file), set()).add(name)
    absent = [file for file in found if not os.path.isfile(file)]
    if absent:
        more = f" ({len(absent)} of its {len(found)} files are missing)" if len(absent) > 1 else ""
        fail(f"{flag} {path}: names {os.path.basename(absent[0])}, which is not beside it{more}; fetch it, too")
    return found


def read_shards(path: str, flag: str) -> dict:
    """All weights of an index; each shard holds what the index says of it, no more and no less."""
    content: dict = {}
    for file, names in shards(path, flag).items():
        part = read_file(file, flag)
        for name in sorted(names ^ part.keys()):
            what = f"lacks {name}, which" if name in names else f"holds {name}, of which"
            but = "says it holds" if name in names else "says nothing"
            fail(f"{flag} {file}: {what} {path} {but}; fetch all files of one model again")
        content |= part
    return content


def privacy_entries(path: str, content: dict, flag: str) -> list[tuple[str, object]]:
    """(file, privacy_entry()) of each file that was read for `path`: itself, or its shards."""
    if path.endswith(INDEX):  # a shard of pickles holds weights alone: read_shards()
        return [(file, privacy_entry(file, {})) for file in shards(path, flag)]
    return [(path, privacy_entry(path, content))]


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


def unwrapped(name: str) -> str:
    """The name of a weight without what wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def state_dict(content: dict, path: str, flag: str) -> dict:
    """What of a file's content is weights by name."""
    entry = next((entry for entry in ENTRIES if entry in content), None)
    raw = content if entry is None else content[entry]
    if not isinstance(raw, dict) or not all(isinstance(name, str) for name in raw):
        fail(f"{flag} {path}: its entry {entry!r} is no dict of named tensors")
    return raw


def canonical_weights(content: dict, path: str, flag: str) -> dict[str, Tensor]:
    """A file's weights under this project's names, without constant buffers. The head is among them where the file has
    one: see settled()."""
    raw = state_dict(content, path, flag)
    family = of_names([unwrapped(name).removeprefix(PREFIX) for name in raw])
    weights: dict[str, Tensor] = {}
    unknown = []
    for name, value in raw.items():
        short = unwrapped(name)
        bare = short.removeprefix(PREFIX)
        if family.BUFFERS.fullmatch(bare):
            continue
        if not isinstance(value, Tensor):
            fail(f"{flag} {path}: {name} is a {type(value).__name__}, wanted a tensor")
        if value.device.type != "cpu" or value.layout != torch.strided or not value.is_floating_point():
            fail(
                f"{flag} {path}: {name} is {value.dtype}, {value.layout}, {value.device}, "
                "wanted a dense floating-point tensor"
            )
        if short in HEAD_NAMES:
            if HEAD in weights and not torch.equal(weights[HEAD], value):
                fail(f"{flag} {path}: holds two heads that differ; wanted one")
            weights[HEAD] = value.detach()
        elif not family.WEIGHTS.fullmatch(bare):
            unknown.append(name)
        elif PREFIX + bare in weights:
            fail(f"{flag} {path}: holds {bare} twice, under its own name and a wrapper's, such as {name}")
        elif bare.endswith("attn.c_attn.weight") and value.dim() == 2 and value.shape[0] == 3 * value.shape[1]:
            fail(
                f"{flag} {path}: {name} is {tuple(value.shape)}, (out, in) as nanoGPT stores it; wanted (in, out): "
                "transpose the weights of c_attn, c_proj and c_fc, and mind that nanoGPT's GELU is the exact one, this "
                "project's GPT-2's that of OpenAI"
            )
        else:
            weights[PREFIX + bare] = value.detach()  # a file of named_parameters() holds Parameters
    if unknown:
        fail(f"{flag} {path}: holds unknown {some(unknown)}, which are no {family.TITLE}'s; {cure(unknown, family)}")
    return weights


def settled(weights: dict[str, Tensor], config: Shape, path: str, flag: str) -> dict[str, Tensor]:
    """canonical_weights() without the copy of a tied embedding that many files hold as a head."""
    if not config.tie_word_embeddings or HEAD not in weights:
        return weights
    embedding = family_of(config).EMBEDDING + ".weight"
    if PREFIX + embedding in weights and not torch.equal(weights[HEAD], weights[PREFIX + embedding]):
        fail(f"{flag} {path}: its head {HEAD} differs from {embedding}, to which the shape says that it is tied")
    return {name: value for name, value in weights.items() if name != HEAD}


def some(names: list[str]) -> str:
    """Up to three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def cure(names: list[str], family: type[LanguageModel]) -> str:
    """What to do about weights of names that the family does not have."""
    if any("lora_" in name or ".base_layer." in name for name in names):
        return (
            "adapters of PEFT are read from the folder that its save_pretrained() writes, with --base_checkpoint; or "
            + MERGE
        )
    return f"save the {family.TITLE} alone, as transformers names its weights (save_pretrained())"


def load_strictly(model: LanguageModel, weights: dict[str, Tensor], path: str, flag: str) -> None:
    """Copy every weight of the file into the model and leave none of the model's without a value: of a file without
    any adapter the model's adapters are drawn from torch's generator. The model's own values are taken for undrawn.

    Raises UserError naming up to three weights that found no place, no value or another shape.
    """
    wanted = dict(model.named_parameters())
    absent = not any(map(is_adapter, weights))
    missing = [name for name in wanted if name not in weights and not (absent and is_adapter(name))]
    unknown = [name for name in weights if name not in wanted]
    shaped = [
        f"{name} {tuple(weights[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    family = of_names([name.removeprefix(PREFIX) for name in weights])
    if weights and missing and family is not type(model):
        fail(
            f"{flag} {path}: holds weights of a {family.TITLE}, and the shape is a {model.TITLE}'s; leave "
            "--model_card out, and put the model's config.json beside them"
        )
    rows = "; for another vocabulary, a padded one too, name a folder whose config.json has its vocab_size"
    rows = rows if any(text.startswith(PREFIX + model.EMBEDDING) for text in shaped) else ""
    held = f"; it holds {some(list(weights)) or 'nothing'}"
    for names, what, more in (
        (shaped, "has another shape", rows),
        (missing, "lacks", held),
        (unknown, "holds unknown", ""),
    ):
        if names:
            fail(f"{flag} {path}: {what}: {some(names)}{more}; does --model_card or --lora_dim match the file?")
    if buffers := [name for name, _ in model.named_buffers()]:
        raise TypeError(f"{some(buffers)}: no parameter, so no file gives it a value")
    with torch.no_grad():
        for name, value in weights.items():
            wanted[name].copy_(value)
    if absent:
        reset_adapters(model)


def fingerprint(weights: dict[str, Tensor]) -> str:
    """A digest of every bit (as float32; half a second a gigabyte): any change of the frozen weights is noticed."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name]
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.float().contiguous().numpy())
    return digest.hexdigest()


def resolve_card(card: str) -> Shape:
    """The shape that --model_card names: a card, or a folder or file in Hugging Face's layout."""
    if card in MODEL_CARDS:
        return MODEL_CARDS[card]
    return read_config(card, "--model_card")


def config_file(path: str) -> str:
    """Where the config.json of `path` would be: that file itself, in a folder, or beside a weight file."""
    if path.endswith(".json") and not path.endswith(INDEX):
        return path
    return os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")


def read_config(path: str, flag: str = "--model_card") -> Shape:
    """The shape in Hugging Face's config.json: `path` is that file, its folder, or a weight file beside it."""
    wanted = f"wanted one of {', '.join(MODEL_CARDS)} or a folder with config.json"
    if not os.path.exists(path):
        fail(f"{flag} {path}: no such file or folder; {wanted}")
    file = config_file(path)
    if not os.path.exists(file):
        folder = os.path.dirname(file)
        below = folder_below(folder, ["config.json"]) if os.path.isdir(path) else None
        fail(f"{flag} {path}: there is no {file}; {f'give {below}' if below else wanted}")
    content = read_object(file, "the config.json of a GPT-2, Llama or the like", flag)
    try:
        return of_model_type(content.get("model_type", DEFAULT)).read_config(content)
    except ValueError as error:
        unnamed = "" if "model_type" in content else f"names no model_type, so it is read as a {DEFAULT}'s, and "
        fail(f"{flag} {file}: {unnamed}{error}")
