"""PEFT's LoRA adapters of the fused projection, translated into this project's and back, exactly.

PEFT adapts the whole projection at once and adds s B A x, s = lora_alpha/r. MergedLinear gives each enabled slot
(query, key, value) a product of its own. Both say the same function:
  out  the slots' lora_A one under the other, r = G R; the slots' lora_B as the blocks of a matrix that is zero
       elsewhere; lora_alpha = G alpha, so that s = alpha/R.
  in   a slot takes the columns of B that are not all zero in its rows, and their rows of A. So what was written comes
       back bit for bit, and a dense B gives every slot a copy of A, R = r. Training further changes the copies apart.

Shapes: D width, S = 3 slots, G enabled slots, R rank of a slot, r PEFT's rank, L layers.
"""

import math
import os
import re
from dataclasses import dataclass
from fractions import Fraction

import safetensors
import torch
from torch import Tensor

from base.errors import fail
from base.files import read_object
from model import SLOTS, GPT2Config, GPT2LMModel, LoRAConfig
from weights.foreign import MERGE, some, unwrapped

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Without what wrappers put in. save_pretrained() leaves the adapter's name out; a state_dict saved by hand has it.
FACTOR = re.compile(r"(?:transformer\.)?h\.(\d+)\.attn\.c_attn\.lora_([AB])(?:\.(\w+))?\.weight")
# Entries that are read below, or that do not change what the factors mean: who made them and how. Which modules are
# adapted is read off the tensors' names; fan_in_fan_out is the layout of the frozen weight.
UNDERSTOOD = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
# Initialisations that leave the frozen weights as they are; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change them.
SOUND_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Adapter:
    """What adapter_config.json says, and the base's fingerprint where src/export.py wrote the adapter."""

    r: int
    lora_alpha: float
    dropout: float
    rslora: bool  # s = lora_alpha/sqrt(r)
    base: str | None
    fingerprint: str | None

    def alpha(self, rank: int) -> float:
        """The alpha for which alpha/rank is the adapter's s."""
        if self.rslora:
            return self.lora_alpha / math.sqrt(self.r) * rank
        return float(Fraction(str(self.lora_alpha)) * rank / self.r)  # decimal: a third of 0.3 is 0.1


# ---------------------------------------------------------------- in


def is_adapter(path: str) -> bool:
    """Whether a weight file is PEFT's."""
    return os.path.basename(path) in WEIGHTS


def read_adapter(path: str, flag: str) -> Adapter:
    """The configuration beside PEFT's weight file `path`; UserError names what this project cannot represent."""
    file = os.path.join(os.path.dirname(path), CONFIG)
    content = read_object(file, "PEFT's adapter configuration", flag)
    if content.get("peft_type") != "LORA":
        fail(f"{flag} {file}: peft_type is {content.get('peft_type')!r}, wanted 'LORA'")
    for name, value in content.items():
        if name not in UNDERSTOOD and value not in (None, False, "none", [], {}):
            fail(f"{flag} {file}: {name} is {str(value)[:60]}; wanted plain LoRA without it: {MERGE}")
    initial = content.get("init_lora_weights", True)
    if not any(initial is sound or (isinstance(initial, str) and initial == sound) for sound in SOUND_INITIALISATIONS):
        fail(
            f"{flag} {file}: init_lora_weights is {initial!r}, which changes the frozen weights too; convert the "
            "adapter with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    r, alpha, dropout = content.get("r", 8), content.get("lora_alpha", 8), content.get("lora_dropout", 0.0)
    base, rslora = content.get("base_model_name_or_path"), content.get("use_rslora", False)
    for name, value, sound in (
        ("r", r, type(r) is int and r > 0),
        ("lora_alpha", alpha, type(alpha) in (int, float) and 0 < alpha < 1e30),
        ("lora_dropout", dropout, type(dropout) in (int, float) and 0 <= dropout < 1),
        ("use_rslora", rslora, type(rslora) is bool),
        ("base_model_name_or_path", base, base is None or isinstance(base, str)),
    ):
        if not sound:
            fail(f"{flag} {file}: {name} is {value!r}; the file is damaged")
    fingerprint = None
    if path.endswith(".safetensors"):
        with safetensors.safe_open(path, framework="pt") as handle:
            fingerprint = (handle.metadata() or {}).get("base_fingerprint")
    return Adapter(r, float(alpha), float(dropout), rslora, base, fingerprint)


def to_ours(
    adapter: Adapter, content: dict, config: GPT2Config, wanted: LoRAConfig | None, where: str
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """(adapter, its weights under this project's names) of the tensors in PEFT's file.

    The adapter is as `wanted` where that is the same function, else of the smallest rank and slots that hold it.
    """
    A, B = read_factors(adapter, content, config, where)
    used = (B.unflatten(1, (len(SLOTS), config.n_embd)) != 0).any(2).any(0)  # (S, r)
    least, parts = int(used.sum(1).max()), tuple(used.any(1).tolist())
    if (
        wanted is not None
        and least <= wanted.dim <= adapter.r
        and wanted.alpha == adapter.alpha(wanted.dim)
        and any(wanted.enable)
        and all(on or not needed for on, needed in zip(wanted.enable, parts, strict=True))
    ):
        rank, enable = wanted.dim, wanted.enable
    elif least:
        rank, enable = least, parts
    else:  # never trained: nothing says which parts are meant
        rank, enable = adapter.r, (True,) * len(SLOTS)
    weights = {}
    columns = choose_columns(used, rank, enable)
    for layer in range(config.n_layer):
        slots = B[layer].unflatten(0, (len(SLOTS), config.n_embd))  # (S, D, r)
        name = f"transformer.h.{layer}.attn.c_attn.lora_"
        weights[name + "A"] = torch.cat([A[layer][chosen] for chosen in columns.values()])  # (G*R, D)
        weights[name + "B"] = torch.cat([slots[slot][:, chosen] for slot, chosen in columns.items()])  # (G*D, R)
    return LoRAConfig(rank, adapter.alpha(rank), adapter.dropout, enable), weights


def read_factors(adapter: Adapter, content: dict, config: GPT2Config, where: str) -> tuple[Tensor, Tensor]:
    """PEFT's A (L, r, D) and B (L, 3D, r), float32."""
    D, L = config.n_embd, config.n_layer
    wanted = {"A": (adapter.r, D), "B": (3 * D, adapter.r)}
    found = {}
    matches = {name: FACTOR.fullmatch(unwrapped(name)) for name in content}
    others = [name for name, match in matches.items() if not match or int(match[1]) >= L]
    if others:
        fail(f"{where}: holds {some(others)}; wanted the factors of h.0 to h.{L - 1}.attn.c_attn alone: {MERGE}")
    adapters = sorted({match[3] or "" for match in matches.values() if match})
    if len(adapters) > 1:
        fail(f"{where}: holds the adapters {adapters[0]!r} and {adapters[1]!r}; wanted one: save it with peft alone")
    for name, value in content.items():
        match = matches[name]
        assert match
        if (match[2], int(match[1])) in found:
            fail(f"{where}: holds {name} twice, under several wrappers; save the adapter with peft's save_pretrained()")
        if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != wanted[match[2]]:
            what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            fail(f"{where}: {name} is {what}, wanted {wanted[match[2]]} numbers: does {CONFIG} or --model_card match?")
        found[match[2], int(match[1])] = value.detach().float()
    missing = [
        f"h.{layer}.attn.c_attn.lora_{factor}" for layer in range(L) for factor in "AB" if (factor, layer) not in found
    ]
    if missing:
        fail(
            f"{where}: lacks {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f"; wanted the factors of all {L} layers"
        )
    return torch.stack([found["A", i] for i in range(L)]), torch.stack([found["B", i] for i in range(L)])


def choose_columns(used: Tensor, rank: int, enable: tuple[bool, ...]) -> dict[int, list[int]]:
    """For each enabled slot the `rank` columns of B that it takes: those of used (S, r), filled up with others, whose
    part in the slot is zero; first those where from_ours() puts the slot's block."""
    chosen = {}
    for place, slot in enumerate(slot for slot, on in enumerate(enable) if on):
        columns = used[slot].nonzero().flatten().tolist()
        rotated = [(place * rank + k) % used.shape[1] for k in range(used.shape[1])]
        columns += [column for column in rotated if column not in columns][: rank - len(columns)]
        chosen[slot] = sorted(columns)
    return chosen


# ---------------------------------------------------------------- out


def from_ours(model: GPT2LMModel, base: str | None) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json, float32 tensors by PEFT's names) of a model with adapters. base: where they belong."""
    lora = model.lora_config
    G = sum(lora.enable)
    weights = {}
    for i, block in enumerate(model.transformer.h):
        layer, name = block.attn.c_attn, f"base_model.model.transformer.h.{i}.attn.c_attn.lora_"
        blocks = torch.zeros(layer.out_features, G * lora.dim)
        for outputs, rows_a, rows_b in layer.slots():
            blocks[outputs, rows_a] = layer.lora_B.detach()[rows_b]
        weights[name + "A.weight"] = layer.lora_A.detach().clone()
        weights[name + "B.weight"] = blocks
    alpha = Fraction(str(lora.alpha)) * G
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": G * lora.dim,
        "lora_alpha": int(alpha) if alpha.denominator == 1 else float(alpha),
        "lora_dropout": lora.dropout,
        "target_modules": ["c_attn"],
        "fan_in_fan_out": True,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }, weights
