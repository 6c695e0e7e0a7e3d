"""Lines of prompt and completion, and units of any name: what is read, its tokens, what is scored, whose it is."""

import json
import os
import random
import re

import numpy as np
import pytest
import torch

from base.errors import UserError
from corpus.author_cache import name_key, open_cache, prepare_cache
from corpus.authors import split_authors
from corpus.batching import PublicLengths, TightCut
from corpus.records import Source, WordTokens, pair_ids, split_fields, text_ids
from corpus.tokenizer import load_tokenizer
from helpers.clipping_oracle import (
    Text,
    clipped_sum,
    difference,
    distance,
    make_model,
    norm,
    run_engine,
    unit_gradients,
)
from helpers.foreign_tokenizers import FORMS, edit, write_tokenizer
from helpers.processes import ROOT
from model import GPT2Config
from privacy.clipping import ClippingRule

VOCAB, LENGTH = ROOT / "vocab" / "demo", 16
WORDS = "the place serves cheap food near a river and it is rated high".split()


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def corpus_of(path, vocab=VOCAB, length=LENGTH, **fields):
    return open_cache(prepare_cache(Source(str(path), "--train_file", str(vocab), length, **fields), None, 1))


def pairs(count: int, seed: int = 0, **fields) -> list[dict]:
    """Lines of a prompt, empty in some, and a completion; fields: name -> function of the line's number."""
    draw = random.Random(seed)
    return [{"prompt": " ".join(draw.choices(WORDS, k=draw.randrange(5))),
             "completion": " " + " ".join(draw.choices(WORDS, k=draw.randint(1, 5))),
             **{name: make(n) for name, make in fields.items()}} for n in range(count)]


@pytest.fixture(params=["GPT-2", *FORMS])
def vocab(request, tmp_path):
    return VOCAB if request.param == "GPT-2" else write_tokenizer(tmp_path / "vocab", request.param)


# ------------------------------------------------------------------ tokens


@pytest.mark.parametrize("prompt", ["", "name: tea", "ends with a space ", "\n"])
def test_a_pair_is_joined_as_it_stands(vocab, prompt):
    """Behind what begins a text, the tokens of both give the two texts back; all of the completion is scored, the end
    of text, too; and every cut of the line is its beginning. A completion alone is a text as any other (Llama's class
    loses a space in front)."""
    tokenizer = load_tokenizer(str(vocab))
    words, end = WordTokens(tokenizer), tokenizer.end_of_text
    for completion in ("tea", " tea", "é日本", "two\n\nlines 1234 "):
        ids, first, cut = pair_ids(prompt, completion, 1000, words)
        begin = list(tokenizer.prefix) or ([] if prompt else [tokenizer.begin_of_text or end])
        assert ids[:len(begin)] == begin and ids[-1] == end and not cut
        before = tokenizer.encode(prompt)
        assert ids[len(begin):first] == before and first >= 1
        text = prompt + completion if prompt else tokenizer.decode(tokenizer.encode(completion))
        assert tokenizer.decode([*before, *ids[first:-1]]) == text
        for length in range(2, len(ids) + 2):
            some = pair_ids(prompt, completion, length, words)
            assert some == (ids[:length], min(first, length), length < len(ids))


def test_a_text_gets_what_transformers_puts_around_it(vocab):
    tokenizer = load_tokenizer(str(vocab))
    whole = [*tokenizer.prefix, *tokenizer.encode("the place serves tea"), *tokenizer.suffix]
    for length in range(2, len(whole) + 2):
        ids, first, cut = text_ids("the place serves tea", length, WordTokens(tokenizer))
        assert (ids, first, cut) == (whole[:length], 1, length < len(whole))


def test_the_completion_alone_is_scored(tmp_path, vocab):
    """In the micro-batches: each row's targets are its completion and the end of text, whatever the cut."""
    lines, tokenizer = pairs(40), load_tokenizer(str(vocab))
    corpus = corpus_of(write(tmp_path / "train.jsonl", lines), vocab, 64)
    expected = sorted([*tokenizer.encode(line["completion"], after=bool(line["prompt"])), tokenizer.end_of_text]
                      for line in lines)
    data = corpus.by_author(np.arange(40), 1, 0)
    for cut in (PublicLengths((8, 16, 63), 200), TightCut(100)):
        found = []
        for batch in data.micro_batches(torch.arange(40), cut):
            found += [part.tolist() for part in torch.split(batch.targets, batch.counts)]
            for part, weights in zip(found[-batch.units:], torch.split(batch.weights, batch.counts), strict=True):
                assert torch.allclose(weights, torch.tensor(1 / len(part)))
        assert sorted(found) == expected


# ------------------------------------------------------------------ units


def units_of(corpus) -> dict[int, list[tuple]]:
    """key of a unit -> its texts, sorted; a list of a key that several units have is that of all of them."""
    found: dict[int, list[tuple]] = {}
    for a, key in enumerate(corpus.keys.tolist()):
        for t in range(corpus.first[a], corpus.first[a + 1]):
            start = corpus.starts[t]
            found.setdefault(key, []).append(tuple(corpus.tokens[start:start + corpus.lengths[t]].tolist()))
    return {key: sorted(texts) for key, texts in found.items()}


def test_without_a_field_the_unit_is_the_line(tmp_path):
    """Also of lines that are alike, which have one key: whether a line is held out does not depend on the others."""
    lines = pairs(30) + pairs(30)[:4]
    corpus = corpus_of(write(tmp_path / "train.jsonl", lines))
    assert len(corpus.keys) == corpus.texts == 34 and (np.diff(corpus.first) == 1).all()
    assert corpus.facts["unit"] == "line" and len(set(corpus.keys.tolist())) == 30
    fewer = corpus_of(write(tmp_path / "fewer.jsonl", lines[3:]))
    whole, rest = units_of(corpus), units_of(fewer)
    assert all(whole[key][:len(texts)] == texts for key, texts in rest.items())
    held = {int(key) for key in corpus.keys[split_authors(corpus.keys, 0.3, 1)[1]]}
    assert {int(key) for key in fewer.keys[split_authors(fewer.keys, 0.3, 1)[1]]} == held & set(fewer.keys.tolist())


@pytest.mark.parametrize("form", ["pairs", "texts"])
@pytest.mark.parametrize("processes, chunk", [(1, 1 << 23), (2, 600)])
def test_all_lines_of_a_unit_are_one_unit(tmp_path, monkeypatch, form, processes, chunk):
    """Wherever they stand; a number is the unit that the same number in quotes is; an empty value is no unit."""
    monkeypatch.setattr("corpus.author_cache.CHUNK", chunk)
    lines = pairs(60, patient=lambda n: [n % 7, str(n % 7), None, ""][n % 4])
    if form == "texts":
        lines = [{"content": "it" + line["completion"], "patient": line["patient"]} for line in lines]
    source = Source(str(write(tmp_path / "train.jsonl", lines)), "", str(VOCAB), LENGTH, unit_field="patient")
    corpus = open_cache(prepare_cache(source, None, processes))
    assert (corpus.facts["unit"], corpus.facts["without_author"]) == ("patient", 30)
    sizes = {name_key(str(k)): sum(line["patient"] not in (None, "") and str(line["patient"]) == str(k)
                                   for line in lines) for k in range(7)}
    assert {key: len(texts) for key, texts in units_of(corpus).items()} == sizes and len(corpus.keys) == 7


def test_pseudo_authors_are_left_out_of_authors_alone(tmp_path):
    lines = [{"author": name, "content": "some text here"} for name in ("[deleted]", "x", "y")]
    path = write(tmp_path / "train.jsonl", lines)
    assert len(corpus_of(path).keys) == 2 and len(corpus_of(path, unit_field="author").keys) == 3


def test_a_prompt_that_fills_the_block_leaves_nothing_to_score(tmp_path):
    """Such a line is left out and counted; where every line is such a line there is no corpus."""
    lines = pairs(5, unit=lambda n: "a") + [{"prompt": "tea " * 20, "completion": "x", "unit": "b"}]
    corpus = corpus_of(write(tmp_path / "train.jsonl", lines), unit_field="unit")
    assert (corpus.facts["too_short"], corpus.texts, len(corpus.keys)) == (1, 5, 1)
    with pytest.raises(UserError, match="holds no text of a line .left out: 1 whose prompts leave no room"):
        corpus_of(write(tmp_path / "long.jsonl", [{"prompt": "tea " * 20, "completion": "x"}]))


BAD = {
    "no completion": ({"prompt": "x"}, "has no 'completion'"),
    "no prompt": ({"completion": "x"}, "has no 'prompt'", "an empty prompt is written out"),
    "no unit": ({"prompt": "x", "completion": "y", "unit": ...}, "has no 'unit'", "--unit_field unit"),
    "an empty completion": ({"prompt": "x", "completion": ""}, "'completion' is empty; remove the line"),
    "a blank completion": ({"prompt": "x", "completion": " \n"}, "'completion' is empty"),
    "a prompt that is null": ({"prompt": None, "completion": "y"}, "'prompt' is null, wanted a string"),
    "a completion that is a list": ({"prompt": "x", "completion": ["y"]}, "'completion' is [\"y\"], wanted a string"),
    "a unit that is a list": ({"prompt": "x", "completion": "y", "unit": [1]}, "'unit' is [1], wanted a string or a"),
    "a unit that is true": ({"prompt": "x", "completion": "y", "unit": True}, "'unit' is true, wanted a string or a"),
    "a unit that is a fraction": ({"prompt": "x", "completion": "y", "unit": 1.5}, "'unit' is 1.5, wanted"),
    "half a pair of surrogates": ({"prompt": "\ud800", "completion": "y"}, "half of a surrogate pair"),
    "the other form": ({"content": "x"}, "holds 'content', the first line 'prompt' and 'completion'", "split it"),
    "both forms": ({"content": "x", "prompt": "x", "completion": "y"}, "'content' and 'prompt' and 'completion', the"),
    "no object": ("x", "not a JSON object", 'wanted {"unit": "...", "prompt": "...", "completion": "..."}'),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(tmp_path, case):
    line, *words = BAD[case]
    if isinstance(line, dict):
        line = {name: value for name, value in {"unit": "u", **line}.items() if value is not ...}
    path = write(tmp_path / "train.jsonl", [*pairs(3, unit=lambda n: "u"), line])
    with pytest.raises(UserError) as error:
        corpus_of(path, unit_field="unit")
    assert str(error.value).startswith(f"{path}:4: ") and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)
    assert os.listdir(tmp_path / ".author_cache") == []


def test_a_pair_among_texts_is_named(tmp_path):
    path = write(tmp_path / "train.jsonl", [{"author": "x", "content": "a text"}, {**pairs(1)[0], "author": "x"}])
    with pytest.raises(UserError, match=r"train.jsonl:2: holds 'prompt' and 'completion', the first line 'content'"):
        corpus_of(path)


def test_a_tokenizer_that_ends_no_text(tmp_path):
    folder = write_tokenizer(tmp_path / "vocab", "Llama 2")
    edit(folder / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    with pytest.raises(UserError, match="names no eos token"):
        corpus_of(write(tmp_path / "train.jsonl", pairs(3)), folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert corpus_of(tmp_path / "train.jsonl", folder).tokens[-1] == 2


# ------------------------------------------------------------------ privacy

CONFIG = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=1500, n_positions=32)
NEIGHBOURS = {
    "lines": ({}, [{"prompt": "a prompt of many words near the river", "completion": " tea"}]),
    "conversations": ({"unit_field": "conversation"}, [
        {"prompt": "x" * n, "completion": " tea and food" * n, "conversation": "new"} for n in range(1, 6)])}


@pytest.mark.parametrize("engine", ["ghost", "materialise", "opacus"])
@pytest.mark.parametrize("case", NEIGHBOURS)
@pytest.mark.parametrize("samples", [1, 3])
def test_one_more_unit_of_prompts_and_completions(tmp_path, case, samples, engine, monkeypatch):
    """From the files on: the noiseless sums with and without the unit, whose lines stand among the others', are those
    of a loop of autograd over units, in which the completion alone is scored; they differ by C at the most, by exactly
    C here, where the unit's gradient is larger. (Weights of a micro-batch are float32, 2^-24 = 6e-8.)"""
    fields, extra = NEIGHBOURS[case]
    samples = 1 if case == "lines" else samples
    lines = pairs(12, seed=3, conversation=lambda n: f"c{n % 5}")
    more = list(lines)
    for n, line in enumerate(extra):
        more.insert(2 * n + 1, line)
    model, tokenizer = make_model(config=CONFIG, spread=1.0), load_tokenizer(str(VOCAB))
    rule, sums = ClippingRule("flat", 1e-3), []
    for name, some in (("fewer", lines), ("more", more)):
        corpus = corpus_of(write(tmp_path / f"{name}.jsonl", some), **fields)
        data = corpus.by_author(np.arange(len(corpus.keys)), samples, 5)
        units = torch.arange(len(data))
        batches = list(data.micro_batches(units, PublicLengths((8, 15), 60), step=2))
        for batch in batches:
            batch.weights = batch.weights.double()
        sums.append(run_engine(engine, model, rule, batches, monkeypatch)[1])
        # The oracle knows lines, not a corpus: whose they are, and with how many of them a unit takes part.
        owners = {}
        for n, line in enumerate(some):
            prompt = tokenizer.encode(line["prompt"]) or [tokenizer.end_of_text]
            ids = [*prompt, *tokenizer.encode(line["completion"]), tokenizer.end_of_text][:LENGTH]
            owners.setdefault(line["conversation"] if fields else n, []).append(Text(tuple(ids), len(prompt)))
        if samples == 1 and case == "lines" or samples >= 3 and all(len(texts) <= 3 for texts in owners.values()):
            expected = clipped_sum(unit_gradients(model, list(owners.values()))[1], rule)
            assert distance(sums[-1], expected) < 1e-6
    assert norm(difference(sums[1], sums[0])) == pytest.approx(rule.C, rel=2e-6)


# ------------------------------------------------------------------ public fields


PUBLIC = {"stars": lambda n: n % 5 + 1, "category": lambda n: ["books", "  fast\nfood "][n % 2]}


@pytest.mark.parametrize("form", ["texts", "pairs"])
def test_public_fields_stand_in_front_and_are_not_scored(tmp_path, form):
    lines = [{**line, "author": f"a{n % 3}"} for n, line in enumerate(pairs(9, **PUBLIC))]
    if form == "texts":
        lines = [{"content": line.pop("completion"), **line} for line in lines]
        for line in lines:
            del line["prompt"]
    path, tokenizer = write(tmp_path / "train.jsonl", lines), load_tokenizer(str(VOCAB))
    unit = {"unit_field": "author"} if form == "pairs" else {}
    corpus = corpus_of(path, length=99, prompt_fields=("stars", "category"), **unit)
    found = set()
    for start, length, first in zip(corpus.starts, corpus.lengths, corpus.scored, strict=True):
        ids = corpus.tokens[start:start + length].tolist()
        assert ids[-1] == tokenizer.end_of_text
        found.add((tokenizer.decode(ids[:first]), tokenizer.decode(ids[first:-1])))
    assert found == {
        (f"stars: {line['stars']} | category: {' '.join(line['category'].split())}\n{line.get('prompt', '')}",
         line.get("content") or line["completion"]) for line in lines}
    plain = corpus_of(path, length=99, **unit)  # another cache, as it was before there were such fields
    assert plain.tokens.tolist() != corpus.tokens.tolist()
    assert name_key("a0") in corpus.keys


@pytest.mark.parametrize("value", [None, "", " ", "a|b", 1.5, True, ["x"], "\ud800"])
def test_values_that_are_no_public_field(tmp_path, value):
    path = write(tmp_path / "train.jsonl", [{"author": "a", "content": "x", "stars": value}])
    with pytest.raises(UserError, match=r"train.jsonl:1: the field 'stars' of --prompt_fields is .*wanted a text"):
        corpus_of(path, prompt_fields=("stars",))


@pytest.mark.parametrize("given", ["", "a,,b", "a,a", "a|b", "author", "prompt"])
def test_names_that_are_no_public_field(given):
    with pytest.raises(UserError, match=f"--prompt_fields {re.escape(given)}: "):
        split_fields(given, ("author", "prompt"))
