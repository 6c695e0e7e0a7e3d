"""The privacy card: each figure recomputed from the ledger's raw records, both forms, and where nothing is claimed."""

import hashlib
import html.parser
import json
import math
import re

import pytest

from base.errors import UserError
from helpers.ledgers import make
from privacy import accounting, attack_risk
from privacy.accounting import Phase
from privacy.ledger import FILE_NAME, NAMES, read_ledger
from run import card
from run.risk_words import percent, up

SETTINGS = {"N": 2000, "q": 0.02, "clip": 1.5, "steps_per_epoch": 50, "noise_source": "os"}
EARLIER = {"steps_charged": 7, "epsilon_prv": 1.5, "delta": 1e-5, "unit": "example", "folder": "/home/someone/secret"}
REPORT = {"disclosed": ["validation <loss> of every epoch", "initial weights of /home/someone/secret, whose own"],
          "initial_weights": [EARLIER]}


def write_ledger(folder, attempts, **changed) -> None:
    """attempts: (first step, last step, settings that this attempt changes)."""
    for number, (first, last, changes) in enumerate(attempts):
        make(folder, range(first, last + 1), number > 0, tuple(changes), **{**SETTINGS, **changed, **changes})


def phases_of(path) -> list[Phase]:
    """The Poisson steps of a ledger, from its lines."""
    counts: dict[tuple[float, float], int] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        counts[record["sigma"], record["q"]] = counts.get((record["sigma"], record["q"]), 0) + 1
    return [Phase(sigma, q, count) for (sigma, q), count in counts.items()]


def collected(folder, report=REPORT, prior=0.5) -> card.Card:
    path = str(folder / FILE_NAME)
    return card.collect(path, read_ledger(path), report, prior)


def test_every_figure_is_that_of_the_ledger(tmp_path):
    write_ledger(tmp_path, [(1, 40, {}), (31, 70, {"sigma": 1.0})])
    (tmp_path / "args.json").write_text(json.dumps({"versions": {"python": "3.11", "torch": "2.13"}}))
    phases, found = phases_of(tmp_path / FILE_NAME), collected(tmp_path, prior=0.2)
    rows = {}
    for term, words in found.rows:
        rows.setdefault(term, []).append(words)
    for words, delta in ((rows["Privacy loss budget"][0], 1e-5), (rows[""][0], 1 / 20_000)):
        epsilon, at = map(float, re.findall(r"\d[\d.e-]*", words)[:2])
        assert epsilon == pytest.approx(accounting.epsilon_prv(phases, delta), abs=6e-5) and at == delta
        pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
        parts = [pld.from_gaussian_mechanism(p.sigma, sampling_prob=p.q).self_compose(p.steps) for p in phases]
        truth = parts[0].compose(parts[1])
        assert 0.999 * truth.get_epsilon_for_delta(delta) < epsilon < truth.get_epsilon_for_delta(delta) + 0.012
    risk = attack_risk.attack_risk(phases)
    for rate in (0.001, 0.01, 0.05):
        assert rows[f"Attack, {rate * 100:g} % false positives"] == [
            f"at most {percent(float(risk.power(rate)))} of the members found"]
    (words,) = rows["Membership advantage"]
    assert float(words.split()[2]) == pytest.approx(truth.get_delta_for_epsilon(0), abs=2e-4)
    assert rows["Guess, prior 0.2"] == [
        f"right at most {percent(risk.guess(0.2))} of the time; without the model 80 %"]
    assert rows["Posterior, prior 0.2"][0].startswith(f"at most {up(risk.posterior(0.2, 1e-5))},")
    for chance in (1e-6, 1e-4, 0.01):
        assert rows[f"Reconstruction, {chance * 100:g} % without the model"] == [
            f"at most {percent(float(risk.power(chance)))} with it"]
    for point in found.curve:
        rate, *others, permitted = point
        assert others == [float(risk.power(rate, way)) for way in ("worse", "removed", "added")]
        assert permitted == pytest.approx(min(1, math.exp(found.epsilon) * rate + 1e-5,
                                              1 - math.exp(-found.epsilon) * (1 - 1e-5 - rate)))
    assert rows["Parameters"] == [
        f"40 steps with q 0.02 (expected batch 40), sigma {sigma}, C 1.5" for sigma in (0.8, 1)]
    assert rows["Privacy unit"] == ["one example; N = 2000 units, a public constant"]
    assert rows["Neighbouring relation"] == ["add or remove one example"]
    digest = hashlib.sha256((tmp_path / FILE_NAME).read_bytes()).hexdigest()
    last = json.loads((tmp_path / FILE_NAME).read_text().splitlines()[-1])["checksum"]
    assert rows["Ledger digest"] == [f"SHA-256 {digest} of 80 records; checksum of the last {last}"]
    assert rows["Versions"] == ["python 3.11, torch 2.13"]
    assert "80 steps charged in 2 attempt" in rows["Privacy loss accounting"][0]
    assert percent(float(risk.power(0.01))) in " ".join(found.plain)
    assert rows["Disclosed beside the model"] == ["validation <loss> of every epoch"]
    assert "with 7 steps: epsilon 1.5 at delta 1e-05" in rows["Initial weights"][0]


@pytest.mark.parametrize("value", [1e-9, 0.0869229, 0.1234501, 0.999999, 0.05, 1.0, 0.0])
def test_bounds_are_rounded_up(value):
    assert value <= float(up(value)) <= value * 1.0011 and value <= float(percent(value).split()[0]) / 100 + 1e-15
    assert float(percent(value).split()[0]) / 100 <= min(1, value * 1.011)


class Page(html.parser.HTMLParser):
    """The tags that are open, the texts, and the addresses that a page names."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.addresses, self.seen = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.addresses += [value for name, value in attributes if name in ("href", "src", "srcset", "xlink:href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_both_forms_say_the_same_and_name_no_folder(tmp_path):
    write_ledger(tmp_path, [(1, 20, {})], noise_source="seeded")
    found = collected(tmp_path)
    page, text = card.as_html(found), card.as_markdown(found)
    parsed = Page(page)
    assert not parsed.open and not parsed.addresses and {"svg", "polyline", "table"} <= parsed.seen
    assert not parsed.seen & {"script", "link", "img", "iframe"} and "url(" not in page
    shown = re.sub(r"\\(.)", r"\1", text)
    for term, words in found.rows:
        assert term in parsed.texts or not term
        assert words in parsed.texts and " ".join(words.split()) in shown
    for point in found.curve:
        assert all(cell in parsed.texts and cell in shown for cell in card.shown(point))
    for form in (page, text):
        assert "/home/someone" not in form and str(tmp_path) not in form and "NO PRIVACY" in form
        assert "NOT hold against anyone who knows the seed" in form
    assert "<loss>" not in page and "<loss>" not in text.replace("\\<", "")
    head, line, *rows = text.split("\n\n")[2].splitlines()
    assert {re.sub(r"\\\|", "", row).count("|") for row in (head, line, *rows)} == {3}


def test_nothing_is_claimed_without_a_step_or_without_noise(tmp_path):
    (tmp_path / FILE_NAME).write_text("")
    assert collected(tmp_path).plain == [card.NO_CLAIM] and "Nothing is claimed" in card.as_html(collected(tmp_path))
    (tmp_path / "bare").mkdir()
    write_ledger(tmp_path / "bare", [(1, 3, {})], sigma=0.0)
    found = collected(tmp_path / "bare", None)
    assert found.plain[0].startswith("Nothing is claimed") and all(point[1] == 1 for point in found.curve)
    assert "epsilon inf" in card.as_markdown(found) and "polyline" in card.as_html(found)


@pytest.mark.parametrize("found", [5, "stars", {"stars": 1}, None])
def test_public_fields_that_are_no_list_are_left_out(tmp_path, found):
    write_ledger(tmp_path, [(1, 3, {})])
    assert "Public context" in dict(collected(tmp_path, {**REPORT, "public_fields": ["stars"]}).rows)
    assert "Public context" not in dict(collected(tmp_path, {**REPORT, "public_fields": found}).rows)


def test_a_file_is_never_lost(tmp_path):
    (tmp_path / "card.md").write_text("mine")
    for path, words in ((tmp_path / "card.md", "is there already"), (tmp_path / "card.pdf", "ends in .md or .html"),
                        (tmp_path / "no" / "card.md", "no folder")):
        with pytest.raises(UserError, match=words):
            card.check_path(str(path))
    assert (tmp_path / "card.md").read_text() == "mine"


def test_every_mechanism_sampler_and_noise_source_has_its_words():
    for name, words in (("mechanism", card.MECHANISMS), ("sampling", card.SAMPLERS), ("noise_source", card.SEEDS)):
        assert sorted(words) == sorted(NAMES[name])
