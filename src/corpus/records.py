"""A line of a corpus: its text, or its prompt and completion, and the unit that it belongs to; and the line in tokens.

Two forms, of which a file has one:
  {"author": "...", "content": "..."}       a text; every token but the first is scored
  {"prompt": "...", "completion": "..."}    the completion alone is scored
The unit is the value of a field (author, patient, conversation); unit_name() says which values are one. A prompt and
its completion need no such field: without one the unit is the line.

Fields that are named as public context (stars, category) become a line in front of either form, prefix_of(), which is
not scored; a text then is a completion of it.

Prompt and completion are joined as they stand: no space or line break comes between. They are tokenised apart, so no
token spans both. The line's tokens are: what transformers puts in front of a text (bos for Llama, nothing for GPT-2),
the prompt, the completion as a text that goes on, and the end of text. An empty prompt is allowed. The completion then
is a text of its own, and where nothing is in front, bos is put there (GPT-2: <|endoftext|>), which predicts its first
token.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from base.errors import fail
from base.files import decode_line, is_text
from corpus.tokenizer import Tokenizer

PSEUDO_AUTHORS = ("[deleted]", "AutoModerator")
PAIR = ("prompt", "completion")
CACHED_WORDS = 1 << 18  # these cover 98 % of the words of an English corpus, in about 70 MB a process
# Splits a text without changing a token: a space behind something that is no space always begins a new piece of GPT-2's
# pre-tokenisation, so the tokens of a text are those of its words, one after the other.
WORDS = re.compile(r"(?<=\S)(?= )")
# Characters that show nothing, beside white space and those of the categories Cc and Cf: Unicode's
# Default_Ignorable_Code_Point, and the blank Braille pattern.
BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff]"
)


@dataclass(frozen=True)
class Source:
    """What a cache is made of.

    unit_field: the field that names the unit, whatever the form; None: author_field, or the line of a pair
    pairs: the lines hold prompts and completions (with_form() finds out)
    prompt_fields: the fields that are public context
    """

    path: str
    flag: str
    vocab: str  # folder of the vocabulary
    length: int  # longer texts are cut to so many tokens
    author_field: str = "author"
    content_field: str = "content"
    unit_field: str | None = None
    pairs: bool = False
    prompt_fields: tuple[str, ...] = ()

    @property
    def owner_field(self) -> str | None:
        """The field whose value is the unit; None where the unit is the line."""
        return self.unit_field or (None if self.pairs else self.author_field)

    @property
    def unit(self) -> str:
        """The word for a unit, in reports."""
        return self.unit_field or ("line" if self.pairs else "author")

    @property
    def texts(self) -> tuple[str, ...]:
        """The fields of the text."""
        return PAIR if self.pairs else (self.content_field,)


@dataclass(frozen=True)
class Record:
    """A line that was read.

    unit: unit_name() of its field's value; None where that is empty
    texts: the values of Source.texts
    respelled: whether `unit` is another spelling than the field's
    fields: the values of Source.prompt_fields
    """

    unit: str | None
    texts: tuple[str, ...]
    respelled: bool = False
    fields: tuple[str, ...] = ()


def with_form(source: Source) -> Source:
    """The source with the form of its first line."""
    with open(source.path, "rb") as handle:
        first = handle.readline()
    try:
        record = json.loads(decode_line(first, source.path, 1))
    except (ValueError, RecursionError):
        record = None  # read_record() says what is wrong with it
    return replace(source, pairs=isinstance(record, dict) and is_pair(record, source.content_field))


def is_pair(record: dict, content_field: str) -> bool:
    """Whether a line is of prompt and completion: it has one of them, and no content."""
    return content_field not in record and not record.keys().isdisjoint(PAIR)


def read_record(line: str, source: Source, where: str) -> Record:
    """The record of one line. UserError where it is none, or not of the file's form. where: "file:line"."""
    fields = (*([source.owner_field] if source.owner_field else []), *source.texts)
    wanted = "wanted {" + ", ".join(f'"{name}": "..."' for name in fields) + "}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        fail(f"{where}: not a line of JSON, {wanted}")
    if not isinstance(record, dict):
        fail(f"{where}: not a JSON object, {wanted}")
    other_form = source.content_field in record if source.pairs else is_pair(record, source.content_field)
    if other_form:
        there = [name for name in (source.content_field, *PAIR) if name in record]
        fail(
            f"{where}: holds {' and '.join(map(repr, there))}, the first line {' and '.join(map(repr, source.texts))}; "
            "a file has one form: split it"
        )
    for name in fields:
        if name not in record:
            if name in PAIR:
                flags = "an empty prompt is written out"
            elif name == source.unit_field:
                flags = f"--unit_field {name} names the field of the unit, which every line has"
            else:
                flags = "--author_field and --content_field name the fields, and --unit_field another unit's"
            fail(f"{where}: has no {name!r}, {wanted}; {flags}")
    for name in fields:
        value = record[name]
        if name == source.owner_field and value is None:
            continue
        if name == source.unit_field and type(value) is int:
            continue
        if not isinstance(value, str):
            kind = "a string or a whole number" if name == source.unit_field else "a string"
            fail(f"{where}: {name!r} is {json.dumps(value)[:60]}, wanted {kind}")
        if not is_text(value):
            fail(f"{where}: {name!r} holds half of a surrogate pair, which is not text; correct or remove the line")
    fields = field_values(record, source.prompt_fields, where)
    texts = tuple(record[name] for name in source.texts)
    if not texts[-1].strip():
        fail(f"{where}: {source.texts[-1]!r} is empty; remove the line")
    if source.owner_field is None:  # lines that are alike are units of their own with one name
        return Record(hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32], texts, fields=fields)
    written = record[source.owner_field]
    written = None if written is None else str(written)
    name = unit_name(written)
    return Record(name, texts, name != written, fields)


def field_values(record: dict, names: Sequence[str], where: str) -> tuple[str, ...]:
    """The values of public fields, as prefix_of() writes them. UserError for a value that is no word of one line."""
    found = []
    for name in names:
        value = record.get(name)
        text = " ".join(str(value).split()) if isinstance(value, str) or type(value) is int else ""
        if not text or "|" in text or not is_text(text):
            fail(
                f"{where}: the field {name!r} of --prompt_fields is {json.dumps(value)[:60]}, wanted a text without "
                "'|', or a whole number; correct or remove the line"
            )
        found.append(text)
    return tuple(found)


def prefix_of(names: Sequence[str], values: Sequence[str]) -> str:
    """The public context of a text, for training and for sampling: "stars: 5 | category: books" and a line feed; ""
    without fields."""
    return " | ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True)) + "\n" if names else ""


def split_fields(given: str | None, taken: Sequence[str | None] = ()) -> tuple[str, ...]:
    """The names in --prompt_fields. taken: fields that are the text or the unit. UserError for what names no field."""
    names = tuple(name.strip() for name in given.split(",")) if given is not None else ()
    for name in names:
        if not name or not name.isprintable() or "|" in name or ":" in name or names.count(name) > 1:
            fail(f"--prompt_fields {given}: expected different names of fields, as in stars,category")
        if name in taken:
            fail(f"--prompt_fields {given}: {name} is the text or the unit itself, which is not public; leave it out")
    return names


def unit_name(written: str | None) -> str | None:
    """The name under which a unit counts; None for none. One person must not be two units, so names that no reader can
    tell apart are one: in either Unicode form (NFC, NFD), with other white space, or with characters that show
    nothing."""
    if written is None or (written.isascii() and written.isprintable() and " " not in written):
        return written or None
    shown = "".join(
        letter
        for letter in written
        if letter.isspace() or not (unicodedata.category(letter) in ("Cc", "Cf") or BLANK.match(letter))
    )
    return " ".join(unicodedata.normalize("NFC", shown).split()) or None


# ------------------------------------------------------------------ in tokens


class WordTokens(dict):
    """word -> its ids, encoded when first met, where a tokenizer's texts are cut at spaces.

    A dictionary answers faster than a tokenizer. The first L tokens of a text lie in its first L words, so the rest is
    never encoded. On texts of 1,400 characters cut to 128 tokens this takes 0.07 ms a text, the tokenizer alone 0.70 ms
    (one core).
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer.encode(word))
        if len(self) < CACHED_WORDS:
            self[word] = ids
        return ids

    def first(self, text: str, length: int, after: bool = False) -> tuple[list[int], bool]:
        """(the first `length` ids of `text`, whether there were more). after: as in Tokenizer.encode()."""
        if not self.tokenizer.cut_at_spaces:
            ids = self.tokenizer.encode(text, after)
            return ids[:length], len(ids) > length
        words = WORDS.split(text, maxsplit=length)
        ids = list(chain.from_iterable(map(self.__getitem__, words[:length])))
        return ids[:length], len(words) > length or len(ids) > length


def text_ids(text: str, length: int, words: WordTokens) -> tuple[list[int], int, bool]:
    """(ids of a text, at most `length`; the first scored one; whether it was cut)."""
    tokenizer = words.tokenizer
    ids, cut = words.first(text, length)
    if tokenizer.prefix or tokenizer.suffix:
        ids = [*tokenizer.prefix, *ids, *([] if cut else tokenizer.suffix)]
        ids, cut = ids[:length], cut or len(ids) > length
    return ids, 1, cut


def pair_ids(prompt: str, completion: str, length: int, words: WordTokens) -> tuple[list[int], int, bool]:
    """(ids of a prompt and its completion, at most `length`; the first scored one, which is `length` where the prompt
    leaves no room; whether anything was cut)."""
    tokenizer = words.tokenizer
    end = tokenizer.end_of_text
    assert end is not None  # check_tokenizer()
    before = [*tokenizer.prefix, *(words.first(prompt, length)[0] if prompt else [])]
    if not before:
        before = [end if tokenizer.begin_of_text is None else tokenizer.begin_of_text]
    if len(before) >= length:
        return before[:length], length, True
    room = length - len(before)
    behind, cut = words.first(completion, room, after=bool(prompt))
    if not cut:
        behind.append(end)
    return [*before, *behind[:room]], len(before), cut or len(behind) > room


def check_tokenizer(tokenizer: Tokenizer, source: Source) -> None:
    """UserError where a completion could not be ended."""
    if (source.pairs or source.prompt_fields) and tokenizer.end_of_text is None:
        fail(
            f"--vocab {source.vocab}: names no eos token, by which a model would learn where a completion ends; add "
            "eos_token to its tokenizer_config.json"
        )
