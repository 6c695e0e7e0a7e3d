"""PEFT's LoRA adapters of the projections of all blocks, translated into this project's and back, exactly.

PEFT adapts a whole projection at once and adds s B A x, s = lora_alpha/r, or lora_alpha/sqrt(r) by rsLoRA. MergedLinear
gives each enabled slot of it (query, key, value of GPT-2's fused one; all of any other) a product of its own. Both say
the same function:
  out  the slots' lora_A one under the other, r = G R; the slots' lora_B as the blocks of a matrix that is zero
       elsewhere; lora_alpha so that the scaling is ours.
  in   a slot takes the columns of B that are not all zero in its rows, and their rows of A. So what was written comes
       back bit for bit, and a dense B gives every slot a copy of A, R = r. Training further changes the copies apart.
Projections of other ranks are in rank_pattern and alpha_pattern; read, they must come to one rank of all slots.

Shapes: I inputs and O outputs of a projection, S slots, G enabled slots, R rank of a slot, r PEFT's rank, L layers.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import safetensors
import torch
from torch import Tensor

from base.errors import fail
from base.files import read_object
from families import family_of
from language_model import LanguageModel, LoRAConfig, Shape
from weights.foreign import MERGE, PREFIX, some, unwrapped

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Entries that are read below, or that do not change what the factors mean: who made them and how. Which modules are
# adapted is read off the tensors' names; fan_in_fan_out is the layout of the frozen weight.
UNDERSTOOD = {
    "alpha_pattern",
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
    "rank_pattern",
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
    rslora: bool
    base: str | None
    fingerprint: str | None
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)  # rank_pattern and alpha_pattern: the end of a
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)  # module's name -> other than r, lora_alpha

    def of(self, module: str) -> "Adapter":
        """With the r and lora_alpha of a module."""

        def found(pattern: Mapping[str, float], default: float) -> float:
            return next((value for end, value in pattern.items() if f".{module}".endswith(f".{end}")), default)

        return dataclasses.replace(
            self, r=int(found(self.ranks, self.r)), lora_alpha=float(found(self.alphas, self.lora_alpha))
        )

    def alpha(self, rank: int, rslora: bool) -> float:
        """The alpha with which a product of rank `rank` has the adapter's s."""
        if not self.rslora and not rslora:
            return float(Fraction(str(self.lora_alpha)) * rank / self.r)  # decimal: a third of 0.3 is 0.1
        if self.rslora and rslora:
            return self.lora_alpha if rank == self.r else float(f"{self.lora_alpha * math.sqrt(rank / self.r):.12g}")
        if self.rslora:
            return self.lora_alpha / math.sqrt(self.r) * rank
        return self.lora_alpha / self.r * math.sqrt(rank)


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
    patterns = [content.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    for name, pattern, kinds in zip(("rank_pattern", "alpha_pattern"), patterns, ((int,), (int, float)), strict=True):
        sound = isinstance(pattern, dict) and all(
            re.fullmatch(r"[\w.]+", key) and type(value) in kinds and 0 < value < 1e30 for key, value in pattern.items()
        )
        if not sound:
            fail(f"{flag} {file}: {name} is {str(pattern)[:60]}; wanted names of modules with numbers above 0: {MERGE}")
    fingerprint = None
    if path.endswith(".safetensors"):
        with safetensors.safe_open(path, framework="pt") as handle:
            fingerprint = (handle.metadata() or {}).get("base_fingerprint")
    return Adapter(r, float(alpha), float(dropout), rslora, base, fingerprint, *patterns)


def to_ours(
    adapter: Adapter, content: dict, config: Shape, wanted: LoRAConfig | None, where: str
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """(adapter, its weights under this project's names) of the tensors in PEFT's file.

    The adapter is as `wanted` where that is the same function, else of the smallest rank and slots that hold it.
    """
    family = family_of(config)
    found = read_factors(adapter, content, config, where)
    used = {  # (S, r): whether a column of B has an entry in a slot
        path: (B.unflatten(1, (len(family.PROJECTIONS[path]), -1)) != 0).any(2).any(0) for path, (_, B) in found.items()
    }
    chosen = choose_form(adapter, used, family, wanted, where)
    weights = {}
    for path, (A, B) in found.items():
        parts = family.PROJECTIONS[path]
        enable = tuple(part in chosen.targets for part in parts)
        columns = choose_columns(used[path], chosen.dim, enable)
        for layer in range(len(A)):
            slots = B[layer].unflatten(0, (len(parts), -1))  # (S, O/S, r)
            name = f"{PREFIX}{family.BLOCKS}.{layer}.{path}.lora_"
            weights[name + "A"] = torch.cat([A[layer][picked] for picked in columns.values()])  # (G*R, I)
            weights[name + "B"] = torch.cat([slots[slot][:, picked] for slot, picked in columns.items()])  # (G*O/S, R)
    return chosen, weights


def choose_form(
    adapter: Adapter, used: Mapping[str, Tensor], family: type[LanguageModel], wanted: LoRAConfig | None, where: str
) -> LoRAConfig:
    """The adapter of this project that to_ours() fills; UserError where the projections come to several."""
    own = {path: adapter.of(f"{family.HUGGING_FACE}{family.BLOCKS}.0.{path}") for path in used}
    most = min(columns.shape[1] for columns in used.values())
    least = int(max(columns.sum(1).max() for columns in used.values()))
    needed, possible = [], []  # parts
    for path, columns in used.items():
        parts = family.PROJECTIONS[path]
        trained = columns.any(1).tolist() if len(parts) > 1 and columns.any() else [True] * len(parts)
        needed += [part for part, on in zip(parts, trained, strict=True) if on and columns.any()]
        possible += [part for part, on in zip(parts, trained, strict=True) if on]

    def fits(config: LoRAConfig) -> bool:
        held = {part for path in used for part in family.PROJECTIONS[path]}
        return (
            least <= config.dim <= most
            and all(one.alpha(config.dim, config.rslora) == config.alpha for one in own.values())
            and {*needed} <= {*config.targets} <= held
            and all({*config.targets} & {*family.PROJECTIONS[path]} for path in used)
        )

    if wanted is not None and fits(wanted):
        return dataclasses.replace(wanted, dropout=adapter.dropout)
    fused = all(len(family.PROJECTIONS[path]) > 1 for path in used)
    rank = (least if fused else most) or most
    found = LoRAConfig(
        rank, next(iter(own.values())).alpha(rank, adapter.rslora), adapter.dropout, tuple(possible), adapter.rslora
    )
    if not fits(found):
        of = ", ".join(f"{path} r {one.r} and lora_alpha {one.lora_alpha:g}" for path, one in own.items())
        fail(f"{where}: rank_pattern or alpha_pattern differ too much ({of}); wanted one rank and scaling: {MERGE}")
    return found.of(family.parts())


def read_factors(adapter: Adapter, content: dict, config: Shape, where: str) -> dict[str, tuple[Tensor, Tensor]]:
    """projection -> PEFT's A (L, r, I) and B (L, O, r), float32, of all projections that the file adapts."""
    family = family_of(config)
    with torch.device("meta"):
        body = family(config).transformer
    L, places = len(body.blocks), "|".join(map(re.escape, family.PROJECTIONS))
    # Without what wrappers put in. save_pretrained() leaves the adapter's name out; a state_dict saved by hand has it.
    factor = re.compile(rf"(?:transformer\.)?{family.BLOCKS}\.(\d+)\.({places})\.lora_([AB])(?:\.(\w+))?\.weight")
    found: dict[tuple[str, str, int], Tensor] = {}
    matches = {name: factor.fullmatch(unwrapped(name)) for name in content}
    others = [name for name, match in matches.items() if not match or int(match[1]) >= L]
    if others:
        fail(
            f"{where}: holds {some(others)}; wanted the factors of {family.BLOCKS}.0 to {family.BLOCKS}.{L - 1} alone, "
            f"of {', '.join(family.PROJECTIONS)}: {MERGE}"
        )
    adapters = sorted({match[4] or "" for match in matches.values() if match})
    if len(adapters) > 1:
        fail(f"{where}: holds the adapters {adapters[0]!r} and {adapters[1]!r}; wanted one: save it with peft alone")
    for name, value in content.items():
        match = matches[name]
        assert match
        key = match[2], match[3], int(match[1])
        if key in found:
            fail(f"{where}: holds {name} twice, under several wrappers; save the adapter with peft's save_pretrained()")
        r = adapter.of(f"{family.HUGGING_FACE}{family.BLOCKS}.{match[1]}.{match[2]}").r
        inputs, outputs = sizes(body.blocks[0].get_submodule(match[2]))
        wanted = (r, inputs) if match[3] == "A" else (outputs, r)
        if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != wanted:
            what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            fail(f"{where}: {name} is {what}, wanted {wanted} numbers: does {CONFIG} or --model_card match?")
        found[key] = value.detach().float()
    paths = [path for path in family.PROJECTIONS if any(key[0] == path for key in found)]
    missing = [
        f"{family.BLOCKS}.{layer}.{path}.lora_{factor}"
        for path in paths or [next(iter(family.PROJECTIONS))]
        for layer in range(L)
        for factor in "AB"
        if (path, factor, layer) not in found
    ]
    if missing:
        fail(
            f"{where}: lacks {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f"; wanted the factors of all {L} layers"
        )
    for path in paths:
        ends = [adapter.of(f"{family.HUGGING_FACE}{family.BLOCKS}.{layer}.{path}") for layer in range(L)]
        if any(one != ends[0] for one in ends):
            fail(f"{where}: rank_pattern or alpha_pattern tell layers of {path} apart; wanted all alike: {MERGE}")
    return {
        path: (
            torch.stack([found[path, "A", layer] for layer in range(L)]),
            torch.stack([found[path, "B", layer] for layer in range(L)]),
        )
        for path in paths
    }


def sizes(layer: torch.nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a projection."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return tuple(layer.weight.shape)  # Conv1D's


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


def from_ours(model: LanguageModel, base: str | None) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json, float32 tensors by PEFT's names) of a model with adapters. base: where they belong."""
    lora = model.lora_config
    slots = {path: sum(part in lora.targets for part in parts) for path, parts in model.PROJECTIONS.items()}
    slots = {path: count for path, count in slots.items() if count}
    weights = {}
    for i, block in enumerate(model.transformer.blocks):
        for path, G in slots.items():
            layer = block.get_submodule(path)
            name = f"base_model.model.{model.HUGGING_FACE}{model.BLOCKS}.{i}.{path}.lora_"
            blocks = torch.zeros(layer.out_features, G * lora.dim)
            for outputs, rows_a, rows_b in layer.slots():
                blocks[outputs, rows_a] = layer.lora_B.detach()[rows_b]
            weights[name + "A.weight"] = layer.lora_A.detach().clone()
            weights[name + "B.weight"] = blocks
    least = min(slots.values())
    more = {module_name(path, model): G for path, G in slots.items() if G != least}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": least * lora.dim,
        "lora_alpha": alpha_of(lora, least),
        "lora_dropout": lora.dropout,
        "target_modules": sorted({module_name(path, model) for path in slots}),
        **({"rank_pattern": {name: G * lora.dim for name, G in more.items()}} if more else {}),
        **({"alpha_pattern": {name: alpha_of(lora, G) for name, G in more.items()}} if more else {}),
        "fan_in_fan_out": model.TRANSPOSED,
        "bias": "none",
        "use_rslora": lora.rslora,
        "use_dora": False,
        "init_lora_weights": True,
    }, weights


def alpha_of(lora: LoRAConfig, slots: int) -> float:
    """lora_alpha for the rank of all slots together."""
    if lora.rslora:
        return lora.alpha if slots == 1 else lora.alpha * math.sqrt(slots)
    alpha = Fraction(str(lora.alpha)) * slots
    return int(alpha) if alpha.denominator == 1 else float(alpha)


def module_name(path: str, model: LanguageModel) -> str:
    """The name by which peft finds a projection: the last part of its path, more where that is another's, too, which
    has no adapter."""
    leaf = path.rpartition(".")[2]
    alike = [other for other in model.PROJECTIONS if other.endswith(f".{leaf}")]
    adapted = [any(part in model.lora_config.targets for part in model.PROJECTIONS[other]) for other in alike]
    return leaf if all(adapted) else path
