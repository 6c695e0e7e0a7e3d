"""The folder that src/export.py writes, opened by transformers: weights, configuration, tokenizer."""

import json
import pathlib
import random

import pytest
import safetensors.torch
import torch
import transformers

from corpus.gpt2_tokenizer import END_OF_TEXT
from corpus.tokenizer import load_tokenizer
from helpers.checkpoints import export
from helpers.foreign_tokenizers import write_tokenizer
from helpers.processes import ROOT
from helpers.small_runs import server, write_model
from model import GPT2Config, GPT2LMModel, LoRAConfig
from weights.checkpoint import load_model, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' remarks on itself

DEMO = ROOT / "vocab" / "demo"
TEXTS = ["", " ", "name : The Vaults | Type : pub | price : more than £ 30\n\n", "  two spaces,\ttab\r\nand ends  ",
         "it's they'll", "café 北京 🙂 ǅ", "\ufeff\u2028 \u00a0", "x" * 500, "1234567 3.14 v1.2"]


def write_run(folder: pathlib.Path, vocabulary: int, inner: int | None = None) -> GPT2LMModel:
    """A whole model with adapters, as a training from random weights leaves it; every parameter random."""
    config = GPT2Config(16, 2, 2, vocab_size=vocabulary, n_positions=40, n_inner=inner, layer_norm_epsilon=1e-4)
    model, generator = GPT2LMModel(config, LoRAConfig(2, 8.0, 0.1)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.freeze_for_training()
    folder.mkdir()
    save_checkpoint(str(folder), 1, model, None, {})
    return model.eval()


@pytest.mark.parametrize("inner", [None, 24])
def test_transformers_finds_every_weight_and_gives_the_same_logits(inner, tmp_path):
    model = write_run(tmp_path / "run", 61, inner)
    folder = export(tmp_path / "run", tmp_path / "out")
    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(theirs, transformers.GPT2LMHeadModel) and theirs.dtype == torch.float32
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any(isinstance(module, torch.nn.Dropout) and module.p for module in theirs.modules())
    assert theirs.config.eos_token_id == 60 and theirs.config.n_inner == inner
    ids = torch.randint(0, 61, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine, other, exact = model(ids), theirs.eval()(ids).logits, theirs.double()(ids).logits
    error = (other - exact).abs().max()
    assert error < 1e-5 * exact.abs().max() and (mine - exact).abs().max() <= 8 * error
    back = load_model(str(folder)).model  # and here it is the merged model, bit for bit
    assert back.lora_config.dim == 0
    torch.testing.assert_close(back(ids), mine, rtol=1e-5, atol=float(8 * error))


@pytest.mark.parametrize("which", ["demo", "GPT-2's own"])
@pytest.mark.parametrize("form", ["merged", "peft"])
def test_the_tokenizer_gives_our_ids(which, form, tmp_path, request):
    vocab = DEMO if which == "demo" else request.getfixturevalue("shared") / "vocab"
    ours = load_tokenizer(str(vocab))
    write_run(tmp_path / "run", ours.vocab_size)
    base = ["--base_name", "x"] if form == "peft" else []
    bare = server().start("src/export.py", ["--init_checkpoint", tmp_path / "run", "--output", tmp_path / "bare"])
    assert bare.wait() == 0 and "none was written; --vocab FOLDER adds one" in bare.stdout
    folder = export(tmp_path / "run", tmp_path / "out", "--vocab", vocab, "--format", form, *base)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    lines = (ROOT / "data" / "demo" / "test.txt").read_text(encoding="utf-8").splitlines()[:100]
    draw = random.Random(0)
    noise = ["".join(chr(draw.choice([draw.randrange(32, 127), draw.randrange(0xA0, 0x2FFF)])) for _ in range(40))
             for _ in range(100)]
    for text in [*TEXTS, *lines, *noise]:
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert len(theirs) == ours.vocab_size and theirs.model_max_length == 40
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_text
    assert theirs.convert_ids_to_tokens(ours.end_of_text) == END_OF_TEXT


def test_what_is_exported_is_read_by_every_script(tmp_path):
    """The folder as --vocab: exported again, for encoding, for decoding and for authors' texts."""
    write_run(tmp_path / "run", 1500)
    first = export(tmp_path / "run", tmp_path / "first", "--vocab", DEMO)
    folder = export(first, tmp_path / "second", "--vocab", first)
    (tmp_path / "whole").mkdir()
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "whole")
    whole = export(first, tmp_path / "third", "--vocab", tmp_path / "whole")
    theirs = transformers.AutoTokenizer.from_pretrained(whole)
    assert theirs("a pub").input_ids == load_tokenizer(str(DEMO)).encode("a pub")
    example = {"context": "name : The Vaults", "completion": "The Vaults is a pub ."}
    (tmp_path / "f.jsonl").write_text(json.dumps(example) + "\n")
    for vocab in (DEMO, folder, whole):
        arguments = ["--vocab", vocab, "--input", tmp_path / "f.jsonl", "--output", tmp_path / "tokens.jsonl"]
        assert server().start("src/gpt2_encode.py", arguments).wait() == 0
        tokens = json.loads((tmp_path / "tokens.jsonl").read_text())
        assert tokens["completion"] == load_tokenizer(str(DEMO)).encode(" " + example["completion"])
        (tmp_path / "p.jsonl").write_text(json.dumps({"id": 0, "predict": tokens["completion"]}) + "\n")
        arguments = ["--vocab", vocab, "--sample_file", tmp_path / "p.jsonl", "--input_file", tmp_path / "f.jsonl",
                     "--output_ref_file", tmp_path / "ref.txt", "--output_pred_file", tmp_path / "pred.txt"]
        assert server().start("src/gpt2_decode.py", arguments).wait() == 0
        assert (tmp_path / "pred.txt").read_text() == example["completion"] + "\n"


@pytest.mark.parametrize("form", ["Llama 2", "Qwen2"])
def test_a_model_with_a_tokenizer_of_its_own_goes_through_every_script(form, tmp_path):
    """Encoded, searched and decoded without --vocab_size, and exported with all files of the tokenizer: the rows behind
    it are never predicted, and its end of text ends a text. The model of 448 rows likes the last one best,
    and the end of text second."""
    write_model(tmp_path / "model", vocabulary=448)
    folder = write_tokenizer(tmp_path / "model", form)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [theirs.eos_token_id]}))
    weights = safetensors.torch.load_file(str(folder / "model.safetensors"))
    weights["ln_f.weight"].zero_()
    weights["ln_f.bias"].fill_(1.0)
    weights["wte.weight"][447], weights["wte.weight"][theirs.eos_token_id] = 2.0, 1.0
    safetensors.torch.save_file(weights, str(folder / "model.safetensors"))
    example = {"context": "name : The Vaults", "completion": "The Vaults is a pub ."}
    (tmp_path / "f.jsonl").write_text(json.dumps(example) + "\n")

    def run(name: str, *arguments: object) -> object:
        done = server().start(f"src/{name}.py", list(arguments))
        assert done.wait() == 0, done.stdout + done.stderr
        return done

    run("gpt2_encode", "--vocab", folder, "--input", tmp_path / "f.jsonl", "--output", tmp_path / "tokens.jsonl",
        "--add_eos")
    tokens = json.loads((tmp_path / "tokens.jsonl").read_text())
    assert tokens["context"] == theirs(example["context"]).input_ids
    both = theirs.decode(tokens["context"] + tokens["completion"], skip_special_tokens=True)
    assert both == " ".join(example.values())
    assert tokens["completion"][-1] == theirs.eos_token_id and theirs.eos_token_id not in tokens["completion"][:-1]

    exported = export(folder, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (exported / name).read_bytes() == (folder / name).read_bytes()
    again = transformers.AutoTokenizer.from_pretrained(exported)
    assert again(TEXTS).input_ids == theirs(TEXTS).input_ids

    adapted = load_model(str(folder), lora_config=LoRAConfig(2, 4.0))  # a training's folder, which has no tokenizer
    adapted.model.freeze_for_training()
    (tmp_path / "run").mkdir()
    save_checkpoint(str(tmp_path / "run"), 1, adapted.model, adapted.base, {})
    for place in (exported, tmp_path / "run"):
        search = run("gpt2_beam", "--data", tmp_path / "tokens.jsonl", "--init_checkpoint", place, "--seq_len", 40,
                     "--eval_len", 6, "--no_repeat_ngram_size", 0, "--work_dir", tmp_path, "--output_file", "p.jsonl")
        assert f"rows {len(theirs)} to 447 are padding" in search.stdout
        (prediction,) = map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
        assert prediction["predict"] == [theirs.eos_token_id]

    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [440]}))  # of another tokenizer
    for name, arguments in (("gpt2_beam", ["--data", tmp_path / "tokens.jsonl", "--seq_len", 40, "--eval_len", 6]),
                            ("export", ["--output", tmp_path / "none"])):
        done = server().start(f"src/{name}.py", ["--init_checkpoint", folder, *arguments])
        assert done.wait() == 2 and "ends a text by 440; give the vocabulary of the model" in done.error, done.stderr
    assert not (tmp_path / "none").exists()

    words = json.dumps({"id": 0, "predict": [*tokens["completion"], *tokens["context"]]})
    (tmp_path / "p.jsonl").write_text(words + "\n")
    run("gpt2_decode", "--vocab", exported, "--sample_file", tmp_path / "p.jsonl", "--input_file", tmp_path / "f.jsonl",
        "--output_ref_file", tmp_path / "ref.txt", "--output_pred_file", tmp_path / "pred.txt")
    assert (tmp_path / "pred.txt").read_text() == example["completion"] + "\n"


def test_generation_ends_where_the_vocabulary_says(tmp_path):
    """The end of text need not be the last id: it is that of --vocab."""
    vocabulary = json.loads((DEMO / "encoder.json").read_text(encoding="utf-8"))
    last = max(vocabulary, key=vocabulary.get)
    other = next(name for name, number in vocabulary.items() if number == 300)
    vocabulary[last], vocabulary[other] = 300, vocabulary[last]
    (tmp_path / "vocab").mkdir()
    (tmp_path / "vocab" / "encoder.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "vocab" / "vocab.bpe").write_bytes((DEMO / "vocab.bpe").read_bytes())
    write_run(tmp_path / "run", len(vocabulary))
    folder = export(tmp_path / "run", tmp_path / "out", "--vocab", tmp_path / "vocab")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == theirs.eos_token_id == 300
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(100 * model.transformer.wte.weight[300])  # it wants to end at once
    generated = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert generated.tolist() == [[1, 2, 3, 300]]


def test_a_killed_export_is_not_taken_for_a_whole_one(tmp_path):
    """The weights come last; an export into what a kill left behind succeeds."""
    write_run(tmp_path / "run", 61)
    kill = ["signal", {"point": "safetensors.torch:save", "when": "before", "nth": 1}]
    arguments = ["--init_checkpoint", tmp_path / "run", "--output", tmp_path / "out"]
    assert server().start("src/export.py", arguments, faults=[kill]).wait() == -9
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".partial"] != []
    assert not list((tmp_path / "out").glob("*.safetensors"))
    export(tmp_path / "run", tmp_path / "out")
    assert load_model(str(tmp_path / "out")).model.config.vocab_size == 61


def test_weights_in_float16(tmp_path):
    """Half the size; every script and transformers read them, rounded to the nearest; refused where they overflow."""
    model = write_run(tmp_path / "run", 61)
    whole, half = export(tmp_path / "run", tmp_path / "a"), export(tmp_path / "run", tmp_path / "b", "--float16")
    sizes = [(pathlib.Path(folder) / "model.safetensors").stat().st_size for folder in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]
    expected = dict(load_model(str(whole)).model.named_parameters())
    for name, value in load_model(str(half)).model.named_parameters():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name].half().float()), name
    assert transformers.AutoModelForCausalLM.from_pretrained(half).dtype == torch.float16
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[3] = 70000.0
    save_checkpoint(str(tmp_path / "run"), 2, model, None, {})
    for flags, word in ((["--float16"], "65504"), (["--float16", "--format", "peft", "--base_name", "x"], "peft")):
        given = ["--init_checkpoint", tmp_path / "run", "--output", tmp_path / "c", *flags]
        run = server().start("src/export.py", given)
        assert run.wait() == 2 and "error: --float16" in run.stderr and word in run.stderr
    assert not (tmp_path / "c").exists()
