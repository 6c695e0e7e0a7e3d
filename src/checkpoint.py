"""Weights in and out: Hugging Face's files and our own, read strictly, written whole or not at all.

A file of ours, `model.{step}.pt`, is a dict for torch.load(weights_only=True):
  model_state_dict  name -> float32 tensor; the adapters alone when they were trained on top of a base file
  step              logical steps done
  config, lora      the model's shape and its adapter, as dicts
  base              None, or {"path", "absolute", "fingerprint"} of the file that holds the frozen weights;
                    path is relative to the checkpoint's folder, so that a moved project still finds it
  privacy           None, or what this run and those before it spent (provenance.py)
Beside it `optimizer.{step}.pt` holds what only a resumed run needs; of these the newest alone is kept.
"""

import dataclasses
import hashlib
import json
import math
import os
import pickle
import re
import warnings

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import peft_format
from cli import UserError, atomic_write, fail, read_object
from model import MODEL_CARDS, SLOTS, GPT2Config, GPT2LMModel, LoRAConfig

PREFIX = "transformer."
STEP_FILE = re.compile(r"model\.(\d+)\.pt")
# Constant buffers of Hugging Face's older files (the causal mask), not weights.
MASK_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
HEAD_NAMES = ("lm_head.weight", "lm_head.decoder.weight")


def numbered_checkpoints(folder: str) -> list[tuple[int, str]]:
    """(step, path) of every model.{step}.pt in `folder`, by step."""
    found = ((STEP_FILE.fullmatch(name), name) for name in os.listdir(folder))
    numbered = sorted((int(match[1]), os.path.join(folder, name)) for match, name in found if match)
    return [(step, path) for step, path in numbered if os.path.isfile(path)]


def find_checkpoint(path: str, flag: str = "--init_checkpoint") -> str:
    """The weight file that `path` names: itself, or a folder's newest model.{step}.pt, or PEFT's or Hugging Face's."""
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        fail(f"{flag} {path}: no such file or folder")
    numbered = numbered_checkpoints(path)
    if numbered:
        return numbered[-1][1]
    for name in (*peft_format.WEIGHTS, "model.safetensors", "pytorch_model.bin"):
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    fail(f"{flag} {path}: the folder holds no model.{{step}}.pt, model.safetensors, pytorch_model.bin or PEFT adapter")


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
        fail(f"{flag} {path}: not a checkpoint, or a truncated one ({type(error).__name__}); "
             "wanted a .safetensors, a pytorch_model.bin or a model.{step}.pt")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        fail(f"{flag} {path}: not a checkpoint: holds a {type(content).__name__}, wanted a dict of named tensors")
    return content


def privacy_entry(path: str, content: dict) -> object:
    """What a weight file says of the runs behind it (provenance.py): the entry `privacy` of a file of ours, the JSON of
    that name in the metadata of an exported one; None where it says nothing. Not checked."""
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
            fail(f"{flag} {path}: {name} is {value.dtype}, {value.layout}, {value.device}, "
                 "wanted a dense floating-point tensor")
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
    shaped = [f"{name} {tuple(weights[name].shape)} for {tuple(wanted[name].shape)}" for name in wanted
              if name in weights and weights[name].shape != wanted[name].shape]
    for names, what in ((shaped, "has another shape"), (missing, "lacks"), (unknown, "holds unknown")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            fail(f"{flag} {path}: {what}: {', '.join(names[:3])}{more}; "
                 "does --model_card or --lora_dim match the file?")
    with torch.no_grad():
        for name, value in weights.items():
            wanted[name].copy_(value)


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
    for key, only in (("model_type", "gpt2"), ("activation_function", "gelu_new"), ("tie_word_embeddings", True),
                      ("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
                      ("add_cross_attention", False)):
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


def resolve_card(card: str) -> GPT2Config:
    """The shape that --model_card names: a card, or a folder or file in Hugging Face's layout."""
    return MODEL_CARDS[card] if card in MODEL_CARDS else read_config(card, "--model_card")


def fingerprint(weights: dict[str, Tensor]) -> str:
    """A digest of every bit (as float32; half a second a gigabyte): any change of the frozen weights is noticed."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name]
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.float().contiguous().numpy())
    return digest.hexdigest()


@dataclasses.dataclass
class Loaded:
    """A model with its weights, and where they came from."""

    model: GPT2LMModel
    base: dict | None  # the `base` entry for checkpoints of this model; None when no file holds the frozen weights
    path: str | None  # the weight file that was read
    step: int = 0
    # every weight file that was read, the frozen weights' first, with its privacy_entry()
    files: list[tuple[str, object]] = dataclasses.field(default_factory=list)


def load_model(init_checkpoint: str | None, model_card: str | None = None, lora_config: LoRAConfig | None = None,
               base_checkpoint: str | None = None, flag: str = "--init_checkpoint") -> Loaded:
    """Build a GPT-2 on the CPU in float32 and give every weight its value.

    init_checkpoint  file or folder (find_checkpoint); None draws GPT-2's initialisation from torch's generator
    model_card       None takes the shape from the checkpoint; given, it must agree with it
    lora_config      None takes the adapter from the checkpoint; given, it must agree with it where the file has one
    base_checkpoint  where the frozen weights of an adapter-only file lie, if not where the file says
    flag             what gave init_checkpoint, for messages
    Raises UserError for whatever does not fit.
    """
    config = resolve_card(model_card) if model_card else None
    if init_checkpoint is None:
        if config is None:
            fail("--model_card: needed where there is no --init_checkpoint to take the shape from")
        return Loaded(build(config, lora_config or LoRAConfig(), f"--model_card {model_card}"), None, None)

    path = find_checkpoint(init_checkpoint, flag)
    content = read_file(path, flag)
    if peft_format.is_adapter(path):
        return load_adapter(path, content, config, lora_config, base_checkpoint, flag)
    ours = "model_state_dict" in content
    weights = canonical_weights(content, path, flag)
    base, step, files = None, 0, [(path, privacy_entry(path, content))]
    if ours and "config" in content:
        stored_config, stored_lora, base, step = stored_entries(content, path, flag)
        if config is not None and not same_shape(config, stored_config):
            fail(f"--model_card {model_card}: {path} is of another shape ({describe(stored_config)})")
        config = stored_config
        if stored_lora.dim:
            lora_config = agreed(lora_config, stored_lora, path)
    elif config is None:
        config = read_config(path, "--model_card not given, and beside " + flag)
    lora_config = lora_config or LoRAConfig()

    if base is not None:
        base_path = find_base(base, path, base_checkpoint)
        base_content = read_file(base_path, "--base_checkpoint")
        base_weights = canonical_weights(base_content, base_path, "--base_checkpoint")
        files.insert(0, (base_path, privacy_entry(base_path, base_content)))
        base, wanted = describe_base(base_path, base_weights), base["fingerprint"]
        if base["fingerprint"] != wanted:
            fail(f"--base_checkpoint {base_path}: not the file that {path} was trained on (its fingerprint differs)")
        weights = {**base_weights, **weights}
    elif base_checkpoint is not None:
        fail(f"--base_checkpoint {base_checkpoint}: {path} does not say that it needs one; leave the flag out")
    elif not any("lora_" in name for name in weights):
        base = describe_base(path, weights)
    with torch.random.fork_rng(devices=[], enabled=lora_config.dim == 0 or any("lora_" in name for name in weights)):
        model = build(config, lora_config, f"{flag} {path}")
    load_strictly(model, weights, path, flag)
    return Loaded(model, base, path, step, files)


def agreed(given: LoRAConfig | None, stored: LoRAConfig, path: str) -> LoRAConfig:
    """The adapter of a file, with `given`'s dropout; UserError where the flags speak of another."""
    if given is None:
        return stored
    if given.dim != stored.dim:
        fail(f"--lora_dim {given.dim}: {path} holds adapters of rank {stored.dim}; give --lora_dim {stored.dim}")
    if (given.alpha, given.enable) != (stored.alpha, stored.enable):
        fail(f"--lora_alpha {given.alpha:g} with slots {slots(given)}: {path} was trained with {stored.alpha:g} and "
             f"{slots(stored)}; give these as --lora_alpha and --lora_target")
    return given


def slots(lora_config: LoRAConfig) -> str:
    return " ".join(name for name, on in zip(SLOTS, lora_config.enable) if on) or "none"


def load_adapter(path: str, content: dict, config: GPT2Config | None, lora_config: LoRAConfig | None,
                 base_checkpoint: str | None, flag: str) -> Loaded:
    """load_model() of PEFT's file `path` on the frozen weights of --base_checkpoint, or of where the adapter says."""
    adapter = peft_format.read_adapter(path, flag)
    if base_checkpoint is None and (adapter.base is None or not os.path.exists(adapter.base)):
        fail(f"{flag} {path}: adapts {adapter.base or 'a model that it does not name'}, which is no file or folder "
             "here; give --base_checkpoint")
    base_path = find_checkpoint(base_checkpoint or adapter.base, "--base_checkpoint")
    base_content = read_file(base_path, "--base_checkpoint")
    base_weights = canonical_weights(base_content, base_path, "--base_checkpoint")
    base = describe_base(base_path, base_weights)
    if any("lora_" in name for name in base_weights):
        fail(f"--base_checkpoint {base_path}: holds adapters, and {path} would come on top; merge them with "
             "src/export.py first")
    if adapter.fingerprint not in (None, base["fingerprint"]):
        fail(f"--base_checkpoint {base_path}: not the file that {path} was trained on (its fingerprint differs)")
    if config is None:
        config = (stored_entries(base_content, base_path, "--base_checkpoint")[0] if "config" in base_content
                  else read_config(base_path, "--model_card not given, and beside --base_checkpoint"))
    stored, weights = peft_format.to_ours(adapter, content, config, lora_config, f"{flag} {path}")
    lora_config = agreed(lora_config, stored, path)
    with torch.random.fork_rng(devices=[]):
        model = build(config, lora_config, f"{flag} {path}")
    load_strictly(model, {**base_weights, **weights}, path, flag)
    files = [(base_path, privacy_entry(base_path, base_content)), (path, privacy_entry(path, content))]
    return Loaded(model, base, path, files=files)


def build(config: GPT2Config, lora_config: LoRAConfig, where: str) -> GPT2LMModel:
    try:
        return GPT2LMModel(config, lora_config)
    except (RuntimeError, MemoryError) as error:
        fail(f"{where}: no memory for a model of {describe(config)} ({str(error).splitlines()[0][:160]})")


def describe(config: GPT2Config) -> str:
    return f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, vocabulary {config.vocab_size}"


def stored_entries(content: dict, path: str, flag: str) -> tuple[GPT2Config, LoRAConfig, dict | None, int]:
    """(shape, adapter, base, step) of a file of ours, or UserError."""
    try:
        lora_config = LoRAConfig(**{**content["lora"], "enable": tuple(content["lora"]["enable"])})
        base, step = content["base"], content["step"]
        sound = (type(lora_config.dim) is int and lora_config.dim >= 0 and 0 <= lora_config.dropout < 1
                 and math.isfinite(lora_config.alpha) and list(map(type, lora_config.enable)) == [bool] * 3
                 and type(step) is int and step >= 0
                 and (base is None or all(isinstance(base[key], str) for key in ("path", "absolute", "fingerprint")))
                 and isinstance(content["config"], dict))
    except (TypeError, KeyError, ValueError) as error:
        fail(f"{flag} {path}: its entries 'lora', 'base' or 'step' are damaged ({type(error).__name__}: {error})")
    if not sound:
        fail(f"{flag} {path}: its entries 'config', 'lora', 'base' or 'step' are damaged")
    return checked_config(content["config"], f"{flag} {path}"), lora_config, base, step


def describe_base(path: str, weights: dict[str, Tensor]) -> dict:
    return {"absolute": os.path.abspath(path), "fingerprint": fingerprint(weights)}


def find_base(base: dict, checkpoint: str, base_checkpoint: str | None) -> str:
    if base_checkpoint is not None:
        return find_checkpoint(base_checkpoint, "--base_checkpoint")
    beside = os.path.join(os.path.dirname(os.path.abspath(checkpoint)), base["path"])
    places = [os.path.normpath(beside), base["absolute"]]  # normpath: `path` was made without following links
    for place in places:
        if os.path.isfile(place):
            return place
    fail(f"{checkpoint}: holds adapters alone, and the weights under them are at neither {' nor '.join(places)}; "
         "give --base_checkpoint")


def trainable_weights(model: GPT2LMModel) -> dict[str, Tensor]:
    """name -> the parameters that training changes, as views."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def model_path(work_dir: str, step: int) -> str:
    return os.path.join(work_dir, f"model.{step}.pt")


def optimizer_path(work_dir: str, step: int) -> str:
    return os.path.join(work_dir, f"optimizer.{step}.pt")


def save_checkpoint(work_dir: str, step: int, model: GPT2LMModel, base: dict | None, optimizer: dict,
                    privacy: dict | None = None) -> None:
    """Write the pair of step `step`. model.{step}.pt is renamed into place last, so it never stands without its
    partner; the partner of an older step goes only after that. Adapters are saved alone when `base` names their frozen
    weights. Raises OSError naming the file when the disk is full."""
    lora_only = model.lora_config.dim > 0 and base is not None
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad or not lora_only}
    if lora_only:
        base = {**base, "path": os.path.relpath(base["absolute"], os.path.abspath(work_dir))}
    content = {
        # clone: a view saved as it stands would carry the whole flat buffer it looks into
        "model_state_dict": {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()
                             if name in names},
        "step": step,
        "config": dataclasses.asdict(model.config),
        "lora": {**dataclasses.asdict(model.lora_config), "enable": list(model.lora_config.enable)},
        "base": base if lora_only else None,
        "privacy": privacy,
    }
    write(optimizer_path(work_dir, step), optimizer)
    write(model_path(work_dir, step), content)
    for name in os.listdir(work_dir):
        match = re.fullmatch(r"optimizer\.(\d+)\.pt", name)
        killed = re.fullmatch(r"(model|optimizer)\.\d+\.pt\.\d+\.partial", name)  # by a run that was
        if killed or (match and int(match[1]) != step):
            os.unlink(os.path.join(work_dir, name))


def write(path: str, content: dict) -> None:
    try:
        with atomic_write(path, "wb") as handle:
            torch.save(content, handle)
    except (OSError, RuntimeError) as error:
        # When the disk is full, torch's writer puts an error of its own over the system's, which names no file.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, path) from error


def latest_resumable(work_dir: str) -> int | None:
    """The newest step of `work_dir` with both files of its pair; None where there is none."""
    steps = [step for step, _ in numbered_checkpoints(work_dir) if os.path.isfile(optimizer_path(work_dir, step))]
    return steps[-1] if steps else None


def load_resumable(work_dir: str, step: int, model: GPT2LMModel) -> dict:
    """Copy the trained parameters of step `step` into `model`; return the optimizer's state and with it, `privacy`."""
    path = model_path(work_dir, step)
    content = read_file(path, "--resume")
    weights = canonical_weights(content, path, "--resume")
    wanted = {name: parameter for name, parameter in model.named_parameters() if name in weights}
    absent = set(trainable_weights(model)) - set(wanted)
    if absent or len(wanted) != len(weights):
        raise UserError(f"--resume {path}: does not hold the parameters that this run trains; "
                        "is it of another --model_card or --lora_dim?")
    with torch.no_grad():
        for name, parameter in wanted.items():
            if parameter.shape != weights[name].shape:
                fail(f"--resume {path}: {name} is {tuple(weights[name].shape)}, this run has {tuple(parameter.shape)}")
            parameter.copy_(weights[name])
    return {**read_file(optimizer_path(work_dir, step), "--resume"), "privacy": content.get("privacy")}
