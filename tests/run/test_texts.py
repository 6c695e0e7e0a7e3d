"""fine-tune-dp.py on prompts and completions and on units of other names, and with a model's own tokenizer."""

import json
import pathlib
import random

import pytest

from base.distributed import World
from base.errors import UserError
from helpers.author_runs import flags, material, script, train, write_corpus
from helpers.foreign_tokenizers import edit, write_tokenizer
from helpers.llamas import write_folder
from helpers.small_runs import ledger, metrics, read, write_model
from run import setup, texts

WORDS = "the place serves cheap food near a river and it is rated high by families who like tea".split()
LINES = 40


def write_pairs(path: pathlib.Path, count: int = LINES, seed: int = 1) -> pathlib.Path:
    """Lines of eight patients, whose names are numbers in half of the lines."""
    draw = random.Random(seed)
    lines = [{"prompt": " ".join(draw.choices(WORDS, k=draw.randrange(4))), "patient": [n % 8, str(n % 8)][n // 8 % 2],
              "completion": " " + " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_run_whose_unit_is_the_line(tmp_path):
    """The report, the ledger, the terminal and the log say so; delta is 1/N of lines."""
    work = tmp_path / "run"
    (run,) = train(flags(work, train_file=write_pairs(tmp_path / "p.jsonl"), eval_fraction=0.1))
    report, records = read(work), ledger(work)
    N = report["N"]
    assert N + report["held_out"]["units"] == LINES and report["held_out"]["texts"] == LINES - N > 0
    assert (report["unit"], report["relation"], report["delta"]) == ("line", "add or remove one line", 1 / N)
    assert report["held_out"]["by"] == "line" and {record["unit"] for record in records} == {"line"}
    assert report["contributions"].keys() == {"texts", "samples_per_unit", "texts_per_unit", "texts_never_used",
                                              "texts_never_used_expected"}
    assert any("numbers of lines" in words for words in report["disclosed"])
    assert "the unit is one line of the file" in run.stdout and f"{N} lines, expected batch 8" in run.stdout
    assert f"{LINES} texts of {LINES} lines; " in run.stdout and "[deleted]" not in run.stdout
    assert any("lines_per_s" in line for line in metrics(work))


def test_a_run_whose_unit_a_field_names(tmp_path):
    """With validation data of its own, of which patients and texts are training data, too: both are said."""
    work, path = tmp_path / "run", write_pairs(tmp_path / "p.jsonl")
    held = tmp_path / "held.jsonl"
    held.write_text(path.read_text().splitlines(True)[3] + write_pairs(held, 16, seed=2).read_text())
    (run,) = train(flags(work, train_file=path, eval_file=held, eval_fraction=None, unit_field="patient",
                         per_device_train_batch_size=4, samples_per_unit=2, eval_strategy="steps", eval_steps=3))
    report = read(work)
    assert (report["unit"], report["N"], report["relation"]) == ("patient", 8, "add or remove one patient")
    assert {record["unit"] for record in ledger(work)} == {"patient"} and report["contributions"]["texts"] == LINES
    assert report["contributions"]["samples_per_unit"] == 2 and report["held_out"]["units"] == 8
    assert "the unit is one patient with all lines that name it" in run.stdout
    assert "8 of the 8 validation patients are training patients" in run.stdout
    assert "1 of the 17 validation texts are training texts" in run.stdout
    assert read(work, "args.json")["unit_field"] == "patient"


def test_texts_whose_unit_a_field_names(tmp_path):
    """The form of authors with another unit: the same model as with --author_field, under another name."""
    lines = (material() / "train.jsonl").read_text().replace('"author"', '"user"')
    (tmp_path / "t.jsonl").write_text(lines)
    for name in ("unit_field", "author_field"):
        train(flags(tmp_path / name, train_file=tmp_path / "t.jsonl", **{name: "user"}))
    one, other = (read(tmp_path / name) for name in ("unit_field", "author_field"))
    assert (one["unit"], other["unit"]) == ("user", "author")
    assert one["train_loss"] == other["train_loss"] and one["eval_loss"] == other["eval_loss"]


# ------------------------------------------------------------------ the model's own tokenizer


def foreign_model(folder: pathlib.Path, form: str, rows: int) -> pathlib.Path:
    write_model(folder, vocabulary=rows, positions=48)
    return write_tokenizer(folder, form)


def test_the_tokenizer_of_the_model_s_folder(tmp_path):
    """Without --vocab; rows of the model beyond it are said to be padding."""
    model = foreign_model(tmp_path / "model", "Llama 2", 448)
    (run,) = train(flags(tmp_path / "run", model_name=model, vocab=None, train_file=write_pairs(tmp_path / "p.jsonl")))
    assert "the model 448: its rows from" in run.stdout and "are padding" in run.stdout and not run.stderr
    assert read(tmp_path / "run", "args.json")["vocab"] == str(model)


# ------------------------------------------------------------------ what is refused


def opened(tmp_path: pathlib.Path, **changed: object) -> texts.Texts:
    settings = script().parse(flags(tmp_path / "run", **changed))
    script().check(settings)
    place, card = script().resolve_model(settings.model.init_checkpoint)
    return texts.open_texts(settings, setup.load_weights(settings, World(), place, card), place, World())


def long_prompts(path: pathlib.Path) -> pathlib.Path:
    path.write_text('{"prompt": "' + "tea " * 30 + '", "completion": "x"}\n' + "")
    return path


def one_patient(path: pathlib.Path) -> pathlib.Path:
    path.write_text('{"prompt": "tea", "completion": " x", "patient": 3}\n' * 5)
    return path


REFUSED = {
    "a unit and an author": (dict(unit_field="x", author_field="y"), ["--author_field y", "--unit_field x"]),
    "a unit without a name": (dict(unit_field=" "), ["--unit_field ' '"]),
    "a unit that is the text": (dict(unit_field="prompt"), ["--unit_field prompt", "is the text itself"]),
    "a unit that is not there": (dict(train_file=write_pairs, unit_field="user"), [":1: has no 'user'"]),
    "an author of pairs": (dict(train_file=write_pairs, author_field="patient"), ["--author_field patient",
                                                                                 "whose unit is the line"]),
    "several texts of a line": (dict(train_file=write_pairs, samples_per_author=2), ["--samples_per_author 2",
                                                                                    "--unit_field"]),
    "one patient": (dict(train_file=one_patient, unit_field="patient"), ["all 5 texts are of one patient"]),
    "prompts longer than the block": (dict(train_file=long_prompts), ["holds no text of a line", "leave no room"]),
    "two forms": (dict(train_file=write_pairs, eval_fraction=None,
                       eval_file=lambda path: write_corpus(path, 3)), ["--eval_file", "holds texts", "completions"]),
    "a chat template": (dict(chat_template="x"), ["--chat_template: refused for now"]),
    "another's tokenizer": (dict(vocab=lambda path: write_tokenizer(path, "Llama 3"),
                                 model_name=lambda path: foreign_model(path, "Qwen2", 1500)), ["leave --vocab out"]),
    "a Llama without a tokenizer": (dict(vocab=None, model_name=lambda path: write_folder("qwen2", path) and path), [
        "--vocab: --model_name", "holds no tokenizer.json, and GPT-2's vocabulary is not its own"]),
    "a Unigram model": (dict(vocab=None, model_name=lambda path: edit(
        foreign_model(path, "Llama 2", 1500) / "tokenizer.json", lambda c: c["model"].update(type="Unigram")) or path),
        ["a Unigram model", "is no BPE"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    changed, words = REFUSED[case]
    changed = {name: value(tmp_path / name) if callable(value) else value for name, value in changed.items()}
    with pytest.raises(UserError) as error:
        opened(tmp_path, **changed)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_the_vocabulary_where_no_flag_names_it(tmp_path):
    """That of the model's folder, else the repository's; one that is named counts."""
    model = foreign_model(tmp_path / "model", "Qwen2", 1500)
    found = opened(tmp_path, vocab=None, model_name=model)
    assert (found.digests["vocab"], found.unit, found.corpus.facts["vocab_size"]) == (str(model), "author", 388)
    assert opened(tmp_path).padding == ""
    with pytest.raises(UserError, match="--vocab .*vocab: "):
        opened(tmp_path, vocab=None)
