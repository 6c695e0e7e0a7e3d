"""Beam search with a fine-tuned GPT-2 over the contexts of a JSON lines file.

Each different context is searched once, whatever the number of lines that hold it, and the ranks share the contexts.
The shape and the adapter come from the checkpoint, so a training folder needs no flag for them.

One process:      python src/gpt2_beam.py --data data/e2e/test.jsonl --eval_len 64 --beam 10 --length_penalty 0.8
                      --eos_token_id 628 --init_checkpoint trained_models/e2e --work_dir trained_models/e2e
Many (CPU, GPU):  python -m torch.distributed.run --nproc_per_node=2 src/gpt2_beam.py ... the same flags

Input:   a line {"context": [ids], ...}; other keys are ignored.
Output:  WORK_DIR/OUTPUT_FILE, for each input line {"id": line number from 0, "predict": [generated ids, through the
EOS if any]}. It appears whole or not at all; a search that was killed leaves OUTPUT_FILE.journal.RANK behind, from
which --resume continues.
"""

import base.early  # noqa: F401  # isort: skip  # before torch, which takes seconds

import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

import loralib as lora
from base.distributed import World, start
from base.errors import fail, run_main
from base.files import atomic_write, check_link, read_lines
from base.flags import REQUIRED, Given, SettingsParser, flag, spelled
from decoding.beam_search import SearchSettings, beam_search
from decoding.journal import Journal
from decoding.tree_decoder import TreeDecoder
from language_model import LanguageModel, Shape
from run.trained import TrainedModel, load, vocabulary, without_padding
from weights.foreign import fingerprint

WAIT_SECONDS = 24 * 3600  # how long a rank that is done waits for the others


@dataclass(frozen=True, kw_only=True)
class Flags(TrainedModel):
    """The command line."""

    data: str = flag(REQUIRED, "JSON lines of token ids, as gpt2_encode.py makes them")
    batch_size: int = flag(10, "contexts searched at once; --token_budget may raise it", least=1)
    token_budget: int = flag(
        24576,
        "raise --batch_size as far as so many cached tokens allow, each context counted with its longest possible "
        "beams (default 24576; 0 keeps --batch_size). No batch size changes the result",
        least=0,
    )
    seq_len: int = flag(512, "tokens of context and generated text together")
    eval_len: int = flag(256, "tokens to generate at most; contexts keep seq_len - eval_len", least=1)
    min_length: int = flag(0, "no EOS before so many tokens", least=0)
    platform: str = flag("local", "local or k8s")
    local_rank: int | None = flag(names=("local_rank", "local-rank"), help="set by torch.distributed.launch")
    beam: int = flag(1, "beams of each context", least=1)
    length_penalty: float = flag(1.0, "a finished beam scores total / length**length_penalty")
    no_repeat_ngram_size: int = flag(4, "forbid generating an n-gram twice; 0 allows it", least=0)
    repetition_penalty: float = flag(1.0, "1 is none", positive=math.inf)
    eos_token_id: tuple[int, ...] | None = flag(
        help="one more EOS id beside the model's own; may be repeated", action="append"
    )
    work_dir: str = flag("gpt2_model", "folder of the output")
    output_file: str = flag("beam_prediction.jsonl", "name of the output in --work_dir")
    hyperparam: bool = flag(
        False,
        "--init_checkpoint is a folder, of which the newest model is taken; folders are understood without it, files "
        "are refused with it",
    )
    bf16: bool = flag(False, "weights, cache and products in bfloat16")
    fp16: bool = flag(False, "refused: GPT-2's activations overflow float16; use --bf16")
    resume: bool = flag(False, "continue a search that was killed")
    random_seed: int | None = flag(help="accepted: nothing in a beam search is drawn at random")

    @property
    def output(self) -> str:
        return os.path.join(self.work_dir, self.output_file)

    def settings(self, config: Shape, ends: frozenset[int] = frozenset()) -> SearchSettings:
        """The rules of the search. EOS ids: `ends`, or without them the model's own; and those given."""
        given, vocab_size = self.eos_token_id or (), config.vocab_size
        for token in given:
            if not 0 <= token < vocab_size:
                fail(
                    f"--eos_token_id {token}: outside the model's vocabulary of {vocab_size} tokens; "
                    f"give ids from 0 to {vocab_size - 1}, or leave it out"
                )
        if self.beam > vocab_size:
            fail(f"--beam {self.beam}: more than the vocabulary's {vocab_size} tokens; choose at most that many")
        ends = frozenset(token for token in ends if token < vocab_size)
        eos_ids = sorted({*(ends or config.eos_ids), *given})
        if not eos_ids:
            fail("--eos_token_id: the model's config names no token that ends a text; give one")
        return SearchSettings(
            self.beam,
            self.eval_len,
            tuple(eos_ids),
            self.length_penalty,
            self.no_repeat_ngram_size,
            self.repetition_penalty,
            self.min_length,
        )


def parse_flags() -> tuple[Given, Flags]:
    changes = {"work_dir": spelled(default=os.getenv("PT_OUTPUT_DIR", "gpt2_model"))}
    parser = SettingsParser(
        {"search": Flags}, changes, unit="context", description="beam search with a fine-tuned GPT-2"
    )
    given, flags = parser.parse_settings(sys.argv[1:])
    return given, flags


def check(given: Given, flags: Flags) -> None:
    """Raise UserError for what can be known to be wrong before any file is read."""
    if flags.fp16:
        fail("--fp16: refused, GPT-2's activations overflow float16 and spoil the search; use --bf16")
    given.check_ranges()
    if flags.eval_len >= flags.seq_len:
        fail(f"--eval_len {flags.eval_len}: leaves no room for a context in --seq_len {flags.seq_len}; expected less")
    if not abs(flags.length_penalty) <= 10:
        fail(f"--length_penalty {flags.length_penalty}: expected a number from -10 to 10")
    if flags.hyperparam and not os.path.isdir(flags.init_checkpoint):
        fail(f"--hyperparam: wants a folder as --init_checkpoint, got {flags.init_checkpoint}; leave --hyperparam out")
    if not flags.output_file or os.path.isdir(flags.output):
        fail(f"--output_file {flags.output_file!r}: {flags.output} is a folder, wanted the name of a file")
    folder = os.path.dirname(flags.output)
    if folder != flags.work_dir and folder and not os.path.isdir(folder):
        fail(f"--output_file {flags.output_file}: there is no folder {folder}; make it, or name a file in --work_dir")


def read_contexts(flags: Flags, vocab_size: int) -> tuple[list[list[int]], list[int], int]:
    """(different contexts, cut; for each line the index of its context; number of lines cut)."""
    room = flags.seq_len - flags.eval_len
    index_of: dict[tuple[int, ...], int] = {}
    of_line, cut = [], 0
    for number, line in read_lines(flags.data, "--data"):
        where = f"{flags.data}:{number}"
        try:
            context = json.loads(line)["context"]
        except (ValueError, KeyError, TypeError, RecursionError):
            fail(f'{where}: wanted {{"context": [ids], ...}}, got {line[:60]!r}; make the file with gpt2_encode.py')
        if not isinstance(context, list) or not all(type(token) is int for token in context):
            fail(f"{where}: context is not a list of token ids, got {line[:60]!r}; make the file with gpt2_encode.py")
        if not context:
            fail(f"{where}: the context is empty, wanted one token at least; remove the line or encode with --add_bos")
        if not (0 <= min(context) and max(context) < vocab_size):
            token = next(token for token in context if not 0 <= token < vocab_size)
            fail(
                f"{where}: token id {token} is outside the model's vocabulary of {vocab_size} tokens; "
                "was the file made with another --vocab, or does --vocab_size leave it out?"
            )
        cut += len(context) > room
        of_line.append(index_of.setdefault(tuple(context[-room:]), len(index_of)))
    if not of_line:
        fail(f"--data {flags.data}: is empty, wanted a context a line")
    return [list(context) for context in index_of], of_line, cut


def identity(model: LanguageModel, contexts: list[list[int]], settings: SearchSettings, bf16: bool) -> dict:
    """What tells one search from another: digests of weights and contexts, and the flags that change the result."""
    weights = {name: value.detach() for name, value in model.named_parameters()}
    data = hashlib.sha256(json.dumps(contexts).encode())
    flags = {**vars(settings), "eos_ids": list(settings.eos_ids), "bf16": bf16}
    return {"checkpoint": fingerprint(weights), "data": data.hexdigest(), "flags": flags}


@dataclass(frozen=True)
class Work:
    """What there is to search, and what is found already."""

    settings: SearchSettings
    contexts: list[list[int]]  # the different ones
    of_line: list[int]  # for each line of --data the index of its context
    identity: dict  # the journal's; on rank 0 alone
    done: dict[int, list[int]]  # index -> tokens, from the journals of a resumed search; on rank 0 alone


def prepare(flags: Flags, world: World, journal: Journal) -> tuple[LanguageModel, Work]:
    """Read and check everything that a mistake can spoil, before anything is written; then, on rank 0, take the lock.

    UserError for the mistakes.
    """
    loaded = load(flags)
    config, rows = loaded.model.config, loaded.model.config.vocab_size
    if flags.seq_len > config.n_positions:
        fail(f"--seq_len {flags.seq_len}: {config.limit}; choose at most {config.n_positions}")
    vocab_size, ends = vocabulary(flags, loaded)
    model = without_padding(loaded.model, vocab_size)
    settings = flags.settings(model.config, ends)
    contexts, of_line, cut = read_contexts(flags, model.config.vocab_size)
    if not world.is_main:
        return model, Work(settings, contexts, of_line, {}, {})
    search_identity = identity(model, contexts, settings, flags.bf16)
    done = journal.read(search_identity) if flags.resume else {}
    check_link(flags.work_dir, "--work_dir")
    try:
        os.makedirs(flags.work_dir, exist_ok=True)
    except OSError as error:
        fail(f"--work_dir {flags.work_dir}: cannot be made ({error.strerror}); name another folder")
    if not os.access(os.path.dirname(flags.output) or ".", os.W_OK | os.X_OK):
        fail(f"--work_dir {flags.work_dir}: cannot be written to; name another folder")
    if rows > (kept := model.config.vocab_size):
        print(f"the model's rows {kept} to {rows - 1} are padding beyond --vocab_size {kept}, and are never predicted")
    if cut:
        print(
            f"{cut} of {len(of_line)} contexts are longer than --seq_len - --eval_len = "
            f"{flags.seq_len - flags.eval_len} tokens and are cut on the left"
        )
    if flags.random_seed is not None:
        print("--random_seed: has no effect, nothing in a beam search is drawn at random")
    journal.take_lock()
    if not journal.alone:
        print(
            f"WARNING: the file system of {flags.output} has no locks: a second search with this --output_file would "
            "not be noticed; start none",
            file=sys.stderr,
        )
    return model, Work(settings, contexts, of_line, search_identity, done)


def make_decoder(flags: Flags, world: World, model: LanguageModel, contexts: list[list[int]]) -> TreeDecoder:
    """The decoder of this rank's contexts, with as many slots as --batch_size and --token_budget allow."""
    lora.merge(model)  # before the cast, so that the sum is taken in float32
    model = model.to(world.device, torch.bfloat16 if flags.bf16 else torch.float32)
    widest = max(map(len, contexts), default=1) + flags.beam * flags.eval_len  # tokens that a context may need
    slots = max(1, min(len(contexts), max(flags.batch_size, flags.token_budget // widest)))
    return TreeDecoder(model, slots, flags.beam)


def search(
    world: World, decoder: TreeDecoder, work: Work, share: list[int], journal: Journal, fresh: bool
) -> dict[int, list[int]]:
    """Search the contexts of `share`, writing each result into this rank's journal; index -> tokens."""
    found = {}
    bar = tqdm(
        total=len(share),
        desc="beam search" + (" (rank 0's share)" if world.size > 1 else ""),
        unit=" contexts",
        disable=not world.is_main or not sys.stderr.isatty(),
    )
    contexts = [work.contexts[index] for index in share]
    with journal.open(world.rank, work.identity, fresh) as handle, bar:
        for result in beam_search(contexts, decoder, work.settings, decoder.slots):
            found[share[result.index]] = result.tokens
            journal.add(handle, {"context": share[result.index], "predict": result.tokens})
            bar.update()
    return found


def main() -> None:
    given, flags = parse_flags()
    world = start(flags.platform, flags.local_rank, timeout_seconds=WAIT_SECONDS)
    journal = Journal(flags.output)
    with world.raise_if_any_failed():
        check(given, flags)
        model, work = prepare(flags, world, journal)
    rank_0_identity, done = world.gather((work.identity, work.done))[0]  # rank 0 read the journals for all
    work = replace(work, identity=rank_0_identity, done=done)
    if journal.left_over and not flags.resume:
        print(f"{flags.output}.journal.*: of a search that did not end, dropped (--resume would have continued it)")
        journal.empty()
    world.barrier()

    length = [len(context) for context in work.contexts]
    to_search = sorted((index for index in range(len(length)) if index not in done), key=length.__getitem__)
    share = to_search[world.rank :: world.size]
    begin = time.perf_counter()
    decoder = make_decoder(flags, world, model, [work.contexts[index] for index in share])
    del model  # the decoder has its own copy of most weights
    with world.raise_if_any_failed():
        found = search(world, decoder, work, share, journal, fresh=not flags.resume)
    for part in world.gather(found):
        done.update(part)
    world.close()
    if world.is_main:
        with atomic_write(flags.output) as out:
            for number, index in enumerate(work.of_line):
                out.write(json.dumps({"id": number, "predict": done[index]}) + "\n")
        journal.remove()
        seconds = time.perf_counter() - begin
        print(
            f"{flags.output}: {len(work.of_line)} lines, {len(work.contexts)} different contexts, {len(to_search)} "
            f"searched in {seconds:.1f} s ({len(to_search) / seconds:.1f} contexts/s)"
        )


if __name__ == "__main__":
    run_main(main)
