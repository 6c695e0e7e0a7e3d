"""Texts of many words, as files give that have lost their line ends: memory grows with their length alone."""

import random
import tracemalloc

import pytest
from pycocoevalcap.rouge.rouge import Rouge

import caption_metrics
import webnlg_scores
from segments import Segments, UserError


def test_rouge_is_pycocoevalcaps():
    """To the bit, over lengths, alphabets, doubled spaces and empty texts."""
    draw = random.Random(3)
    texts = ["", " ", "a", "a  b", *(" ".join(draw.choices("abcdefghij"[: draw.randint(1, 10)], k=draw.randint(1, 30)))
                                     for _ in range(300))]
    for _ in range(300):
        group, output = draw.choices(texts, k=draw.randint(1, 5)), draw.choice(texts)
        assert caption_metrics.rouge_l(group, output) == Rouge().calc_score([output], group)


def test_rouge_of_a_long_text():
    """30,000 words of one kind against every other of them: the table of all pairs has 450 million cells."""
    one, other = " ".join(["word"] * 15000), " ".join(["word", "x"] * 15000)
    tracemalloc.start()
    score = caption_metrics.rouge_l([one], other)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert score == pytest.approx((1 + 1.2**2) * 0.5 * 1 / (1 + 1.2**2 * 0.5)) and peak < 20e6


def test_ter_of_a_long_text_is_refused():
    text = "word " * 6000
    with pytest.raises(UserError, match="seen: text 2: 6000 words against a reference of 6000"):
        webnlg_scores.check_lengths("seen", Segments([""] * 2, [["a"], ["b", text]], ["a", text]))
    webnlg_scores.check_lengths("seen", Segments([""], [["a", text]], ["a"]))
