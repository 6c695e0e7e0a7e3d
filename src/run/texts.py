"""The texts that fine-tune-dp.py trains on: their flags, the corpus, who is held out, and what is said of them.

The unit is an author, what another field names, or a line (corpus/records.py).
"""

import os
from dataclasses import dataclass

import numpy as np

from base.distributed import World
from base.errors import fail
from base.flags import flag
from corpus.author_cache import describe_left_out, open_cache, prepare_cache
from corpus.authors import AuthorTexts, Corpus, split_authors
from corpus.examples import count_shared
from corpus.records import PAIR, Source, split_fields
from corpus.tokenizer import CHAT_TEMPLATE_HELP, VOCAB_HELP, check_vocabulary_fits, digest_vocab, own_vocabulary
from families import DEFAULT, name_of
from run import setup
from run.loop import Trainer
from run.settings import Settings
from weights.checkpoint import Loaded

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PUBLIC_CONTEXT = (
    "public context: the fields {fields} stand before each text and are not scored; a mix of them that is counted from "
    "these data is not covered by epsilon (generate.py --label_counts private draws one that is)"
)
QUANTILES = {"min": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "90 %": 0.9, "99 %": 0.99, "max": 1.0}


@dataclass(frozen=True, kw_only=True)
class AuthorData:
    """Texts with authors, or prompts with completions, and which of them are held out."""

    train_file: str = flag(
        os.path.join(ROOT, "data", "reddit", "train.jsonl"),
        "JSON lines with an author and a content, or with a prompt and a completion, which alone is scored (default "
        "data/reddit/train.jsonl of the repository)",
        may_change=True,
    )
    eval_file: str | None = flag(
        help="held-out texts in the same form, not protected at all; without it, authors of --train_file are held out",
        may_change=True,
    )
    eval_fraction: float | None = flag(
        help="chance of an author to be held out, without --eval_file (default 0.02)", within=(0, 1)
    )
    unit_field: str | None = flag(
        help="name of the field whose value is the unit of privacy, such as patient or conversation (default: the "
        "author; of prompts and completions, the line)"
    )
    author_field: str = flag("author", "name of the author's field")
    content_field: str = flag("content", "name of the text's field")
    prompt_fields: str | None = flag(
        help="fields that are public context, as in stars,category: they become a line in front of each text, which is "
        "not scored, and by which generate.py chooses what to write",
        metavar="NAMES",
    )
    vocab: str | None = flag(help=f"{VOCAB_HELP} (default: the model's folder, or the repository's)", may_change=True)
    chat_template: str | None = flag(help=CHAT_TEMPLATE_HELP, may_change=True, nargs="?", const="")
    cache_dir: str | None = flag(
        help="where the tokenised texts are kept (default: .author_cache beside the file)", may_change=True
    )
    seq_len: int = flag(
        128, "longest text in tokens; longer ones are cut (default 128)", names=("sequence_len",), least=2
    )
    samples_per_author: int = flag(
        1,
        "texts that a drawn author, or other unit, contributes, drawn afresh in each step (default 1)",
        names=("samples_per_author", "samples_per_unit"),
        least=1,
        metavar="K",
    )

    @property
    def public_fields(self) -> tuple[str, ...]:
        unit = self.unit_field or self.author_field
        return split_fields(self.prompt_fields, (unit, self.content_field, *PAIR))


def check(settings: Settings) -> None:
    """Raise UserError for mistakes that show before any file is read."""
    data = settings.data
    if data.eval_file is not None and data.eval_fraction is not None:
        fail("--eval_fraction: means nothing with --eval_file, which holds all held-out texts")
    if data.chat_template is not None:
        fail(f"--chat_template: {CHAT_TEMPLATE_HELP}")
    _ = data.public_fields  # a UserError for names that are none
    if data.unit_field is not None:
        if "author_field" in settings.given.explicit:
            fail(f"--author_field {data.author_field}: means nothing with --unit_field {data.unit_field}; give one")
        if not data.unit_field.strip() or not data.unit_field.isprintable():
            fail(f"--unit_field {data.unit_field!r}: expected the name of a field, such as author or conversation")
        if data.unit_field in (data.content_field, *PAIR):
            fail(f"--unit_field {data.unit_field}: is the text itself; name the field that says whose text it is")


@dataclass(frozen=True)
class Texts:
    """What a run trains on. held_out: what the report says of the texts that are held out."""

    corpus: Corpus
    train: AuthorTexts
    valid: AuthorTexts | None
    held_out: dict
    digests: dict
    padding: str  # what check_vocabulary_fits() says of the model's rows; "" for nothing

    @property
    def unit(self) -> str:
        return self.corpus.facts["unit"]


def plural(unit: str) -> str:
    """The key of reports that counts units: authors, or units where these are of another kind."""
    return "authors" if unit == "author" else "units"


def open_corpus(path: str, flag: str, vocab: str, settings: Settings, world: World) -> Corpus:
    """The tokenised texts of a file. Collective: where there is no cache, one process of each machine makes it."""
    data = settings.data
    fields = (data.author_field, data.content_field, data.unit_field)
    source = Source(path, flag, vocab, data.seq_len, *fields, prompt_fields=data.public_fields)
    folder = None
    with world.raise_if_any_failed():
        if world.local_rank == 0:
            folder = prepare_cache(source, data.cache_dir)
    folders = [folder for folder in world.gather(folder) if folder]
    if len({os.path.basename(folder) for folder in folders}) > 1:
        fail(f"{flag} {path}: the machines of this job hold different files, or different vocabularies in {vocab}")
    with world.raise_if_any_failed():
        opened = open_cache(folder or folders[0])
        if opened.facts["pairs"]:
            if "author_field" in settings.given.explicit:
                fail(
                    f"--author_field {data.author_field}: {flag} {path} holds prompts and completions, whose unit is "
                    "the line; --unit_field names the field of another unit"
                )
            if opened.facts["unit"] == "line" and data.samples_per_author > 1:
                fail(
                    f"--samples_per_author {data.samples_per_author}: the unit of {flag} {path} is a line, which has "
                    "one text; --unit_field names the field of a unit with several"
                )
    return opened


def open_texts(settings: Settings, loaded: Loaded, place: str, world: World) -> Texts:
    """The texts of a run on a model that was loaded from `place`. Collective."""
    data, config = settings.data, loaded.model.config
    model = f"{settings.flag_of('init_checkpoint')} {settings.model.init_checkpoint}"
    places = (place, settings.model.base_checkpoint, loaded.base_path)
    vocab = data.vocab or own_vocabulary(*places)
    with world.raise_if_any_failed():
        if vocab is None and name_of(config) != DEFAULT:
            fail(f"--vocab: {model} holds no tokenizer.json, and GPT-2's vocabulary is not its own; give the model's")
    vocab = vocab or os.path.join(ROOT, "vocab")
    corpus = open_corpus(data.train_file, "--train_file", vocab, settings, world)
    evaluation = None if data.eval_file is None else open_corpus(data.eval_file, "--eval_file", vocab, settings, world)
    with world.raise_if_any_failed():
        padding = check_vocabulary_fits(vocab, corpus.facts["vocab_size"], config.vocab_size, model, *places)
        train, valid, held_out = split(settings, corpus, evaluation)
        digests = {
            "train_sha256": corpus.facts["sha256"],
            "vocab_sha256": digest_vocab(vocab),
            "eval_sha256": None if evaluation is None else evaluation.facts["sha256"],
            "vocab": vocab,  # also where no flag named it
        }
    return Texts(corpus, train, valid, held_out, digests, padding)


def split(
    settings: Settings, corpus: Corpus, evaluation: Corpus | None
) -> tuple[AuthorTexts, AuthorTexts | None, dict]:
    """(training units, held-out texts or None, what the report says of the split)."""
    data, seed, A, unit = settings.data, settings.loop.random_seed, len(corpus.keys), corpus.facts["unit"]
    if A < 2:
        one = "by one author; author-level privacy needs many" if unit == "author" else f"of one {unit}; give many"
        fail(f"--train_file {data.train_file}: all {corpus.texts} texts are {one}")
    if evaluation is not None:
        setup.check_validation("--eval_file", data.eval_file, evaluation.facts["sha256"], corpus.facts["sha256"])
        if evaluation.facts["pairs"] != corpus.facts["pairs"]:
            forms = ["prompts and completions" if one.facts["pairs"] else "texts" for one in (evaluation, corpus)]
            fail(f"--eval_file {data.eval_file}: holds {forms[0]}, --train_file {forms[1]}; give both in one form")
        training, held_out_authors = np.arange(A), len(evaluation.keys)
        held_out = evaluation.by_text(np.arange(held_out_authors))
        facts = {"by": "file", "file_sha256": evaluation.facts["sha256"]}
    else:
        fraction = 0.02 if data.eval_fraction is None else data.eval_fraction
        training, rest = split_authors(corpus.keys, fraction, seed)
        if len(training) < 2:
            fail(f"--eval_fraction {fraction:g}: leaves {len(training)} of {A} {unit}s to train on; give a smaller one")
        held_out, held_out_authors = corpus.by_text(rest) if len(rest) else None, len(rest)
        facts = {"by": unit, "fraction": fraction, "seed": seed}
    train = corpus.by_author(training, data.samples_per_author, seed)
    texts = 0 if held_out is None else len(held_out)
    return train, held_out, {**facts, plural(unit): held_out_authors, "texts": texts}


def describe(settings: Settings, trainer: Trainer, texts: Texts) -> None:
    """Say what is trained on what."""
    say, data, corpus, held_out, unit = trainer.display.say, settings.data, texts.corpus, texts.held_out, texts.unit
    facts = corpus.facts
    say(
        f"{data.train_file}: {facts['records']} records; {describe_left_out(facts, unit, facts['pairs'])}; "
        f"{corpus.texts} texts {'by' if unit == 'author' else 'of'} {len(corpus.keys)} {unit}s; {facts['cut']} cut to "
        f"{data.seq_len} tokens"
    )
    if unit == "line":
        say(
            "the unit is one line of the file: epsilon is about one line, not about a person who wrote several; "
            "--unit_field names a field that says whose line it is",
            important=True,
        )
    elif unit != "author":
        say(f"the unit is one {unit} with all lines that name it in the field {unit!r}", important=True)
    say(
        f"held out: {held_out['texts']} texts of {held_out[plural(unit)]} {unit}s, by {held_out['by']}"
        + (f", seed {held_out['seed']}" if held_out["by"] == unit else "")
    )
    if trainer.world.is_main and texts.valid is not None:
        if unit != "line":
            units = np.unique(texts.valid.keys)
            setup.warn_of_shared(trainer, f"{unit}s", np.isin(units, texts.train.keys).sum(), len(units))
        setup.warn_of_shared(trainer, "texts", count_shared(texts.valid, texts.train), len(texts.valid))
    if data.public_fields:
        say(PUBLIC_CONTEXT.format(fields=", ".join(data.public_fields)), important=True)
    if texts.padding:
        say(texts.padding, important=True)


def contributions(texts: Texts, trainer: Trainer, resumed: bool, world: World) -> dict:
    """How many texts the units contributed, for privacy.json. Collective.

    The list of used texts shows who took part in a step. Amplification by sampling requires that to be secret, so the
    list is kept in memory only. A resumed run lacks it for the steps before, and reports the expected number alone.
    """
    train, unit = texts.train, plural(texts.unit).removesuffix("s")
    used = sum(world.gather(int(train.used.sum())))
    settings = trainer.plan.settings
    expected = train.never_used(settings.q, trainer.done, settings.sampling == "poisson")
    return {
        "texts": len(train.starts),
        f"samples_per_{unit}": train.samples,
        f"texts_per_{unit}": {name: float(np.quantile(train.sizes, share)) for name, share in QUANTILES.items()},
        "texts_never_used": None if resumed else len(train.starts) - used,
        "texts_never_used_expected": round(expected, 1),
    }
