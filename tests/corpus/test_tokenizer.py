"""The tokenizer against a plain loop over the published algorithm, with GPT-2's vocabulary and the demonstration's."""

import itertools
import json
import random
import shutil

import pytest
import regex
import tokenizers
import transformers

from base.errors import UserError
from corpus.tokenizer import digest_vocab, load_tokenizer
from helpers.processes import ROOT

TEXTS = [
    "",
    " ",
    "a",
    "The Vaults pub near Café Adriatic has a 5 star rating . Prices start at £ 30 .",
    "name : The Vaults | Type : pub | price : more than £ 30",
    "I'll say it's they've we're I'm he'd don't 'S 'LL",
    "two\n\nlines\n \n  and\ttabs\r\n end   ",
    "   leading and trailing   ",
    "<|endoftext|>",
    "before<|endoftext|>after <|endoftext|>",
    "line\u2028separator \u0085 next\u00a0no-break \u3000wide",
    "\u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0639\u0631\u0628\u064a",
    "\U0001f642\U0001f469\u200d\U0001f680",
    "e\u0301 \u00e9 \u2167 \u00bd \u0661\u0662 1234567890 3.14 x_y-z #$%^&*()",
    "\x00\x01\x1f\x7f\ufeff\ufffd\uffff",
    "a" * 300,
]
PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def byte_symbols() -> list[str]:
    """Byte -> printable character, as GPT-2's files write it: printable Latin-1 is itself, the rest from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


class PlainEncoder:
    """Byte-level BPE by the letter: cut into words, then merge the pair of lowest rank until none is left."""

    def __init__(self, folder):
        self.vocab = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
        self.rank = {tuple(line.split()): number for number, line in enumerate(lines)}
        self.symbols = byte_symbols()

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in PATTERN.findall(text):
            parts = [self.symbols[byte] for byte in word.encode("utf-8")]
            while True:
                pairs = [(self.rank[pair], pair) for pair in itertools.pairwise(parts) if pair in self.rank]
                if not pairs:
                    break
                first, second = min(pairs)[1]
                merged = []
                for part in parts:
                    if merged and merged[-1] == first and part == second:
                        merged[-1] = first + second
                    else:
                        merged.append(part)
                parts = merged
            ids += [self.vocab[part] for part in parts]
        return ids

    def decode(self, ids: list[int]) -> str:
        names = {number: symbol for symbol, number in self.vocab.items()}
        byte_of = {symbol: byte for byte, symbol in enumerate(self.symbols)}
        text = "".join(names[number] for number in ids)
        return bytes(byte_of[character] for character in text).decode("utf-8", errors="replace")


@pytest.fixture(params=["vocab/demo", "gpt2"])
def folder(request):
    return request.getfixturevalue("shared") / "vocab" if request.param == "gpt2" else ROOT / request.param


def some_texts() -> list[str]:
    """TEXTS and 200 random strings from alphabets that mix scripts, spaces, digits and quotes."""
    draw = random.Random(7)
    letters = "abcdefgh'strevmlld  \n\t0123.,|:£é\u00df\u0416\u4e2d\u0301\u00a0\u2028\U0001f600"
    return TEXTS + ["".join(draw.choices(letters, k=draw.randrange(1, 40))) for _ in range(200)]


def test_ids_equal_the_plain_algorithm(folder):
    tokenizer, plain = load_tokenizer(str(folder)), PlainEncoder(folder)
    texts = some_texts()
    expected = [plain.encode(text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == expected
    assert tokenizer.encode_batch(texts) == expected


def test_decode_is_the_inverse(folder):
    tokenizer = load_tokenizer(str(folder))
    for text in some_texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_of_any_ids_equals_python_s_replacement(folder):
    """Ids in random order cut UTF-8 sequences in two: U+FFFD must stand where Python's own decoder puts it."""
    tokenizer, plain = load_tokenizer(str(folder)), PlainEncoder(folder)
    draw = random.Random(8)
    for _ in range(200):
        ids = [draw.randrange(draw.choice((256, tokenizer.vocab_size))) for _ in range(draw.randrange(12))]
        assert tokenizer.decode(ids) == plain.decode(ids)


def test_sizes_and_the_special_token(folder):
    tokenizer = load_tokenizer(str(folder))
    vocab = json.loads((folder / "encoder.json").read_text())
    assert tokenizer.vocab_size == len(vocab)
    assert tokenizer.end_of_text == vocab["<|endoftext|>"] == len(vocab) - 1  # 50256 of 50257 for GPT-2
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"
    assert tokenizer.end_of_text not in tokenizer.encode("a<|endoftext|>")


def test_gpt2_s_own_numbers(shared):
    tokenizer = load_tokenizer(str(shared / "vocab"))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.encode("\n\n") == [628]


@pytest.mark.parametrize("wrong", [-1, 1500, 50257])
def test_decode_refuses_an_id_outside_the_vocabulary(wrong):
    with pytest.raises(ValueError, match=f"{wrong} is outside"):
        load_tokenizer(str(ROOT / "vocab/demo")).decode([0, wrong])


def test_encode_refuses_half_a_surrogate_pair():
    tokenizer = load_tokenizer(str(ROOT / "vocab/demo"))
    for call in (lambda: tokenizer.encode("a\ud800"), lambda: tokenizer.encode_batch(["a", "\udfff"])):
        with pytest.raises(UnicodeEncodeError):
            call()


def edit_vocab(change):
    def edit(folder):
        path = folder / "encoder.json"
        vocab = json.loads(path.read_text())
        change(vocab)
        path.write_text(json.dumps(vocab))

    return edit


def edit_merges(change):
    def edit(folder):
        path = folder / "vocab.bpe"
        lines = path.read_text(encoding="utf-8").split("\n")
        change(lines)
        path.write_text("\n".join(lines), encoding="utf-8")

    return edit


DAMAGE = {
    "no encoder.json": (lambda f: (f / "encoder.json").unlink(), "encoder.json does not exist"),
    "no vocab.bpe": (lambda f: (f / "vocab.bpe").unlink(), "vocab.bpe does not exist"),
    "empty encoder.json": (lambda f: (f / "encoder.json").write_text(""), "encoder.json: is not JSON"),
    "cut encoder.json": (
        lambda f: (f / "encoder.json").write_bytes((f / "encoder.json").read_bytes()[:-9]),
        "encoder.json: is not JSON",
    ),
    "binary encoder.json": (lambda f: (f / "encoder.json").write_bytes(b"\xff\xfe\x00"), "encoder.json:1: not UTF-8"),
    "a list": (lambda f: (f / "encoder.json").write_text("[1]"), "encoder.json: is not a JSON object"),
    "an id of text": (edit_vocab(lambda v: v.update(a="64")), "encoder.json: is not a JSON object"),
    "an id twice": (edit_vocab(lambda v: v.update(a=0)), "are not 0..1499"),
    "a byte missing": (
        edit_vocab(lambda v: v.update({"@@": v.pop("a")})), "has no id for 'a' (1 symbols missing)"),
    "no end of text": (edit_vocab(lambda v: v.update({"@@": v.pop("<|endoftext|>")})), "no id for '<|endoftext|>'"),
    "empty vocab.bpe": (lambda f: (f / "vocab.bpe").write_text(""), "vocab.bpe: has 0 merges"),
    "no version": (edit_merges(lambda m: m.pop(0)), "vocab.bpe:1: wanted a line that begins with #version"),
    "half a merge": (edit_merges(lambda m: m.__setitem__(5, "ab")), "vocab.bpe:6: wanted two symbols"),
    "foreign merge": (edit_merges(lambda m: m.__setitem__(5, "q zzzz")), "vocab.bpe:6: 'zzzz' is not in encoder.json"),
    "cut vocab.bpe": (edit_merges(lambda m: m.__delitem__(slice(-20, -1))), "vocab.bpe: has 1224 merges"),
    "binary vocab.bpe": (lambda f: (f / "vocab.bpe").write_bytes(b"#version: 0.2\n\xff \xfe\n"), "not UTF-8"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named(tmp_path, damage):
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(ROOT / "vocab/demo" / name, tmp_path / name)
    assert load_tokenizer(str(tmp_path)).vocab_size == 1500
    edit, words = DAMAGE[damage]
    edit(tmp_path)
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_files_of_two_vocabularies_do_not_go_together(tmp_path, shared):
    shutil.copy(ROOT / "vocab/demo/encoder.json", tmp_path)
    shutil.copy(shared / "vocab/vocab.bpe", tmp_path)
    with pytest.raises(UserError, match=r"vocab.bpe:\d+: .* is not in encoder.json"):
        load_tokenizer(str(tmp_path))


# ------------------------------------------------------------------ the forms in which others keep a vocabulary

DEMO = ROOT / "vocab/demo"


def hugging_face_pair(folder):
    shutil.copy(DEMO / "encoder.json", folder / "vocab.json")
    shutil.copy(DEMO / "vocab.bpe", folder / "merges.txt")


def by_transformers(folder, **special):
    """tokenizer.json and tokenizer_config.json, as save_pretrained() writes them."""
    pair = folder.parent / f"{folder.name}_pair"
    pair.mkdir()
    hugging_face_pair(pair)
    made = transformers.GPT2Tokenizer(str(pair / "vocab.json"), str(pair / "merges.txt"))
    made.add_special_tokens(special)
    made.save_pretrained(folder)
    assert not (folder / "vocab.json").exists() and (folder / "tokenizer.json").exists()


def by_tokenizers(folder):
    """The library's own class of a GPT-2, which writes pairs as it likes."""
    hugging_face_pair(folder)
    made = tokenizers.ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    made.save(str(folder / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


def merges_as_text(folder):
    """Older versions write a merge as one text."""
    by_transformers(folder)
    edit_whole(lambda c: c["model"].update(merges=[" ".join(merge) for merge in c["model"]["merges"]]))(folder)


def edit_whole(change):
    def edit(folder):
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return edit


@pytest.mark.parametrize("write", [hugging_face_pair, by_transformers, by_tokenizers, merges_as_text])
def test_every_form_of_a_vocabulary_gives_the_same_ids(write, tmp_path):
    write(tmp_path)
    found, plain = load_tokenizer(str(tmp_path)), PlainEncoder(DEMO)
    assert (found.vocab_size, found.end_of_text) == (1500, plain.vocab["<|endoftext|>"])
    for text in TEXTS:
        assert found.encode(text) == plain.encode(text)
        assert found.decode(found.encode(text)) == text
    if write is hugging_face_pair:  # the same bytes are the same vocabulary: no cache is made anew
        assert digest_vocab(str(tmp_path)) == digest_vocab(str(DEMO))
    assert len(digest_vocab(str(tmp_path))) == 64
    for name in ("encoder.json", "vocab.bpe"):  # OpenAI's names come first, and a part of them is no other form's
        shutil.copy(DEMO / name, tmp_path)
    assert digest_vocab(str(tmp_path)) == digest_vocab(str(DEMO))


OTHER_TOKENIZERS = {
    "no BPE": (lambda c: c["model"].update(type="WordPiece"), "is no BPE"),
    "dropout": (lambda c: c["model"].update(dropout=0.1), "has dropout '0.1'"),
    "a prefix": (lambda c: c["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix '##'"),
    "other words": (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "neither byte-level"),
    "no words": (lambda c: c.update(pre_tokenizer=None), "neither byte-level"),
    "a template": (lambda c: c["post_processor"].update(special_tokens={"[CLS]": {}}), "cannot be read by tokenizers"),
    "another step": (lambda c: c.update(post_processor=[{"type": "BertProcessing"}]), "cannot be read by tokenizers"),
    "no merges": (lambda c: c["model"].update(merges=3), "has no vocab or merges"),
    "another id": (lambda c: c["added_tokens"][0].update(id=7), "is 1499 in vocab, 7 in added_tokens"),
    "no vocab": (lambda c: c["model"].pop("vocab"), "has no vocab"),
    "an id of text": (lambda c: c["model"]["vocab"].update(a="64"), "is not a JSON object of symbol"),
    "a byte missing": (lambda c: c["model"]["vocab"].update({"@@": c["model"]["vocab"].pop("a")}), "no id for 'a'"),
    "half a merge": (lambda c: c["model"]["merges"].__setitem__(4, ["a"]), "merge 4: wanted two symbols"),
    "foreign merge": (lambda c: c["model"]["merges"].__setitem__(4, ["q", "zzzz"]), "4: 'zzzz' is not in its vocab"),
    "merges cut": (lambda c: c["model"].update(merges=c["model"]["merges"][:-2]), "has 1241 merges where its vocab"),
    "no model": (lambda c: c.pop("model"), "is no BPE"),
}


@pytest.mark.parametrize("damage", OTHER_TOKENIZERS)
def test_a_tokenizer_json_that_gives_other_ids_is_refused(damage, tmp_path):
    by_transformers(tmp_path)
    change, words = OTHER_TOKENIZERS[damage]
    edit_whole(change)(tmp_path)
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path))
    assert "tokenizer.json" in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def behind_the_merges(folder):
    hugging_face_pair(folder)
    path = folder / "vocab.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "[PAD]": 1500}))


def beside_the_merges(folder):
    hugging_face_pair(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 1500, "<|endoftext|>": 1499}))


@pytest.mark.parametrize("write, file, words", [
    (behind_the_merges, "merges.txt", "wants 1244: it has 1 symbol more than the merges make: '[PAD]'"),
    (beside_the_merges, "added_tokens.json", "adds '[PAD]'"),
])
def test_added_tokens_are_named(write, file, words, tmp_path):
    write(tmp_path)
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path / file}: ") and words in str(error.value)


def test_a_tokenizer_json_with_tokens_or_rules_of_its_own_is_no_gpt2_s(tmp_path):
    """It is read as transformers reads it: there <|endoftext|> in a text is the special token."""
    changes = {"added": {}, "whole words": lambda c: c["model"].update(ignore_merges=True),
               "a normalizer": lambda c: c.update(normalizer={"type": "Lowercase"}),
               "a space first": lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
               "no pattern": lambda c: c["pre_tokenizer"].update(use_regex=False)}
    for name, change in changes.items():
        folder = tmp_path / name
        by_transformers(folder, **({"pad_token": "[PAD]"} if name == "added" else {}))
        if change:
            edit_whole(change)(folder)
        ours, theirs = load_tokenizer(str(folder)), transformers.TokenizersBackend.from_pretrained(folder)
        assert [ours.encode(text) for text in TEXTS] == theirs(TEXTS)["input_ids"]
        assert ours.encode("a<|endoftext|>")[-1] == ours.end_of_text == 1499


def test_a_vocabulary_that_is_not_there_or_a_pointer(tmp_path):
    below = tmp_path / "snapshots" / "0123abc"
    below.mkdir(parents=True)
    hugging_face_pair(below)
    with pytest.raises(UserError, match=f"encoder.json does not exist; .* or give {below}"):
        load_tokenizer(str(tmp_path))
    (below / "merges.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="merges.txt: is a Git LFS pointer"):
        load_tokenizer(str(below))
