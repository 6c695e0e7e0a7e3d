"""The clipped sum by Opacus, as the code of Yu et al. (2022) trains: a reference for privacy.clipping.BookKeeping.

Opacus's DifferentiallyPrivateDistributedDataParallel gives every rank rank 0's parameters; around it, GradSampleModule
computes and holds every per-text gradient. Neither sums over the ranks: in Opacus its optimizer does, here the plan.

Shapes: M texts, U units, V vocabulary.
"""

import torch
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

import lora_grad_samplers  # noqa: F401  (registers the rules of this project's layers with Opacus)
from base.distributed import World
from base.products import BLOCK_ROWS, row_blocks
from base.recompute import recomputed
from language_model import LanguageModel
from losses import MicroBatch, unit_losses
from optimizer import FlatParameters
from privacy.clipping import ClippingRule
from privacy.unit_gradients import UNITS, add_units, sum_of_squares, unless_all, zero_rows


class UnitLosses(nn.Module):
    """What Opacus wraps: a model whose output is its loss, as the published one's is."""

    def __init__(self, model: LanguageModel, smoothing: float):
        super().__init__()
        self.model, self.smoothing, self.head_trains = model, smoothing, model.lm_head.weight.requires_grad

    def forward(self, batch: MicroBatch) -> Tensor:
        """The units' losses, (U,). The head runs over all positions where it trains: Opacus needs the texts in the
        first dimension."""
        return unit_losses(self.model, batch, self.smoothing, self.head_trains, all_positions=self.head_trains)


class OpacusEngine:
    """Same contract as privacy.clipping.BookKeeping, but that all ranks build it together; `model` itself is left as it
    is, under the names that checkpoints have."""

    losses: type[nn.Module] = UnitLosses

    def __init__(
        self,
        model: LanguageModel,
        flat: FlatParameters,
        rule: ClippingRule,
        smoothing: float = 0.0,
        world: World | None = None,
        recompute: bool = False,
    ):
        if flat.sums.dtype != torch.float64:
            raise ValueError(f"sums of units in {flat.sums.dtype}: expected float64, whose rounding the noise pays for")
        self.model, self.flat, self.rule = model, flat, rule
        model.transformer.run_block = recomputed if recompute else None
        module = self.losses(model, smoothing)
        if world is not None and world.size > 1:  # alone there is no process group to broadcast in
            with world.collective_errors():
                module = DifferentiallyPrivateDistributedDataParallel(module)
        # "sum": the losses of a micro-batch are added, never averaged, so backpropagated values are per-text gradients.
        self.module = GradSampleModule(module, batch_first=True, loss_reduction="sum")
        self.module.disable_hooks()

    def accumulate(self, batch: MicroBatch) -> Tensor:
        """Add the clipped gradients of a micro-batch's units to `flat.grad`; return their losses, (U,).

        UNITS units at a time: the samplers' products then have one shape, whoever else was drawn.
        """
        if not len(batch.targets):
            return torch.zeros(batch.units, device=batch.ids.device)
        return torch.cat([self.accumulate_part(part) for part in batch.split(UNITS)])[: batch.units]

    def accumulate_part(self, batch: MicroBatch) -> Tensor:
        if not len(batch.targets):
            return torch.zeros(batch.units, device=batch.ids.device)
        self.module.enable_hooks()
        try:
            with row_blocks(BLOCK_ROWS[batch.ids.device.type]):
                losses = self.module(batch)
                losses.sum().backward()
        finally:
            self.module.disable_hooks()
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
            mask = unless_all(finite)
            for (_, parameter), grad, factor in zip(self.flat.named, grads, factors.T, strict=True):
                target = self.flat.grad_of(parameter)
                assert target is not None  # all of flat.named train
                add_units(target, factor, zero_rows(grad, mask))
        return losses.detach()
