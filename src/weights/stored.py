"""What a checkpoint of ours says of its model: its entries family, config, lora, base and step."""

import itertools
import math

from base.errors import fail
from families import DEFAULT, FAMILIES, family_of
from language_model import LoRAConfig, Shape
from model import SLOTS


def fitted(lora_config: LoRAConfig, config: Shape) -> LoRAConfig:
    """The adapter with its targets as the shape's family names them; UserError for those that it does not have."""
    try:
        return lora_config.of(family_of(config).parts())
    except ValueError as error:
        fail(f"--lora_target {error}")


def stored_entries(content: dict, path: str, flag: str) -> tuple[Shape, LoRAConfig, dict | None, int]:
    """(shape, adapter, base, step) of a file of ours, or UserError."""
    name = content.get("family", DEFAULT)
    if not isinstance(name, str) or name not in FAMILIES:
        fail(f"{flag} {path}: its entry 'family' is {name!r:.60}; wanted {' or '.join(FAMILIES)}")
    try:
        lora_config, base, step = stored_adapter(content["lora"]), content["base"], content["step"]
        sound = (
            type(lora_config.dim) is int
            and lora_config.dim >= 0
            and 0 <= lora_config.dropout < 1
            and math.isfinite(lora_config.alpha)
            and type(lora_config.rslora) is bool
            and type(lora_config.bottleneck) is int
            and 0 <= lora_config.bottleneck
            and 0 in (lora_config.dim, lora_config.bottleneck)
            and type(step) is int
            and step >= 0
            and (base is None or all(isinstance(base[key], str) for key in ("path", "absolute", "fingerprint")))
            and (base is None or base.get("dtype") in (None, "bf16"))
            and isinstance(content["config"], dict)
        )
        lora_config = lora_config.of(FAMILIES[name].parts())
    except (TypeError, KeyError, ValueError) as error:
        fail(f"{flag} {path}: its entries 'lora', 'base' or 'step' are damaged ({type(error).__name__}: {error})")
    if not sound:
        fail(f"{flag} {path}: its entries 'config', 'lora', 'base' or 'step' are damaged")
    try:
        return FAMILIES[name].check_config(content["config"]), lora_config, base, step
    except ValueError as error:
        fail(f"{flag} {path}: {error}")


def stored_adapter(entry: dict) -> LoRAConfig:
    """The entry `lora` of a file of ours, of either format. TypeError, KeyError or ValueError where it is damaged."""
    if "enable" not in entry:
        return LoRAConfig(**{**entry, "targets": tuple(entry["targets"])})
    enable = entry["enable"]
    if list(map(type, enable)) != [bool] * len(SLOTS):
        raise ValueError(f"enable is {enable!r:.60}")
    targets = tuple(itertools.compress(SLOTS, enable))
    return LoRAConfig(entry["dim"], entry["alpha"], entry["dropout"], targets)
