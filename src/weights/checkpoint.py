"""Our checkpoints: the pair of files that a training run saves, and the model that any weight file gives.

`model.{step}.pt` is a dict for torch.load(weights_only=True):
  format            FORMAT; the files of format 1 that earlier versions wrote lack the entry
  model_state_dict  name -> float32 tensor; the adapters alone when they were trained on top of a base file; frozen
                    matrices as they were held (--base_dtype)
  step              logical steps done
  family            a name of families.FAMILIES; absent in format 1, which knew GPT-2 alone
  config, lora      the model's shape and its adapter, as dicts; format 1 says `enable`, three booleans for the parts of
                    the fused projection, for `targets`
  base              None, or {"path", "absolute", "fingerprint"} of the file that holds the frozen weights;
                    path is relative to the checkpoint's folder, so that a moved project still finds it;
                    "dtype": "bf16" where the matrices were rounded to bfloat16, which every reader then does, too: the
                    adapters belong to the rounded ones
  privacy           None, or what this run and those before it spent (run/provenance.py); absent is None
`optimizer.{step}.pt` beside it holds `format` and what only a resumed run needs; the newest step's alone is kept.
Both are written whole or not at all. Files of others are weights/foreign.py's and weights/peft_format.py's.
"""

import dataclasses
import os
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from base.device import read_back
from base.errors import fail
from base.files import atomic_write, check_format, folder_below
from families import name_of
from language_model import LanguageModel, LoRAConfig, Shape, is_adapter
from weights import peft_format
from weights.building import build, filled, rounded_matrices
from weights.foreign import (
    SHARD,
    WEIGHT_FILES,
    canonical_weights,
    config_file,
    fingerprint,
    privacy_entries,
    read_config,
    read_file,
    resolve_card,
    settled,
    some,
)
from weights.stored import fitted, stored_entries

FORMAT = 2  # the newest that this version reads, and the one that it writes
STEP_FILE = re.compile(r"model\.(\d+)\.pt")


def numbered_checkpoints(folder: str) -> list[tuple[int, str]]:
    """(step, path) of every model.{step}.pt in `folder`, by step."""
    found = ((STEP_FILE.fullmatch(name), name) for name in os.listdir(folder))
    numbered = sorted((int(match[1]), os.path.join(folder, name)) for match, name in found if match)
    return [(step, path) for step, path in numbered if os.path.isfile(path)]


def find_checkpoint(path: str, flag: str = "--init_checkpoint") -> str:
    """The weight file that `path` names: itself, or a folder's newest model.{step}.pt, or PEFT's or Hugging Face's,
    which is an index where the weights are in shards."""
    if os.path.isfile(path):
        if SHARD.fullmatch(path):
            fail(f"{flag} {path}: is one of several files of a model; give their folder, with the index in it")
        return path
    if not os.path.isdir(path):
        fail(f"{flag} {path}: no such file or folder")
    numbered = numbered_checkpoints(path)
    if numbered:
        return numbered[-1][1]
    known = (*peft_format.WEIGHTS, *WEIGHT_FILES)
    for name in known:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    wanted = (
        "the folder holds no model.{step}.pt, model.safetensors, pytorch_model.bin, index of their shards or PEFT "
        "adapter"
    )
    if below := folder_below(path, (*known, "config.json")):
        fail(f"{flag} {path}: {wanted}; give {below}")
    found = sorted(name for name in os.listdir(path) if not name.startswith("."))
    fail(f"{flag} {path}: {wanted}; it holds {some(found) or 'nothing'}")


def read_weights(path: str, flag: str) -> tuple[dict, dict[str, Tensor]]:
    """(content, weights by this project's names) of a weight file, ours or Hugging Face's."""
    content = read_file(path, flag)
    if "model_state_dict" in content or "format" in content:
        check_format(content.get("format"), FORMAT, f"{flag} {path}")
    return content, canonical_weights(content, path, flag)


# ------------------------------------------------------------------ loading


@dataclasses.dataclass
class Loaded:
    """A model with its weights, and where they came from."""

    model: LanguageModel
    base: dict | None  # the `base` entry for checkpoints of this model; None when no file holds the frozen weights
    path: str | None  # the weight file that was read
    step: int = 0
    # every weight file that was read, the frozen weights' first, with its privacy_entry()
    files: list[tuple[str, object]] = dataclasses.field(default_factory=list)

    @property
    def base_path(self) -> str | None:
        """The file of the frozen weights."""
        return None if self.base is None else self.base["absolute"]


def load_model(
    init_checkpoint: str | None,
    model_card: str | None = None,
    lora_config: LoRAConfig | None = None,
    base_checkpoint: str | None = None,
    flag: str = "--init_checkpoint",
    bf16_base: bool = False,
) -> Loaded:
    """Build a model on the CPU in float32 and give every weight its value.

    init_checkpoint  file or folder (find_checkpoint); None draws the family's initialisation from torch's generator
    model_card       None takes the shape from the checkpoint; given, it must agree with it
    lora_config      None takes the adapter from the checkpoint; given, it must agree with it where the file has one
    base_checkpoint  where the frozen weights of an adapter-only file lie, if not where the file says
    flag             what gave init_checkpoint, for messages
    bf16_base        hold the frozen matrices under adapters in bfloat16; vectors and adapters stay float32
    Raises UserError for whatever does not fit.
    """
    config = resolve_card(model_card) if model_card else None
    if init_checkpoint is None:
        if config is None:
            fail("--model_card: needed where there is no --init_checkpoint to take the shape from")
        lora_config = fitted(lora_config or LoRAConfig(), config)
        return Loaded(build(config, lora_config, f"--model_card {model_card}", bf16_base), None, None)

    path = find_checkpoint(init_checkpoint, flag)
    if peft_format.is_adapter(path):
        return load_adapter(path, config, lora_config, base_checkpoint, flag, bf16_base)
    content, weights = read_weights(path, flag)
    base, step, files = None, 0, privacy_entries(path, content, flag)
    if "model_state_dict" in content and "config" in content:
        stored_config, stored_lora, base, step = stored_entries(content, path, flag)
        if config is not None and not config.same(stored_config):
            fail(f"--model_card {model_card}: {path} is of another shape ({stored_config.describe()})")
        config = stored_config
        if stored_lora.adapts:
            lora_config = agreed(lora_config and fitted(lora_config, config), stored_lora, path)
    elif weights and all("lora_" in name for name in weights):
        return load_factors(path, weights, files, config, lora_config, base_checkpoint, flag, bf16_base)
    elif config is None:
        config = read_config(path, "--model_card not given, and beside " + flag)
    lora_config, weights = fitted(lora_config or LoRAConfig(), config), settled(weights, config, path, flag)

    if base is not None:
        base_path = find_base(base, path, base_checkpoint)
        base_content, base_weights = read_weights(base_path, "--base_checkpoint")
        base_weights = settled(base_weights, config, base_path, "--base_checkpoint")
        files = [*privacy_entries(base_path, base_content, "--base_checkpoint"), *files]
        rounded = base.get("dtype") is not None
        base = held(describe_base(base_path, base_weights, base["fingerprint"], path), rounded)
        if rounded:
            base_weights = rounded_matrices(base_weights)
        weights = {**base_weights, **weights}
    elif base_checkpoint is not None:
        fail(f"--base_checkpoint {base_checkpoint}: {path} holds whole weights; leave the flag out")
    elif not any(map(is_adapter, weights)):
        base = describe_base(path, weights)
    model = filled(config, lora_config, weights, path, flag, bf16_base)
    return Loaded(model, held(base, bf16_base), path, step, files)


def load_trained(
    init_checkpoint: str,
    model_card: str | None,
    base_checkpoint: str | None,
    lora_dim: int | None,
    lora_alpha: float | None,
    lora_target: Sequence[str] | None,
) -> Loaded:
    """load_model() for use, not for training: no adapter is drawn. The flags of the adapter are None where they are not
    given, and are needed where the file does not say what it holds. UserError where the model is not as they say."""
    given, targets = None, LoRAConfig().targets if lora_target is None else tuple(lora_target)
    if lora_dim is not None and lora_alpha is not None:
        given = LoRAConfig(lora_dim, lora_alpha, targets=targets)
    loaded = load_model(init_checkpoint, model_card, given, base_checkpoint)
    path, found = loaded.path, loaded.model.lora_config
    if lora_dim and loaded.base is not None and loaded.base["absolute"] == os.path.abspath(path or ""):
        fail(f"--lora_dim {lora_dim}: {path} holds no adapter; leave the flag out")
    if lora_dim is not None and lora_dim != found.dim:
        fail(f"--lora_dim {lora_dim}: {path} has rank {found.dim}; leave the flag out")
    if lora_alpha is not None and found.dim and lora_alpha != found.alpha:
        fail(f"--lora_alpha {lora_alpha:g}: {path} was trained with {found.alpha:g}; leave the flag out")
    wanted = fitted(LoRAConfig(targets=targets), loaded.model.config).targets
    if lora_target is not None and found.dim and wanted != found.targets:
        fail(f"--lora_target {' '.join(lora_target)}: {path} was trained with {found.words}; leave the flag out")
    return loaded


def agreed(given: LoRAConfig | None, stored: LoRAConfig, path: str) -> LoRAConfig:
    """The adapter of a file, with `given`'s dropout; UserError where the flags speak of another."""
    if given is None:
        return stored
    if given.bottleneck != stored.bottleneck:
        fail(
            f"--adapter_dim {given.bottleneck}: {path} holds "
            + (f"bottleneck adapters of width {stored.bottleneck}" if stored.bottleneck else "low-rank adapters")
            + "; give the flags that it was trained with"
        )
    if given.dim != stored.dim:
        fail(f"--lora_dim {given.dim}: {path} holds adapters of rank {stored.dim}; give --lora_dim {stored.dim}")
    if (given.alpha, given.targets) != (stored.alpha, stored.targets):
        fail(
            f"--lora_alpha {given.alpha:g} with {given.words}: {path} was trained with {stored.alpha:g} and "
            f"{stored.words}; give these as --lora_alpha and --lora_target"
        )
    if given.rslora != stored.rslora:
        fail(f"--use_rslora: {path} was trained {'with' if stored.rslora else 'without'} it; do likewise")
    return given


def load_adapter(
    path: str,
    config: Shape | None,
    lora_config: LoRAConfig | None,
    base_checkpoint: str | None,
    flag: str,
    bf16_base: bool,
) -> Loaded:
    """load_model() of PEFT's file `path`, on the frozen weights of --base_checkpoint or of where the adapter says."""
    content, adapter = read_file(path, flag), peft_format.read_adapter(path, flag)
    place = adapter.base if base_checkpoint is None else base_checkpoint
    if place is None or (base_checkpoint is None and not os.path.exists(place)):
        fail(
            f"{flag} {path}: adapts {adapter.base or 'a model that it does not name'}, which is no file or folder "
            "here; give --base_checkpoint"
        )
    base, base_weights, config, files = read_base(place, path, config, adapter.fingerprint)
    lora_config = lora_config and fitted(lora_config, config)
    stored, weights = peft_format.to_ours(adapter, content, config, lora_config, f"{flag} {path}")
    lora_config = agreed(lora_config, stored, path)
    files += privacy_entries(path, content, flag)
    return on_base(base, base_weights, weights, config, lora_config, path, flag, files, bf16_base)


def load_factors(
    path: str,
    weights: dict[str, Tensor],
    files: list[tuple[str, object]],
    config: Shape | None,
    lora_config: LoRAConfig | None,
    base_checkpoint: str | None,
    flag: str,
    bf16_base: bool,
) -> Loaded:
    """load_model() of a file of adapters that says nothing of itself, as the published code saves them, on the frozen
    weights of --base_checkpoint. The flags say alpha and the slots."""
    if base_checkpoint is None:
        fail(f"{flag} {path}: holds adapters alone; give the weights under them as --base_checkpoint")
    rank = next((value.shape[-1] for name, value in weights.items() if name.endswith("lora_B") and value.dim()), 0)
    if lora_config is None or lora_config.dim != rank:
        fail(
            f"{flag} {path}: holds adapters of rank {rank} and does not say their alpha; give --lora_dim {rank}, and "
            "--lora_alpha and --lora_target as they were trained with"
        )
    base, base_weights, config, base_files = read_base(base_checkpoint, path, config)
    lora_config = fitted(lora_config, config)
    return on_base(base, base_weights, weights, config, lora_config, path, flag, [*base_files, *files], bf16_base)


def read_base(
    place: str, adapters: str, config: Shape | None, wanted: str | None = None
) -> tuple[dict, dict[str, Tensor], Shape, list[tuple[str, object]]]:
    """(`base` entry, weights, shape, files) of the frozen weights at `place`, for the file `adapters`. wanted: their
    fingerprint, where that is known."""
    flag = "--base_checkpoint"
    path = find_checkpoint(place, flag)
    content, weights = ({}, {}) if peft_format.is_adapter(path) else read_weights(path, flag)
    if not weights or any(map(is_adapter, weights)):
        fail(f"{flag} {path}: holds adapters, and {adapters} would come on top; merge them with src/export.py first")
    if config is None:
        if "config" in content and "model_state_dict" in content:
            config = stored_entries(content, path, flag)[0]
        else:
            config = read_config(path, f"--model_card not given, and beside {flag}")
    weights = settled(weights, config, path, flag)
    base = describe_base(path, weights, wanted, adapters)
    return base, weights, config, privacy_entries(path, content, flag)


def on_base(
    base: dict,
    base_weights: dict[str, Tensor],
    weights: dict[str, Tensor],
    config: Shape,
    lora_config: LoRAConfig,
    path: str,
    flag: str,
    files: list[tuple[str, object]],
    bf16_base: bool,
) -> Loaded:
    """The model of adapters `weights` on frozen weights."""
    model = filled(config, lora_config, {**base_weights, **weights}, path, flag, bf16_base)
    return Loaded(model, held(base, bf16_base), path, files=files)


def held(base: dict | None, bf16_base: bool) -> dict | None:
    """The `base` entry of weights of which the matrices were rounded to bfloat16, or not."""
    return {**base, "dtype": "bf16"} if base and bf16_base else base


def says_shape(place: str, flag: str = "--init_checkpoint") -> bool:
    """Whether the weights at `place` come with their shape: in a file of ours, beside Hugging Face's, in a base's."""
    path = find_checkpoint(place, flag)
    ours = re.fullmatch(r"(model|average)\.\d+\.pt", os.path.basename(path)) is not None
    return ours or peft_format.is_adapter(path) or os.path.isfile(config_file(path))


def describe_base(path: str, weights: dict[str, Tensor], wanted: str | None = None, adapters: str = "") -> dict:
    """The `base` entry, without its relative path, of the frozen weights in file `path`. UserError where the file
    `adapters` was trained on weights of another fingerprint, `wanted`."""
    found = fingerprint(weights)
    if wanted not in (None, found):
        fail(f"--base_checkpoint {path}: not the file that {adapters} was trained on (its fingerprint differs)")
    return {"absolute": os.path.abspath(path), "fingerprint": found}


def find_base(base: dict, checkpoint: str, base_checkpoint: str | None) -> str:
    """The file of the frozen weights: what --base_checkpoint names, else where a checkpoint's entry `base` says."""
    if base_checkpoint is not None:
        return find_checkpoint(base_checkpoint, "--base_checkpoint")
    beside = os.path.join(os.path.dirname(os.path.abspath(checkpoint)), base["path"])
    places = [os.path.normpath(beside), base["absolute"]]  # normpath: `path` was made without following links
    for place in places:
        if os.path.isfile(place):
            return place
    fail(
        f"{checkpoint}: holds adapters alone, and the weights under them are at neither {' nor '.join(places)}; "
        "give --base_checkpoint"
    )


# ------------------------------------------------------------------ saving and resuming


def trainable_weights(model: LanguageModel) -> dict[str, Tensor]:
    """name -> the parameters that training changes, as views."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def model_path(work_dir: str, step: int) -> str:
    return os.path.join(work_dir, f"model.{step}.pt")


def optimizer_path(work_dir: str, step: int) -> str:
    return os.path.join(work_dir, f"optimizer.{step}.pt")


def save_checkpoint(
    work_dir: str, step: int, model: LanguageModel, base: dict | None, optimizer: dict, privacy: dict | None = None
) -> None:
    """Write the pair of step `step`. model.{step}.pt is renamed into place last, so it never stands without its
    partner; the partner of an older step goes only after that. Raises OSError naming the file when the disk is full."""
    content = model_content(work_dir, step, model, base, privacy)  # refuses a merged model before anything is written
    write(optimizer_path(work_dir, step), {"format": FORMAT, **optimizer})
    write(model_path(work_dir, step), content)
    for name in os.listdir(work_dir):
        match = re.fullmatch(r"optimizer\.(\d+)\.pt", name)
        left_by_a_kill = re.fullmatch(r"(model|optimizer|average)\.\d+\.pt\.\d+\.partial", name)
        if left_by_a_kill or (match and int(match[1]) != step):
            os.unlink(os.path.join(work_dir, name))


def model_content(work_dir: str, step: int, model: LanguageModel, base: dict | None, privacy: dict | None) -> dict:
    """What model.{step}.pt holds. Adapters are saved alone when `base` names their frozen weights."""
    if not model.lora_config.adapts:
        base = None
    if base is not None:
        base = {**base, "path": os.path.relpath(base["absolute"], os.path.abspath(work_dir))}
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad or base is None}
    adapter = {**dataclasses.asdict(model.lora_config), "targets": list(model.lora_config.targets)}
    if not adapter["bottleneck"]:
        del adapter["bottleneck"]  # earlier versions, which do not know it, read the file
    return {
        "format": FORMAT,
        # copied: a view saved as it stands would carry the whole flat buffer it looks into
        "model_state_dict": {
            name: read_back("checkpoint", value.detach(), copy=True)
            for name, value in model.state_dict().items()
            if name in names
        },
        "step": step,
        "family": name_of(model.config),
        "config": dataclasses.asdict(model.config),
        "lora": adapter,
        "base": base,
        "privacy": privacy,
    }


def write(path: str, content: dict) -> None:
    """torch.save(), whole or not at all. Raises OSError naming the file."""
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


def load_resumable(work_dir: str, step: int, model: LanguageModel) -> dict:
    """Copy the trained parameters of step `step` into `model`. Returns the optimizer's state, with the model file's
    `privacy` and `base` beside it. UserError where the step is of another model."""
    content = load_parameters(model_path(work_dir, step), model)
    path = optimizer_path(work_dir, step)
    state = read_file(path, "--resume")
    check_format(state.pop("format", None), FORMAT, f"--resume {path}")
    return {**state, "privacy": content.get("privacy"), "base": content.get("base")}


def load_parameters(path: str, model: LanguageModel) -> dict:
    """Copy the trained parameters of a file of ours into `model`; returns the file's content."""
    content, weights = read_weights(path, "--resume")
    wanted = {name: parameter for name, parameter in model.named_parameters() if name in weights}
    absent = set(trainable_weights(model)) - set(wanted)
    if absent or len(wanted) != len(weights):
        fail(
            f"--resume {path}: does not hold the parameters that this run trains; "
            "is it of another --model_card or --lora_dim?"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            if parameter.shape != weights[name].shape:
                fail(f"--resume {path}: {name} is {tuple(weights[name].shape)}, this run has {tuple(parameter.shape)}")
            parameter.copy_(weights[name])
    return content
