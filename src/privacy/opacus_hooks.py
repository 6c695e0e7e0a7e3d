"""The clipped sum through Opacus's own hooks (GradSampleModule), which hold every per-text gradient: to compare with.

Shapes: M texts, U units, V vocabulary.
"""

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor

import lora_grad_samplers  # noqa: F401  (registers the rules of this project's layers with Opacus)
from fast_linear import BLOCK_ROWS, row_blocks
from losses import MicroBatch, unit_losses
from model import GPT2LMModel
from optimizer import FlatParameters
from privacy.clipping import UNITS, ClippingRule, sum_of_squares


class OpacusHooks:
    """Same contract as privacy.clipping.BookKeeping."""

    def __init__(self, model: GPT2LMModel, flat: FlatParameters, rule: ClippingRule, smoothing: float = 0.0):
        self.model, self.flat, self.rule, self.smoothing = model, flat, rule, smoothing
        self.head_trains = model.lm_head.weight.requires_grad
        # "sum": the losses of a micro-batch are added, never averaged, so backpropagated values are per-text gradients.
        self.hooks = GradSampleModule(model, batch_first=True, loss_reduction="sum")
        self.hooks.disable_hooks()

    def losses(self, batch: MicroBatch) -> Tensor:
        """The units' losses, (U,). The head runs over all positions where it trains: Opacus needs the texts in the
        first dimension."""
        return unit_losses(self.model, batch, self.smoothing, self.head_trains, all_positions=self.head_trains)

    def accumulate(self, batch: MicroBatch) -> Tensor:
        """Add the clipped gradients of a micro-batch's units to `flat.grad`; return their losses, (U,).

        UNITS units at a time: the samplers' products then have one shape, whoever else was drawn.
        """
        if not len(batch.targets):
            return torch.zeros(batch.units, device=batch.ids.device)
        return torch.cat([self.accumulate_part(part) for part in batch.split(UNITS)])[:batch.units]

    def accumulate_part(self, batch: MicroBatch) -> Tensor:
        if not len(batch.targets):
            return torch.zeros(batch.units, device=batch.ids.device)
        self.hooks.enable_hooks()
        try:
            with row_blocks(BLOCK_ROWS[batch.ids.device.type]):
                losses = self.losses(batch)
                losses.sum().backward()
        finally:
            self.hooks.disable_hooks()
        with torch.no_grad(), torch.autocast(batch.ids.device.type, enabled=False):
            grads = []
            for name, parameter in self.flat.named:
                sample = parameter.grad_sample  # (M, *shape)
                parameter.grad_sample = parameter.grad = None
                if not isinstance(sample, Tensor):
                    raise RuntimeError(f"{name}: Opacus computed no per-text gradient")
                sample = sample.to(self.flat.data.dtype)
                grads.append(sample.view(batch.units, batch.rows_per_unit, -1).sum(1))  # (U, size)
            factors, finite = self.rule.factors(torch.stack([sum_of_squares(grad) for grad in grads], dim=1))
            for (_, parameter), grad, factor in zip(self.flat.named, grads, factors.T):
                if not bool(finite.all()):
                    grad = grad.masked_fill(~finite[:, None], 0)
                self.flat.grad_of(parameter).add_((factor @ grad).view_as(parameter))
        return losses.detach()
