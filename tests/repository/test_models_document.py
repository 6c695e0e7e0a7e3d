"""docs/models.md: its commands run as they stand, on small random folders of the families that they name; its tables
name what the code covers."""

import hashlib
import json
import pathlib
import random
import re
import shlex

import peft
import pytest
import safetensors.torch
import torch
import transformers

from families import FAMILIES
from helpers.foreign_tokenizers import write_tokenizer
from helpers.llamas import write_folder
from helpers.processes import ROOT
from helpers.result_rows import lines_of
from helpers.small_runs import read, server
from llama import LlamaLMModel
from llama_config import ROPE
from weights.checkpoint import load_model

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and peft's remarks on themselves

PAGE = (ROOT / "docs/models.md").read_text(encoding="utf-8")
MODELS = {"Qwen3-0.6B": ("qwen3", "Qwen2"), "Llama-3.2-1B": ("llama 3.1", "Llama 3")}
LINES = 300  # above the commands' batch
DEMO = pathlib.Path("pretrained_checkpoints/demo-llama")


def commands() -> list[list[str]]:
    blocks = "".join(re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines() if line.startswith("python src/")]


def write_model(folder: pathlib.Path, kind: str, form: str) -> None:
    """A folder of transformers with a tokenizer whose ids are the model's rows, as a user downloads it."""
    write_tokenizer(folder, form)
    (folder / "config.json").unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    write_folder(kind, folder, vocab_size=len(tokenizer), max_position_embeddings=256,
                 eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> pathlib.Path:
    """A user's folder after all commands of the page."""
    folder = tmp_path_factory.mktemp("user")
    for name, (kind, form) in MODELS.items():
        write_model(folder / "models" / name, kind, form)
    (folder / "data/e2e").mkdir(parents=True)
    for part, lines in (("train", LINES), ("valid", 9), ("test", 5)):
        text = sorted((ROOT / f"data/demo/{part}.txt").read_text(encoding="utf-8").splitlines(True), key=len)
        (folder / f"data/e2e/{part}.txt").write_text("".join(text[:lines]), encoding="utf-8")
    draw = random.Random(1)
    for name, keys in (("notes", ["content"]), ("pairs", ["prompt", "completion"])):
        lines = [{"patient": n, **{key: " ".join(draw.choices(["tea", "cough", "fever"], k=4)) for key in keys}}
                 for n in range(LINES)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for script, *arguments in (command[1:] for command in commands()):
        run = server().start(script, arguments, cwd=folder)
        assert run.wait() == 0, f"{script}\n{run.stdout[-2000:]}{run.stderr}"
    return folder


def test_every_command_runs(user):
    assert {command[1] for command in commands()} >= {f"src/{name}.py" for name in (
        "fine-tune-dp", "gpt2_ft", "gpt2_beam", "gpt2_encode", "export", "privacy_report")}
    for name, unit in (("notes", "patient"), ("pairs", "patient"), ("qwen", "example")):
        report = read(user / "trained_models" / name)
        assert report["unit"] == unit and 7.9 < report["epsilon_prv"] <= 8
        loaded = load_model(str(user / "trained_models" / name)).model
        assert loaded.lora_config.targets == LlamaLMModel.parts()
    assert len((user / "predictions.txt").read_text(encoding="utf-8").splitlines()) >= 1


def test_the_exported_folders_are_those_of_transformers_and_peft(user):
    """Their logits are the run's. Two layers of width 16 err by some 2^-22 of the largest (tests/test_llama.py)."""
    place = user / "trained_models"
    ours = load_model(str(place / "notes")).model.eval()
    adapter = json.loads((place / "notes_adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "models/Qwen3-0.6B"
    base = transformers.AutoModelForCausalLM.from_pretrained(user / adapter["base_model_name_or_path"])
    tokens = torch.randint(0, ours.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine = ours(tokens)
        for theirs in (transformers.AutoModelForCausalLM.from_pretrained(place / "notes_merged"),
                       peft.PeftModel.from_pretrained(base, place / "notes_adapter")):
            assert (theirs.eval()(tokens).logits - mine).abs().max() < 1e-5 * mine.abs().max()
    for exported in ("notes_merged", "notes_adapter"):
        there, given = (transformers.AutoTokenizer.from_pretrained(folder)
                        for folder in (place / exported, user / "models/Qwen3-0.6B"))
        assert there("tea and <|im_end|>").input_ids == given("tea and <|im_end|>").input_ids
    assert "patient" in (user / "notes.html").read_text(encoding="utf-8")


def test_the_tables_name_what_is_covered():
    tables = {tuple(line): lines_of(part) for part in PAGE.split("\n\n") if part.startswith("| ")
              for line in lines_of(part)[:1]}
    families = next(lines for heads, lines in tables.items() if heads[0] == "`model_type`")
    assert [line["`model_type`"].strip("`") for line in families] == [
        name for family in FAMILIES.values() for name in family.MODEL_TYPES]
    config = next(lines for heads, lines in tables.items() if heads[0] == "of config.json")
    covered = {line["of config.json"]: line["covered"] for line in config}
    rope = next(words for key, words in covered.items() if "rope_parameters" in key)
    assert re.findall(r"`(\w+)`", rope)[1:] == list(ROPE)
    assert f"`{' '.join(LlamaLMModel.parts())}`" in PAGE


# ------------------------------------------------------------------ the demonstration's Llama


def test_the_demonstration_s_llama_is_what_the_page_says():
    (said,) = [part for part in PAGE.split("\n## ") if part.startswith("The demonstration's Llama")]
    folder = ROOT / DEMO
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}  # no account of a run, no folder of another machine
    loaded = load_model(str(folder)).model
    config = loaded.config
    assert (config.model_type, config.num_attention_heads, config.num_key_value_heads) == ("llama", 4, 2)
    assert config.tie_word_embeddings and sum(value.numel() for value in loaded.parameters()) == 979_584
    for path in folder.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert f"| `{path.name}` | {digest} |" in said, path.name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2.1e6
