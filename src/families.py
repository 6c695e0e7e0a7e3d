"""The families of models that this project trains; a new one is a file like llama.py and a line here."""

from language_model import LanguageModel
from llama import LlamaLMModel
from model import GPT2LMModel

FAMILIES: dict[str, type[LanguageModel]] = {"gpt2": GPT2LMModel, "llama": LlamaLMModel}  # by a checkpoint's name of it
DEFAULT = "gpt2"  # of checkpoints that name none: the format before there were others

PARTS = tuple(dict.fromkeys(part for family in FAMILIES.values() for part in family.parts()))


def family_of(config: object) -> type[LanguageModel]:
    """The family of a shape."""
    return next(family for family in FAMILIES.values() if type(config) is family.CONFIG)


def name_of(config: object) -> str:
    """What checkpoints call it."""
    return next(name for name, family in FAMILIES.items() if type(config) is family.CONFIG)


def of_model_type(model_type: object) -> type[LanguageModel]:
    """The family of config.json's model_type; ValueError for another."""
    for family in FAMILIES.values():
        if model_type in family.MODEL_TYPES:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.MODEL_TYPES)
    raise ValueError(f"model_type is {model_type!r}; supported are {known}")


def of_names(names: list[str]) -> type[LanguageModel]:
    """The family whose weights have most of these names, without a prefix."""
    return max(FAMILIES.values(), key=lambda family: sum(bool(family.WEIGHTS.fullmatch(name)) for name in names))
