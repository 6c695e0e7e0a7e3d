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
  {"prompt": "...", "text": "...", "tokens": [ids], "logprob": x}, and with public fields "fields": {name: value}
tokens: what was generated, through the token that ended it, if any. text: the same as text, without special tokens and
cut before --stop. logprob: the natural logarithm of the tokens' probability under the distribution that they were drawn
from, after temperature, top-k and top-p.

The same seed gives the same texts whatever --batch_size, the number of ranks, or a kill and --resume: sample j of line
i has random numbers of its own, and its states are computed in shapes that do not depend on the other samples. That
holds on one kind of processor, with one number of threads (OMP_NUM_THREADS; torchrun sets 1) and for one total number
of samples, which sets the rows of a product.
"""

import base.early  # noqa: F401  # isort: skip  # before torch, which takes seconds

import functools
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

import loralib as lora
from base.distributed import World, start
from base.errors import fail, run_main
from base.files import atomic_write, check_place, is_text
from base.flags import REQUIRED, Given, SettingsParser, check_output, flag
from corpus.records import split_fields
from corpus.tokenizer import VOCAB_HELP, Tokenizer, check_vocabulary_fits, digest_vocab, load_tokenizer, own_vocabulary
from decoding.journal import Journal
from decoding.line_decoder import LineDecoder, rows_for
from decoding.sampling import Job, SamplingRules, sample_all
from language_model import LanguageModel
from run.label_counts import PRIVATE, Private, private_weights, read_table, shared_out
from run.log import read_args
from run.prompts import Prompt, mix_prompts, read_prompts, stops, text_of
from run.texts import ROOT
from run.trained import TrainedModel, load, without_padding
from weights.checkpoint import Loaded
from weights.foreign import fingerprint

WAIT_SECONDS = 24 * 3600  # how long a rank that is done waits for the others
BATCH = {"cpu": 128, "cuda": 512}  # samples at once, where --token_budget allows them


def as_given(text: str) -> str:
    """A flag's text that is no path: a tilde in it is not the home folder."""
    return text


@dataclass(frozen=True, kw_only=True)
class Flags(TrainedModel):
    """The command line."""

    prompts: str | None = flag(
        help='a text file of one prompt a line, or .jsonl with {"prompt": "..."} or {"context": [ids]} a line '
        "(default: none, a text begins at the start token)",
        metavar="FILE",
    )
    num_samples: int = flag(1, "samples of each prompt; without --prompts in all (default 1)", least=1)
    prompt_fields: str | None = flag(
        help="the public fields that the model was trained with, as in stars,category; .jsonl of --prompts then has "
        "them in each line (default: those of the training)",
        metavar="NAMES",
    )
    label_counts: str | None = flag(
        help='a table of how many samples each mix of fields gets, {"stars": 5, ..., "count": 20} a line, or "weight" '
        "to share --num_samples out; or private: the mix of the private data, counted with noise that the run's "
        "ledger pays for",
        metavar="FILE",
    )
    train_file: str | None = flag(help="private: the file that the run was trained on")
    label_domain: str | None = flag(
        help="private: the mixes that can be, a public list without counts; texts of any other mix count nowhere",
        metavar="FILE",
    )
    label_noise_multiplier: float | None = flag(
        help="private: the noise's standard deviation in each count, where a unit changes them by 1 at most",
        positive=1e6,
    )
    target_epsilon: float | None = flag(
        help="private: the epsilon that training and labels may cost together (default: the run's)", positive=math.inf
    )
    temperature: float = flag(1.0, "what logits are divided by, from 0.01 on (default 1)", within=(0.01, 100))
    top_k: int = flag(0, "keep the k most probable tokens; 0 keeps all (default 0)", least=0)
    top_p: float = flag(
        1.0, "keep the most probable tokens that have a share of p together, after --top_k (default 1)", positive=1
    )
    max_new_tokens: int = flag(128, "tokens to generate at most (default 128)", least=1)
    stop: tuple[str, ...] | None = flag(
        help="end a text before this string; may be repeated. A text also ends at the vocabulary's end tokens",
        action="append",
        type=as_given,
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
    check_labels(given, flags)
    for path in (flags.prompts, flags.label_counts, flags.train_file, flags.label_domain):
        if path is not None:
            check_output(flags.output, path, "--output")
    check_place(flags.output, "--output")


def check_labels(given: Given, flags: Flags) -> None:
    """Raise UserError for flags of --label_counts that contradict each other or mean nothing."""
    needed = ("train_file", "label_domain", "label_noise_multiplier")
    private = flags.label_counts == PRIVATE
    if flags.label_counts is not None and flags.prompts is not None:
        fail("--label_counts: means nothing with --prompts, whose lines say what is drawn; give one of them")
    for name in (*needed, "target_epsilon"):
        if getattr(flags, name) is not None and not private:
            fail(f"--{name}: means nothing without --label_counts private; leave it out")
        if private and name in needed and getattr(flags, name) is None:
            fail(f"--label_counts private: needs --{name}; the labels' domain is a public list, and their noise yours")
    if private and not os.path.isdir(flags.init_checkpoint):
        fail(
            f"--label_counts private: --init_checkpoint {flags.init_checkpoint} is no folder; give the run's, whose "
            "ledger pays"
        )


def public_fields(flags: Flags) -> tuple[str, ...]:
    """The names of --prompt_fields, or of the training's. UserError where the two differ."""
    place = flags.init_checkpoint
    trained = read_args(place if os.path.isdir(place) else os.path.dirname(place) or ".").get("prompt_fields")
    trained = trained if isinstance(trained, str) else None
    names = split_fields(trained if flags.prompt_fields is None else flags.prompt_fields)
    if trained is not None and names != split_fields(trained):
        fail(f"--prompt_fields {flags.prompt_fields}: {place} was trained with {trained}; leave the flag out")
    if flags.label_counts is not None and not names:
        fail("--label_counts: the model was trained without --prompt_fields; give the fields that it knows")
    if flags.label_counts is None and flags.prompts is None and flags.prompt_fields is not None:
        fail("--prompt_fields: needs --label_counts, or --prompts of .jsonl lines that have the fields")
    if flags.prompts is not None and not flags.prompts.endswith(".jsonl") and flags.prompt_fields is not None:
        fail(f"--prompt_fields {flags.prompt_fields}: --prompts {flags.prompts} is no .jsonl, whose lines have fields")
    return names if flags.label_counts is not None or flags.prompt_fields is not None else ()


def label_mixes(
    given: Given, flags: Flags, names: tuple[str, ...], check: Callable[[list[tuple[str, ...]]], object]
) -> tuple[list[tuple[str, ...]], list[int]]:
    """(mixes of public fields, samples of each) of --label_counts; ([], []) without it. On rank 0 alone, since it may
    charge the run's ledger. check: raises UserError for mixes that cannot be drawn, before a charge."""
    if flags.label_counts is None:
        return [], []
    if flags.label_counts == PRIVATE:
        assert flags.train_file and flags.label_domain and flags.label_noise_multiplier
        private = Private(
            flags.init_checkpoint,
            flags.train_file,
            flags.label_domain,
            flags.label_noise_multiplier,
            flags.target_epsilon,
        )
        mixes, weights = private_weights(private, names, f"{flags.output}.labels.jsonl", flags.resume, check)
        return mixes, shared_out(weights, flags.num_samples)
    mixes, amounts, are_counts = read_table(flags.label_counts, "--label_counts", names, True)
    if not are_counts:
        return mixes, shared_out(amounts, flags.num_samples)
    if "num_samples" in given.explicit:
        fail(f"--num_samples: means nothing with the counts of --label_counts {flags.label_counts}; leave it out")
    return mixes, [int(amount) for amount in amounts]


def open_vocabulary(flags: Flags, loaded: Loaded) -> tuple[Tokenizer, str]:
    """(the tokenizer of the model, what is to be said of the model's rows beyond it; "" for nothing). UserError where
    it is not the model's."""
    place = flags.init_checkpoint
    folder = place if os.path.isdir(place) else os.path.dirname(place) or "."
    places = (place, flags.base_checkpoint, loaded.base_path)
    args, own = read_args(folder), own_vocabulary(*places)
    recorded = args.get("vocab") if isinstance(args.get("vocab"), str) else None
    vocab = flags.vocab or own or (recorded if recorded and os.path.isdir(recorded) else os.path.join(ROOT, "vocab"))
    tokenizer = load_tokenizer(vocab)
    rows, what = loaded.model.config.vocab_size, f"--init_checkpoint {place}"
    said = check_vocabulary_fits(vocab, tokenizer.vocab_size, rows, what, *places)
    wanted = args.get("vocab_sha256")
    if isinstance(wanted, str) and wanted != digest_vocab(vocab):
        fail(f"--vocab {vocab}: is not the one that {what} was trained with ({recorded}); give that one")
    return tokenizer, said


def open_model(flags: Flags) -> tuple[LanguageModel, Tokenizer, SamplingRules, str]:
    """(the model without padded rows, its tokenizer, the rules, what is to be said of the rows). UserError where they
    do not fit."""
    loaded = load(flags)
    tokenizer, said = open_vocabulary(flags, loaded)
    model = without_padding(loaded.model, flags.vocab_size or tokenizer.vocab_size)
    config = model.config
    limit = config.n_positions - flags.max_new_tokens
    if limit < 1:
        fail(f"--max_new_tokens {flags.max_new_tokens}: {config.limit}, of which a prompt takes one; choose fewer")
    if flags.top_k > config.vocab_size:
        fail(f"--top_k {flags.top_k}: more than the vocabulary's {config.vocab_size} tokens; choose at most that many")
    ends = frozenset(token for token in tokenizer.ends or config.eos_ids if token < config.vocab_size)
    rules = SamplingRules(flags.max_new_tokens, ends, flags.temperature, flags.top_k, flags.top_p)
    return model, tokenizer, rules, said


def prepare(
    flags: Flags,
    world: World,
    journal: Journal,
    model: LanguageModel,
    tokenizer: Tokenizer,
    rules: SamplingRules,
    names: tuple[str, ...],
    mixes: list[tuple[str, ...]],
    counts: list[int],
) -> Work:
    """Read the prompts, or make them of `mixes` with `counts` samples of each; then, on rank 0, read the journals of a
    resumed sampling and take the lock."""
    limit = model.config.n_positions - flags.max_new_tokens
    if mixes:
        prompts = mix_prompts(names, mixes, tokenizer, limit)
    else:
        prompts = read_prompts(flags.prompts, names, tokenizer, limit)
        counts = [flags.num_samples] * len(prompts)
    pairs = ((i, j) for i, count in enumerate(counts) for j in range(count))
    jobs = [Job(index, i, j, prompts[i].ids) for index, (i, j) in enumerate(pairs)]
    work = Work(rules, prompts, jobs, {}, {})
    if not world.is_main:
        return work
    identity = {
        "checkpoint": fingerprint({name: value.detach() for name, value in model.named_parameters()}),
        "data": hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest(),
        "flags": {
            **{**vars(rules), "ends": sorted(rules.ends)},
            **{name: getattr(flags, name) for name in ("seed", "bf16")},
            "counts": counts,
            "stop": list(flags.stop or ()),
        },
    }
    done = journal.read(identity) if flags.resume else {}
    journal.take_lock()
    if not journal.alone:
        print(
            f"WARNING: the file system of {flags.output} has no locks: a second sampling with this --output would not "
            "be noticed; start none",
            file=sys.stderr,
        )
    return Work(rules, prompts, jobs, identity, done)


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
        for sample in sample_all(jobs, decoder, work.rules, flags.seed, stops(flags.stop or (), tokenizer)):
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
            fields = {"fields": dict(prompt.fields)} if prompt.fields else {}
            line = {"prompt": prompt.text, "text": text, **drawn, **fields}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def main() -> None:
    given, flags = parse_flags()
    world = start(flags.platform, flags.local_rank, timeout_seconds=WAIT_SECONDS)
    journal = Journal(flags.output, "--output", "sampling")
    with world.raise_if_any_failed():
        check(given, flags)
        names = public_fields(flags)
        model, tokenizer, rules, said = open_model(flags)
    with world.raise_if_any_failed():
        limit = model.config.n_positions - flags.max_new_tokens
        check_mixes = functools.partial(mix_prompts, names, tokenizer=tokenizer, limit=limit)
        found = label_mixes(given, flags, names, check_mixes) if world.is_main else ([], [])
    mixes, counts = world.gather(found)[0]
    with world.raise_if_any_failed():
        work = prepare(flags, world, journal, model, tokenizer, rules, names, mixes, counts)
    if said and world.is_main:
        print(said)
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
        drawn = draw_share(flags, world, work, share, decoder, tokenizer, journal, identity)
    for part in world.gather(drawn):
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
