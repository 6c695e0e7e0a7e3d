"""Time sampling: this project's, Hugging Face transformers' generate() at its best batch, and the arithmetic floor.

    python scripts/start.py benchmark_generate --output results/2026-11-28_generate/samples.json

GPT-2 small's shape with random weights, the same for both. Everything runs in one process, one after the other; each
batch of transformers takes a turn between two of ours. No text ends before --new_tokens, and all begin at the start
token, so that no padding slows transformers. The floor is the time of the multiply-adds alone at the best rate of
matrix products that this process reaches. With one thread on a CPU the clock is the thread's own (CPU seconds), which
other jobs on the machine disturb least.
Needs transformers (requirements-dev.txt).
"""

import datetime
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from base.errors import fail
from base.files import atomic_write
from base.flags import Parser, check_least
from benchmark_training import cpu_name, synchronise
from decoding.line_decoder import LineDecoder, rows_for
from decoding.sampling import Job, SamplingRules, sample_all
from model import MODEL_CARDS, GPT2LMModel

# name -> rules of both; transformers' own default of top_k is 50
SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "top-p 0.9": {"top_p": 0.9}, "top-k 50": {"top_k": 50}}


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    synchronise(device)
    begin = clock()
    work()
    synchronise(device)
    return clock() - begin


def repeat(work: Callable[[], object]) -> None:
    for _ in range(20):
        work()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds per second of the best of several products, plain and packed."""
    best = 0.0
    for rows in (64, 256, 1024):
        x, weight = torch.randn(rows, 768, device=device, dtype=dtype), torch.randn(3072, 768, device=device).to(dtype)
        products = [lambda x=x, w=weight: torch.nn.functional.linear(x, w)]
        if device.type == "cpu":
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            products.append(lambda x=x, w=packed: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))
        for product in products:
            seconds = min(timed(functools.partial(repeat, product), device) for _ in range(5))
            best = max(best, 20 * rows * weight.numel() / seconds)
    return best


def multiply_adds(model: GPT2LMModel, samples: int, tokens: int) -> int:
    """Of `samples` texts of so many tokens after the start token: blocks, head, and attention to all tokens before."""
    config = model.config
    D, L = config.n_embd, config.n_layer
    attention = 2 * L * D * tokens * (tokens + 1) // 2
    return samples * (tokens * (config.block_outputs * D + config.vocab_size * D) + attention)


def ours(decoder: LineDecoder, rules: SamplingRules, samples: int, start: int) -> None:
    jobs = [Job(n, 0, n, (start,)) for n in range(samples)]
    assert sum(len(sample.tokens) for sample in sample_all(jobs, decoder, rules, seed=1)) == (
        samples * rules.max_new_tokens
    )


def their_model(model: GPT2LMModel, device: torch.device, dtype: torch.dtype) -> transformers.GPT2LMHeadModel:
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**model.config.to_hugging_face()))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(model.get_parameter(name))
    return theirs.to(device, dtype).eval()


def theirs_at(theirs: transformers.GPT2LMHeadModel, rules: dict, batch: int, tokens: int, start: int) -> None:
    ids = torch.full((batch, 1), start, device=theirs.device)
    with torch.inference_mode():
        found = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=start,
            **{"top_k": 0, **rules},
        )
    assert found.shape == (batch, tokens + 1)


def compare(options, setting: str, dtype: torch.dtype, device: torch.device) -> dict:
    torch.manual_seed(0)
    model = GPT2LMModel(MODEL_CARDS[options.model_card])
    theirs, start, tokens = their_model(model, device, dtype), model.config.end_of_text, options.new_tokens
    work = multiply_adds(model, options.samples, tokens)
    decoder = LineDecoder(model.to(device, dtype), options.samples, tokens + 1, rows_for(options.samples, device))
    ours(decoder, SamplingRules(2), options.samples, start)  # first calls allocate and compile
    own, other = [], {}
    rules = SamplingRules(tokens, **SETTINGS[setting])
    own_run = functools.partial(ours, decoder, rules, options.samples, start)
    for batch in options.batch_sizes:
        own.append(options.samples * tokens / timed(own_run, device))
        theirs_at(theirs, SETTINGS[setting], batch, 2, start)
        their_run = functools.partial(theirs_at, theirs, SETTINGS[setting], batch, tokens, start)
        other[batch] = batch * tokens / timed(their_run, device)
        print(
            f"{setting}, {dtype}: ours {own[-1]:.0f} tokens/s, transformers {other[batch]:.0f} at batch {batch}",
            flush=True,
        )
    rate = matmul_rate(device, dtype)
    best, speed = max(other, key=lambda batch: other[batch]), statistics.median(own)
    return {
        "setting": setting,
        "dtype": str(dtype).removeprefix("torch."),
        "ours_tokens_per_s": own,
        "transformers_tokens_per_s": {str(batch): value for batch, value in other.items()},
        "best_batch": best,
        "ratio": speed / other[best],
        "multiply_adds_per_s": rate,
        "share_of_floor": work / rate / (options.samples * tokens / speed),
    }


def write(path: str, rows: list[dict], device: torch.device, options) -> None:
    with atomic_write(path) as out:
        json.dump(
            {
                "generate": rows,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
                "threads": torch.get_num_threads(),
                "load": os.getloadavg()[0],
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "options": {name: value for name, value in vars(options).items() if name != "output"},
            },
            out,
            indent=1,
        )
        out.write("\n")


def main() -> None:
    parser = Parser(description="time sampling against transformers and the arithmetic floor")
    parser.add_argument("--model_card", default="gpt2.sm", choices=tuple(MODEL_CARDS))
    parser.add_argument("--samples", type=int, default=128, help="ours, all at once (default 128)")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[32, 128], help="for transformers")
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--output", help="JSON file (default results/DATE_benchmark_generate.json)")
    options = parser.parse_args()
    check_least(options, samples=1, new_tokens=1)
    if min(options.batch_sizes) < 1:
        fail(f"--batch_sizes {min(options.batch_sizes)}: expected at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = options.output or f"results/{datetime.date.today()}_benchmark_generate.json"
    rows: list[dict] = []
    for dtype in options.dtypes:
        for setting in options.settings:
            rows.append(compare(options, setting, getattr(torch, dtype), device))
            write(path, rows, device, options)
    for row in rows:
        print(
            f"{row['setting']}, {row['dtype']}: {row['ratio']:.2f} times transformers at its best batch "
            f"{row['best_batch']}; {row['share_of_floor']:.2f} of the floor"
        )
