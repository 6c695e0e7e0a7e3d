"""The memory of a private training, by a formula, and measured on this machine.

    python scripts/start.py project_memory                                 # the table of docs/models.md
    python scripts/start.py project_memory --tokens 16384 --length 1024 --rank 64
    python scripts/start.py project_memory --measure smollm2-135m          # peak of this machine beside the formula's

A micro-batch of `tokens` padded tokens, U = tokens/T units of T tokens, every token scored, products in float32
(--bf16 needs less). D width, I width inside the MLP, q and k widths of queries and keys, L layers, V vocabulary, P
trained coordinates, R rank; numbers of 4 bytes where nothing else is said:

    weights   P, and of the frozen ones 4 bytes or 2 (--base_dtype bf16; vectors stay 4)
    training  16 P bytes: the sums in float64, AdamW's two moments
    kept      what the backward pass needs, L tokens (4 D + 4 q + 3 I): norms' inputs and outputs, queries, keys and
              values repeated for all heads, attention's output, the MLP's three. With --recompute the blocks' inputs,
              L tokens D, and where notes are had a second time the gradients at their outputs, as much again
    notes     of each product P x Q (of an adapter, P or Q is R) and each unit P Q numbers, its gradient, or T (P + Q),
              as unit_gradients.py chooses. They take the place of `kept`, so what counts is the excess
    block     with --recompute, one block's share of `kept`, or its notes if they are had a second time and are more
    working   the largest single step: 4 I tokens of SwiGLU's backward pass, and the norm of the largest note, for which
              8 units are taken at a time: 8 (T (P + Q) + P Q), or 16 T (P + Q) in float64
    head      whole matrices: the logits, tokens V; else the states' gradients, 5 tokens D

Left out: rounding errors' share, buffers of the libraries, and the process itself (0.3 GB on a CPU).
"""

import json
import math
import multiprocessing
import resource
import time

import torch

from base.errors import fail
from base.flags import Parser, check_positive
from base.markdown import markdown
from base.memory import keep_memory
from language_model import LoRAConfig
from llama_config import LlamaConfig
from losses import MicroBatch
from optimizer import AdamW, FlatParameters
from privacy.clipping import WORTH_KEEPING, BookKeeping, ClippingRule
from privacy.unit_gradients import TRAFFIC_COST, UNITS
from weights.building import build


def shape(V: int, D: int, inner: int, L: int, H: int, K: int, W: int, tied: bool, kind: str) -> LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": 1e5}
    return LlamaConfig(kind, V, D, inner, L, H, K, W, 8192, rope, tie_word_embeddings=tied)


# As their config.json say, but for what takes no memory (rope, epsilon of the norms).
SHAPES = {
    "smollm2-135m": shape(49152, 576, 1536, 30, 9, 3, 64, True, "llama"),
    "qwen2.5-0.5b": shape(151936, 896, 4864, 24, 14, 2, 64, True, "qwen2"),
    "qwen2.5-1.5b": shape(151936, 1536, 8960, 28, 12, 2, 128, True, "qwen2"),
    "llama-3.1-8b": shape(128256, 4096, 14336, 32, 32, 8, 128, False, "llama"),
}


def products(config: LlamaConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of a block's projections."""
    D, inner = config.hidden_size, config.intermediate_size
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return [(D, q), (D, k), (D, k), (q, D), (D, inner), (D, inner), (inner, D)]


def counts(config: LlamaConfig, rank: int) -> tuple[int, int, int]:
    """(entries of matrices, of vectors, of adapters of rank `rank` on every projection)."""
    D, L = config.hidden_size, config.num_hidden_layers
    heads = 1 if config.tie_word_embeddings else 2
    matrices = heads * config.vocab_size * D + L * sum(a * b for a, b in products(config))
    biases = sum(out for _, out in products(config)[:3]) if config.qkv_bias else 0
    return matrices, L * (2 * D + biases) + D, L * rank * sum(a + b for a, b in products(config))


def note(T: int, P: int, Q: int) -> int:
    """Numbers that a unit's note of a product holds: its gradient, or the factors, as unit_gradients.Outer chooses."""
    return P * Q if formed(T, P, Q) else T * (P + Q)


def formed(T: int, P: int, Q: int) -> bool:
    return T * T * (P + Q) >= TRAFFIC_COST * P * Q


def working(T: int, P: int, Q: int) -> int:
    return UNITS * (T * (P + Q) + P * Q) if formed(T, P, Q) else 2 * UNITS * T * (P + Q)


def terms(config: LlamaConfig, rank: int, bf16_base: bool, recompute: bool, tokens: int, T: int) -> dict[str, float]:
    """Bytes of each term at the peak of a step. rank 0: every weight trains."""
    matrices, vectors, adapters = counts(config, rank)
    D, inner, L, U = config.hidden_size, config.intermediate_size, config.num_hidden_layers, tokens / T
    q = config.num_attention_heads * config.head_dim
    P = adapters if rank else matrices + vectors
    kept = tokens * (4 * D + 4 * q + 3 * inner)  # of a block
    adapted = [pair for a, b in products(config) for pair in ((rank, a), (b, rank))]
    pairs = adapted if rank else products(config)
    notes = U * sum(note(T, *pair) for pair in pairs)  # of a block
    again = recompute and notes > WORTH_KEEPING * 2 * tokens * D  # had a second time
    largest = max(working(T, *pair) for pair in pairs)
    found = {
        "weights": 4 * P + (((2 if bf16_base else 4) * matrices + 4 * vectors) if rank else 0),
        "training": 16 * P,
        "kept": 4 * L * (tokens * D * (2 if again else 1) if recompute else kept),
        "notes": 0 if again else 4 * L * max(0, notes - (tokens * D if recompute else kept)),
        "block": 4 * max(kept, notes if again else 0) if recompute else 0,
        "working": 4 * (4 * inner * tokens + largest),
        "head": 4 * (5 * tokens * D if rank else tokens * config.vocab_size),
    }
    return {name: float(value) for name, value in found.items()}


def step_terms(found: dict[str, float]) -> float:
    """Bytes of a step alone: what is allocated and freed between two micro-batches."""
    return sum(value for name, value in found.items() if name not in ("weights", "training"))


def show(args) -> None:
    lines = []
    for name, config in SHAPES.items():
        for rank in (args.rank, 0):
            for bf16_base in (False, True) if rank else (False,):
                kept, again = (terms(config, rank, bf16_base, on, args.tokens, args.length) for on in (False, True))
                lines.append(
                    [
                        name,
                        f"LoRA, rank {rank}" if rank else "all weights",
                        "bf16" if bf16_base else "float32",
                        *(f"{part / 1e9:.3g}" for part in (kept["weights"], kept["training"])),
                        *(f"{sum(found.values()) / 1e9:.3g}" for found in (kept, again)),
                    ]
                )
    head = ("model", "trained", "base", "weights [GB]", "sums, AdamW [GB]", "peak [GB]", "with --recompute [GB]")
    print(markdown(head, lines), end="")


# ------------------------------------------------------------------ measured here


def random_batch(vocabulary: int, units: int, T: int) -> MicroBatch:
    n = units * T
    ids = torch.randint(0, vocabulary, (units, T))
    weights, targets = torch.full((n,), 1 / T), torch.randint(0, vocabulary, (n,))
    return MicroBatch(ids, torch.arange(n), targets, weights, [T] * units, 1, n)


def worker(pipe, config: LlamaConfig, rank: int, bf16_base: bool, recompute: bool, tokens: int, T: int) -> None:
    """Sends (peak bytes above those of the process before it had a model, seconds of a second micro-batch)."""
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        keep_memory()
    before = 0 if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = torch.device("cuda" if on_gpu else "cpu")
    lora = LoRAConfig(rank, 32.0, targets=("all",)) if rank else LoRAConfig()
    model = build(config, lora, "--measure", bf16_base).to(device)
    model.freeze_for_training()
    flat = FlatParameters(model)
    optimizer = AdamW(flat, (0.9, 0.999), 1e-6, 0.01, True)
    engine = BookKeeping(model, flat, ClippingRule("flat", 1.0), recompute=recompute)
    batch = random_batch(config.vocab_size, tokens // T, T).to(device)
    engine.accumulate(batch)
    start = time.perf_counter()
    engine.accumulate(batch)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    optimizer.step(flat.grad.float(), 1e-5)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send((peak - before, seconds))


def measure(args) -> None:
    context = multiprocessing.get_context("spawn")
    rows = [(args.rank, bf16_base, recompute) for bf16_base in (False, True) for recompute in (False, True)]
    if args.whole:
        rows = [(0, False, False), (0, False, True)]
    for rank, bf16_base, recompute in rows:
        ours, theirs = context.Pipe()
        setting = (SHAPES[args.measure], rank, bf16_base, recompute, args.tokens, args.length)
        process = context.Process(target=worker, args=(theirs, *setting))
        process.start()
        theirs.close()
        try:
            peak, seconds = ours.recv()
        except EOFError:
            fail(f"--measure {args.measure}: the process ended without an answer (out of memory?)")
        process.join()
        formula = sum(terms(*setting).values())
        found = {"rank": rank, "base_dtype": "bf16" if bf16_base else "float32", "recompute": recompute}
        found |= {"peak_gb": round(peak / 1e9, 3), "formula_gb": round(formula / 1e9, 3)}
        print(json.dumps({**found, "error": round(formula / peak - 1, 3), "seconds": round(seconds, 2)}), flush=True)


def main() -> None:
    parser = Parser(description="the memory of a private training")
    add = parser.add_argument
    add("--tokens", type=int, default=2048, help="padded tokens of a micro-batch, --micro_batch_tokens (default 2048)")
    add("--length", type=int, default=512, help="tokens of a text (default 512)")
    add("--rank", type=int, default=16, help="of adapters on every projection (default 16)")
    add("--measure", choices=SHAPES, help="measure this shape with random weights, each setting in its own process")
    add("--whole", action="store_true", help="with --measure: all weights train")
    args = parser.parse_args()
    if args.whole and not args.measure:
        fail("--whole: goes with --measure alone; the table has both")
    check_positive(args, tokens=math.inf, length=math.inf, rank=math.inf)
    if args.tokens % args.length:
        fail(f"--tokens {args.tokens}: expected a multiple of --length {args.length}")
    (measure if args.measure else show)(args)
