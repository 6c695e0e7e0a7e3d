"""Lines held out and secrets planted among the others; and the losses of lines, against a plain loop."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

import plant_secrets
import text_losses
from base.errors import UserError
from corpus.tokenizer import load_tokenizer
from helpers.processes import ROOT
from helpers.small_runs import write_model, write_tokens

VOCAB = str(ROOT / "vocab/demo")


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Lines of the demonstration's private text in tokens, as src/gpt2_encode.py writes them."""
    path, tokenizer = tmp_path_factory.mktemp("data") / "train.jsonl", load_tokenizer(VOCAB)
    end = tokenizer.end_of_text
    lines = (ROOT / "data/demo/train.txt").read_text(encoding="utf-8").splitlines()[:400]
    path.write_text("".join(
        json.dumps({"context": [*tokenizer.encode(context), end],
                    "completion": [*tokenizer.encode(f" {text}", after=True), end]}) + "\n"
        for context, text in (line.split("||") for line in lines)))
    return path


def plant(monkeypatch, data, out, *more: object) -> None:
    words = ["--data", data, "--vocab", VOCAB, "--output_dir", out, "--held_out", 50, "--secrets", 3, "--others", 20]
    monkeypatch.setattr("sys.argv", ["plant_secrets.py", *map(str, [*words, *more])])
    plant_secrets.main()


def test_what_is_planted_and_what_is_held_out(monkeypatch, data, tmp_path):
    plant(monkeypatch, data, tmp_path, "--repeats", 2)
    tokenizer = load_tokenizer(VOCAB)
    secrets = json.loads((tmp_path / "secrets.json").read_text(encoding="utf-8"))
    found, train, held_out = secrets["secrets"], read(tmp_path / "train.jsonl"), read(tmp_path / "held_out.jsonl")
    members, planted = train[:350], train[350:]

    def key(line: dict) -> tuple:
        return (*line["context"], -1, *line["completion"])

    assert Counter(map(key, [*members, *held_out])) == Counter(map(key, read(data))) and len(held_out) == 50
    wanted = [{"context": one["context"], "completion": [*one["secret"], tokenizer.end_of_text]}
              for one in found if one["planted"]]
    assert Counter(map(key, planted)) == Counter({key(line): 2 for line in wanted}) and len(wanted) == 6

    used = {token for line in read(data) for token in line["context"] + line["completion"]}
    spelled = {token: word for word, token in tokenizer.tokens().items()}
    assert Counter((one["kind"], one["planted"]) for one in found) == Counter(
        {(kind, planted): 3 for kind in ("new tokens", "ordinary words") for planted in (True, False)})
    for one in found:
        own = [*one["context"][:-1], *one["secret"]]
        assert one["context"][-1] == tokenizer.end_of_text and one["text"] == tokenizer.decode(one["secret"])
        if one["kind"] == "new tokens":
            assert not used.intersection(own)
        else:
            assert used.issuperset(own) and all(spelled[token][0] == "Ġ" and spelled[token][1:].isalpha()
                                                for token in own)
    assert len({tuple(one["context"]) for one in found}) == len(found)

    candidates = read(tmp_path / "candidates.jsonl")
    for k, one in enumerate(found):
        rivals = candidates[21 * k:21 * (k + 1)]
        assert {tuple(line["context"]) for line in rivals} == {tuple(one["context"])}
        assert rivals[0]["completion"][:-1] == one["secret"] and len({key(line) for line in rivals}) == 21
    assert [line["context"] for line in read(tmp_path / "contexts.jsonl")] == [one["context"] for one in found]
    for name, lines in (("train", train), ("held_out", held_out)):
        texts = [line["text"] for line in read(tmp_path / f"{name}_texts.jsonl")]
        assert texts == [tokenizer.decode(line["completion"][:-1]).strip() for line in lines]


def test_the_seed_decides(monkeypatch, data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        plant(monkeypatch, data, tmp_path / name, "--seed", seed)
    one, same, other = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert one == same != other


@pytest.mark.parametrize("more, said", [
    (["--held_out", 400], "--held_out 400: .* none would be left"), (["--secrets", 0], "--secrets 0"),
    (["--others", -1], "--others -1"), (["--data", "absent"], "absent: cannot be read"),
    (["--others", 10**18], "--others 10+: the data have .* choose at most"),
    (["--secrets", 10**18], "--secrets 10+: the data have .* choose at most"),
])
def test_mistakes(monkeypatch, data, tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        plant(monkeypatch, data, tmp_path / "new", *more)
    assert not (tmp_path / "new").exists()


def test_the_data_are_not_overwritten(monkeypatch, data):
    before = data.read_bytes()
    with pytest.raises(UserError, match="--output_dir .*: is the folder of --data"):
        plant(monkeypatch, data, data.parent)
    assert data.read_bytes() == before and [path.name for path in data.parent.iterdir()] == [data.name]


def test_a_corpus_without_ordinary_words_is_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="tokens for secrets of ordinary words"):
        plant(monkeypatch, write_tokens(tmp_path / "few.jsonl", 60, 0), tmp_path / "new")


def losses(monkeypatch, model, output, *files: object, more: tuple = ()) -> dict:
    words = ["--init_checkpoint", model, "--data", *files, "--output", output, *more]
    monkeypatch.setattr("sys.argv", ["text_losses.py", *map(str, words)])
    text_losses.main()
    return json.loads(output.read_text())["files"]


def test_losses_are_those_of_a_plain_loop(monkeypatch, tmp_path):
    from weights.checkpoint import load_trained

    folder = write_model(tmp_path / "model")
    files = [write_tokens(tmp_path / f"{name}.jsonl", 30, seed) for name, seed in (("train", 1), ("held_out", 2))]
    found = losses(monkeypatch, folder, tmp_path / "losses.json", *files)
    model = load_trained(str(folder), None, None, None, None, None).model.eval()
    for file in files:
        for line, loss in zip(read(file), found[file.stem]["losses"]):
            ids, first = line["context"] + line["completion"], len(line["context"])
            with torch.no_grad():
                logs = torch.log_softmax(model(torch.tensor([ids]))[0].double(), -1)
            plain = np.mean([-logs[k - 1, ids[k]].item() for k in range(first, len(ids))])
            assert loss == pytest.approx(plain, abs=1e-5)


def test_mistakes_of_losses(monkeypatch, tmp_path):
    folder, file = write_model(tmp_path / "model"), write_tokens(tmp_path / "train.jsonl", 9, 1)
    (tmp_path / "other").mkdir()
    double = write_tokens(tmp_path / "other/train.jsonl", 9, 2)
    for files, more, said in (
        ((file, double), (), "another file is called train"), ((file,), ("--seq_len", 99), "choose at most 48"),
        ((file,), ("--seq_len", 2), "no scored token left"), ((tmp_path / "absent",), (), "cannot be read"),
    ):
        with pytest.raises(UserError, match=said):
            losses(monkeypatch, folder, tmp_path / "out.json", *files, more=more)
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(UserError, match="there is no folder"):  # before the losses are computed
        losses(monkeypatch, tmp_path / "absent", tmp_path / "new/out.json", file)
