"""The judgement of samples, against plain loops, closed forms and scipy."""

import itertools
import json
import math
import random
import tracemalloc

import numpy as np
import pytest
from scipy.stats import binomtest

import attacks
import frontier
import judge_samples
import leaks
import likeness
from helpers.judged import flags, write, write_world
from helpers.processes import ROOT, assert_user_error, run_script
from segments import UserError
from suffixes import common_prefixes, longest_spans, suffix_array
from texts import Secret, words

JUDGE = "eval/synthetic/judge_samples.py"


# ------------------------------------------------------------------ copied spans


def plain_longest(corpus: list[list[int]], text: list[int]) -> tuple[int, int]:
    """(length, start) of the longest common span, by the quadratic table; of equal ones the first in the text."""
    best = (0, 0)
    for other in corpus:
        row = [0] * (len(other) + 1)
        for i in range(len(text)):
            new = [0] * (len(other) + 1)
            for j in range(len(other)):
                if text[i] == other[j]:
                    new[j + 1] = row[j] + 1
                    start = i + 1 - new[j + 1]
                    if new[j + 1] > best[0] or (new[j + 1] == best[0] and start < best[1]):
                        best = (new[j + 1], start)
            row = new
    return best


@pytest.mark.parametrize("letters", [1, 2, 5, 40])
@pytest.mark.parametrize("seed", range(6))
def test_the_longest_span_is_that_of_a_plain_table(letters, seed):
    draw = random.Random(letters * 100 + seed)

    def texts(count: int) -> list[list[int]]:
        return [[draw.randrange(letters) for _ in range(draw.randrange(0, 14))] for _ in range(count)]

    corpus, asked = [*texts(draw.randrange(1, 9)), [0]], texts(7)
    found = longest_spans([np.array(text, int) for text in corpus], [np.array(text, int) for text in asked])
    for k, text in enumerate(asked):
        length, start = plain_longest(corpus, text)
        assert (found.lengths[k], found.starts[k]) == (length, start)
        source = found.sources[k]
        span = text[start:start + length]
        assert (source == -1) == (length == 0)
        if length:
            holder = corpus[source]
            assert any(holder[i:i + length] == span for i in range(len(holder)))


def test_no_span_runs_over_the_end_of_a_text():
    corpus = [np.array([1, 2]), np.array([3, 4])]
    assert longest_spans(corpus, [np.array([1, 2, 3, 4])]).lengths.tolist() == [2]
    assert longest_spans(corpus, [np.array([1]), np.array([2, 3])]).lengths.tolist() == [1, 1]


@pytest.mark.parametrize("text", [[0], [0, 0, 0, 0], [2, 1, 0], [1, 0, 1, 0, 1]])
def test_the_suffix_array_is_sorted(text):
    assert suffix_array(np.array([*text, -1])).tolist() == sorted(range(len(text) + 1), key=lambda i: [*text, -1][i:])
    assert common_prefixes(np.array([*text, -1, *text, -2]), np.array([0]), np.array([len(text) + 1])) == [len(text)]


def test_memory_is_linear():
    """Twice the words take about twice the memory, also where a long text is copied whole: a table would take the
    square, 3.6 GB here."""
    def peak(n: int) -> int:
        text = np.random.default_rng(n).integers(0, 50, n)
        tracemalloc.start()
        assert longest_spans([text], [text[: n // 2]]).lengths.tolist() == [n // 2]
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small, large = peak(3000), peak(30_000)
    assert large < 13 * small and large < 400 * 45_000  # arrays of 8 bytes a word, some dozens of them


# ------------------------------------------------------------------ duplicates, nearest texts, secrets


SAMPLES = ["the cat sat on the mat .", "a dog", "", "the cat sat on the mat !"]
CORPUS = ["the cat sat on the mat .", "dogs bark", "the cat sat on a mat .", "x"]


def plain_shingles(text: str) -> set:
    split = ["\0", *words(text), "\0"]
    return {tuple(split[i:i + 3]) for i in range(len(split) - 2)} or {tuple(split)}


def test_the_nearest_text_is_that_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr(leaks, "BLOCK", 3)
    found = leaks.nearest(SAMPLES, CORPUS)
    for k, sample in enumerate(SAMPLES):
        own = plain_shingles(sample)
        index = [len(own & plain_shingles(text)) / len(own | plain_shingles(text)) for text in CORPUS]
        assert found.likeness[k] == pytest.approx(max(index)) and index[found.texts[k]] == max(index)
    figures = leaks.duplicate_figures(SAMPLES, CORPUS, found)
    assert (figures["exact"]["found"], figures["near"]["found"]) == (1, 1)


def test_copies_stand_beside_the_same_of_other_texts():
    figures, _ = leaks.compare(SAMPLES, {"private": CORPUS, "held out": ["no such thing"]})
    assert figures["private"]["spans"]["longest"] == 7 and figures["held out"]["spans"]["longest"] == 0
    assert figures["private"]["duplicates"]["exact"]["value"] == 0.25


def test_secrets():
    secrets = [Secret("new", True, [5, 6, 7], "a"), Secret("new", False, [8, 9, 8], "b")]
    losses = np.array([[1.0, 2, 3, 4], [3.0, 1, 3, 9]])
    assert attacks.ranks(losses).tolist() == [1, 3]  # a tie counts against the attacker
    assert attacks.exposures(losses).tolist() == pytest.approx([2, 2 - math.log2(3)])
    found = leaks.recovered(secrets, [[5, 6, 7, 0], [8, 9, 9]])
    figures = leaks.secret_figures(secrets, losses, found, [[1, 6, 7], [8, 1, 9]])["new"]
    assert figures["planted"]["recovered"]["found"] == 1 and figures["planted"]["in_samples"] == [2]
    assert figures["not planted"]["recovered"]["found"] == 0 and figures["not planted"]["in_samples"] == [1]
    assert figures["planted"]["exposure"]["mean"] == 2 and figures["not planted"]["ranks"] == [3]


def test_the_exposure_of_an_unknown_secret():
    """Of uniform ranks 1..R: the mean of log2(R / rank), 1.44 bits for large R; and P[exposure >= x] <= 2^-x."""
    losses = np.random.default_rng(0).random((4000, 256))
    found = attacks.exposures(losses)
    mean = np.log2(256 / np.arange(1, 257)).mean()
    assert found.mean() == pytest.approx(mean, abs=4 * 1.44 / math.sqrt(4000))  # 4 deviations
    assert (found >= 3).mean() < 2**-3 + 4 * math.sqrt(0.11 / 4000)


# ------------------------------------------------------------------ membership


@pytest.mark.parametrize("seed", range(4))
def test_true_positives_are_those_of_a_plain_search(seed):
    draw = np.random.default_rng(seed)
    members, others = draw.integers(0, 30, 200) + 3.0, draw.integers(0, 30, 150) * 1.0  # with ties
    for rate in (0.01, 0.05, 0.5, 1.0):
        best = max((int((members > t).sum()) for t in [-1, *range(40)] if (others > t).mean() <= rate), default=0)
        assert attacks.true_positives(members, others, rate).found == best
    assert attacks.true_positives(members, others, 0.001) is None  # 150 others cannot show 1 in 1,000
    assert attacks.true_positives(members, draw.random(1000), 0.001) is not None
    pairs = [(m > o) + 0.5 * (m == o) for m, o in itertools.product(members, others)]
    value, low, high = attacks.area(members, others)
    assert value == pytest.approx(np.mean(pairs)) and low < value < high
    false, true = attacks.curve(members, others)
    assert np.trapezoid(true, false) == pytest.approx(value) and (false[-1], true[-1]) == (1, 1)


@pytest.mark.parametrize("found, of", [(0, 10), (3, 10), (10, 10), (17, 400)])
def test_intervals_of_shares(found, of):
    share = attacks.Share(found, of)
    exact = binomtest(found, of).proportion_ci(0.95, "exact")
    assert share.interval == pytest.approx((exact.low, exact.high)) and share.as_json()["value"] == found / of


def test_delong_s_interval_covers():
    """Of sound 95 % intervals at least 90 % of 300 hold the true area, 1/2 (4 deviations below are 0.9)."""
    draw = np.random.default_rng(1)
    inside = sum(low <= 0.5 <= high for _, low, high in
                 (attacks.area(draw.random(80), draw.random(60)) for _ in range(300)))
    assert 270 <= inside


# ------------------------------------------------------------------ likeness


def test_distinct_and_divergence():
    one, other = [["a", "b", "a"]], [["a", "b"], ["c"]]
    assert likeness.distinct(one, 1) == pytest.approx(2 / 3) and likeness.distinct(one, 4) == 0
    p, q = np.array([2, 1, 0]) / 3, np.array([1, 1, 1]) / 3
    m = (p + q) / 2
    plain = sum(0.5 * a * math.log2(a / c) for part in (p, q) for a, c in zip(part, m) if a)
    assert likeness.divergence(one, other, 1) == pytest.approx(plain)
    assert likeness.divergence(one, one, 2) == 0 and likeness.divergence(one, [["x"]], 1) == pytest.approx(1)
    assert likeness.divergence(one, [["x"]], 2) == 1 and likeness.divergence([["y"]], [["x"]], 2) == 0


def test_self_bleu():
    pytest.importorskip("nltk")
    from nltk.translate.bleu_score import sentence_bleu

    texts = ["a b c d e f", "a b c d x y", "a b c d e g"]
    theirs = np.mean([sentence_bleu([t.split() for t in texts if t is not text], text.split()) for text in texts])
    assert likeness.self_bleu(texts) == pytest.approx(theirs, abs=1e-6)
    assert likeness.self_bleu(["same words in all"] * 5) == pytest.approx(1) and likeness.self_bleu(["one"]) == 0


def test_lengths():
    found = likeness.lengths([["a"] * n for n in (1, 2, 3)], [["a"] * n for n in (2, 3, 4)])
    assert found["mean"] == 2 and found["quantiles"]["0.5"] == 2 and found["distance"] == pytest.approx(1 / 3)


def test_the_frontier():
    """Equal histograms give 1; of disjoint ones the curve is (w^c, (1 - w)^c), whose area is c B(c, c + 1)."""
    p, q = np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.25, 0.75])
    c = frontier.SCALE
    disjoint = c * math.exp(math.lgamma(c) + math.lgamma(c + 1) - math.lgamma(2 * c + 1))
    assert frontier.area_under_frontier(p, p) == pytest.approx(1, abs=1e-4)
    assert frontier.area_under_frontier(p, q) == pytest.approx(disjoint, rel=0.02)  # of 100 mixtures
    between = frontier.area_under_frontier(p, np.array([0.25, 0.25, 0.25, 0.25]))
    assert disjoint < between < 1 and between == pytest.approx(
        frontier.area_under_frontier(np.array([0.25, 0.25, 0.25, 0.25]), p), abs=0.01)


def test_mauve_tells_clusters_apart():
    draw = np.random.default_rng(0)
    one, two, far = (draw.normal(centre, 0.1, (120, 6)) for centre in (1, 1, [1, -1, 1, -1, 1, -1]))
    assert frontier.mauve(one, two) > 0.7 > 0.1 > frontier.mauve(one, far)


def test_an_embedder_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for folder, said in ((tmp_path / "absent", "holds no config.json"), (tmp_path, "cannot be loaded")):
        with pytest.raises(UserError, match=said):
            frontier.Embedder(str(folder))


def test_a_real_embedder(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    config = transformers.GPT2Config(vocab_size=3, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2Model(config)
    model.save_pretrained(tmp_path)
    embed = frontier.Embedder(str(tmp_path))
    found = embed(["a b", "b"])
    own = model.eval()(input_ids=embed.torch.tensor([[0, 1]])).last_hidden_state[0, -1].detach().numpy()
    assert found.shape == (2, 8) and found[0] == pytest.approx(own, abs=1e-5)
    with pytest.raises(UserError, match="makes no token"):
        embed([""])


# ------------------------------------------------------------------ the command


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path)


def test_the_judgement(world, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["judge_samples.py", *flags(world)])
    judge_samples.main()
    found, printed = json.loads((world / "out.json").read_text()), capsys.readouterr().out
    assert found["copies"]["private"]["duplicates"]["exact"]["found"] == 1
    assert found["copies"]["private"]["spans"]["longest"] == 6
    assert found["membership"]["loss"]["members"] == 5  # the secret's line is none
    assert found["membership"]["reference"]["area"]["value"] == pytest.approx(2 / 3)
    secrets = found["secrets"]["new tokens"]
    assert secrets["planted"]["ranks"] == [1] and secrets["planted"]["recovered"]["found"] == 1
    assert secrets["not planted"]["recovered"]["found"] == 0 and secrets["planted"]["in_samples"] == [3]
    first = found["examples"][0]
    begin, end = first["marked"]
    assert first["sample"][begin:end] == "the dog sat on the mat" == first["nearest"]
    assert {line["mark"] for line in found["table"]} == {judge_samples.MARK, judge_samples.YARDSTICK_ALONE}
    own = {line["figure"] for line in found["table"] if line["mark"] != judge_samples.MARK}
    assert all(name.startswith(("mean length", "distinct", "self-BLEU")) for name in own)  # of the samples alone
    assert all(line["figure"] in printed for line in found["table"])
    assert printed.count(judge_samples.MARK) == len(found["table"])


@pytest.mark.parametrize("changed, words", [
    ({"private": "held_out.txt", "held_out": "held_out.txt"}, ["--held_out", "files swapped"]),
    ({"samples": "absent"}, ["--samples", "absent", "cannot be read"]),
    ({"losses": None}, ["--reference", "--losses"]), ({"secrets": None}, ["--searched", "--secrets"]),
    ({"embedder": "absent"}, ["--embedder", "leave it out"]), ({"json": "private.jsonl"}, ["--json", "lost"]),
])
def test_mistakes_of_the_command(world, changed, words):
    assert_user_error(run_script(JUDGE, *flags(world, **changed), cwd=ROOT), *words)


SPOILED = {
    "a list": ("samples", ["[1]"], "not a JSON object|is no list|want"),
    "no text": ("samples", [{"text": "a", "tokens": []}, {"words": "b"}], r"samples:2: got"),
    "half of a line": ("private", ['{"text": "a"}', '{"text": '], r"private:2: not JSON"),
    "empty": ("held_out", [], "is empty"),
    "contained": ("held_out", ["the cat sat on the mat", "the dog sat on the mat", "new"], "files swapped"),
    "swapped": ("private", ["the owl flew", "a fox runs"], "files swapped"),
    "losses of another file": ("losses", [{"files": {"train": {"losses": [1]}}}], "no losses of"),
    "no numbers": ("losses", [{"files": {"train": {"losses": ["a"]}}}], "no list of numbers"),
    "not finite": ("losses", ['{"files": {"train": {"losses": [NaN]}}}'], "not finite"),
    "too few rivals": ("secrets", [{"repeats": 1, "others": 9, "secrets": []}], "losses of candidates"),
    "no secrets": ("secrets", [{"secrets": 1}], "not of the form"),
    "too few searches": ("searched", [{"predict": [1]}], "want one for each"),
    "no ids": ("searched", [{"predict": "a"}, {"predict": [1]}], "no list of token ids"),
}


@pytest.mark.parametrize("name, lines, said", SPOILED.values(), ids=SPOILED)
def test_spoiled_files(world, monkeypatch, name, lines, said):
    write(world / name, lines)
    monkeypatch.setattr("sys.argv", ["judge_samples.py", *flags(world, **{name: name})])
    with pytest.raises(UserError, match=said):
        judge_samples.main()
    assert not (world / "out.json").exists()
