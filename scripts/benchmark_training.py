"""How fast private training is, against ordinary training and the other ways to clip, in one run.

    python scripts/benchmark_training.py                              # every task, every variant, on this machine
    python scripts/benchmark_training.py --tasks e2e_lora --variants ordinary published --repeats 5
    python scripts/benchmark_training.py --scaling                    # ours: seconds a step against batch and length
    python scripts/benchmark_training.py --show results/2026-11-25_benchmark_training/*.json

Every variant lives in a process of its own, so that its peak memory is its own; a variant and ours then take turns,
one logical step each (A B A B ...), and what is printed are medians of the pairwise ratios. A step is all of a step:
gradients, clipping, noise, AdamW. The slow variants compute the gradients of a part of the logical batch alone, whose
time is scaled up to the whole; noise and AdamW are counted once, as for the others. Beside it stands the arithmetic
floor: the multiply-adds that the real tokens need (forward, backward for the states, weight gradients of what trains),
over the matrix-product rate measured here.

Variants: ordinary     the same model and loss without clipping or noise
          book_keeping ours
          opacus       Opacus's hooks on our model: every per-example gradient is held
          ghost        Opacus's ghost clipping: two backward passes, head and embedding untied, since it must
          padded       opacus, with every row padded to --seq_len and logits at every position
          published    padded, in the arithmetic of the published code: attention with its matrix of scores and a mask,
                       GELU and layer norm as formulas, a log-softmax of all logits, PyTorch's own matrix products
          plain        a plain PyTorch loop over Hugging Face's GPT-2 without privacy (needs transformers and peft)
Writes JSON to results/.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, os.path.join(ROOT, "src"))

import numpy as np
import torch

import fast_linear
from benchmark_variants import GhostClipping, PlainLoop, PublishedWay, pad_to, untie
from batching import Cut, PublicLengths, TightCut, choose_lengths
from cli import Parser, atomic_write, fail, run_main
from cpu_memory import keep_memory
from data_utils import Examples
from losses import MicroBatch
from model import MODEL_CARDS, GPT2LMModel, LoRAConfig
from optimizer import AdamW, FlatParameters
from privacy.clipping import BookKeeping, ClippingRule, Ordinary
from privacy.noise import NoiseSource
from privacy.opacus_engine import OpacusEngine
from run_setup import DEFAULT_TOKENS

VARIANTS = ("ordinary", "book_keeping", "opacus", "ghost", "padded", "published", "plain")
# (adapters, completion only, units of a logical batch)
TASKS = {"e2e_lora": (True, True, 128), "author_full": (False, False, 64), "author_lora": (True, False, 64)}
SLOW_UNITS = {"opacus": 8, "ghost": 8, "padded": 8, "published": 8}  # of a logical batch


def make_examples(task: str, units: int, length: int, vocab_size: int, seed: int = 0) -> Examples:
    """E2E's lengths in tokens (mean 53, of which context 28; at most 115), or `length` tokens, all scored."""
    rng = np.random.default_rng(seed)
    if TASKS[task][1]:
        lengths = np.clip(rng.normal(53, 16, units).round().astype(np.int64), 20, 115)
        first_scored = np.maximum(1, (lengths * 28) // 53)
    else:
        lengths, first_scored = np.full(units, length + 1), np.ones(units, np.int64)
    tokens = rng.integers(0, vocab_size, lengths.sum()).astype(np.int32)
    return Examples(tokens, np.concatenate([[0], np.cumsum(lengths)]), first_scored, 0, 0)


def multiply_adds(examples: Examples, config, lora: bool) -> float:
    """What the real tokens need: forward and state gradients everywhere, weight gradients of what trains (biases,
    norms, attention scores and adapters left out: well under 2 %)."""
    per_token = config.n_layer * (4 * config.n_embd ** 2 + 2 * config.n_embd * config.inner)
    states = (examples.lengths - 1).sum()
    scored = (examples.lengths - examples.first_scored).sum()
    passes = 2 if lora else 3
    return float(passes * (states * per_token + scored * config.n_embd * config.vocab_size))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds a second of a large matrix product: the best of several."""
    size = (2048, 1024, 4096) if device.type == "cpu" else (8192, 8192, 8192)
    a = torch.randn(size[0], size[1], device=device, dtype=dtype)
    b = torch.randn(size[1], size[2], device=device, dtype=dtype)
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


# ------------------------------------------------------------------ a step


@dataclass
class Step:
    """One logical step of a variant: the gradients of `units` of the logical batch, then noise and AdamW."""

    gradients: Callable[[list[MicroBatch]], None]
    update: Callable[[], None]
    batches: list[MicroBatch]
    units: int
    logical: int
    tokens: int  # real tokens of the logical batch
    multiply_adds: float

    def seconds(self, device: torch.device, batches: list[MicroBatch]) -> float:
        """The time of a whole logical step."""
        marks = [time.perf_counter()]
        for part in (lambda: self.gradients(batches), self.update):
            part()
            synchronise(device)
            marks.append(time.perf_counter())
        return (marks[1] - marks[0]) * self.logical / self.units + marks[2] - marks[1]


def build(variant: str, task: str, options: argparse.Namespace, device: torch.device) -> Step:
    lora, _, logical = TASKS[task]
    logical = options.units or logical
    units = min(SLOW_UNITS.get(variant, logical), logical)
    tokens = options.micro_batch_tokens or DEFAULT_TOKENS[device.type]
    torch.manual_seed(0)
    rule, smoothing = ClippingRule("flat", 1.0), 0.1 if lora else 0.0
    if variant == "plain":
        engine = PlainLoop(options.model_card, lora)
        model = engine.model.to(device)
    else:
        model = GPT2LMModel(MODEL_CARDS[options.model_card], LoRAConfig(4, 32) if lora else LoRAConfig())
        model.freeze_for_training()
        if variant == "ghost":
            untie(model)
        model.to(device)
    added_by_autograd = variant in ("ordinary", "plain", "ghost")
    flat = FlatParameters(model, sums=torch.float32 if added_by_autograd else torch.float64)
    if variant == "plain":
        for _, parameter in flat.named:
            parameter.grad = flat.grad_of(parameter)
    elif variant == "ghost":
        engine = GhostClipping(model, flat, rule.C, smoothing)
    elif variant == "ordinary":
        engine = Ordinary(model, flat, smoothing)
    else:
        if variant == "published":
            fast_linear.AVAILABLE = False  # in this process, which is its own
        kind = {"book_keeping": BookKeeping, "published": PublishedWay}.get(variant, OpacusEngine)
        engine = kind(model, flat, rule, smoothing)
    optimizer = AdamW(flat, (0.9, 0.999), 1e-6, 0.01, True)
    examples = make_examples(task, logical, options.length, 50257)
    by_length = np.argsort(examples.lengths, kind="stable")
    every = logical // units  # a part has the lengths of the whole
    drawn = torch.from_numpy(by_length[every // 2::every][:units])
    cut: Cut = TightCut(tokens)
    if variant == "book_keeping":  # a private run pads to public lengths; the others pad as little as they can
        public = make_examples(task, 4 * logical, options.length, 50257, seed=1).inputs
        filler = fast_linear.BLOCK_ROWS[device.type] / 2
        cut = PublicLengths(choose_lengths(public, int(examples.inputs.max()), logical, tokens, filler), tokens)
    batches = list(examples.micro_batches(drawn, cut))
    if variant in ("padded", "published"):
        batches = [pad_to(batch, options.seq_len if TASKS[task][1] else options.length) for batch in batches]
    batches = [batch.to(device) for batch in batches]
    noise = NoiseSource("os", "noise", device=device)

    def gradients(some: list[MicroBatch]) -> None:
        flat.grad.zero_()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            for batch in some:
                engine.accumulate(batch)

    def update() -> None:
        if variant not in ("ordinary", "plain"):
            noise.add_normal_(flat.grad, 0.6)
        optimizer.step(flat.grad.div_(logical).float(), 1e-5)

    return Step(gradients, update, batches, units, logical, int(examples.lengths.sum()),
                multiply_adds(examples, MODEL_CARDS[options.model_card], lora))


# ------------------------------------------------------------------ taking turns


def worker(pipe, variant: str, task: str, options: argparse.Namespace) -> None:
    """Builds a variant, warms up with a step, then makes one a message: (seconds, peak bytes so far)."""
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_memory()  # every variant gets what our scripts have
    step = build(variant, task, options, device)
    step.seconds(device, step.batches)
    pipe.send((step.logical, step.tokens, step.multiply_adds))
    while pipe.recv():
        seconds = step.seconds(device, step.batches)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else peak))


class Worker:
    def __init__(self, variant: str, task: str, options: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(theirs, variant, task, options), daemon=True)
        self.process.start()
        theirs.close()
        self.variant = variant
        self.units, self.tokens, self.multiply_adds = self.answer()
        self.seconds: list[float] = []
        self.peak = 0

    def answer(self) -> tuple:
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            status = self.process.exitcode
            fail(f"--variants {self.variant}: its process ended with status {status} (-9: out of memory?)")

    def step(self) -> None:
        self.pipe.send(True)
        seconds, self.peak = self.answer()
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


HEAD = ("task", "against", "ours/other", "min", "max", "ours units/s", "other units/s", "ours tokens/s",
        "ours of matmul rate", "other of matmul rate", "ours peak GB", "other peak GB")


def cells(row: dict) -> tuple[str, ...]:
    """A comparison under HEAD."""
    ours, other = row["ours"], row["other"]
    return (row["task"], row["variant"], *(f"{row[f'ratio_{name}']:.2f}" for name in ("median", "min", "max")),
            f"{ours['units_per_s']:.2f}", f"{other['units_per_s']:.2f}", f"{ours['tokens_per_s']:.0f}",
            *(f"{one[name]:.2f}" for name in ("share_of_matmul_rate", "peak_gb") for one in (ours, other)))


def print_line(*words: str) -> None:
    print("| " + " | ".join(words) + " |", flush=True)


def show(paths: list[str]) -> None:
    """The comparisons of JSON files as one table, each with its file."""
    rows = []
    for path in paths:
        try:
            with open(path, encoding="utf-8") as handle:
                rows += [(*cells(row), os.path.basename(path)) for row in json.load(handle)["rows"] if "variant" in row]
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"--show {path}: no JSON of this benchmark ({error})")
    print_line(*HEAD, "file")
    print_line(*["---"] * (len(HEAD) + 1))
    for row in sorted(rows, key=lambda row: (list(TASKS).index(row[0]), VARIANTS.index(row[1]))):
        print_line(*row)


def comparisons(options: argparse.Namespace, rate: float) -> list[dict]:
    """Ours against every asked variant in every asked task; prints a row each."""
    print_line(*HEAD)
    print_line(*["---"] * len(HEAD))
    rows = []
    for task in options.tasks:
        for variant in options.variants:
            rows.append(compare(task, variant, options, rate))
            print_line(*cells(rows[-1]))
    return rows


def scaling(options: argparse.Namespace) -> list[dict]:
    """Ours over logical batches (E2E's lengths, LoRA) and over lengths (4,096 tokens a step, whole model)."""
    rows = []
    cells = [("e2e_lora", units, options.length) for units in (32, 64, 128, 256, 512, 1024)]
    cells += [("author_full", 4096 // length, length) for length in (32, 64, 128, 256, 512, 1024)]
    print("| task | logical batch | tokens of a text | real tokens | seconds a step | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for task, units, length in cells:
        one = Worker("book_keeping", task, argparse.Namespace(**{**vars(options), "units": units, "length": length}))
        for _ in range(options.repeats):
            one.step()
        one.close()
        seconds = statistics.median(one.seconds)
        rows.append({"task": task, "units": units, "length": length, "tokens": one.tokens, "seconds": one.seconds})
        print(f"| {task} | {units} | {'E2E' if task == 'e2e_lora' else length} | {one.tokens} | {seconds:.2f} | "
              f"{one.tokens / seconds:.0f} |", flush=True)
    return rows


def draw_scaling(rows: list[dict], path: str) -> None:
    """Seconds a step against the real tokens of the logical batch: in proportion, or not."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (batches, lengths) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, task, x, label in ((batches, "e2e_lora", "tokens", "real tokens of the logical batch"),
                                 (lengths, "author_full", "length", "tokens of a text, 4,096 in all")):
        cells = [row for row in rows if row["task"] == task]
        seconds = [statistics.median(row["seconds"]) for row in cells]
        axes.plot([row[x] for row in cells], seconds, marker="o")
        axes.set(xlabel=label, ylabel="seconds a step", title=task, xlim=(0, None), ylim=(0, 1.1 * max(seconds)))
        axes.grid(alpha=0.3)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=110)


def cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as handle:
        for line in handle:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    others = [name for name in VARIANTS if name != "book_keeping"]
    parser.add_argument("--variants", nargs="+", choices=others, default=others)
    parser.add_argument("--model_card", choices=MODEL_CARDS, default="gpt2.sm")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seq_len", type=int, default=512, help="what the published way pads to")
    parser.add_argument("--length", type=int, default=128, help="tokens of an author's text")
    parser.add_argument("--micro_batch_tokens", type=int, help="padded tokens of a micro-batch (default: the scripts')")
    parser.add_argument("--units", type=int, help="logical batch, in place of the task's own")
    parser.add_argument("--scaling", action="store_true", help="time ours alone over batches and lengths")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--show", nargs="+", metavar="JSON", help="time nothing; print what earlier calls wrote")
    parser.add_argument("--output", help="JSON file (default results/DATE_benchmark_training[_scaling].json)")
    options = parser.parse_args()
    if options.show:
        return show(options.show)
    for flag in ("repeats", "threads", "units", "micro_batch_tokens"):
        if (value := getattr(options, flag)) is not None and value < 1:
            fail(f"--{flag} {value}: expected at least 1")
    for flag in ("seq_len", "length"):
        if not 2 <= getattr(options, flag) <= 1024:
            fail(f"--{flag} {getattr(options, flag)}: expected 2 to 1024, the positions of a GPT-2")
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_name()}, {options.threads} threads"
    rate = matmul_rate(device, torch.bfloat16 if options.bf16 else torch.float32)
    print(f"{options.model_card} on {name}: matrix product {rate / 1e9:.1f} G multiply-adds/s")
    rows = scaling(options) if options.scaling else comparisons(options, rate)
    kind = "_scaling" if options.scaling else ""
    path = options.output or os.path.join(ROOT, "results", f"{datetime.date.today()}_benchmark_training{kind}.json")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with atomic_write(path) as handle:
        json.dump({"device": name, "torch": torch.__version__, "matmul_multiply_adds_per_s": rate,
                   "options": {name: value for name, value in vars(options).items() if name != "output"},
                   "rows": rows}, handle, indent=1)
        handle.write("\n")
    print(f"wrote {os.path.relpath(path)}")
    if options.scaling:
        draw_scaling(rows, os.path.splitext(path)[0] + ".png")


if __name__ == "__main__":
    run_main(main)
