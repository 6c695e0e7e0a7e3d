"""Other ways to train, for benchmark_training.py: Opacus's ghost clipping, Yu et al.'s arithmetic, a plain loop.

Each is an engine as privacy.clipping.BookKeeping is: accumulate(batch) adds the units' gradients to the flat buffer.

Shapes: M rows, T tokens, U units, D width, H heads, V vocabulary.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

import loralib as lora
from base.errors import fail
from language_model import LanguageModel, LoRAConfig
from llama import LlamaLMModel
from llama_config import LlamaConfig
from losses import MicroBatch
from model import MLP, MODEL_CARDS, Conv1D, GPT2Block, GPT2LMModel
from optimizer import FlatParameters
from privacy.clipping import ClippingRule
from privacy.opacus_engine import OpacusEngine, UnitLosses
from project_memory import SHAPES
from project_scaling import multiply_adds

# --model_card -> shape; the weights are random.
LLAMAS: dict[str, LlamaConfig] = {"llama-135m": dataclasses.replace(SHAPES["smollm2-135m"], rms_norm_eps=1e-5)}
VARIANTS_OF_GPT2 = ("padded", "published")


def chosen_variants(card: str, chosen: list[str] | None, known: list[str]) -> list[str]:
    """The variants that --variants names, by default all that the model has; UserError for those that it lacks."""
    had = [name for name in known if card not in LLAMAS or name not in VARIANTS_OF_GPT2]
    if absent := sorted({*(chosen or [])} - {*had}):
        fail(f"--variants {' '.join(absent)}: {card} has none such; expected some of {' '.join(had)}")
    return chosen or had


def adapters_of(card: str) -> LoRAConfig:
    """Llama: rank 8 on every projection. GPT-2: Yu et al.'s, rank 4 on query and value."""
    return LoRAConfig(8, 32, targets=("all",)) if card in LLAMAS else LoRAConfig(4, 32)


def random_model(card: str, adapters: bool) -> LanguageModel:
    lora_config = adapters_of(card) if adapters else LoRAConfig()
    if card in LLAMAS:
        return LlamaLMModel(LLAMAS[card], lora_config)
    return GPT2LMModel(MODEL_CARDS[card], lora_config)


def vocabulary(card: str) -> int:
    return LLAMAS[card].vocab_size if card in LLAMAS else 50257


def needed(card: str, tokens: int, scored: int, adapters: bool) -> float:
    """multiply_adds() of either family: what the real tokens need in all passes."""
    if card not in LLAMAS:
        return multiply_adds(MODEL_CARDS[card], tokens, scored, adapters)
    shape = LLAMAS[card]
    once = shape.hidden_size * (tokens * shape.block_outputs + scored * shape.vocab_size)
    return (2 if adapters else 3) * once


class LinearHead(nn.Linear):
    """The untied head that Opacus's ghost clipping needs."""


def untie(model: LanguageModel) -> None:
    """Replace what Opacus's ghost clipping has no rule for: linear layers of ours without an adapter by nn.Linear, the
    tied head by one of its own."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            transposed = isinstance(child, Conv1D)
            if transposed or (
                isinstance(child, lora.MergedLinear) and not child.has_adapter() and not child.fan_in_fan_out
            ):
                weight = child.weight.data.T.contiguous() if transposed else child.weight.data
                linear = nn.Linear(*weight.T.shape, bias=child.bias is not None)
                linear.weight.data = weight
                if child.bias is not None:
                    linear.bias.data = child.bias.data
                linear.requires_grad_(child.weight.requires_grad)
                setattr(module, name, linear)
    head = LinearHead(model.embedding.embedding_dim, model.config.vocab_size, bias=False)
    head.weight.data = model.lm_head.weight.data.clone()
    head.requires_grad_(model.lm_head.weight.requires_grad)
    model.lm_head = head
    if not isinstance(model, GPT2LMModel):
        return
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
    """Hugging Face's model (with peft's adapters where ours has them), the loss of a padded batch, backward()."""

    def __init__(self, card: str, lora: bool):
        self.model = self.llama(card) if card in LLAMAS else self.gpt2(card)
        if lora:
            from peft import LoraConfig, get_peft_model

            parts, config = LlamaLMModel.parts(), adapters_of(card)
            targets = [f"{part}_proj" for part in parts] if card in LLAMAS else ["c_attn"]
            self.model = get_peft_model(
                self.model,
                LoraConfig(
                    r=config.dim,
                    lora_alpha=int(config.alpha),
                    target_modules=targets,
                    fan_in_fan_out=card not in LLAMAS,
                ),
            )

    @staticmethod
    def llama(card: str) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = LLAMAS[card].to_hugging_face()
        return LlamaForCausalLM(LlamaConfig(**{**shape, "use_cache": False, "torch_dtype": "float32"}))

    @staticmethod
    def gpt2(card: str) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = MODEL_CARDS[card]
        return GPT2LMHeadModel(
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
