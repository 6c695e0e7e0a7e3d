"""Other models' tokenizers, against transformers' AutoTokenizer on the same folder."""

import json
import random

import pytest
import transformers

from base.errors import UserError
from corpus.tokenizer import check_vocabulary_fits, digest_vocab, load_tokenizer, own_vocabulary
from helpers.foreign_tokenizers import FORMS, edit, write_tokenizer
from helpers.processes import ROOT

TEXTS = [
    "", " ", "  ", "a", " a", "  a", "a ", "the place serves cheap food", "don't I'LL 1234567 3.14 x_y-z #$%^&*()",
    "two\n\nlines\n \n  and\ttabs\r\n end   ", "日本語 русский \U0001f642\U0001f469\u200d\U0001f680",
    "e\u0301 \u00e9 \u2167 \u00bd \u0661\u0662 \u00a0\u2028\u3000", "\x00\x01\x1f\x7f\ufeff\ufffd", "a" * 200,
    "the <s> place</s>x </s> <unk>", "a<|im_end|>b <|im_end|> <|begin|>\n<|endoftext|>", "<0x41> ▁x ▁ Ġthe",
    "[INST] the place [/INST] tea",
]


def some_texts() -> list[str]:
    draw = random.Random(7)
    letters = list("abcdefgh'strevm  \n\t012.,|é\u00df\u0416\u4e2d\u0301\u00a0\U0001f600") + ["</s>", "<|im_end|>"]
    return TEXTS + ["".join(draw.choices(letters, k=draw.randrange(1, 30))) for _ in range(150)]


@pytest.fixture(params=FORMS)
def pair(request, tmp_path):
    """(our tokenizer, transformers') of a folder."""
    folder = write_tokenizer(tmp_path / "model", request.param)
    return load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)


def test_ids_equal_transformers(pair):
    """With what it puts in front of a text, and without."""
    ours, theirs = pair
    texts = some_texts()
    bare = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [ours.encode(text) for text in texts] == bare == ours.encode_batch(texts)
    assert [[*ours.prefix, *ours.encode(text), *ours.suffix] for text in texts] == theirs(texts)["input_ids"]


def test_texts_equal_transformers(pair):
    """Of encoded texts, and of ids in random order, which cut bytes in two."""
    ours, theirs = pair
    draw = random.Random(8)
    drawn = [[draw.randrange(ours.vocab_size) for _ in range(draw.randrange(12))] for _ in range(200)]
    for ids in [*map(ours.encode, some_texts()), *drawn]:
        assert ours.decode(ids) == theirs.decode(ids)
        end = next((n for n, token in enumerate(ids) if token == theirs.eos_token_id), len(ids))
        assert ours.decode_generated(ids) == theirs.decode(ids[:end], skip_special_tokens=True)


def test_special_tokens_equal_transformers(pair):
    ours, theirs = pair
    assert ours.special == {kind: token for kind in ("bos", "eos", "pad", "unk")
                            if (token := getattr(theirs, f"{kind}_token_id")) is not None and kind in ours.special}
    assert (ours.begin_of_text, ours.end_of_text) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs) and ours.ends == {theirs.eos_token_id}


def test_a_continuation_is_the_text_that_goes_on(pair):
    """Prompt and completion encoded apart give the text again: no token spans both, and no space comes between."""
    ours, _ = pair
    draw = random.Random(9)
    for _ in range(200):
        text = draw.choice("ab") + "".join(draw.choices("abth e river\n1é日", k=12))  # NFC changes none of them
        cut = draw.randrange(1, len(text))
        parts = [ours.encode(text[:cut]), ours.encode(text[cut:], after=True)]
        assert ours.encode_batch([text[cut:]], after=True) == parts[1:]
        assert ours.decode(parts[0] + parts[1]) == text
    assert ours.encode("", after=True) == []


def test_older_folders_follow_tokenizer_json(tmp_path):
    """Where transformers 5 builds a class anew, the file decides: as TokenizersBackend, which reads it, gives them."""
    for form, name in (("Llama 2", "LlamaTokenizer"), ("SmolLM2", "GPT2Tokenizer")):
        folder = write_tokenizer(tmp_path / name, form)
        edit(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class=name))
        ours, file = load_tokenizer(str(folder)), transformers.TokenizersBackend.from_pretrained(folder)
        anew = transformers.AutoTokenizer.from_pretrained(folder)
        assert type(anew).__name__ == name
        assert [[*ours.prefix, *ours.encode(text)] for text in some_texts()] == file(some_texts())["input_ids"]
        assert ours.decode(ours.encode("it's 1234 tea")) == "it's 1234 tea"


def test_a_text_that_ends_with_a_token(tmp_path):
    """A post_processor that puts eos behind a text, too, as some do."""
    folder = write_tokenizer(tmp_path, "Llama 2")
    end = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    edit(folder / "tokenizer.json", lambda c: c["post_processor"].update(
        single=[*c["post_processor"]["single"], {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        special_tokens={**c["post_processor"]["special_tokens"], "</s>": end}))
    ours, theirs = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.prefix, ours.suffix) == ((1,), (2,))
    assert theirs("tea")["input_ids"] == [1, *ours.encode("tea"), 2]


def test_where_special_tokens_are_named(tmp_path):
    """special_tokens_map.json counts first, as in transformers, unless there is an added_tokens_decoder; without any of
    them the model's configuration names the end of a text, and generation_config.json may name several."""
    folder = write_tokenizer(tmp_path, "Llama 3", eos_token_id=3)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    ends = load_tokenizer(str(folder)).special["eos"], transformers.AutoTokenizer.from_pretrained(folder).eos_token_id
    assert ends[0] == ends[1] == load_tokenizer(str(folder)).tokens()["<|endoftext|>"]
    before = digest_vocab(str(folder))
    edit(folder / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder={}))
    ends = load_tokenizer(str(folder)).special["eos"], transformers.AutoTokenizer.from_pretrained(folder).eos_token_id
    assert ends[0] == ends[1] == load_tokenizer(str(folder)).tokens()["<|im_end|>"]
    assert digest_vocab(str(folder)) != before
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink()
    ours = load_tokenizer(str(folder))
    assert (ours.end_of_text, ours.begin_of_text, ours.ends) == (3, None, {3})
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    ours = load_tokenizer(str(folder))
    assert (ours.end_of_text, ours.ends) == (5, {5, 7})
    assert ours.decode_generated([*ours.encode("tea"), 7, 9]) == "tea"


def test_a_vocabulary_of_words_beside_tokenizer_json_does_not_count(tmp_path):
    """Qwen's folders hold vocab.json and merges.txt, too, which do not say how a text is cut."""
    folder = write_tokenizer(tmp_path, "Qwen2")
    before = load_tokenizer(str(folder)).encode("don't 12345"), digest_vocab(str(folder))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(merge) + "\n" for merge in model["merges"]))
    assert (load_tokenizer(str(folder)).encode("don't 12345"), digest_vocab(str(folder))) == before


def spoil(form: str, change):
    def spoiled(folder) -> None:
        write_tokenizer(folder, form)
        edit(folder / "tokenizer.json", change)

    return spoiled


def renamed(token: str):
    return lambda content: content["model"]["vocab"].update({"@@": content["model"]["vocab"].pop(token)})


def sentencepiece_alone(folder) -> None:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e")


def named(**tokens):
    def spoiled(folder) -> None:
        write_tokenizer(folder, "Llama 2")
        edit(folder / "tokenizer_config.json", lambda c: c.update(tokens))

    return spoiled


REFUSED = {
    "Unigram": (spoil("Llama 2", lambda c: c["model"].update(type="Unigram")), ["a Unigram model", "is no BPE"]),
    "WordPiece": (spoil("Llama 3", lambda c: c["model"].update(type="WordPiece")), ["of type WordPiece", "is no BPE"]),
    "no model": (spoil("Llama 3", lambda c: c.pop("model")), ["is no BPE"]),
    "dropout": (spoil("Llama 3", lambda c: c["model"].update(dropout=0.1)), ["has dropout '0.1'"]),
    "no fallback": (spoil("Llama 2", lambda c: c["model"].update(byte_fallback=False)), ["is neither byte-level"]),
    "a byte missing": (spoil("Llama 2", renamed("<0x41>")), ["no id for '<0x41>' (1 of 256"]),
    "a symbol missing": (spoil("Llama 3", renamed("!")), ["no id for '!'"]),
    "foreign merges": (spoil("Qwen2", lambda c: c["model"]["merges"].insert(4, ["q", "zzzz"])),
                       ["cannot be read by tokenizers"]),
    "an unknown step": (spoil("Qwen2", lambda c: c.update(pre_tokenizer={"type": "ByteLevel", "x": [{"type": "Y"}]})),
                        ["cannot be read by tokenizers"]),
    "cut": (lambda folder: write_tokenizer(folder, "Qwen2") and (folder / "tokenizer.json").write_text(
        (folder / "tokenizer.json").read_text()[:-9]), ["not JSON"]),
    "tokenizer.model alone": (sentencepiece_alone, ["tokenizer.model alone is not read", "save_pretrained"]),
    "another's special token": (named(eos_token="<|eot|>"), ["does not hold '<|eot|>'", "eos_token"]),
    "a special token that is no text": (named(bos_token=3), ["tokenizer_config.json", "bos_token is 3"]),
    "an end that is no id": (lambda folder: write_tokenizer(folder, "Llama 2", eos_token_id="2"),
                             ['config.json: eos_token_id is "2"']),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    write, words = REFUSED[case]
    write(tmp_path / "model")
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path / "model"))
    assert "\n" not in str(error.value) and str(tmp_path / "model") in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_ids_outside_the_vocabulary(pair):
    ours, _ = pair
    for wrong in (-1, ours.vocab_size):
        with pytest.raises(ValueError, match=f"{wrong} is outside"):
            ours.decode([0, wrong])
        with pytest.raises(ValueError, match=f"{wrong} is outside"):
            ours.decode_generated([ours.end_of_text, wrong])
    with pytest.raises(UnicodeEncodeError):
        ours.encode("a\ud800")


def test_whether_a_vocabulary_is_the_models(tmp_path):
    """Refused where it cannot be; rows beyond it are padding, and are said."""
    own = write_tokenizer(tmp_path / "own", "Qwen2", eos_token_id=387)
    other = write_tokenizer(tmp_path / "other", "Llama 3")
    copy = write_tokenizer(tmp_path / "copy", "Qwen2")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"eos_token_id": 410}')
    size = load_tokenizer(str(own)).vocab_size
    assert own_vocabulary(str(own)) == own_vocabulary(None, str(own / "model.safetensors")) == str(own)
    assert own_vocabulary(str(bare), None) is None

    def check(folder, rows: int, place=own) -> str:
        size = load_tokenizer(str(folder)).vocab_size
        return check_vocabulary_fits(str(folder), size, rows, "--model_name M", None, str(place))

    pieces = tmp_path / "pieces"
    pieces.mkdir()
    (pieces / "tokenizer.model").write_bytes(b"is not read: nothing is compared with it")
    assert check(own, size, pieces) == "" and own_vocabulary(str(pieces)) == str(pieces)
    assert check(own, size) == check(copy, size) == ""
    assert f"from {size} on are padding" in check(own, 512) and "WARNING" not in check(own, 512)
    assert "is it the model's?" in check(own, 512, tmp_path / "weights.bin")
    for words, arguments in (("only 300", (own, 300)), ("leave --vocab out", (other, 512)),
                             ("ends a text by 410", (own, 512, bare)),
                             ("ends a text by 410", (own, 512, bare / "model.safetensors")),
                             ("in the vocabulary beside", (ROOT / "vocab/demo", 1500))):
        with pytest.raises(UserError, match=words):
            check(*arguments)
