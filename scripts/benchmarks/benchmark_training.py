"""The speed of private training against non-private training and against other ways to clip.

    python scripts/start.py benchmark_training            # every task, every variant, on this machine
    python scripts/start.py benchmark_training --tasks e2e_lora --variants ordinary published --repeats 5
    python scripts/start.py benchmark_training --scaling  # ours: seconds a step against batch and length
    python scripts/start.py benchmark_training --model_card llama-135m --length 512   # SmolLM2-135M's shape
    python scripts/start.py benchmark_training --show results/2026-11-25_benchmark_training/*.json

Every variant runs in its own process, so that its peak memory can be measured. A variant and our code take turns, one
logical step each (A B A B ...). Printed are medians of the pairwise ratios. A step has all parts: gradients, clipping,
noise and AdamW. Slow variants compute the gradients of a part of the logical batch; that time is scaled up to
the whole batch, and noise and AdamW are counted once. The arithmetic floor is the time of the multiply-adds that the
real tokens need (forward, gradients of the states, gradients of the trained weights) at the measured rate of matrix
products.

Variants: ordinary     the same model and loss without clipping or noise
          book_keeping ours
          opacus       Opacus's hooks on our model: every per-example gradient is held
          ghost        Opacus's ghost clipping: two backward passes, with head and embedding untied
          padded       opacus, with every row padded to --seq_len and logits at every position
          published    padded, with the arithmetic of Yu et al. (2022): attention with a matrix of scores and a
                       mask, GELU and layer norm as formulas, a log-softmax of all logits, PyTorch's matrix products
          plain        a plain PyTorch loop over Hugging Face's model without privacy (needs transformers and peft)
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
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from base import products
from base.errors import fail
from base.files import atomic_write
from base.flags import Parser
from base.markdown import markdown, table_line
from base.memory import keep_memory
from benchmark_variants import (
    LLAMAS,
    GhostClipping,
    PlainLoop,
    YuArithmetic,
    chosen_variants,
    needed,
    pad_to,
    random_model,
    untie,
    vocabulary,
)
from corpus.batching import Cut, PublicLengths, TightCut, choose_lengths
from corpus.examples import Examples
from losses import MicroBatch
from model import MODEL_CARDS
from optimizer import AdamW, FlatParameters
from privacy.clipping import BookKeeping, ClippingRule, NonPrivate
from privacy.opacus_engine import OpacusEngine
from privacy.randomness import NoiseSource
from run.settings import DEFAULT_TOKENS

VARIANTS = ("ordinary", "book_keeping", "opacus", "ghost", "padded", "published", "plain")
# (adapters, completion only, units of a logical batch)
TASKS = {"e2e_lora": (True, True, 128), "author_full": (False, False, 64), "author_lora": (True, False, 64)}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
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


def matmul_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """Multiply-adds a second of a large matrix product: the best of several."""
    size = (2048, 1024, 4096) if device.type == "cpu" else (8192, 8192, 8192)
    a = torch.randn(size[0], size[1], device=device, dtype=dtype)
    b = torch.randn(size[1], size[2], device=device, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        start = clock()
        a @ b
        synchronise(device)
        best = min(best, clock() - start)
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
    clock: Callable[[], float]

    def seconds(self, device: torch.device, batches: list[MicroBatch]) -> float:
        """The time of a whole logical step."""
        marks = [self.clock()]
        for part in (lambda: self.gradients(batches), self.update):
            part()
            synchronise(device)
            marks.append(self.clock())
        return (marks[1] - marks[0]) * self.logical / self.units + marks[2] - marks[1]


def build(variant: str, task: str, options: argparse.Namespace, device: torch.device) -> Step:
    lora, _, logical = TASKS[task]
    logical = options.units or logical
    units = min(options.part or SLOW_UNITS.get(variant, logical), logical)
    tokens = options.micro_batch_tokens or DEFAULT_TOKENS[device.type]
    torch.manual_seed(0)
    rule, smoothing = ClippingRule("flat", 1.0), 0.1 if lora else 0.0
    if variant == "plain":
        engine = PlainLoop(options.model_card, lora)
        model = engine.model.to(device)
    else:
        model = random_model(options.model_card, lora)
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
        engine = NonPrivate(model, flat, smoothing)
    else:
        if variant == "published":
            products.AVAILABLE = False  # in this process, which is its own
        kind = {"book_keeping": BookKeeping, "published": YuArithmetic}.get(variant, OpacusEngine)
        engine = kind(model, flat, rule, smoothing)
    optimizer = AdamW(flat, (0.9, 0.999), 1e-6, 0.01, True)
    examples = make_examples(task, logical, options.length, vocabulary(options.model_card))
    by_length = np.argsort(examples.lengths, kind="stable")
    every = logical // units  # a part has the lengths of the whole
    drawn = torch.from_numpy(by_length[every // 2 :: every][:units])
    cut: Cut = TightCut(tokens)
    if variant == "book_keeping":  # a private run pads to public lengths; the others pad as little as they can
        public = make_examples(task, 4 * logical, options.length, vocabulary(options.model_card), seed=1).inputs
        filler = products.BLOCK_ROWS[device.type] / 2
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

    scored = examples.lengths - examples.first_scored
    return Step(
        gradients,
        update,
        batches,
        units,
        logical,
        int(examples.lengths.sum()),
        needed(options.model_card, int(examples.inputs.sum()), int(scored.sum()), lora),
        CLOCKS[options.clock],
    )


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
    """Time our code and `variant` in turn."""
    ours, other = Worker("book_keeping", task, options), Worker(variant, task, options)
    for _ in range(options.repeats):
        other.step()
        ours.step()
    for each in (ours, other):
        each.close()
    ratios = [a / b for a, b in zip(ours.rates, other.rates, strict=True)]

    def summary(one: Worker) -> dict:
        seconds = statistics.median(one.seconds)
        return {
            "units_per_s": one.units / seconds,
            "tokens_per_s": one.tokens / seconds,
            "peak_gb": one.peak / 1e9,
            "share_of_matmul_rate": one.multiply_adds / seconds / rate,
            "units": one.units,
            "seconds": one.seconds,
        }

    return {
        "task": task,
        "variant": variant,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ours": summary(ours),
        "other": summary(other),
    }


HEAD = (
    "task",
    "against",
    "ours/other",
    "min",
    "max",
    "ours units/s",
    "other units/s",
    "ours tokens/s",
    "ours of matmul rate",
    "other of matmul rate",
    "ours peak GB",
    "other peak GB",
)


def cells(row: dict) -> tuple[str, ...]:
    """A comparison under HEAD."""
    ours, other = row["ours"], row["other"]
    return (
        row["task"],
        row["variant"],
        *(f"{row[f'ratio_{name}']:.2f}" for name in ("median", "min", "max")),
        f"{ours['units_per_s']:.2f}",
        f"{other['units_per_s']:.2f}",
        f"{ours['tokens_per_s']:.0f}",
        *(f"{one[name]:.2f}" for name in ("share_of_matmul_rate", "peak_gb") for one in (ours, other)),
    )


def show(paths: list[str]) -> None:
    """The comparisons of JSON files as one table, each with its file."""
    rows = []
    for path in paths:
        try:
            with open(path, encoding="utf-8") as handle:
                rows += [(*cells(row), os.path.basename(path)) for row in json.load(handle)["rows"] if "variant" in row]
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"--show {path}: no JSON of this benchmark ({error})")
    rows.sort(key=lambda row: (list(TASKS).index(row[0]), VARIANTS.index(row[1])))
    print(markdown((*HEAD, "file"), rows), end="")


def comparisons(options: argparse.Namespace, rate: float) -> list[dict]:
    """Compare our code with each chosen variant in each chosen task; print a row for each."""
    print(markdown(HEAD), end="")
    rows = []
    for task in options.tasks:
        for variant in options.variants:
            rows.append(compare(task, variant, options, rate))
            print(table_line(cells(rows[-1])), end="", flush=True)
    return rows


def scaling(options: argparse.Namespace) -> list[dict]:
    """Ours over logical batches (E2E's lengths, LoRA) and over lengths (4,096 tokens a step, whole model)."""
    rows, cells = [], [("e2e_lora", units, options.length) for units in (32, 64, 128, 256, 512, 1024)]
    cells += [("author_full", 4096 // length, length) for length in (32, 64, 128, 256, 512, 1024)]
    print(markdown(("task", "logical batch", "tokens of a text", "real tokens", "seconds a step", "tokens/s")), end="")
    for task, units, length in cells:
        one = Worker("book_keeping", task, argparse.Namespace(**{**vars(options), "units": units, "length": length}))
        for _ in range(options.repeats):
            one.step()
        one.close()
        seconds = statistics.median(one.seconds)
        rows.append({"task": task, "units": units, "length": length, "tokens": one.tokens, "seconds": one.seconds})
        line = (
            task,
            str(units),
            "E2E" if task == "e2e_lora" else str(length),
            str(one.tokens),
            f"{seconds:.2f}",
            f"{one.tokens / seconds:.0f}",
        )
        print(table_line(line), end="", flush=True)
    return rows


def draw_scaling(rows: list[dict], path: str) -> None:
    """Plot the seconds of a step against the real tokens of the logical batch and against the length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (batches, lengths) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, task, x, label in (
        (batches, "e2e_lora", "tokens", "real tokens of the logical batch"),
        (lengths, "author_full", "length", "tokens of a text, 4,096 in all"),
    ):
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
    parser.add_argument("--variants", nargs="+", choices=others, help="default: all that the model has")
    parser.add_argument("--model_card", choices=[*MODEL_CARDS, *LLAMAS], default="gpt2.sm")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor seconds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seq_len", type=int, default=512, help="what Yu et al.'s code pads to")
    parser.add_argument("--length", type=int, default=128, help="tokens of an author's text")
    parser.add_argument("--micro_batch_tokens", type=int, help="padded tokens of a micro-batch (default: the scripts')")
    parser.add_argument("--units", type=int, help="logical batch, in place of the task's own")
    parser.add_argument("--part", type=int, help="units of it whose gradients are timed (default: all; 8 of the slow)")
    parser.add_argument("--scaling", action="store_true", help="time ours alone over batches and lengths")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--show", nargs="+", metavar="JSON", help="time nothing; print what earlier calls wrote")
    parser.add_argument("--output", help="JSON file (default results/DATE_benchmark_training[_scaling].json)")
    options = parser.parse_args()
    if options.show:
        return show(options.show)
    for flag in ("repeats", "threads", "units", "part", "micro_batch_tokens"):
        if (value := getattr(options, flag)) is not None and value < 1:
            fail(f"--{flag} {value}: expected at least 1")
    for flag in ("seq_len", "length"):
        if not 2 <= getattr(options, flag) <= 1024:
            fail(f"--{flag} {getattr(options, flag)}: expected 2 to 1024, the positions of a GPT-2")
    if options.clock == "cpu" and options.threads != 1:
        fail(f"--clock cpu: expected --threads 1, got {options.threads}: threads that wait count, too")
    options.variants = chosen_variants(options.model_card, options.variants, others)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_name()}, {options.threads} threads"
    rate = matmul_rate(device, torch.bfloat16 if options.bf16 else torch.float32, CLOCKS[options.clock])
    print(f"{options.model_card} on {name}: matrix product {rate / 1e9:.1f} G multiply-adds/s")
    rows = scaling(options) if options.scaling else comparisons(options, rate)
    kind = "_scaling" if options.scaling else ""
    path = options.output or f"results/{datetime.date.today()}_benchmark_training{kind}.json"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with atomic_write(path) as handle:
        json.dump(
            {
                "device": name,
                "torch": torch.__version__,
                "matmul_multiply_adds_per_s": rate,
                "options": {name: value for name, value in vars(options).items() if name != "output"},
                "rows": rows,
            },
            handle,
            indent=1,
        )
        handle.write("\n")
    print(f"wrote {os.path.relpath(path)}")
    if options.scaling:
        draw_scaling(rows, os.path.splitext(path)[0] + ".png")
