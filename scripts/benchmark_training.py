"""How fast private training is, against ordinary training and the other ways to clip, in one run.

    python scripts/benchmark_training.py                              # every task, every variant, on this machine
    python scripts/benchmark_training.py --tasks e2e_lora --variants ordinary published --repeats 5
    python scripts/benchmark_training.py --scaling                    # ours: seconds a step against batch and length

Every variant lives in a process of its own, so that its peak memory is its own; a variant and ours then take turns,
one logical step each (A B A B ...), and what is printed are medians of the pairwise ratios. A step is all of a step:
gradients, clipping, noise, AdamW. Beside it stands the arithmetic floor: the multiply-adds that the real tokens need
(forward, backward for the states, weight gradients of what trains), over the matrix-product rate measured here.

Variants: ordinary    the same model and loss without clipping or noise
          book_keeping ours
          opacus      Opacus's hooks: every per-example gradient is held
          ghost       Opacus's ghost clipping: two backward passes, head and embedding untied, since it must
          published   padded to --seq_len, logits of every position, Opacus's hooks
          plain       a plain PyTorch loop over Hugging Face's GPT-2 without privacy (needs transformers)
Writes JSON to results/.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, os.path.join(ROOT, "src"))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data_utils import Examples
from losses import MicroBatch
from model import MODEL_CARDS, Conv1D, GPT2LMModel, LoRAConfig
from optimizer import AdamW, FlatParameters
from privacy.clipping import BookKeeping, ClippingRule, Ordinary
from privacy.noise import NoiseSource

VARIANTS = ("ordinary", "book_keeping", "opacus", "ghost", "published", "plain")
# (adapters, completion only, units of a logical batch, units a slow variant is timed on, padded tokens a micro-batch)
TASKS = {
    "e2e_lora": (True, True, 128, 8, 2048),
    "author_full": (False, False, 64, 8, 1024),
    "author_lora": (True, False, 64, 8, 2048),
}
SLOW = {"opacus", "ghost", "published"}


def make_examples(task: str, units: int, length: int, vocab_size: int) -> Examples:
    """E2E's lengths in tokens (mean 53, of which context 28; at most 115), or `length` tokens, all scored."""
    rng = np.random.default_rng(0)
    if TASKS[task][1]:
        lengths = np.clip(rng.normal(53, 16, units).round().astype(np.int64), 20, 115)
        first_scored = np.maximum(1, (lengths * 28) // 53)
    else:
        lengths, first_scored = np.full(units, length + 1), np.ones(units, np.int64)
    tokens = rng.integers(0, vocab_size, lengths.sum()).astype(np.int32)
    return Examples(tokens, np.concatenate([[0], np.cumsum(lengths)]), first_scored, 0, 0)


def multiply_adds(examples: Examples, config, lora: bool) -> float:
    """What the real tokens need: forward and state gradients everywhere, weight gradients of what trains (biases, norms,
    attention scores and adapters left out: well under 2 %)."""
    per_token = config.n_layer * (4 * config.n_embd ** 2 + 2 * config.n_embd * config.inner)
    states = (examples.lengths - 1).sum()
    scored = (examples.lengths - examples.first_scored).sum()
    passes = 2 if lora else 3
    return float(passes * (states * per_token + scored * config.n_embd * config.vocab_size))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds a second of a large matrix product: the best of several."""
    size = (2048, 1024, 4096) if device.type == "cpu" else (8192, 8192, 8192)
    a, b = torch.randn(size[0], size[1], device=device, dtype=dtype), torch.randn(size[1], size[2], device=device, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return size[0] * size[1] * size[2] / best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------ the variants


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


def dense_losses(logits: torch.Tensor, batch: MicroBatch, smoothing: float) -> torch.Tensor:
    """Per-unit losses from the logits of every position, as the published code computes them."""
    M, T, V = logits.shape
    targets = torch.zeros(M * T, dtype=torch.int64, device=logits.device)
    weights = torch.zeros(M * T, device=logits.device)
    targets[batch.positions], weights[batch.positions] = batch.targets, batch.weights
    losses = F.cross_entropy(logits.float().view(-1, V), targets, reduction="none", label_smoothing=smoothing)
    return (losses * weights).view(batch.units, -1).sum(1)


class GhostClipping:
    """Opacus's fast gradient clipping: norms in a first backward pass, the weighted sum in a second."""

    def __init__(self, model: GPT2LMModel, flat: FlatParameters, C: float, smoothing: float):
        import lora_grad_samplers  # noqa: F401
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        self.flat, self.smoothing = flat, smoothing
        self.module = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=C,
                                                           use_ghost_clipping=True)

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
    """Hugging Face's GPT-2, its own loss over the padded batch, loss.backward()."""

    def __init__(self, card: str):
        from transformers import GPT2Config, GPT2LMHeadModel
        shape = MODEL_CARDS[card]
        self.model = GPT2LMHeadModel(GPT2Config(n_embd=shape.n_embd, n_layer=shape.n_layer, n_head=shape.n_head,
                                                attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False))

    def accumulate(self, batch: MicroBatch) -> None:
        labels = torch.full((batch.ids.numel(),), -100, dtype=torch.int64, device=batch.ids.device)
        labels[batch.positions] = batch.targets
        logits = self.model(batch.ids).logits
        F.cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum").backward()


def build(variant: str, task: str, options: argparse.Namespace, device: torch.device):
    """(a function that makes one logical step, units of it, its examples)."""
    lora, _, units, slow_units, tokens = TASKS[task]
    units = options.units or units
    if options.micro_batch_tokens:
        tokens = options.micro_batch_tokens
    if variant in SLOW:
        units, tokens = slow_units, slow_units * (options.seq_len if variant == "published" else 128)
    torch.manual_seed(0)
    C, smoothing = 1.0, 0.1 if lora else 0.0
    if variant == "plain":
        engine = PlainLoop(options.model_card)
        model = engine.model.to(device)
    else:
        model = GPT2LMModel(MODEL_CARDS[options.model_card], LoRAConfig(4, 32) if lora else LoRAConfig())
        model.freeze_for_training()
        if variant == "ghost":
            untie(model)
        model.to(device)
    flat = FlatParameters(model)
    if variant == "ordinary":
        engine = Ordinary(model, flat, smoothing)
    elif variant == "book_keeping":
        engine = BookKeeping(model, flat, ClippingRule("flat", C), smoothing)
    elif variant in ("opacus", "published"):
        from privacy.opacus_hooks import OpacusHooks
        engine = OpacusHooks(model, flat, ClippingRule("flat", C), smoothing)
    elif variant == "ghost":
        engine = GhostClipping(model, flat, C, smoothing)
    if variant == "plain":
        for _, parameter in flat.named:
            parameter.grad = flat.grad_of(parameter)
    optimizer = AdamW(flat, (0.9, 0.999), 1e-6, 0.01, True)
    examples = make_examples(task, units, options.length, 50257)
    batches = list(examples.micro_batches(torch.arange(units), tokens))
    if variant == "published":
        batches = [pad_to(batch, options.seq_len) for batch in batches]
    batches = [batch.to(device) for batch in batches]
    noise = NoiseSource("os", "noise", device=device)
    private = variant not in ("ordinary", "plain")

    def step() -> None:
        flat.grad.zero_()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            for batch in batches:
                engine.accumulate(batch)
        if private:
            noise.add_normal_(flat.grad, 0.6)
        optimizer.step(flat.grad.div_(units), 1e-5)
        synchronise(device)

    return step, units, examples


def pad_to(batch: MicroBatch, seq_len: int) -> MicroBatch:
    M, T = batch.ids.shape
    ids = F.pad(batch.ids, (0, seq_len - T))
    positions = batch.positions // T * seq_len + batch.positions % T
    return MicroBatch(ids, positions, batch.targets, batch.weights, batch.counts, batch.rows_per_unit, batch.tokens)


# ------------------------------------------------------------------ taking turns


def worker(pipe, variant: str, task: str, options: argparse.Namespace) -> None:
    """Builds a variant, then makes a step for each message, answering (seconds, peak bytes so far)."""
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, units, examples = build(variant, task, options, device)
    lora = TASKS[task][0]
    pipe.send((units, int(examples.lengths.sum()), multiply_adds(examples, MODEL_CARDS[options.model_card], lora)))
    while pipe.recv():
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else peak))


class Worker:
    def __init__(self, variant: str, task: str, options: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(theirs, variant, task, options), daemon=True)
        self.process.start()
        theirs.close()
        self.units, self.tokens, self.multiply_adds = self.pipe.recv()
        self.seconds: list[float] = []
        self.peak = 0

    def step(self, counted: bool = True) -> None:
        self.pipe.send(True)
        seconds, self.peak = self.pipe.recv()
        if counted:
            self.seconds.append(seconds)

    def close(self) -> None:
        self.pipe.send(False)
        self.process.join()

    @property
    def rates(self) -> list[float]:
        return [self.units / seconds for seconds in self.seconds]


def compare(task: str, variant: str, options: argparse.Namespace, rate: float) -> dict:
    """Ours and `variant` in turn."""
    ours, other = Worker("book_keeping", task, options), Worker(variant, task, options)
    for each in (ours, other):
        each.step(counted=False)
    for _ in range(options.repeats):
        other.step()
        ours.step()
    for each in (ours, other):
        each.close()
    ratios = [a / b for a, b in zip(ours.rates, other.rates)]

    def summary(one: Worker) -> dict:
        seconds = statistics.median(one.seconds)
        return {"units_per_s": one.units / seconds, "tokens_per_s": one.tokens / seconds, "peak_gb": one.peak / 1e9,
                "share_of_matmul_rate": one.multiply_adds / seconds / rate, "units": one.units, "seconds": one.seconds}

    return {"task": task, "variant": variant, "ratio_median": statistics.median(ratios), "ratio_min": min(ratios),
            "ratio_max": max(ratios), "ours": summary(ours), "other": summary(other)}


def comparisons(options: argparse.Namespace, rate: float) -> list[dict]:
    """Ours against every asked variant in every asked task; prints a row each."""
    print("| task | against | ours/other (min-max) | ours units/s | other units/s | ours tokens/s | ours of matmul rate | "
          "other of matmul rate | ours peak GB | other peak GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for task in options.tasks:
        for variant in options.variants:
            row = compare(task, variant, options, rate)
            rows.append(row)
            ours, other = row["ours"], row["other"]
            print(f"| {task} | {variant} | {row['ratio_median']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f}) | "
                  f"{ours['units_per_s']:.2f} | {other['units_per_s']:.2f} | {ours['tokens_per_s']:.0f} | "
                  f"{ours['share_of_matmul_rate']:.2f} | {other['share_of_matmul_rate']:.2f} | {ours['peak_gb']:.2f} | "
                  f"{other['peak_gb']:.2f} |", flush=True)
    return rows


def scaling(options: argparse.Namespace) -> list[dict]:
    """Ours over logical batches (E2E's lengths, LoRA) and over lengths (4,096 tokens a step, whole model)."""
    rows = []
    cells = [("e2e_lora", units, options.length) for units in (32, 64, 128, 256, 512, 1024)]
    cells += [("author_full", 4096 // length, length) for length in (32, 64, 128, 256, 512, 1023)]
    print("| task | logical batch | tokens of a text | real tokens | seconds a step | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for task, units, length in cells:
        one = Worker("book_keeping", task, argparse.Namespace(**{**vars(options), "units": units, "length": length}))
        for index in range(options.repeats + 1):
            one.step(counted=index > 0)
        one.close()
        seconds = statistics.median(one.seconds)
        rows.append({"task": task, "units": units, "length": length, "tokens": one.tokens, "seconds": one.seconds})
        print(f"| {task} | {units} | {'E2E' if task == 'e2e_lora' else length} | {one.tokens} | {seconds:.2f} | "
              f"{one.tokens / seconds:.0f} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=[v for v in VARIANTS if v != "book_keeping"],
                        default=[v for v in VARIANTS if v != "book_keeping"])
    parser.add_argument("--model_card", choices=MODEL_CARDS, default="gpt2.sm")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seq_len", type=int, default=512, help="what the published way pads to")
    parser.add_argument("--length", type=int, default=128, help="tokens of an author's text")
    parser.add_argument("--micro_batch_tokens", type=int, help="padded tokens of a micro-batch")
    parser.add_argument("--units", type=int, help="logical batch of the fast variants, in place of the task's own")
    parser.add_argument("--scaling", action="store_true", help="time ours alone over batches and lengths")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", help="JSON file (default results/DATE_benchmark_training.json)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {options.threads} threads"
    rate = matmul_rate(device, torch.bfloat16 if options.bf16 else torch.float32)
    print(f"{options.model_card} on {name}: matrix product {rate / 1e9:.1f} G multiply-adds/s")
    rows = scaling(options) if options.scaling else comparisons(options, rate)
    path = options.output or os.path.join(ROOT, "results", f"{datetime.date.today()}_benchmark_training{'_scaling' if options.scaling else ''}.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as handle:
        json.dump({"device": name, "torch": torch.__version__, "matmul_multiply_adds_per_s": rate,
                   "options": vars(options), "rows": rows}, handle, indent=1)
    print(f"wrote {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
