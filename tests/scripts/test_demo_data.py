"""The demonstration's text and vocabulary: reproducible, of E2E's form, nothing private in the public domain."""

import collections
import hashlib
import json
import re

import pytest
import transformers

from corpus.tokenizer import load_tokenizer
from helpers.processes import ROOT, assert_user_error, run_script

DEMO = ROOT / "data/demo"
PUBLIC_TRAIN_SHA256 = "62e9629f1312253732ddd948ba475e77e28a764946a17852a74ce8c173e4441b"
FIELDS = ["name", "Type", "food", "price", "customer rating", "area", "family friendly", "near"]
OPEN_FIELDS = (
    "name", "Type", "near", "area", "from", "to", "film", "hall", "played by", "shows", "sells", "known for", "music",
    "language", "rooms", "night", "ticket", "fare", "seat", "acres", "books", "screens", "platform", "opens", "closes",
    "starts", "leaves", "loan", "day",
)
# Everyday words of eating and drinking, the private kinds' own names among them: none is in the public text.
PRIVATE_WORDS = """restaurant pub diner inn tavern bar cafe coffee tea food meal eat eats dish dishes dine dining drink
    drinks cuisine menu kitchen chef cook breakfast lunch dinner supper beer wine bread bistro""".split()


def make_data(*arguments):
    return run_script("scripts/start.py", "make_demo_data", *arguments)


def make_vocab(*arguments):
    return run_script("scripts/start.py", "make_demo_vocab", *arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Both domains, generated again by the scripts' defaults."""
    folder = tmp_path_factory.mktemp("demo")
    for domain in ("restaurants", "public"):
        process = make_data("--domain", domain, "--out", folder)
        assert process.returncode == 0, process.stderr
    return folder


def lines_of(*paths) -> list[tuple[str, str]]:
    """(context, text) of every line."""
    return [tuple(line.split("||")) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def meaning_of(context: str) -> dict[str, str]:
    return dict(item.split(" : ", 1) for item in context.split(" | "))


@pytest.fixture(scope="module")
def private():
    return lines_of(*(DEMO / f"{part}.txt" for part in ("train", "valid", "test")))


@pytest.fixture(scope="module")
def public(made):
    return lines_of(made / "public_train.txt", made / "public_valid.txt")


# ---------------------------------------------------------- reproducible


def test_the_text_that_the_repository_carries_is_what_the_script_makes(made):
    for name in ("train", "valid", "test", "public_valid"):
        assert (made / f"{name}.txt").read_bytes() == (DEMO / f"{name}.txt").read_bytes(), name
    # Too large to carry (5 MB), so only its digest is kept.
    assert hashlib.sha256((made / "public_train.txt").read_bytes()).hexdigest() == PUBLIC_TRAIN_SHA256


def test_the_vocabulary_is_made_of_the_public_text_alone(made, tmp_path):
    """Made again where there is no private text at all, the two files are the same bytes."""
    assert make_vocab("--train", made / "public_train.txt", "--out", tmp_path).returncode == 0
    for name in ("encoder.json", "vocab.bpe"):
        assert (tmp_path / name).read_bytes() == (ROOT / "vocab/demo" / name).read_bytes(), name


def test_the_vocabulary_has_gpt2_s_form():
    vocab = json.loads((ROOT / "vocab/demo/encoder.json").read_text())
    merges = (ROOT / "vocab/demo/vocab.bpe").read_text(encoding="utf-8").split("\n")
    assert merges[0].startswith("#version") and merges[-1] == ""
    assert list(vocab.values()) == list(range(1500))
    assert list(vocab)[-1] == "<|endoftext|>" and all(len(symbol) == 1 for symbol in list(vocab)[:256])
    # The ids after the bytes are the merges in their order, as in GPT-2.
    assert list(vocab)[256:-1] == [line.replace(" ", "") for line in merges[1:-1]]


def test_the_llama_s_tokenizer_is_the_same_vocabulary(tmp_path, private):
    """Written again, the same bytes; the same ids, so the same token files serve both models."""
    assert make_vocab("--vocab", ROOT / "vocab/demo", "--out", tmp_path).returncode == 0
    whole = ROOT / "pretrained_checkpoints/demo-llama/tokenizer.json"
    assert (tmp_path / "tokenizer.json").read_bytes() == whole.read_bytes()
    pair, ours = (load_tokenizer(str(folder)) for folder in (ROOT / "vocab/demo", whole.parent))
    theirs = transformers.AutoTokenizer.from_pretrained(whole.parent)
    texts = [text for line in private[:300] for text in line] + ["caf\u00e9 \U0001f642 it's", "  two\n\n"]
    assert ours.encode_batch(texts) == pair.encode_batch(texts) == theirs(texts).input_ids
    assert ours.end_of_text == pair.end_of_text == theirs.eos_token_id == 1499


@pytest.mark.parametrize("domain, part", [("restaurants", "train"), ("public", "public_valid")])
def test_another_seed_gives_another_text(made, tmp_path, domain, part):
    assert make_data("--domain", domain, "--seed", 2, "--out", tmp_path).returncode == 0
    first, second = lines_of(made / f"{part}.txt"), lines_of(tmp_path / f"{part}.txt")
    assert len(first) == len(second)
    assert len({context for context, _ in first} & {context for context, _ in second}) < len(first) / 50


# --------------------------------------------------------- of E2E's form


def test_the_private_corpus_has_the_shape_that_was_asked_for():
    seen: set[str] = set()
    for part, lines, contexts, fewest, most in (
        ("train", 6000, (900, 1300), 3, 8), ("valid", 600, (80, 130), 4, 8), ("test", 400, (50, 70), 5, 8)
    ):
        examples = lines_of(DEMO / f"{part}.txt")
        texts = collections.defaultdict(list)
        for context, text in examples:
            texts[context].append(text)
        counts = sorted(len(same) for same in texts.values())
        assert len(examples) == lines and contexts[0] <= len(texts) <= contexts[1]
        assert counts[1] >= fewest and counts[-1] <= most  # the last meaning of a part may be cut short
        assert all(len(set(same)) == len(same) for same in texts.values())
        assert not seen & texts.keys(), "a meaning is in two parts"
        seen |= texts.keys()
        for context in texts:
            fields = list(meaning_of(context))
            assert fields[:2] == ["name", "Type"] and 4 <= len(fields) <= 5
            assert fields == [field for field in FIELDS if field in fields]
    assert sum((DEMO / f"{part}.txt").stat().st_size for part in ("train", "valid", "test")) < 1_500_000


def test_a_text_is_well_formed(private, public):
    for _, text in private + public:
        assert text[0].isupper() and text.endswith(" .") and "  " not in text
        assert not re.search(r"[<>@|]|\(n\)|[^ ][.,]( |$)|\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]|, \.", text), text
        assert 1 <= text.count(" .") <= 3


def said(field: str, value: str, text: str) -> bool:
    """The value is told in the text, in its own words or in those that stand for it."""
    words = {
        "price": {"cheap": ("cheap", "low priced"), "moderate": ("moderate",), "high": ("high price", "expensive")},
        "customer rating": {"low": ("low rated", "poorly rated", "low customer", "rated low"), "average": ("average",),
                            "high": ("highly rated", "high customer")},
        "family friendly": {"yes": ("family friendly", "child friendly", "welcomes families"),
                            "no": ("not family friendly", "not child friendly")},
    }
    return any(word in text for word in words.get(field, {}).get(value, (value,)))


def test_a_text_says_every_field(private):
    for context, text in private:
        meaning = meaning_of(context)
        for field, value in meaning.items():
            assert said(field, value, text), (field, value, text)
        for field in ("food", "family friendly", "customer rating"):  # and none that was not asked for
            word = {"food": " food", "family friendly": " friendly", "customer rating": " rat"}[field]
            assert field in meaning or word not in text, text


def test_a_public_text_says_every_open_value(public):
    """Open values must be copied to the letter; closed ones such as yes and no have words of their own."""
    for context, text in public:
        for field, value in meaning_of(context).items():
            if field in OPEN_FIELDS:
                assert value.lower() in text.lower(), (field, value, text)


def test_examples_are_short(private, public):
    """A minute of training on two cores: fewer than 60 tokens an example on average, with both special tokens."""
    tokenizer = load_tokenizer(str(ROOT / "vocab/demo"))
    for examples, least in ((private, 40), (public, 40)):
        contexts = tokenizer.encode_batch([context for context, _ in examples])
        texts = tokenizer.encode_batch([f" {text}" for _, text in examples])
        lengths = [len(context) + len(text) + 2 for context, text in zip(contexts, texts)]
        assert least < sum(lengths) / len(lengths) < 60 and max(lengths) <= 128


# ----------------------------------------- nothing private in the public


def names_of(examples) -> set[str]:
    """Every value that is a name, without its article."""
    fields = ("name", "near", "film", "played by", "from", "to", "hall")
    values = (meaning_of(context).get(field, "") for context, _ in examples for field in fields)
    return {value.removeprefix("The ") for value in values} - {""}


def grams(texts, size: int) -> set[tuple[str, ...]]:
    found = set()
    for text in texts:
        words = text.lower().split()
        found.update(zip(*(words[start:] for start in range(size))))
    return found


def test_the_domains_share_no_name_no_text_and_no_phrase(private, public):
    """No phrase: no run of six words at all, and none of five within a sentence (names and values included)."""
    assert not names_of(private) & names_of(public)
    private_texts, public_texts = {text for _, text in private}, {text for _, text in public}
    assert not private_texts & public_texts
    assert not {context for context, _ in private} & {context for context, _ in public}
    assert not grams(private_texts, 6) & grams(public_texts, 6)
    sentences = [[part for text in texts for part in text.split(" .")] for texts in (private_texts, public_texts)]
    assert not grams(sentences[0], 5) & grams(sentences[1], 5)
    # The test can fail: the private parts share plenty among themselves.
    assert grams([text for _, text in private[:6000]], 6) & grams([text for _, text in private[6000:]], 6)


def test_the_public_text_never_speaks_of_restaurants(private, public):
    def words(examples):
        return {word for line in examples for part in line for word in re.findall(r"\w+", part.lower())}

    assert not words(public) & set(PRIVATE_WORDS)
    assert words(private) & set(PRIVATE_WORDS) >= {"restaurant", "pub", "food"}
    name_words = {word.lower() for name in names_of(private) for word in name.split()}
    assert words(public) & name_words <= {"old"}  # "old ships", in no public name


# ------------------------------------------------------------- bad input


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "text.txt").write_text("name : A||It is A .\n" * 3)
    (tmp_path / "bad.txt").write_text("name : A||It is A .\nno bars\n")
    (tmp_path / "empty.txt").write_text("")
    out = ["--out", tmp_path / "vocab"]
    assert_user_error(make_data("--domain", "public", "--out", tmp_path / "none"), "--out", "no such folder")
    assert_user_error(make_vocab("--train", tmp_path / "text.txt", *out), "--out", "no such folder")
    (tmp_path / "vocab").mkdir()
    assert_user_error(make_vocab("--train", tmp_path / "none.txt", *out), "--train", "No such file")
    assert_user_error(make_vocab("--train", tmp_path / "bad.txt", *out), "bad.txt:2", "wanted context||completion")
    assert_user_error(make_vocab("--train", tmp_path / "empty.txt", *out), "--train", "is empty")
    assert_user_error(make_vocab("--train", tmp_path / "text.txt", *out, "--size", 257), "--size 257", "more than 257")
    assert_user_error(make_vocab("--train", tmp_path / "text.txt", *out, "--size", 5000), "--size 5000", "only gives")
    assert_user_error(make_vocab("--vocab", tmp_path, *out), "--vocab", "encoder.json does not exist")
    whole = ROOT / "pretrained_checkpoints/demo-llama"
    assert_user_error(make_vocab("--vocab", ROOT / "vocab/demo"), "--out vocab/demo: is the folder of --vocab")
    assert_user_error(make_vocab("--vocab", whole, *out), "--vocab", "holds a tokenizer.json already")
    assert_user_error(make_vocab("--vocab", whole, "--train", tmp_path / "text.txt"), "--train", "not allowed")
    assert list((tmp_path / "vocab").iterdir()) == []
