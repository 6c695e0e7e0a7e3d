"""How long a private training would take on 1 to 64 GPUs: a projection from stated rates, not a measurement.

    python scripts/start.py project_scaling --measure                      # what this machine can measure, as JSON
    python scripts/start.py project_scaling                                # gpt2.xl, all parameters, E2E, on A100s
    python scripts/start.py project_scaling --device h100 --reached 0.5 --node_bandwidth 50e9

A step on n GPUs, g of them in each of m machines; P trained coordinates of W parameters, B examples:

    compute   the longer of two (a roofline, Williams et al., 2009):
              arithmetic  p B (S 12 L D^2 + s D V) / (n R f)   S real tokens an example, s of them scored; 12 L D^2
                          multiply-adds of a token's layers, D V of a scored one's head; p = 3 passes: forward,
                          gradients of states, gradients of weights (2 with adapters alone); R multiply-adds/s, of which
                          a step, clipping included, reaches the share f
              traffic     26 W u / M   u micro-batches; weights are cast (4 + 2 bytes), read by two passes (2 + 2), and
                          their gradients added to the sum (16; not with adapters alone); M bytes/s of memory
    load      a step waits for the rank with the largest draw: of n Poisson draws of mean B/n, the expected maximum over
              the mean, less 1, times compute
    sum       b (2 (g-1)/g / v + 2 (m-1)/m / w), b = 8 (P + 5) bytes: the gradient and five sums, float64, are the one
              large collective of a step. The bandwidth bound of a ring (Patarasuk and Yuan, 2009), inside machines and
              then between them; v bytes/s of a GPU's links, w of a machine's network, one way
    update    (28 P + 8 P/n) 4 bytes / M   every rank: zero, divide and round the sum, AdamW's seven operations, the
              check for NaN, each a pass over memory; its share of the noise

With --shard optimizer, a reduce-scatter of 8 bytes and an all-gather of 4 a coordinate take the place of the sum: b =
(8 P + 4 P)/2, and update is (3 P + 33 P/n) 4 bytes / M: what is left to every rank is zeroing and the check for NaN.

No overlap is assumed: the sum starts when the last micro-batch is done, as in src/run/loop.py. Steps are epochs N / B.
"""

import json
import math
import os
import socket
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from scipy.stats import poisson

from base.distributed import World
from base.errors import fail
from base.flags import Parser, check_positive
from base.markdown import markdown
from base.memory import keep_memory
from losses import MicroBatch
from model import MODEL_CARDS, GPT2Config, GPT2LMModel, LoRAConfig
from optimizer import AdamW, FlatParameters
from privacy.clipping import BookKeeping, ClippingRule, NonPrivate
from privacy.randomness import NoiseSource
from run.loop import EXTRA
from run.settings import DEFAULT_TOKENS, MOST_EPOCHS

# Data sheets: bfloat16 multiply-adds/s (half of the dense FLOP/s: 312 and 989 TFLOPS), bytes/s of memory, of NVLink one
# way (600 and 900 GB/s both ways), of a machine's network (DGX: eight adapters of 200 and 400 Gb/s). NVIDIA A100 80GB
# SXM and H100 SXM data sheets; DGX A100 and DGX H100 user guides.
DEVICES = {"a100": (156e12, 2.039e12, 300e9, 200e9), "h100": (494.5e12, 3.35e12, 450e9, 400e9)}


def trained_coordinates(config: GPT2Config, rank: int) -> int:
    """P: all parameters of the tied model, or adapters of rank `rank` on query and value."""
    D, L = config.n_embd, config.n_layer
    if rank:
        return L * (2 * rank * D + 2 * D * rank)
    layer = 4 * D * D + 4 * D + 2 * D * config.inner + config.inner + D + 4 * D  # attention, MLP, two norms
    return (config.vocab_size + config.n_positions) * D + L * layer + 2 * D


def multiply_adds(config: GPT2Config, tokens: float, scored: float, adapters: bool) -> float:
    """Of `tokens` inputs, `scored` of them with a target, all passes: forward and the states' gradients everywhere, the
    weights' where these train. Left out, under 2 %: biases, norms, adapters, and the attention's scores (2 T D a token
    and layer, 1 % at E2E's lengths)."""
    per_token = config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * config.inner)
    return (2 if adapters else 3) * (tokens * per_token + scored * config.n_embd * config.vocab_size)


def project(args, config: GPT2Config, n: int) -> dict:
    """Seconds of the parts of one step on n GPUs, and hours of the run."""
    P = trained_coordinates(config, args.lora_dim)
    machines, inside = math.ceil(n / args.gpus_per_machine), min(n, args.gpus_per_machine)
    mean = args.batch / n
    arithmetic = mean * multiply_adds(config, args.tokens, args.scored, args.lora_dim) / (args.rate * args.reached)
    micro_batches = math.ceil(mean * args.tokens / args.micro_batch_tokens)
    traffic = (10 if args.lora_dim else 26) * trained_coordinates(config, 0) * micro_batches / args.memory_bandwidth
    compute = max(arithmetic, traffic)
    size = (6 if args.shard == "optimizer" else 8) * (P + EXTRA)
    whole, shared = (3, 33) if args.shard == "optimizer" else (28, 8)  # passes of 4 bytes a coordinate
    ring = 2 * (inside - 1) / inside / args.link_bandwidth + 2 * (machines - 1) / machines / args.node_bandwidth
    parts = {
        "compute": compute,
        "load": compute * (largest_draw(mean, n) / mean - 1),
        "sum": size * ring,
        "update": (whole + shared / n) * 4 * P / args.memory_bandwidth,
    }
    step = sum(parts.values())
    return {**parts, "step": step, "hours": step * round(args.epochs * args.N / args.batch) / 3600}


def largest_draw(mean: float, n: int) -> float:
    """Expected maximum of n independent Poisson draws: the sum over k >= 0 of P(maximum > k)."""
    k = np.arange(math.ceil(mean + 40 * math.sqrt(mean) + 40))
    return float((1 - poisson.cdf(k, mean) ** n).sum())


def show(args, config: GPT2Config) -> None:
    P = trained_coordinates(config, args.lora_dim)
    steps = round(args.epochs * args.N / args.batch)
    trained = f"adapters of rank {args.lora_dim}" if args.lora_dim else "all parameters"
    print(
        f"{args.model_card}, {trained}: {P:,} trained coordinates, {8 * (P + EXTRA) / 1e9:.3g} GB summed a step; "
        f"{args.epochs:g} epochs of {args.N:,} examples at {args.batch} a step: {steps:,} steps; {args.tokens:g} "
        f"tokens an example, {args.scored:g} scored.\n"
        f"Assumed: {args.rate:.3g} multiply-adds/s of which {args.reached:.0%} is reached, clipping included; memory "
        f"{args.memory_bandwidth:.3g} B/s, links {args.link_bandwidth:.3g} B/s a GPU, {args.node_bandwidth:.3g} B/s "
        f"a machine of {args.gpus_per_machine} GPUs.\n"
    )
    alone = project(args, config, 1)["hours"]
    parts, lines = ("compute", "load", "sum", "update", "step"), []
    for n in args.gpus:
        found = project(args, config, n)
        lines.append(
            [
                str(n),
                *(f"{1e3 * found[name]:.0f}" for name in parts),
                f"{found['hours']:.2f}",
                f"{alone / found['hours'] / n:.0%}",
            ]
        )
    print(markdown(["GPUs", *(f"{name} [ms]" for name in parts), "run [h]", "efficiency"], lines), end="")


# ------------------------------------------------------------------ what this machine can measure


def best(call, repeats: int, device: torch.device) -> float:
    """Seconds of the fastest of several calls, the first left out."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    return min(timed() for _ in range(repeats))


def measure_compute(device: torch.device, config: GPT2Config, bf16: bool) -> dict:
    """Rate of matrix products; share of it that ordinary and private steps reach; seconds a coordinate of noise and
    AdamW."""
    if device.type == "cpu":
        keep_memory()
    rows, tokens, first = (8, 53, 28) if device.type == "cpu" else (128, 53, 28)
    dtype = torch.bfloat16 if bf16 else torch.float32
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rate = size**3 / best(lambda: a @ b, 5, device)
    torch.manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (rows, tokens))
    positions = (torch.arange(rows)[:, None] * tokens + torch.arange(first - 1, tokens - 1)).flatten()
    scored = tokens - first
    batch = MicroBatch(
        ids,
        positions,
        ids.flatten()[positions + 1],
        torch.full((rows * scored,), 1 / scored),
        [scored] * rows,
        1,
        rows * tokens,
    ).to(device)
    found = {"multiply_adds_per_s": rate}
    for name in ("ordinary", "private"):
        model = GPT2LMModel(config, LoRAConfig())
        model.freeze_for_training()
        private = name == "private"
        flat = FlatParameters(model.to(device), extra=EXTRA, sums=torch.float64 if private else torch.float32)
        engine = BookKeeping(model, flat, ClippingRule("flat", 1.0), 0.1) if private else NonPrivate(model, flat, 0.1)

        def step(flat=flat, engine=engine) -> None:
            flat.sums.zero_()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                engine.accumulate(batch)

        seconds = best(step, 5, device)
        found[f"{name}_share_of_rate"] = rows * multiply_adds(config, tokens - 1, scored, False) / seconds / rate
        found[f"{name}_tokens_per_s"] = rows * tokens / seconds
    if flat.size != trained_coordinates(config, 0):
        raise RuntimeError("trained_coordinates() is not the model's own count")
    noise, optimizer = NoiseSource("os", "noise", device=device), AdamW(flat, (0.9, 0.999), 1e-6, 0.01, True)
    found["noise_s_per_coordinate"] = best(lambda: noise.add_normal_(flat.grad, 1.0), 2, device) / flat.size
    found["adamw_s_per_coordinate"] = best(lambda: optimizer.step(flat.grad.float(), 1e-6), 3, device) / flat.size
    return found


def reduce_worker(rank: int, size: int, port: int, count: int, pipe) -> None:
    """One of `size` ranks; rank 0 sends the seconds of the fastest of five all-reduces of `count` float64, and of a
    reduce-scatter of them with an all-gather of `count` float32."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    sums, data = torch.ones(count, device=device, dtype=torch.float64), torch.ones(count, device=device)
    world = World(rank, size, rank, device)

    def shares() -> None:
        world.reduce_scatter(sums)
        world.all_gather(data)

    whole, shared = best(lambda: dist.all_reduce(sums), 5, device), best(shares, 5, device)
    if rank == 0:
        pipe.put((whole, shared))
    dist.destroy_process_group()


def measure_sum(count: int) -> dict:
    """Bytes/s of an all-reduce of `count` float64, of which 2 (n-1)/n pass through each rank's link, and the time of
    the sharded step's two collectives over its."""
    size = torch.cuda.device_count() if torch.cuda.is_available() else 2
    if size < 2:
        return {"ranks": size, "link_bytes_per_s": None}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    pipe = context.SimpleQueue()
    torch.multiprocessing.spawn(reduce_worker, (size, port, count, pipe), nprocs=size)
    passing = 2 * (size - 1) / size * 8 * count
    whole, shared = pipe.get()
    return {
        "ranks": size,
        "summed_bytes": 8 * count,
        "link_bytes_per_s": passing / whole,
        "sharded_over_whole": shared / whole,
    }


def measure(args, config: GPT2Config) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    found = {
        "device": name,
        "torch": torch.__version__,
        "model_card": args.model_card,
        "load": round(os.getloadavg()[0], 2),
    }
    return {**found, **measure_compute(device, config, device.type == "cuda"), **measure_sum(25_200_000)}


def main() -> None:
    parser = Parser(description="project the time of a private training on many GPUs")
    add = parser.add_argument
    add("--model_card", choices=MODEL_CARDS, default="gpt2.xl")
    add("--lora_dim", type=int, default=0, help="rank of adapters; 0 (default): all parameters train")
    add("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    add("--gpus_per_machine", type=int, default=8)
    add("--N", type=int, default=42061, help="training examples (default: E2E's)")
    add("--batch", type=int, default=128, help="expected logical batch")
    add("--epochs", type=float, default=20)
    add("--tokens", type=float, default=52, help="tokens of an example that pass the layers (default: E2E's mean)")
    add("--scored", type=float, default=25, help="of which have a target (default: E2E's mean)")
    add("--device", choices=DEVICES, default="a100", help="whose data sheet gives the four rates (default a100)")
    add("--rate", type=float, help="multiply-adds/s of a GPU")
    add("--memory_bandwidth", type=float, help="bytes/s of a GPU's memory")
    add("--link_bandwidth", type=float, help="bytes/s between GPUs of a machine, one way")
    add("--node_bandwidth", type=float, help="bytes/s between machines, one way, of a whole machine")
    add(
        "--micro_batch_tokens",
        type=int,
        default=DEFAULT_TOKENS["cuda"],
        help=f"of a training on GPUs (default {DEFAULT_TOKENS['cuda']})",
    )
    add(
        "--reached",
        type=float,
        default=0.4,
        help="share of the rate that a private step reaches (default 0.4, an assumption)",
    )
    add("--shard", choices=("none", "optimizer"), default="none", help="as the training scripts' flag")
    add("--measure", action="store_true", help="measure on this machine what can be, and print it as JSON")
    args = parser.parse_args()
    rates = ("rate", "memory_bandwidth", "link_bandwidth", "node_bandwidth")
    check_positive(
        args,
        epochs=MOST_EPOCHS,
        **dict.fromkeys(
            ("gpus_per_machine", "N", "batch", "tokens", "micro_batch_tokens", "reached", *rates), math.inf
        ),
    )
    if min(args.gpus) < 1 or args.lora_dim < 0 or not 0 <= args.scored <= args.tokens:
        fail("--gpus, --lora_dim, --scored: expected at least 1 GPU, none below 0, no more scored than --tokens")
    for name, value in zip(rates, DEVICES[args.device], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    config = MODEL_CARDS[args.model_card]
    if args.measure:
        print(json.dumps(measure(args, config), indent=1))
    else:
        show(args, config)
