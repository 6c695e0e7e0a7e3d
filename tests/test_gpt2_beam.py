"""gpt2_beam.py as a user runs it: references, ranks, kill and resume, every mistake. Loopback only."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import safetensors.torch
import torch

import gpt2_beam
from base.errors import UserError
from decoding.journal import Journal
from helpers.processes import LAUNCHER, ROOT, assert_user_error, environment, free_port, run_script
from helpers.small_runs import server
from model import GPT2Config, GPT2LMModel, LoRAConfig
from weights.checkpoint import load_model, save_checkpoint

SCRIPT = ROOT / "src" / "gpt2_beam.py"
CONFIG = GPT2Config(32, 2, 4, vocab_size=90, n_positions=64)
# The published flags; the paths and the shape are the test's.
PUBLISHED = ("--batch_size 1 --platform local --lora_dim 4 --lora_alpha 32 --beam 10 --length_penalty 0.8 "
             "--no_repeat_ngram_size 4 --repetition_penalty 1.0 --hyperparam").split()
CPU = environment()


def write_lines(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read_predictions(path) -> list[list[int]]:
    records = [json.loads(line) for line in open(path)]
    assert [record["id"] for record in records] == list(range(len(records)))
    assert all(list(record) == ["id", "predict"] for record in records)
    return [record["predict"] for record in records]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A base model in Hugging Face's layout, a training folder of adapters over it, and 40 lines of 25 contexts."""
    folder = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    model = GPT2LMModel(CONFIG, LoRAConfig(4, 32.0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35)
    base = {name: value.clone() for name, value in model.named_parameters() if "lora_" not in name}
    (folder / "base").mkdir()
    safetensors.torch.save_file(base, folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text(json.dumps(
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 90, "n_positions": 64, "model_type": "gpt2"}))
    model.freeze_for_training()
    (folder / "run").mkdir()
    loaded = load_model(str(folder / "base"))
    save_checkpoint(str(folder / "run"), 9, GPT2LMModel(CONFIG, LoRAConfig(4, 32.0)), loaded.base, {})
    save_checkpoint(str(folder / "run"), 10, model, loaded.base, {})
    draw = random.Random(0)
    contexts = [[draw.randrange(90) for _ in range(draw.randint(1, 60))] for _ in range(25)]
    lines = contexts + [draw.choice(contexts) for _ in range(15)]
    draw.shuffle(lines)
    write_lines(folder / "test.jsonl", ({"context": line, "completion": [1, 2]} for line in lines))
    return folder


def flags(project, work_dir, *more) -> list[str]:
    return ["--data", str(project / "test.jsonl"), "--seq_len", "64", "--eval_len", "14", "--work_dir", str(work_dir),
            "--init_checkpoint", str(project / "run"), "--output_file", "predict.jsonl", *map(str, more)]


def launch(processes: int, arguments: list[str], module: str = "torch.distributed.run") -> subprocess.CompletedProcess:
    return run_script("-W", "ignore", "-m", module, "--nproc_per_node", processes, "--master_port", free_port(), SCRIPT,
                      *arguments, env=CPU)


def run_here(monkeypatch, arguments: list[str]) -> None:
    """main() in this process: a mistake costs milliseconds here, seconds as a process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    gpt2_beam.main()


@pytest.fixture(scope="module")
def alone(project, tmp_path_factory):
    """The predictions of one process with the published flags."""
    work_dir = tmp_path_factory.mktemp("alone")
    done = run_script(SCRIPT, *flags(project, work_dir / "made", *PUBLISHED), env=CPU)
    assert done.returncode == 0, done.stderr
    assert "40 lines, 25 different contexts, 25 searched" in done.stdout and "are cut on the left" in done.stdout
    assert os.listdir(work_dir / "made") == ["predict.jsonl"]
    return read_predictions(work_dir / "made" / "predict.jsonl")


@pytest.mark.parametrize("name, more", [
    ("default", "--eval_len 64 --beam 10 --length_penalty 0.8 --no_repeat_ngram_size 4 --repetition_penalty 1.0"),
    ("variant", "--eval_len 40 --beam 4 --length_penalty 1.0 --no_repeat_ngram_size 3 --repetition_penalty 1.2 "
                "--min_length 12")], ids=["default", "variant"])
def test_reference_files(shared, tmp_path, name, more):
    folder = shared / "reference" / "beam"
    done = run_script(SCRIPT, "--data", folder / "contexts.jsonl", "--batch_size", 1, "--seq_len", 512,
                      "--eos_token_id", 628, "--init_checkpoint", folder, "--work_dir", tmp_path,
                      "--output_file", "p.jsonl", *more.split(), env=CPU)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.jsonl").read_text() == (folder / f"expected_{name}.jsonl").read_text()


def test_a_training_folder_needs_no_other_flag_and_its_adapter_counts(project, alone, tmp_path):
    rules = [*PUBLISHED[PUBLISHED.index("--beam"):-1]]
    done = run_script(SCRIPT, *flags(project, tmp_path, *rules), env=CPU)
    assert done.returncode == 0, done.stderr
    assert read_predictions(tmp_path / "predict.jsonl") == alone
    arguments = flags(project, tmp_path, *rules)
    arguments[arguments.index("--init_checkpoint") + 1] = str(project / "base")
    assert run_script(SCRIPT, *arguments, env=CPU).returncode == 0
    assert read_predictions(tmp_path / "predict.jsonl") != alone


def test_padded_rows_are_never_predicted(project, alone, tmp_path, monkeypatch, capsys):
    """A vocabulary of 90 padded to 128 by rows that every state likes best: the same predictions as without them."""
    weights = safetensors.torch.load_file(project / "base" / "model.safetensors")
    trained = torch.load(project / "run" / "model.10.pt", weights_only=True)["model_state_dict"]
    wte = weights["transformer.wte.weight"]
    weights["transformer.wte.weight"] = torch.cat([wte, 9 * wte[:38]])
    config = GPT2Config(32, 2, 4, vocab_size=128, n_positions=64)
    model = GPT2LMModel(config, LoRAConfig(4, 32.0))
    model.load_state_dict({**weights, **trained, "lm_head.weight": weights["transformer.wte.weight"]}, strict=False)
    (tmp_path / "padded").mkdir()
    save_checkpoint(str(tmp_path / "padded"), 1, model, None, {})
    arguments = [*flags(project, tmp_path, *PUBLISHED), "--init_checkpoint", tmp_path / "padded"]
    run_here(monkeypatch, [*arguments, "--eos_token_id", 89])
    assert any(token >= 90 for line in read_predictions(tmp_path / "predict.jsonl") for token in line)
    run_here(monkeypatch, [*arguments, "--vocab_size", 90])
    assert read_predictions(tmp_path / "predict.jsonl") == alone
    assert "rows 90 to 127 are padding beyond --vocab_size 90" in capsys.readouterr().out
    for given, words in ((129, "has 128 ids"), (0, "--vocab_size 0"), (20, "does --vocab_size leave it out")):
        with pytest.raises(UserError, match=words):
            run_here(monkeypatch, [*arguments, "--vocab_size", given])


def test_rows_behind_gpt_2s_own_are_padding_by_default():
    model = GPT2LMModel(GPT2Config(4, 1, 1, vocab_size=50304, n_positions=2))
    kept = model.transformer.wte.weight[:50257].clone()
    model = gpt2_beam.without_padding(model, None)
    assert torch.equal(model.lm_head.weight, kept) and model.config.vocab_size == 50257
    assert GPT2Config(4, 1, 1, vocab_size=50304).end_of_text == model.config.end_of_text == 50256
    assert gpt2_beam.without_padding(model, 50257) is model and GPT2Config(4, 1, 1, vocab_size=90).end_of_text == 89


def test_ranks_give_what_one_process_gives(project, alone, tmp_path):
    done = launch(2, flags(project, tmp_path / "two", *PUBLISHED), "torch.distributed.launch")
    assert done.returncode == 0, done.stderr
    assert read_predictions(tmp_path / "two" / "predict.jsonl") == alone
    done = launch(3, flags(project, tmp_path / "three", *PUBLISHED))
    assert done.returncode == 0, done.stderr
    assert read_predictions(tmp_path / "three" / "predict.jsonl") == alone
    assert os.listdir(tmp_path / "three") == ["predict.jsonl"]


def test_more_ranks_than_contexts_and_an_error_on_all(project, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", [{"context": [5, 6]}] * 3)
    done = launch(2, [*flags(project, tmp_path), "--data", data, "--beam", "2"])
    assert done.returncode == 0, done.stderr
    first, *others = read_predictions(tmp_path / "predict.jsonl")
    assert others == [first, first]
    done = launch(2, [*flags(project, tmp_path), "--data", data, "--eos_token_id", "628"])
    assert done.returncode != 0
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1, done.stderr


def test_killed_search_is_resumed(project, tmp_path, monkeypatch):
    draw = random.Random(1)
    data = write_lines(tmp_path / "d.jsonl", ({"context": [draw.randrange(90) for _ in range(20)]} for _ in range(150)))
    slow = [*flags(project, tmp_path / "out"), "--data", data, "--eval_len", "40", "--beam", "6", "--token_budget", "0",
            "--batch_size", "1"]
    journal, output = tmp_path / "out" / "predict.jsonl.journal.0", tmp_path / "out" / "predict.jsonl"
    process = subprocess.Popen([sys.executable, str(SCRIPT), *slow], env=CPU, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 5) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-7])  # the kill tore the last line
    kept = whole[:-7].count(b"\n") - 1

    with pytest.raises(UserError, match="--resume.*other flags"):
        run_here(monkeypatch, [*slow, "--resume", "--beam", 5])
    other = write_lines(tmp_path / "e.jsonl", [{"context": [1]}])
    with pytest.raises(UserError, match="--resume.*other data"):
        run_here(monkeypatch, [*slow, "--resume", "--data", other])
    with pytest.raises(UserError, match="--resume.*other checkpoint"):
        run_here(monkeypatch, [*slow, "--resume", "--init_checkpoint", project / "base"])
    assert journal.read_bytes() == whole[:-7] and not output.exists()

    done = launch(2, [*slow, "--resume", "--batch_size", "16"])  # neither ranks nor batches need be the same
    assert done.returncode == 0, done.stderr
    assert f"150 different contexts, {150 - kept} searched" in done.stdout and 3 <= kept < 150
    assert os.listdir(tmp_path / "out") == ["predict.jsonl"]
    run_here(monkeypatch, [*slow, "--work_dir", tmp_path / "fresh", "--token_budget", 8192])
    assert read_predictions(output) == read_predictions(tmp_path / "fresh" / "predict.jsonl")
    with pytest.raises(UserError, match="nothing to resume"):
        run_here(monkeypatch, [*slow, "--resume"])


@pytest.mark.parametrize("number, words", [
    (None, None), (1, None), (2, "format 2 is newer"), (0, "format 0 is none"), ("1", "format '1' is none")])
def test_a_journal_s_format(tmp_path, monkeypatch, capsys, number, words):
    """A journal from before format numbers is resumed, and one of an unknown format refused and left alone."""
    old = ROOT / "tests" / "fixtures" / "unnumbered"
    search = ["--data", old / "contexts.jsonl", "--init_checkpoint", old, "--seq_len", 6, "--eval_len", 3, "--beam", 3]
    journal = tmp_path / "predict.jsonl.journal.0"
    first, *others = (old / "predict.jsonl.journal.0").read_text().splitlines(keepends=True)
    identity = json.loads(first)
    assert "format" not in identity and len(others) == 5 and not others[-1].endswith("\n")  # a kill tore it
    first = first if number is None else json.dumps({**identity, "format": number}) + "\n"
    journal.write_text("".join([first, *others]))
    resume = [*search, "--work_dir", tmp_path, "--output_file", "predict.jsonl", "--resume"]
    if words:
        with pytest.raises(UserError, match=re.escape(f"--resume {journal}:1: {words}")):
            run_here(monkeypatch, resume)
        assert journal.read_text() == "".join([first, *others])
        return
    run_here(monkeypatch, resume)
    assert "9 different contexts, 5 searched" in capsys.readouterr().out
    run_here(monkeypatch, [*search, "--work_dir", tmp_path / "fresh", "--output_file", "predict.jsonl"])
    assert (tmp_path / "predict.jsonl").read_text() == (tmp_path / "fresh" / "predict.jsonl").read_text()


@pytest.mark.parametrize("first, words", [
    *((first, "damaged") for first in ('{"format": 1, "chec', "", "\0\0\0", "[" * 100000, "1")),
    ("{}", "other checkpoint and data and flags")])
def test_a_journal_without_its_first_line_is_refused(tmp_path, monkeypatch, first, words):
    """It alone says which search the results are of: they were taken for this one's."""
    old = ROOT / "tests" / "fixtures" / "unnumbered"
    journal = tmp_path / "predict.jsonl.journal.0"
    journal.write_text(f'{first}\n{{"context": 0, "predict": [1, 2]}}\n')
    before = journal.read_bytes()
    with pytest.raises(UserError, match=f"--resume:? {journal}(:1:| is of a search with) {words}"):
        run_here(monkeypatch, ["--data", old / "contexts.jsonl", "--init_checkpoint", old, "--seq_len", 6, "--eval_len",
                               3, "--work_dir", tmp_path, "--output_file", "predict.jsonl", "--resume"])
    assert journal.read_bytes() == before


def test_a_new_journal_has_its_format(project, tmp_path, monkeypatch):
    monkeypatch.setattr("decoding.journal.Journal.remove", lambda self: None)
    run_here(monkeypatch, flags(project, tmp_path, "--beam", 1))
    with open(tmp_path / "predict.jsonl.journal.0") as journal:
        assert json.loads(journal.readline())["format"] == 1


def test_a_second_search_into_the_same_output_is_refused(project, tmp_path):
    """It would drop the first one's journal, and each would replace the other's output."""
    work, go = tmp_path / "out", tmp_path / "go"
    wait = ["shell", {"point": "decoding.beam_search:beam_search", "when": "before", "nth": 1,
                      "command": f"until [ -e {go} ]; do sleep 0.1; done"}]
    first = server().start("src/gpt2_beam.py", flags(project, work), faults=[wait])
    journal, deadline = work / "predict.jsonl.journal.0", time.monotonic() + 60
    while not journal.exists() or not journal.stat().st_size:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    before = journal.read_bytes()
    for more in ([], ["--resume"], ["--beam", "2"]):
        second = server().start("src/gpt2_beam.py", [*flags(project, work), *more])
        assert second.wait() == 2 and "predict.jsonl: another search is writing it" in second.error
        assert journal.read_bytes() == before and not (work / "predict.jsonl").exists()
    go.touch()
    assert first.wait() == 0 and os.listdir(work) == ["predict.jsonl"], first.stderr


@pytest.mark.parametrize("more, words", [
    (["--beam", 0], ["--beam 0", "at least 1"]),
    (["--beam", 91], ["--beam 91", "90 tokens"]),
    (["--eos_token_id", 628], ["--eos_token_id 628", "90"]),
    (["--eos_token_id", -1], ["--eos_token_id -1"]),
    (["--eval_len", 64], ["--eval_len 64", "--seq_len 64"]),
    (["--seq_len", 65], ["--seq_len 65", "64 positions"]),
    (["--batch_size", 0], ["--batch_size 0"]),
    (["--min_length", -1], ["--min_length -1"]),
    (["--repetition_penalty", 0], ["--repetition_penalty 0"]),
    (["--length_penalty", "nan"], ["--length_penalty nan"]),
    (["--no_repeat_ngram_size", -1], ["--no_repeat_ngram_size"]),
    (["--fp16"], ["--fp16", "--bf16"]),
    (["--platform", "azure"], ["--platform azure"]),
    (["--lora_dim", 8], ["--lora_dim 8", "rank 4"]),
    (["--lora_dim", 8, "--lora_alpha", 32], ["--lora_dim 8", "rank 4"]),
    (["--lora_alpha", 16], ["--lora_alpha 16", "32"]),
    (["--lora_target", "key"], ["--lora_target key", "query value"]),
    (["--lora_target", "key", "--lora_dim", 4, "--lora_alpha", 32], ["key", "query value"]),
    (["--model_card", "gpt2.sm"], ["--model_card gpt2.sm"]),
    (["--init_checkpoint", "/nowhere"], ["--init_checkpoint /nowhere"]),
    (["--hyperparam", "--init_checkpoint", "/nowhere/model.pt"], ["--hyperparam", "folder"]),
    (["--data", "/nowhere.jsonl"], ["--data /nowhere.jsonl"]),
    (["--resume"], ["--resume", "nothing to resume"]),
    (["--beem", 3], ["--beem"]),
    (["--output_file", "no/such/place.jsonl"], ["--output_file", "no folder"]),
    (["--output_file", ""], ["--output_file"]),
])
def test_mistakes_in_flags(project, tmp_path, monkeypatch, more, words):
    with pytest.raises(UserError) as caught:
        run_here(monkeypatch, flags(project, tmp_path / "out", *more))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lines, words", [
    ([], ["--data", "empty"]),
    (['{"context": [1]}', '{"context": [1'], [":2", "gpt2_encode.py"]),
    (['{"context": [1]}', ""], [":2"]),
    (['{"completion": [1]}'], [":1"]),
    (["[1, 2]"], [":1"]),
    (['{"context": "a b"}'], [":1", "not a list"]),
    (['{"context": [1, true]}'], [":1"]),
    (['{"context": [1, 2.5]}'], [":1"]),
    (['{"context": [1]}', '{"context": []}'], [":2", "empty"]),
    (['{"context": [1, 90]}'], [":1", "90"]),
    (['{"context": [1, -1]}'], [":1", "-1"]),
])
def test_mistakes_in_data(project, tmp_path, monkeypatch, lines, words):
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(lines) + "\n" if lines else "")
    with pytest.raises(UserError) as caught:
        run_here(monkeypatch, flags(project, tmp_path / "out", "--data", data))
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_other_parts(project, tmp_path, monkeypatch):
    """With --lora_target, or with no word about the adapter, a checkpoint of key alone is searched alike."""
    torch.manual_seed(1)
    model = GPT2LMModel(CONFIG, LoRAConfig(4, 32.0, targets=("key",)))
    loaded = load_model(str(project / "base"))
    (tmp_path / "key").mkdir()
    save_checkpoint(str(tmp_path / "key"), 1, model, loaded.base, {})
    found = []
    for more in ((), ("--lora_dim", 4, "--lora_alpha", 32, "--lora_target", "key")):
        run_here(monkeypatch, flags(project, tmp_path, "--init_checkpoint", tmp_path / "key", *more))
        found.append(read_predictions(tmp_path / "predict.jsonl"))
    assert found[0] == found[1]
    with pytest.raises(UserError, match="--lora_target"):
        run_here(monkeypatch, flags(project, tmp_path, "--init_checkpoint", tmp_path / "key", "--lora_dim", 4,
                                    "--lora_alpha", 32))


def test_a_base_model_has_no_adapter(project, tmp_path, monkeypatch):
    for more in (["--lora_dim", 4], ["--lora_dim", 4, "--lora_alpha", 32]):
        with pytest.raises(UserError, match="--lora_dim 4.*no adapter"):
            run_here(monkeypatch, flags(project, tmp_path, "--init_checkpoint", project / "base", *more))


def test_mistakes_are_one_line_and_leave_the_old_output(project, tmp_path):
    (tmp_path / "predict.jsonl").write_text("old")
    assert_user_error(run_script(SCRIPT, *flags(project, tmp_path, "--beam", "0"), env=CPU), "--beam 0")
    assert (tmp_path / "predict.jsonl").read_text() == "old" and os.listdir(tmp_path) == ["predict.jsonl"]
    (tmp_path / "file").write_text("")
    assert_user_error(run_script(SCRIPT, *flags(project, tmp_path / "file" / "x"), env=CPU), "--work_dir")
    broken = (tmp_path / "broken.jsonl")
    broken.write_bytes(b'{"context": [1]}\n\xff\xfe\n')
    assert_user_error(run_script(SCRIPT, *flags(project, tmp_path, "--data", broken), env=CPU), "not UTF-8")


def test_bf16_and_flags_without_effect(project, tmp_path, monkeypatch, capsys):
    """bfloat16 keeps 8 bits: the tokens may differ, most first tokens of a peaked model do not."""
    run_here(monkeypatch, flags(project, tmp_path, "--beam", 3))
    plain = read_predictions(tmp_path / "predict.jsonl")
    run_here(monkeypatch, flags(project, tmp_path, "--beam", 3, "--bf16", "--random_seed", 7))
    rounded = read_predictions(tmp_path / "predict.jsonl")
    assert capsys.readouterr().out.count("--random_seed: has no effect") == 1
    assert sum(a[:1] == b[:1] for a, b in zip(plain, rounded)) > 0.7 * len(plain)


def test_end_of_text_is_the_last_id_of_a_small_vocabulary(project, tmp_path, monkeypatch):
    """Id 89 ends a prediction without being named; two ids that are named, picked among the frequent, do too."""
    run_here(monkeypatch, flags(project, tmp_path, "--beam", 4))
    plain = read_predictions(tmp_path / "predict.jsonl")
    assert all(89 not in tokens[:-1] for tokens in plain)
    assert all(len(tokens) == 14 or tokens[-1] == 89 for tokens in plain)
    often = [token for token, _ in Counter(token for tokens in plain for token in set(tokens)).most_common(2)]
    run_here(monkeypatch, flags(project, tmp_path, "--beam", 4, "--eos_token_id", often[0], "--eos_token_id", often[1]))
    ended = read_predictions(tmp_path / "predict.jsonl")
    assert all(not {89, *often} & set(tokens[:-1]) for tokens in ended)
    assert {tokens[-1] for tokens in ended} >= set(often)


def test_a_file_system_without_locks_or_room(project, tmp_path, monkeypatch, capsys):
    def flock(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    run_here(monkeypatch, flags(project, tmp_path, "--beam", 1))
    assert capsys.readouterr().err.count("has no locks: a second search") == 1
    with (open("/dev/full", "wb", buffering=0) as full,
          pytest.raises(UserError, match="/dev/full: No space left .*--resume")):
        Journal.add(full, {"context": 1})
