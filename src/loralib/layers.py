"""A linear layer with low-rank adapters (Hu et al., 2021, "LoRA", eq. 3: h = W x + (alpha/r) B A x).

Shapes: B batch, T tokens, I in_features, O out_features, R rank, G number of enabled slots.
Every trainable tensor's name begins with `lora_`, so freezing and saving are one-liners (see utils.py).
"""

import math
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.products import linear


class MergedLinear(nn.Module):
    """A linear layer whose output is len(enable_lora) equal slots, each with or without an adapter of its own.

    GPT-2's fused projection is [query, key, value]; `enable_lora=[True, False, True]` adapts query and value.
    lora_A is (G*R, I), Kaiming-uniform(sqrt 5); lora_B is (O/len(enable_lora)*G, R), zero.
    `fan_in_fan_out=True` stores weight as (I, O), the layout of GPT-2's Conv1D; else (O, I).
    `rslora` scales by alpha/sqrt(r) in place of alpha/r (Kalajdzievski, 2023, arXiv:2312.03732).

    `merge()` keeps the base weight and `unmerge()` puts that very tensor back, so any number of merges and unmerges
    leaves every bit in place; both are idempotent. While merged a layer cannot be trained or saved.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: tuple[bool, ...] = (False,),
        fan_in_fan_out: bool = False,
        bias: bool = True,
        rslora: bool = False,
    ):
        super().__init__()
        if not enable_lora or out_features % len(enable_lora):
            raise ValueError(
                f"enable_lora has {len(enable_lora)} slots: expected a divisor of out_features={out_features}"
            )
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout={lora_dropout}: expected 0 <= lora_dropout < 1")
        if r < 0:
            raise ValueError(f"lora rank r={r}: expected r >= 0")
        self.r, self.lora_alpha = r, lora_alpha
        self.scaling = lora_alpha / (math.sqrt(r) if rslora else r) if r > 0 else 0.0
        self.base_weight: Tensor | None = None  # while merged
        self.in_features, self.out_features = in_features, out_features
        self.enable_lora = tuple(bool(on) for on in enable_lora)
        self.fan_in_fan_out = fan_in_fan_out
        self.lora_dropout = lora_dropout
        # see remember(): the storage of an input -> (where in it, numbers, what dropout left) of each forward pass
        self.adapter_inputs: weakref.WeakKeyDictionary[torch.UntypedStorage, list[tuple[int, int, Tensor | None]]] = (
            weakref.WeakKeyDictionary()
        )
        shape = (in_features, out_features) if fan_in_fan_out else (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        if self.has_adapter():
            self.lora_A = nn.Parameter(torch.empty(r * self.groups, in_features))
            self.lora_B = nn.Parameter(torch.empty(self.slot_width * self.groups, r))
        self.reset_parameters()

    @property
    def groups(self) -> int:
        return sum(self.enable_lora)

    @property
    def slot_width(self) -> int:
        return self.out_features // len(self.enable_lora)

    def has_adapter(self) -> bool:
        return self.r > 0 and self.groups > 0

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight.T if self.fan_in_fan_out else self.weight, a=math.sqrt(5))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        if self.has_adapter():
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def slots(self) -> list[tuple[slice, slice, slice]]:
        """For each enabled slot: (its outputs, its rows of lora_A, its rows of lora_B)."""
        width, enabled = self.slot_width, [i for i, on in enumerate(self.enable_lora) if on]
        return [
            (slice(i * width, (i + 1) * width), slice(j * self.r, (j + 1) * self.r), slice(j * width, (j + 1) * width))
            for j, i in enumerate(enabled)
        ]

    def expanded_B(self) -> Tensor:
        """lora_B as one block matrix (O, G*R), scaling included: outputs without an adapter have zero rows."""
        columns = []
        for outputs, _, rows_b in self.slots():
            below = self.out_features - outputs.stop
            columns.append(F.pad(self.lora_B[rows_b], (0, 0, outputs.start, below)))
        return torch.cat(columns, dim=1) * self.scaling

    def delta_weight(self) -> Tensor:
        """The adapters' products in the layout of `weight`."""
        delta = self.expanded_B() @ self.lora_A  # (O, I)
        return delta.T if self.fan_in_fan_out else delta

    @property
    def merged(self) -> bool:
        return self.base_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapter into `weight`."""
        if not self.merged and self.has_adapter():
            self.base_weight = self.weight.data
            self.weight.data = self.base_weight + self.delta_weight().to(self.base_weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if self.base_weight is not None:
            # .to() is the same tensor unless the layer was moved or cast while merged
            self.weight.data = self.base_weight.to(self.weight.device, self.weight.dtype)
            self.base_weight = None

    def adds_adapter(self) -> bool:
        """Whether forward() adds the adapter's output: there is one, and `weight` does not hold it already."""
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError("the layer is merged, its adapter would get no gradient: call unmerge() before training")
        return self.has_adapter() and not self.merged

    # A merged weight saved beside its factors would be added twice when read back; one read in would lose the adapter.
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.merged:
            raise RuntimeError(f"{prefix}weight is merged: call unmerge() before state_dict()")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if self.merged:
            raise RuntimeError(f"{prefix}weight is merged: call unmerge() before load_state_dict()")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # ---------------------------------------------------------------- forward, and what a per-unit gradient needs

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        result = linear(x, weight, self.bias)
        if not self.adds_adapter():
            return result
        dropping = self.training and self.lora_dropout > 0
        adapter_input = F.dropout(x, self.lora_dropout) if dropping else x
        # Only an engine for per-unit gradients asks for the masks, and it watches the layer through a forward hook.
        if self.lora_dropout > 0 and self._forward_hooks and torch.is_grad_enabled():
            self.remember(x, adapter_input.detach() if dropping else None)
        return result + linear(linear(adapter_input, self.lora_A), self.expanded_B())

    def remember(self, x: Tensor, dropped: Tensor | None) -> None:
        """Keep what dropout left of `x` (None: all of it), for adapter_factors: a per-unit gradient needs the very mask
        of its forward pass. Kept for as long as somebody holds the memory of `x`, so nothing piles up."""
        self.adapter_inputs.setdefault(x.untyped_storage(), []).append((x.data_ptr(), x.numel(), dropped))

    def take_adapter_input(self, x: Tensor) -> Tensor:
        """What the adapter got in the last pass that saw `x` or a view of all of it; hands each pass out once."""
        if self.lora_dropout == 0:
            return x
        passes = self.adapter_inputs.get(x.untyped_storage(), [])
        for i in reversed(range(len(passes))):
            if passes[i][:2] == (x.data_ptr(), x.numel()):
                dropped = passes.pop(i)[2]
                return x if dropped is None else dropped.reshape(x.shape)
        raise RuntimeError("no forward pass watched by a hook saw this input, so its dropout mask is unknown")

    def adapter_factors(
        self, x: Tensor, grad: Tensor
    ) -> tuple[tuple[Tensor, Tensor], list[tuple[slice, Tensor, Tensor]]]:
        """The adapter's gradients as sums of outer products over positions.

        x (B, ..., I) is the input, grad (B, ..., O) the gradient at the output. Returns ((p, q), [(rows, p, q), ...]):
        the gradient of lora_A, then of each slot's rows of lora_B, is the sum over ... of p ⊗ q. The slots come in the
        order of their rows, all in grad's dtype. With dropout, a forward pass can be asked for once.
        """
        adapter_input = self.take_adapter_input(x).to(grad.dtype)
        down = linear(adapter_input, self.lora_A.to(grad.dtype))  # (B, ..., G*R)
        up, factors_b = [], []
        for outputs, rows_a, rows_b in self.slots():
            grad_slot = grad[..., outputs] * self.scaling  # (B, ..., O/slots)
            up.append(linear(grad_slot, self.lora_B[rows_b].T.to(grad.dtype)))  # (B, ..., R)
            factors_b.append((rows_b, grad_slot, down[..., rows_a]))
        return (torch.cat(up, dim=-1), adapter_input), factors_b

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "adapter_inputs"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.adapter_inputs = weakref.WeakKeyDictionary()  # forward passes of the original are not the copy's

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, r={self.r}, enable_lora={list(self.enable_lora)}"
