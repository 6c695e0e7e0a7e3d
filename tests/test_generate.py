"""generate.py as a user runs it: checkpoints, prompts, ranks, kill and resume, every mistake. Loopback only."""

import json
import re
import shutil
import sys

import pytest
import torch

import generate
from base.errors import UserError
from base.files import atomic_write
from corpus.tokenizer import load_tokenizer
from helpers.author_runs import VOCAB
from helpers.foreign_tokenizers import edit, write_tokenizer
from helpers.llamas import write_folder
from helpers.processes import LAUNCHER, ROOT, rank_environments
from helpers.small_runs import server, write_model
from llama import LlamaLMModel
from model import GPT2LMModel, LoRAConfig
from weights.checkpoint import load_model, save_checkpoint
from weights.peft_format import WEIGHTS

SCRIPT = "src/generate.py"
PROMPTS = ["the place serves", "", "cheap food near a river and it is rated", "tea"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """base/, a random model of the demo vocabulary in Hugging Face's layout; run/, a training's folder of adapters over
    it; prompts.txt, and the same as token ids."""
    folder = tmp_path_factory.mktemp("project")
    base = write_model(folder / "base", vocabulary=1500, positions=64)
    loaded = load_model(str(base))
    torch.manual_seed(1)
    model = GPT2LMModel(loaded.model.config, LoRAConfig(2, 8.0))
    model.load_state_dict(loaded.model.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.5)
    model.freeze_for_training()
    (folder / "run").mkdir()
    save_checkpoint(str(folder / "run"), 3, model, loaded.base, {})
    (folder / "prompts.txt").write_text("".join(f"{line}\n" for line in PROMPTS))
    tokenizer = load_tokenizer(str(VOCAB))
    contexts = [tokenizer.encode(line) or [tokenizer.end_of_text] for line in PROMPTS]
    (folder / "tokens.jsonl").write_text("".join(json.dumps({"context": ids}) + "\n" for ids in contexts))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in PROMPTS))
    return folder


def flags(project, output, **changed: object) -> list[str]:
    values = {"init_checkpoint": project / "run", "vocab": VOCAB, "num_samples": 3, "max_new_tokens": 12,
              "prompts": project / "prompts.txt", "top_p": 0.95, "seed": 4, "output": output, **changed}
    found: list[str] = []
    for name, value in values.items():
        if isinstance(value, tuple):
            found += [word for one in value for word in (f"--{name}", str(one))]
        elif value is not None:
            found += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return found


def run_here(monkeypatch, arguments: list[str]) -> None:
    """main() in this process: a mistake costs milliseconds here, seconds as a process."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    generate.main()


def read(path) -> list[dict]:
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def sample(monkeypatch, project, tmp_path, **changed: object) -> list[dict]:
    run_here(monkeypatch, flags(project, tmp_path / "samples.jsonl", **changed))
    return read(tmp_path / "samples.jsonl")


@pytest.fixture(scope="module")
def alone(project, tmp_path_factory):
    """The bytes that one process writes."""
    output = tmp_path_factory.mktemp("alone") / "samples.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch, flags(project, output))
    return output.read_bytes()


def test_the_output(alone, project):
    tokenizer, lines = load_tokenizer(str(VOCAB)), alone.decode().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [prompt for prompt in PROMPTS for _ in range(3)]
    for line in lines:
        record = json.loads(line)
        assert list(record) == ["prompt", "text", "tokens", "logprob"] and record["logprob"] < 0
        assert 1 <= len(record["tokens"]) <= 12 and record["text"] == tokenizer.decode_generated(record["tokens"])
    assert len({json.loads(line)["text"] for line in lines}) > 9


def test_neither_batch_nor_ranks_nor_the_form_of_prompts_change_a_text(alone, project, tmp_path, monkeypatch):
    for changed in ({"batch_size": 1}, {"batch_size": 5}, {"prompts": project / "texts.jsonl"},
                    {"prompts": project / "tokens.jsonl"}):
        run_here(monkeypatch, flags(project, tmp_path / "s.jsonl", **changed))
        same = (tmp_path / "s.jsonl").read_bytes() == alone
        records = [(one["text"], one["logprob"]) for one in read(tmp_path / "s.jsonl")]
        assert same or records == [(one["text"], one["logprob"]) for one in map(json.loads, alone.splitlines())]
    ranks = [server().start(SCRIPT, flags(project, tmp_path / "two.jsonl"), env=env) for env in rank_environments(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert (tmp_path / "two.jsonl").read_bytes() == alone
    # more samples of a prompt are further ones
    more = sample(monkeypatch, project, tmp_path, num_samples=4)
    assert [one["tokens"] for n, one in enumerate(more) if n % 4 < 3] == [
        json.loads(line)["tokens"] for line in alone.splitlines()]
    assert sample(monkeypatch, project, tmp_path, seed=5) != [json.loads(line) for line in alone.splitlines()]


def test_a_killed_sampling_is_resumed(alone, project, tmp_path, monkeypatch):
    output, journal = tmp_path / "samples.jsonl", tmp_path / "samples.jsonl.journal.0"
    kept = 5
    with monkeypatch.context() as patch:  # the kill: after so many samples nothing more is written
        drawn, whole = [], generate.sample_all

        def killed(*arguments):
            for one in whole(*arguments):
                if len(drawn) == kept:
                    raise KeyboardInterrupt
                drawn.append(one)
                yield one

        patch.setattr(generate, "sample_all", killed)
        with pytest.raises(KeyboardInterrupt):
            run_here(monkeypatch, flags(project, output, batch_size=2))
    assert journal.read_bytes().count(b"\n") == kept + 1 and not output.exists()
    journal.write_bytes(journal.read_bytes()[:-7])  # and it tore the last line
    for changed, words in (({"seed": 5}, "flags"), ({"temperature": 0.9}, "flags"), ({"stop": ("a",)}, "flags"),
                           ({"prompts": None}, "data"), ({"init_checkpoint": project / "base"}, "checkpoint")):
        with pytest.raises(UserError, match=f"--resume.*other.*{words}"):
            run_here(monkeypatch, flags(project, output, resume=True, **changed))
    ranks = [server().start(SCRIPT, flags(project, output, resume=True), env=env) for env in rank_environments(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert f"{12 - kept + 1} drawn" in ranks[0].stdout and output.read_bytes() == alone
    with pytest.raises(UserError, match="nothing to resume"):
        run_here(monkeypatch, flags(project, output, resume=True))


def test_every_checkpoint_gives_the_same_texts(alone, project, tmp_path, monkeypatch):
    """The training's folder and its file, PEFT's folder and the merged one of export.py; the base alone does not."""
    records = [json.loads(line) for line in alone.splitlines()]
    for name, more in (("peft", ["--format", "peft"]), ("merged", [])):
        run = server().start("src/export.py", ["--init_checkpoint", project / "run", "--output", tmp_path / name,
                                               *more])
        assert run.wait() == 0, run.stderr
    assert (tmp_path / "peft" / WEIGHTS[0]).exists()
    assert sample(monkeypatch, project, tmp_path, init_checkpoint=project / "run" / "model.3.pt") == records
    for name, base in (("peft", project / "base"), ("merged", None)):
        found = sample(monkeypatch, project, tmp_path, init_checkpoint=tmp_path / name, base_checkpoint=base)
        assert [one["text"] for one in found] == [one["text"] for one in records]  # float32 sums in another order
    assert sample(monkeypatch, project, tmp_path, init_checkpoint=project / "base") != records


def test_a_text_ends_before_a_stop(project, tmp_path, monkeypatch):
    whole = sample(monkeypatch, project, tmp_path, max_new_tokens=40)
    stop = ("a", "ee")
    cut = sample(monkeypatch, project, tmp_path, max_new_tokens=40, stop=stop)
    tokenizer, ended = load_tokenizer(str(VOCAB)), 0
    for long, short in zip(whole, cut, strict=True):
        assert short["text"] == re.split("a|ee", long["text"])[0]
        assert short["tokens"] == long["tokens"][:len(short["tokens"])]
        assert not any(one in tokenizer.decode(short["tokens"][:-1]) for one in stop)
        ended += len(short["tokens"]) < len(long["tokens"])
    assert ended > 6


@pytest.mark.parametrize("form", ["Llama 2", "Qwen2"])
def test_a_llama_with_its_own_tokenizer(tmp_path, monkeypatch, form):
    """Prompts begin as in training; a continuation keeps its first space; bfloat16."""
    folder = tmp_path / "model"
    write_folder("llama", folder, vocab_size=420)
    tokenizer = load_tokenizer(str(write_tokenizer(folder, form)))
    (tmp_path / "p.txt").write_text("the old man\n\n")
    values = {"init_checkpoint": folder, "vocab": None, "prompts": tmp_path / "p.txt", "bf16": True}
    records = sample(monkeypatch, tmp_path, tmp_path, **values)
    for one in records:
        assert all(token < tokenizer.vocab_size for token in one["tokens"])
        ids = [*tokenizer.prefix, *tokenizer.encode("the old man")]
        if one["prompt"] and one["tokens"][-1] not in tokenizer.ends:
            assert tokenizer.decode([*ids, *one["tokens"]]) == tokenizer.decode(ids) + one["text"]
    assert sample(monkeypatch, tmp_path, tmp_path, **values, batch_size=2) == records


def test_adapters_find_the_tokenizer_beside_the_frozen_weights(tmp_path, monkeypatch):
    """The run's folder has none, and names the folder of its frozen weights."""
    write_folder("llama", tmp_path / "base", vocab_size=420)
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path / "base", "Llama 2")))
    loaded = load_model(str(tmp_path / "base"))
    model = LlamaLMModel(loaded.model.config, LoRAConfig(2, 8.0))
    model.load_state_dict(loaded.model.state_dict(), strict=False)
    model.freeze_for_training()
    (tmp_path / "run").mkdir()
    save_checkpoint(str(tmp_path / "run"), 3, model, loaded.base, {})
    (tmp_path / "p.txt").write_text("the old man\n")
    values = {"init_checkpoint": tmp_path / "run", "vocab": None, "prompts": tmp_path / "p.txt", "stop": ("no such",)}
    found = sample(monkeypatch, tmp_path, tmp_path, **values)
    assert all(token < tokenizer.vocab_size for one in found for token in one["tokens"])
    del values["vocab"]
    with pytest.raises(UserError, match=f"--vocab {VOCAB}"):  # another one is refused
        sample(monkeypatch, tmp_path, tmp_path, **values)


def test_without_a_start_token(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    write_folder("llama", folder, vocab_size=420)
    write_tokenizer(folder, "Qwen2")
    edit(folder / "tokenizer_config.json", lambda content: content.pop("eos_token"))
    for path in ("config.json", "generation_config.json"):
        edit(folder / path, lambda content: content.pop("eos_token_id", None))
    (tmp_path / "p.txt").write_text("the old man\n\n")
    values = {"init_checkpoint": folder, "vocab": None}
    with pytest.raises(UserError, match="--prompts: not given, and the vocabulary has no start token"):
        sample(monkeypatch, tmp_path, tmp_path, **values, prompts=None)
    with pytest.raises(UserError, match=r"p.txt:2: is empty, and the vocabulary has no start token"):
        sample(monkeypatch, tmp_path, tmp_path, **values, prompts=tmp_path / "p.txt")


MISTAKES = [
    ({"temperature": 0}, "--temperature 0: expected a number from 0.01"),
    ({"temperature": "nan"}, "--temperature nan"),
    ({"top_k": -1}, "--top_k -1: expected at least 0"),
    ({"top_k": 1501}, "--top_k 1501: more than the vocabulary's"),
    ({"top_k": 1, "temperature": 0.5}, "--temperature: means nothing with --top_k 1"),
    ({"top_p": 0}, "--top_p 0: expected a number above 0, at most 1"),
    ({"top_p": 1.5}, "--top_p 1.5: expected a number above 0, at most 1"),
    ({"num_samples": 0}, "--num_samples 0: expected at least 1"),
    ({"max_new_tokens": 0}, "--max_new_tokens 0: expected at least 1"),
    ({"max_new_tokens": 64}, "--max_new_tokens 64: the model has 64 positions"),
    ({"max_new_tokens": 60}, r"prompts.txt:3: the prompt has \d+ tokens.*room for 4"),
    ({"seed": -1}, "--seed -1: expected at least 0"),
    ({"seed": 2**64}, "--seed 18446744073709551616: expected a number below"),
    ({"stop": ("",)}, "--stop ''"),
    ({"batch_size": 0}, "--batch_size 0: expected at least 1"),
    ({"prompts": "nowhere.txt"}, "--prompts nowhere.txt: cannot be read"),
    ({"prompts": "p.jsonl", "lines": '{"context": [1500]}'}, "p.jsonl:1: token id 1500 is outside the vocabulary"),
    ({"prompts": "p.jsonl", "lines": '{"context": []}'}, "p.jsonl:1: the context is empty"),
    ({"prompts": "p.jsonl", "lines": '{"context": "a"}'}, "p.jsonl:1: the context is no list of token ids"),
    ({"prompts": "p.jsonl", "lines": "tea"}, 'p.jsonl:1: wanted {"prompt"'),
    ({"prompts": "p.jsonl", "lines": '{"prompt": "a", "context": [1]}'}, 'p.jsonl:1: wanted {"prompt"'),
    ({"prompts": "p.jsonl", "lines": '{"prompt": 3}'}, "p.jsonl:1: the prompt is no text"),
    ({"prompts": "p.jsonl", "lines": ""}, "--prompts p.jsonl: is empty"),
    ({"init_checkpoint": "nowhere"}, "--init_checkpoint nowhere: no such file or folder"),
    ({"vocab": "nowhere"}, "--vocab nowhere: .* does not exist"),
    ({"output": "nowhere/s.jsonl"}, "--output nowhere/s.jsonl: there is no folder nowhere"),
    ({"output": "."}, "--output .: is a folder"),
    ({"output": "p.jsonl", "prompts": "p.jsonl", "lines": '{"prompt": "a"}'}, "--output p.jsonl: is the input itself"),
    ({"resume": True}, "--resume: nothing to resume"),
]


@pytest.mark.parametrize("changed, words", MISTAKES, ids=[words[:40] for _, words in MISTAKES])
def test_mistakes(project, tmp_path, monkeypatch, changed, words):
    monkeypatch.chdir(tmp_path)
    values = {"output": "samples.jsonl", **changed}
    if (lines := values.pop("lines", None)) is not None:
        (tmp_path / "p.jsonl").write_text(lines)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=words) as caught:
        run_here(monkeypatch, flags(project, **values))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_another_vocabulary_is_refused(project, tmp_path, monkeypatch):
    """Larger than the model, or not the one that the training recorded."""
    small = write_model(tmp_path / "small", vocabulary=1000, positions=64)
    with pytest.raises(UserError, match="--vocab .* has 1500 ids, .* only 1000"):
        sample(monkeypatch, project, tmp_path, init_checkpoint=small)
    run = shutil.copytree(project / "run", tmp_path / "run")
    for digest, vocab in ((generate.digest_vocab(str(VOCAB)), None), ("0" * 64, VOCAB)):
        with atomic_write(str(run / "args.json")) as out:
            json.dump({"vocab": str(VOCAB), "vocab_sha256": digest}, out)
        values = {"init_checkpoint": run, "base_checkpoint": project / "base", "vocab": vocab}
        if vocab is None:  # found where the training found it
            assert sample(monkeypatch, project, tmp_path, **values)
        else:
            with pytest.raises(UserError, match=f"--vocab {VOCAB}: is not the one that .* was trained with"):
                sample(monkeypatch, project, tmp_path, **values)


def test_help_names_the_log_probability():
    run = server().start(SCRIPT, ["--help"], cwd=ROOT)
    assert run.wait() == 0
    words = " ".join(run.stdout.split())
    assert "logprob, which is that of the tokens under the distribution that they are drawn from" in words
