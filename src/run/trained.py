"""The trained model that a script uses: its flags, its weights and the ids of its vocabulary."""

import math
from dataclasses import dataclass

from base.errors import fail
from base.flags import REQUIRED, flag
from corpus.tokenizer import check_vocabulary_fits, foreign_vocabulary, load_tokenizer
from families import PARTS
from language_model import EVERY_PART, LanguageModel
from weights.checkpoint import Loaded, load_trained


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A checkpoint, and what it may leave unsaid."""

    model_card: str | None = flag(
        help="gpt2.sm, gpt2.md, gpt2.lg, gpt2.xl, or a folder or file with config.json; default: the checkpoint's shape"
    )
    init_checkpoint: str = flag(
        REQUIRED,
        "weight file (of an average: average.{step}.pt), or a folder: its newest model.{step}.pt, PEFT's or Hugging "
        "Face's file",
    )
    base_checkpoint: str | None = flag(help="the frozen weights under an adapter-only checkpoint, if not where it says")
    lora_dim: int | None = flag(help="adapter's rank; default: the checkpoint's, with which it must agree", least=0)
    lora_alpha: float | None = flag(
        help="adapter's alpha; default: the checkpoint's, with which it must agree", positive=math.inf
    )
    lora_target: tuple[str, ...] | None = flag(
        help="parts of a block that have an adapter; default: the checkpoint's, with which it must agree, or query "
        "value where it does not say",
        nargs="+",
        choices=(*PARTS, EVERY_PART),
    )
    vocab: str | None = flag(
        help="folder of the tokenizer: says --vocab_size, and which ids end a text (default: a tokenizer.json beside "
        "the weights or the frozen ones, unless GPT-2's)"
    )
    vocab_size: int | None = flag(
        help="ids of the vocabulary, where the model has more rows than that: the others are padding, and are never "
        "predicted (default: all of a model's, of a GPT-2's at most 50257)",
        least=1,
    )


def load(flags: TrainedModel) -> Loaded:
    """The model, on the CPU in float32. UserError where it is not as the flags say."""
    adapter = (flags.lora_dim, flags.lora_alpha, flags.lora_target)
    return load_trained(flags.init_checkpoint, flags.model_card, flags.base_checkpoint, *adapter)


def vocabulary(flags: TrainedModel, loaded: Loaded) -> tuple[int | None, frozenset[int]]:
    """(--vocab_size, or the size of the tokenizer in --vocab, beside the weights or the frozen ones; the ids that end a
    text there); (None, none) where no flag and no file says them."""
    places = (flags.init_checkpoint, flags.base_checkpoint, loaded.base_path)
    folder = flags.vocab or foreign_vocabulary(*places)
    if folder is None:
        return flags.vocab_size, frozenset()
    tokenizer, model = load_tokenizer(folder), f"--init_checkpoint {flags.init_checkpoint}"
    check_vocabulary_fits(folder, tokenizer.vocab_size, loaded.model.config.vocab_size, model, *places)
    return flags.vocab_size or tokenizer.vocab_size, tokenizer.ends


def without_padding(model: LanguageModel, vocab_size: int | None) -> LanguageModel:
    """The model with the rows of its vocabulary alone. Many are padded to a multiple of 64 or 128 for speed: such a row
    is no token, but has a probability. vocab_size None: as far as the shape tells."""
    rows = model.config.vocab_size
    kept = model.config.known_tokens if vocab_size is None else vocab_size
    if kept > rows:
        fail(f"--vocab_size {kept}: the model has {rows} ids; give at most that many, or leave it out")
    if kept < rows:
        model.keep_vocabulary(kept)
    return model
