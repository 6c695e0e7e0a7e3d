"""Time beam search: this project's, Hugging Face transformers' at its best batch size, and the arithmetic floor.

    python scripts/start.py benchmark_beam --init_checkpoint pretrained_checkpoints/demo \
        --data quickstart_runs/data/test.jsonl

These --data are what scripts/quickstart.sh leaves; their tokens must be of the model's vocabulary. Everything runs in
one process, one after the other, on the same contexts, taken evenly from the different ones of --data. The floor is the
time of the products alone, for the hypotheses that the search ran, at the speed that this machine reaches on the
largest of them (the vocabulary's), and of reading the logits once, at the speed of a maximum. transformers runs without
its n-gram ban, a Python loop that would slow it down.
Needs transformers (requirements-dev.txt).
"""

import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from base.errors import fail
from base.files import read_lines
from base.flags import Parser
from base.products import PackedLinear
from decoding.beam_search import SearchSettings, beam_search
from decoding.top_k_head import CPU_BLOCK
from decoding.tree_decoder import TreeDecoder
from model import GPT2Config
from weights.checkpoint import load_model


def best_of(repeats: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def different_contexts(path: str, count: int) -> list[list[int]]:
    different: dict[tuple[int, ...], None] = {}
    for number, line in read_lines(path, "--data"):
        try:
            context = tuple(json.loads(line)["context"])
        except (ValueError, KeyError, TypeError, RecursionError):
            context = ()
        if not context or not all(type(token) is int for token in context):
            fail(f'{path}:{number}: wanted {{"context": [token ids], ...}}, as src/gpt2_encode.py writes it')
        different[context] = None
    if len(different) < count:
        fail(f"--data {path}: holds {len(different)} different contexts, --contexts wants {count}")
    contexts = list(different)
    return [list(contexts[i * len(contexts) // count]) for i in range(count)]


class CountingDecoder(TreeDecoder):
    """Counts what the search asks for: rows through the head, and (token, layer stack) passes."""

    rows = tokens = 0

    def admit(self, slots, contexts):
        self.rows += len(contexts)
        self.tokens += sum(map(len, contexts))
        return super().admit(slots, contexts)

    def advance(self, slots, places, parents, tokens):
        self.rows += len(slots)
        self.tokens += len(slots)
        return super().advance(slots, places, parents, tokens)


def floor_seconds(decoder: CountingDecoder, config: GPT2Config) -> float:
    """Products and one reading of the logits, at measured speeds, in seconds for the whole search."""
    states, weight = torch.randn(300, config.n_embd), torch.randn(CPU_BLOCK, config.n_embd)
    project, logits = PackedLinear(weight), torch.randn(300, CPU_BLOCK)
    blocks = 20
    per_product = best_of(10, lambda: [project(states) for _ in range(blocks)]) / (blocks * 2 * 300 * weight.numel())
    per_logit = best_of(10, lambda: [logits.amax(-1) for _ in range(blocks)]) / (blocks * logits.numel())
    head = 2 * config.n_embd * config.vocab_size
    body = 2 * config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * config.inner)
    print(
        f"floor: {decoder.rows} hypotheses through the head, {head * decoder.rows / 1e9:.0f} GFLOP; "
        f"{decoder.tokens} tokens through the layers, {body * decoder.tokens / 1e9:.0f} GFLOP; "
        f"{1e-9 / per_product:.0f} GFLOP/s, {1e-9 / per_logit:.1f} G logits/s"
    )
    return (head * decoder.rows + body * decoder.tokens) * per_product + decoder.rows * config.vocab_size * per_logit


def transformers_seconds(folder: str, contexts: list[list[int]], settings: SearchSettings, batch: int) -> float:
    """Seconds of generate() with the same beams, penalty and ends over all contexts."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    ends = list(settings.eos_ids)
    ordered = sorted(contexts, key=len)

    def work() -> None:
        for start in range(0, len(ordered), batch):
            part = ordered[start : start + batch]
            longest = max(map(len, part))
            ids = torch.tensor([[ends[-1]] * (longest - len(context)) + context for context in part])
            mask = torch.tensor([[0] * (longest - len(context)) + [1] * len(context) for context in part])
            model.generate(
                ids,
                attention_mask=mask,
                num_beams=settings.beam,
                do_sample=False,
                early_stopping=False,
                max_new_tokens=settings.eval_len,
                length_penalty=settings.length_penalty,
                no_repeat_ngram_size=0,
                eos_token_id=ends,
                pad_token_id=ends[-1],
            )

    with torch.inference_mode():
        return best_of(1, work)


def main() -> None:
    parser = Parser(description="time beam search against transformers and the arithmetic floor")
    parser.add_argument("--data", default="data/e2e/test.jsonl", help="JSON lines of token ids")
    parser.add_argument("--init_checkpoint", required=True, help="a folder in Hugging Face's layout")
    parser.add_argument("--contexts", type=int, default=60)
    parser.add_argument("--slots", type=int, default=32, help="contexts in work at once")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="*", default=[1, 4, 10, 20, 30], help="for transformers; none skips it"
    )
    args = parser.parse_args()
    for name, values in (("contexts", [args.contexts]), ("slots", [args.slots]), ("batch_sizes", args.batch_sizes)):
        if min(values, default=1) < 1:
            fail(f"--{name} {min(values)}: expected at least 1")
    contexts = different_contexts(args.data, args.contexts)

    def search(decoder: TreeDecoder, settings: SearchSettings) -> None:
        for _ in beam_search(contexts, decoder, settings, args.slots):
            pass

    loaded = load_model(args.init_checkpoint)
    config = loaded.model.config
    # a text ends with the vocabulary's last token, and GPT-2's with two line feeds too: token 628
    ends = (628, 50256) if config.vocab_size == 50257 else (config.vocab_size - 1,)
    settings = SearchSettings(beam=10, eval_len=64, eos_ids=ends, length_penalty=0.8, no_repeat_ngram_size=4)
    decoder = TreeDecoder(loaded.model, args.slots, settings.beam)
    search(decoder, replace(settings, eval_len=2))  # first calls allocate
    ours = best_of(3, lambda: search(decoder, settings)) / len(contexts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    counting = CountingDecoder(loaded.model, args.slots, settings.beam)
    search(counting, settings)
    print(
        f"{len(contexts)} contexts, beam {settings.beam}, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    floor = floor_seconds(counting, config) / len(contexts)
    print(f"floor          {floor:.4f} s a context")
    print(f"this project   {ours:.4f} s a context, {ours / floor:.1f} times the floor, peak memory {peak:.0f} MiB")
    times = {}
    for batch in args.batch_sizes:
        times[batch] = transformers_seconds(args.init_checkpoint, contexts, settings, batch) / len(contexts)
        print(f"transformers   {times[batch]:.4f} s a context at batch {batch}")
    if times:
        best = min(times, key=lambda batch: times[batch])
        print(f"transformers'  best is batch {best}: this is {times[best] / ours:.1f} times as fast")
