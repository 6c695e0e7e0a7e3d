"""Draw texts from a trained model: a synthetic corpus, or continuations of given prompts.

One process:      python src/generate.py --init_checkpoint trained_models/reviews --num_samples 10000
                      --temperature 0.9 --top_p 0.95 --max_new_tokens 128 --seed 1 --output samples.jsonl
Many (CPU, GPU):  python -m torch.distributed.run --nproc_per_node=2 src/generate.py ... the same flags

--init_checkpoint is what load_model() takes: a folder of a training (its newest model.{step}.pt), Hugging Face's or
PEFT's folder, or a weight file. Adapters are merged.

--prompts FILE: a text file has a prompt a line; an empty line is the start token alone. A .jsonl file has a line
{"prompt": "..."}, or {"context": [ids], ...} as gpt2_encode.py writes it. --num_samples are drawn of each line. Without
--prompts all samples begin at the start token, GPT-2's <|endoftext|>; a vocabulary without one is refused.

Output, in the order of the prompts, whole or not at all, a line a sample:
  {"prompt": "...", "text": "...", "tokens": [ids], "logprob": x}
tokens: what was generated, through the token that ended it, if any. text: the same as text, without special tokens and
cut before --stop. logprob: the natural logarithm of the tokens' probability under the distribution that they were drawn
from, after temperature, top-k and top-p.

The same seed gives the same texts whatever --batch_size, the number of ranks, or a kill and --resume: sample j of line
i has random numbers of its own, and its states are computed in shapes that do not depend on the other samples. That
holds on one kind of processor and with one number of threads (OMP_NUM_THREADS; torchrun sets 1).
"""

import base.early  # noqa: F401  # isort: skip  # before torch, which takes seconds

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

import loralib as lora
from base.distributed import World, start
from base.errors import fail, run_main
from base.files import atomic_write, check_link, is_text, read_lines
from base.flags import REQUIRED, Given, SettingsParser, check_output, flag
from corpus.tokenizer import VOCAB_HELP, Tokenizer, check_vocabulary_fits, digest_vocab, load_tokenizer, own_vocabulary
from decoding.journal import Journal
from decoding.line_decoder import LineDecoder, rows_for
from decoding.sampling import Job, SamplingRules, sample_all
from language_model import LanguageModel
from run.log import read_args
from run.texts import ROOT
from run.trained import TrainedModel, load, without_padding
from weights.foreign import fingerprint

WAIT_SECONDS = 24 * 3600  # how long a rank that is done waits for the others
BATCH = {"cpu": 128, "cuda": 512}  # samples at once, where --token_budget allows them


@dataclass(frozen=True, kw_only=True)
class Flags(TrainedModel):
    """The command line."""

    prompts: str | None = flag(
        help='a text file of one prompt a line, or .jsonl with {"prompt": "..."} or {"context": [ids]} a line '
        "(default: none, a text begins at the start token)",
        metavar="FILE",
    )
    num_samples: int = flag(1, "samples of each prompt; without --prompts in all (default 1)", least=1)
    temperature: float = flag(1.0, "what logits are divided by, from 0.01 on (default 1)", within=(0.01, 100))
    top_k: int = flag(0, "keep the k most probable tokens; 0 keeps all (default 0)", least=0)
    top_p: float = flag(
        1.0, "keep the most probable tokens that have a share of p together, after --top_k (default 1)", positive=1
    )
    max_new_tokens: int = flag(128, "tokens to generate at most (default 128)", least=1)
    stop: tuple[str, ...] | None = flag(
        help="end a text before this string; may be repeated. A text also ends at the vocabulary's end tokens",
        action="append",
        type=str,
        metavar="TEXT",
    )
    seed: int = flag(0, "of the random numbers: the same one gives the same texts (default 0)", least=0)
    output: str = flag(
        REQUIRED,
        "JSON lines of the samples: prompt, text, tokens, and logprob, which is that of the tokens under the "
        "distribution that they are drawn from",
        metavar="FILE",
    )
    batch_size: int | None = flag(
        help=f"samples in work at once (default: {BATCH['cpu']}, on a GPU {BATCH['cuda']}, as far as --token_budget "
        "allows). It changes no text",
        least=1,
    )
    token_budget: int = flag(
        24576, "without --batch_size: cached tokens that the samples may need together (default 24576)", least=1
    )
    bf16: bool = flag(False, "weights, cache and products in bfloat16")
    resume: bool = flag(False, "continue a sampling that was killed")
    platform: str = flag("local", "local or k8s")
    local_rank: int | None = flag(names=("local_rank", "local-rank"), help="set by torch.distributed.launch")


@dataclass(frozen=True)
class Prompt:
    """What a sample continues. text: as it stands in the output; has_text: whether the ids hold more than a start."""

    text: str
    ids: tuple[int, ...]
    has_text: bool


@dataclass(frozen=True)
class Work:
    """What there is to draw, and what is drawn already."""

    rules: SamplingRules
    prompts: list[Prompt]
    jobs: list[Job]
    identity: dict  # the journal's; on rank 0 alone
    done: dict[int, dict]  # index -> {"tokens", "logprob"}, from the journals of a resumed sampling; on rank 0 alone


def parse_flags() -> tuple[Given, Flags]:
    changes = {"vocab": {"help": f"{VOCAB_HELP} (default: the model's folder, what its training used, or vocab)"}}
    parser = SettingsParser({"sampling": Flags}, changes, unit="text", description=__doc__.splitlines()[0])
    given, flags = parser.parse_settings(sys.argv[1:])
    return given, flags


def check(given: Given, flags: Flags) -> None:
    """Raise UserError for what can be known to be wrong before any file is read."""
    given.check_ranges()
    if flags.seed >= 1 << 64:
        fail(f"--seed {flags.seed}: expected a number below 2^64")
    for text in flags.stop or ():
        if not text or not is_text(text):
            fail(f"--stop {text!r}: expected a text of at least one character; leave the flag out to stop at no text")
    if flags.top_k == 1 and (changed := [name for name in ("temperature", "top_p") if name in given.explicit]):
        fail(f"--{changed[0]}: means nothing with --top_k 1, which always takes the most probable token; give one")
    if os.path.isdir(flags.output):
        fail(f"--output {flags.output}: is a folder, wanted the name of a file")
    if flags.prompts is not None:
        check_output(flags.output, flags.prompts, "--output")
    folder = os.path.dirname(flags.output)
    check_link(folder or ".", "--output")
    if folder and not os.path.isdir(folder):
        fail(f"--output {flags.output}: there is no folder {folder}; make it, or name another")
    if not os.access(folder or ".", os.W_OK | os.X_OK):
        fail(f"--output {flags.output}: its folder cannot be written to; name another")


def open_vocabulary(flags: Flags, model: LanguageModel) -> tuple[Tokenizer, str]:
    """(the tokenizer of the model, what is to be said of the model's rows beyond it; "" for nothing). UserError where
    it is not the model's."""
    place = flags.init_checkpoint
    folder = place if os.path.isdir(place) else os.path.dirname(place) or "."
    args, own = read_args(folder), own_vocabulary(place, flags.base_checkpoint)
    recorded = args.get("vocab") if isinstance(args.get("vocab"), str) else None
    vocab = flags.vocab or own or (recorded if recorded and os.path.isdir(recorded) else os.path.join(ROOT, "vocab"))
    tokenizer = load_tokenizer(vocab)
    rows, what = model.config.vocab_size, f"--init_checkpoint {place}"
    said = check_vocabulary_fits(vocab, tokenizer.vocab_size, rows, what, place, own)
    wanted = args.get("vocab_sha256")
    if isinstance(wanted, str) and wanted != digest_vocab(vocab):
        fail(f"--vocab {vocab}: is not the one that {what} was trained with ({recorded}); give that one")
    return tokenizer, said


def read_prompts(flags: Flags, tokenizer: Tokenizer, limit: int) -> list[Prompt]:
    """The prompts, as corpus/records.py makes the tokens of a prompt. limit: tokens that one may have."""
    begin = tokenizer.end_of_text if tokenizer.begin_of_text is None else tokenizer.begin_of_text

    def prompt(text: str, where: str) -> Prompt:
        ids = (*tokenizer.prefix, *(tokenizer.encode(text) if text else ()))
        if not ids and begin is None:
            fail(f"{where}: is empty, and the vocabulary has no start token; give a text")
        return Prompt(text, ids or (begin,), bool(text))

    if flags.prompts is None:
        if not tokenizer.prefix and begin is None:
            fail("--prompts: not given, and the vocabulary has no start token; give a file of prompts")
        return [prompt("", "--prompts")]
    found, tokens = [], flags.prompts.endswith(".jsonl")
    for number, line in read_lines(flags.prompts, "--prompts"):
        where = f"{flags.prompts}:{number}"
        one = prompt_of_record(line, where, tokenizer, prompt) if tokens else prompt(line, where)
        if len(one.ids) > limit:
            fail(
                f"{where}: the prompt has {len(one.ids)} tokens, and with --max_new_tokens {flags.max_new_tokens} the "
                f"model has room for {limit}; shorten it, or give fewer"
            )
        found.append(one)
    if not found:
        fail(f"--prompts {flags.prompts}: is empty, wanted a prompt a line")
    return found


def prompt_of_record(line: str, where: str, tokenizer: Tokenizer, prompt: Callable[[str, str], Prompt]) -> Prompt:
    """The prompt of a line of JSON."""
    wanted = 'wanted {"prompt": "..."} or {"context": [ids]}'
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or ("prompt" in record) == ("context" in record):
        fail(f"{where}: {wanted}, got {line[:60]!r}")
    if "prompt" in record:
        if not isinstance(record["prompt"], str) or not is_text(record["prompt"]):
            fail(f"{where}: the prompt is no text; {wanted}, got {line[:60]!r}")
        return prompt(record["prompt"], where)
    ids = record["context"]
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        fail(f"{where}: the context is no list of token ids; {wanted}, got {line[:60]!r}")
    if not ids:
        fail(f"{where}: the context is empty, wanted one token at least; remove the line or encode with --add_bos")
    if wrong := [token for token in ids if not 0 <= token < tokenizer.vocab_size]:
        fail(f"{where}: token id {wrong[0]} is outside the vocabulary of {tokenizer.vocab_size} tokens; is it another?")
    return Prompt(tokenizer.decode(ids), tuple(ids), True)


def stops(flags: Flags, tokenizer: Tokenizer) -> Callable[[Sequence[int]], bool] | None:
    """Whether the text of tokens holds one of --stop, where the newest token can have ended it. A token but a special
    one has a byte at least, so the text lies in as many tokens as it has bytes."""
    if not flags.stop:
        return None
    window = max(len(text.encode()) for text in flags.stop) + 4

    def stopped(tokens: Sequence[int]) -> bool:
        text = tokenizer.decode(list(tokens[-window:]))
        return any(one in text for one in flags.stop or ())

    return stopped


def text_of(tokens: list[int], prompt: Prompt, tokenizer: Tokenizer, stop: Sequence[str]) -> str:
    """The generated text: up to an end token, cut before a stop."""
    body = tokens[:-1] if tokens[-1] in tokenizer.ends else tokens
    text = tokenizer.decode_generated(body)
    if prompt.has_text and not tokenizer.cut_at_spaces:  # alone, such tokens lose the space at their begin
        before, whole = tokenizer.decode(list(prompt.ids)), tokenizer.decode([*prompt.ids, *body])
        text = whole.removeprefix(before) if whole.startswith(before) else text
    ends = [place for one in stop if (place := text.find(one)) >= 0]
    return text[: min(ends)] if ends else text


def prepare(flags: Flags, world: World, journal: Journal) -> tuple[LanguageModel, Tokenizer, Work]:
    """Read and check everything that a mistake can spoil, before anything is written; then, on rank 0, take the lock.

    UserError for the mistakes.
    """
    model = load(flags)
    tokenizer, said = open_vocabulary(flags, model)
    model = without_padding(model, flags.vocab_size or min(tokenizer.vocab_size, model.config.vocab_size))
    config = model.config
    limit = config.n_positions - flags.max_new_tokens
    if limit < 1:
        fail(f"--max_new_tokens {flags.max_new_tokens}: {config.limit}, of which a prompt takes one; choose fewer")
    if flags.top_k > config.vocab_size:
        fail(f"--top_k {flags.top_k}: more than the vocabulary's {config.vocab_size} tokens; choose at most that many")
    ends = frozenset(token for token in tokenizer.ends or config.eos_ids if token < config.vocab_size)
    rules = SamplingRules(flags.max_new_tokens, ends, flags.temperature, flags.top_k, flags.top_p)
    prompts = read_prompts(flags, tokenizer, limit)
    n = flags.num_samples
    jobs = [Job(i * n + j, i, j, prompt.ids) for i, prompt in enumerate(prompts) for j in range(n)]
    work = Work(rules, prompts, jobs, {}, {})
    if not world.is_main:
        return model, tokenizer, work
    identity = {
        "checkpoint": fingerprint({name: value.detach() for name, value in model.named_parameters()}),
        "data": hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest(),
        "flags": {
            **{**vars(rules), "ends": sorted(ends)},
            **{name: getattr(flags, name) for name in ("seed", "num_samples", "bf16")},
            "stop": list(flags.stop or ()),
        },
    }
    done = journal.read(identity) if flags.resume else {}
    journal.take_lock()
    if said:
        print(said)
    if not journal.alone:
        print(
            f"WARNING: the file system of {flags.output} has no locks: a second sampling with this --output would not "
            "be noticed; start none",
            file=sys.stderr,
        )
    return model, tokenizer, Work(rules, prompts, jobs, identity, done)


def make_decoder(flags: Flags, world: World, model: LanguageModel, work: Work, count: int) -> LineDecoder:
    """The decoder of `count` samples, with as many slots as --batch_size or --token_budget allow. Its length and rows
    are those of all ranks' prompts and samples: the states must not depend on who draws what."""
    lora.merge(model)  # before the cast, so that the sum is taken in float32
    model = model.to(world.device, torch.bfloat16 if flags.bf16 else torch.float32)
    length = max(len(prompt.ids) for prompt in work.prompts) + flags.max_new_tokens
    slots = flags.batch_size or min(BATCH[world.device.type], max(1, flags.token_budget // length))
    rows = rows_for(len(work.jobs), world.device)
    return LineDecoder(model, max(1, min(slots, count)), length, rows)


def draw_share(
    flags: Flags,
    world: World,
    work: Work,
    jobs: list[Job],
    decoder: LineDecoder,
    tokenizer: Tokenizer,
    journal: Journal,
    identity: dict,
) -> dict[int, dict]:
    """Draw the samples of `jobs`, writing each into this rank's journal; index -> {"tokens", "logprob"}."""
    found, tokens, begin = {}, 0, time.perf_counter()
    bar = tqdm(
        total=len(jobs),
        desc="generate" + (" (rank 0's share)" if world.size > 1 else ""),
        unit=" samples",
        disable=not world.is_main or not sys.stderr.isatty(),
    )
    with journal.open(world.rank, identity, not flags.resume) as handle, bar:
        for sample in sample_all(jobs, decoder, work.rules, flags.seed, stops(flags, tokenizer)):
            found[sample.index] = {"tokens": sample.tokens, "logprob": sample.logprob}
            journal.add(handle, {"context": sample.index, "predict": found[sample.index]})
            tokens += len(sample.tokens)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - begin):.0f} tokens/s", refresh=False)
            bar.update()
    return found


def write_samples(flags: Flags, work: Work, done: dict[int, dict], tokenizer: Tokenizer) -> None:
    with atomic_write(flags.output) as out:
        for job in work.jobs:
            prompt, drawn = work.prompts[job.prompt], done[job.index]
            text = text_of(drawn["tokens"], prompt, tokenizer, flags.stop or ())
            out.write(json.dumps({"prompt": prompt.text, "text": text, **drawn}, ensure_ascii=False) + "\n")


def main() -> None:
    given, flags = parse_flags()
    world = start(flags.platform, flags.local_rank, timeout_seconds=WAIT_SECONDS)
    journal = Journal(flags.output, "--output", "sampling")
    with world.raise_if_any_failed():
        check(given, flags)
        model, tokenizer, work = prepare(flags, world, journal)
    identity, done = world.gather((work.identity, work.done))[0]  # rank 0 read the journals for all
    if journal.left_over and not flags.resume:
        print(f"{flags.output}.journal.*: of a sampling that did not end, dropped (--resume would have continued it)")
        journal.empty()
    world.barrier()

    to_draw = [job for job in work.jobs if job.index not in done]
    share = to_draw[world.rank * len(to_draw) // world.size : (world.rank + 1) * len(to_draw) // world.size]
    decoder = make_decoder(flags, world, model, work, len(share))
    del model  # the decoder has its own copy of most weights
    begin = time.perf_counter()
    with world.raise_if_any_failed():
        found = draw_share(flags, world, work, share, decoder, tokenizer, journal, identity)
    for part in world.gather(found):
        done.update(part)
    world.close()
    if world.is_main:
        seconds = time.perf_counter() - begin
        write_samples(flags, work, done, tokenizer)
        journal.remove()
        tokens = sum(len(done[job.index]["tokens"]) for job in to_draw)
        print(
            f"{flags.output}: {len(work.jobs)} samples of {len(work.prompts)} prompts, {len(to_draw)} drawn in "
            f"{seconds:.1f} s ({tokens} tokens, {tokens / seconds:.0f} tokens/s)"
        )


if __name__ == "__main__":
    run_main(main)
