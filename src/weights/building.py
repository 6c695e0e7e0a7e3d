"""Models from shapes: with weights that are drawn, or with those of a file, of which nothing is drawn first."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from base.errors import fail
from families import family_of
from language_model import LanguageModel, LoRAConfig, Shape, is_adapter
from weights.foreign import load_strictly


def build(config: Shape, lora_config: LoRAConfig, where: str, bf16_base: bool) -> LanguageModel:
    """A model whose weights are drawn from torch's generator."""
    with memory_for(config, where):
        model = family_of(config)(config, lora_config)
        for parameter in frozen_matrices(model) if bf16_base else ():
            parameter.data = parameter.data.bfloat16()
    return model


def filled(
    config: Shape, lora_config: LoRAConfig, weights: dict[str, Tensor], path: str, flag: str, bf16_base: bool
) -> LanguageModel:
    """A model of the file's weights: nothing is drawn but adapters, where the file has none."""
    with memory_for(config, f"{flag} {path}"), Undrawn():
        model = family_of(config)(config, lora_config)
        for parameter in frozen_matrices(model) if bf16_base else ():
            parameter.data = torch.empty_like(parameter, dtype=torch.bfloat16)  # of the float32 no page was touched
    load_strictly(model, weights, path, flag)
    return model


def rounded_matrices(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file with its matrices as frozen_matrices() in bfloat16 hold them."""
    return {name: value.bfloat16() if value.dim() > 1 else value for name, value in weights.items()}


def frozen_matrices(model: LanguageModel) -> list[nn.Parameter]:
    """Everything under the adapters but the vectors, which are few and whose layers compute in float32."""
    return [value for name, value in model.named_parameters() if not is_adapter(name) and value.dim() > 1]


class Undrawn(TorchFunctionMode):
    """Inside, what a layer would draw for its weights is left as the memory was found."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (Tensor.normal_, nn.init.normal_, nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextlib.contextmanager
def memory_for(config: Shape, where: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        fail(f"{where}: no memory for a model of {config.describe()} ({str(error).splitlines()[0][:160]})")
