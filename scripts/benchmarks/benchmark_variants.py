"""Other ways to train, for benchmark_training.py: Opacus's ghost clipping, Yu et al.'s arithmetic, a plain loop.

Each is an engine as privacy.clipping.BookKeeping is: accumulate(batch) adds the units' gradients to the flat buffer.

Shapes: M rows, T tokens, U units, D width, H heads, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from losses import MicroBatch
from model import MLP, MODEL_CARDS, Conv1D, GPT2Block, GPT2LMModel
from optimizer import FlatParameters
from privacy.clipping import ClippingRule
from privacy.opacus_engine import OpacusEngine, UnitLosses


class LinearHead(nn.Linear):
    """The untied head that Opacus's ghost clipping needs."""


def untie(model: GPT2LMModel) -> None:
    """Replace what Opacus's ghost clipping has no rule for: Conv1D by nn.Linear, the tied head by one of its own."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.weight.shape[0], child.weight.shape[1])
                linear.weight.data, linear.bias.data = child.weight.data.T.contiguous(), child.bias.data
                linear.requires_grad_(child.weight.requires_grad)
                setattr(module, name, linear)
    head = LinearHead(model.config.n_embd, model.config.vocab_size, bias=False)
    head.weight.data = model.lm_head.weight.data.clone()
    head.requires_grad_(model.lm_head.weight.requires_grad)
    model.lm_head = head
    # its rule for embeddings views the ids as one column, which the expanded positions do not allow
    model.transformer.wpe.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))


def dense_targets(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(targets, weights) of every position, (M*T,); a weight of 0 where nothing is scored."""
    targets = torch.zeros(batch.ids.numel(), dtype=torch.int64, device=batch.ids.device)
    weights = torch.zeros(batch.ids.numel(), device=batch.ids.device)
    targets[batch.positions], weights[batch.positions] = batch.targets, batch.weights
    return targets, weights


def dense_losses(logits: torch.Tensor, batch: MicroBatch, smoothing: float) -> torch.Tensor:
    """Per-unit losses from the logits of every position, (U,)."""
    targets, weights = dense_targets(batch)
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none", label_smoothing=smoothing)
    return (losses * weights).view(batch.units, -1).sum(1)


class YuBlock(GPT2Block):
    """Attention as Yu et al.'s code computes it: all scores, a mask, a softmax."""

    def forward(self, x: torch.Tensor, places: None) -> torch.Tensor:
        B, T, D = x.shape
        query, key, value = (part.transpose(1, 2) for part in self.project(x, places))  # each (B, H, T, D/H)
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        mask = torch.ones(T, T, device=x.device).tril()
        y = (scores * mask - 1e10 * (1 - mask)).softmax(dim=-1) @ value
        return self.finish(x, y.transpose(1, 2).reshape(B, T, D))


class YuMLP(MLP):
    """The tanh GELU as a formula of elementwise operations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_fc(x)
        return self.c_proj(0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3)))))


class YuLayerNorm(nn.LayerNorm):
    """The layer norm as a formula too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.pow(2).mean(dim=-1, keepdim=True)
        return self.weight * (centred / torch.sqrt(variance + self.eps)) + self.bias


class YuLosses(UnitLosses):
    """A log-softmax of the logits of every position."""

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        log_p = torch.log_softmax(self.model(batch.ids).float().flatten(0, 1), dim=-1)  # (M*T, V)
        targets, weights = dense_targets(batch)
        nll = -log_p.gather(1, targets[:, None]).squeeze(1)
        losses = (1 - self.smoothing) * nll - self.smoothing * log_p.mean(dim=-1)
        return (losses * weights).view(batch.units, -1).sum(1)


class YuArithmetic(OpacusEngine):
    """Opacus's hooks with the arithmetic of Yu et al. (2022), which is that of LoRA's NLG example.

    A layer norm that trains stays PyTorch's, as in dp-transformers: Opacus has no rule for another.
    """

    losses = YuLosses

    def __init__(self, model: GPT2LMModel, flat: FlatParameters, rule: ClippingRule, smoothing: float):
        for block in model.transformer.h:
            block.__class__, block.mlp.__class__ = YuBlock, YuMLP
        for module in model.modules():
            if type(module) is nn.LayerNorm and not module.weight.requires_grad:
                module.__class__ = YuLayerNorm
        super().__init__(model, flat, rule, smoothing)


class GhostClipping:
    """Opacus's fast gradient clipping: norms in a first backward pass, the weighted sum in a second."""

    def __init__(self, model: GPT2LMModel, flat: FlatParameters, C: float, smoothing: float):
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        import lora_grad_samplers  # noqa: F401

        self.flat, self.smoothing = flat, smoothing
        self.module = GradSampleModuleFastGradientClipping(
            model, loss_reduction="sum", max_grad_norm=C, use_ghost_clipping=True
        )

    def accumulate(self, batch: MicroBatch) -> None:
        for _, parameter in self.flat.named:
            parameter.grad = None
        self.module.enable_hooks()
        losses = dense_losses(self.module(batch.ids), batch, self.smoothing)
        losses.sum().backward(retain_graph=True)
        factors = self.module.get_clipping_coef()
        for _, parameter in self.flat.named:
            parameter.grad = self.flat.grad_of(parameter)
        self.module.disable_hooks()
        (losses * factors).sum().backward()


class PlainLoop:
    """Hugging Face's GPT-2 (with peft's adapters on the fused projection), the loss of a padded batch, backward()."""

    def __init__(self, card: str, lora: bool):
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = MODEL_CARDS[card]
        self.model = GPT2LMHeadModel(
            GPT2Config(
                n_embd=shape.n_embd,
                n_layer=shape.n_layer,
                n_head=shape.n_head,
                attn_pdrop=0.0,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
                use_cache=False,
            )
        )
        if lora:
            from peft import LoraConfig, get_peft_model

            self.model = get_peft_model(
                self.model, LoraConfig(r=4, lora_alpha=32, target_modules=["c_attn"], fan_in_fan_out=True)
            )

    def accumulate(self, batch: MicroBatch) -> None:
        labels = torch.full((batch.ids.numel(),), -100, dtype=torch.int64, device=batch.ids.device)
        labels[batch.positions] = batch.targets
        logits = self.model(batch.ids).logits
        F.cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum").backward()


def pad_to(batch: MicroBatch, seq_len: int) -> MicroBatch:
    """`batch` with every row padded to seq_len."""
    T = batch.ids.shape[1]
    ids = F.pad(batch.ids, (0, seq_len - T))
    positions = batch.positions // T * seq_len + batch.positions % T
    return MicroBatch(ids, positions, batch.targets, batch.weights, batch.counts, batch.rows_per_unit, batch.tokens)
