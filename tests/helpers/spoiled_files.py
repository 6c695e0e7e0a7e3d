"""A folder of sound and of spoiled files: data, weights, model cards, ledgers, runs."""

import json
import os
import pathlib
import pickle
import shutil
import signal
import zipfile

import torch

from helpers.small_runs import flags, start_ranks, write_model, write_tokens

# Copies of a stopped run, of which one file is something that is read without an end.
LINKED = {"zero_ledger": "privacy_ledger.jsonl", "full_ledger": "privacy_ledger.jsonl",
          "pipe_ledger": "privacy_ledger.jsonl", "zero_metrics": "metrics.jsonl", "pipe_metrics": "metrics.jsonl",
          "zero_args": "args.json", "pipe_args": "args.json", "zero_report": "privacy.json", "pipe_lock": ".lock"}
GOOD = '{"context": [1, 2], "completion": [3]}\n'


class Malicious:
    """A pickle that makes a folder where it is loaded without care."""

    def __init__(self, folder: str):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def write_vocabulary(folder: pathlib.Path) -> None:
    """A BPE of 256 bytes, one merge and <|endoftext|>."""
    import tokenizers
    folder.mkdir()
    symbols = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "ab", "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({symbol: number for number, symbol in enumerate(symbols)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\na b\n")


def make_world(root: pathlib.Path) -> pathlib.Path:
    """Fill the folder `root`: what is sound, and beside it what is spoiled in one way each."""
    write_vocabulary(root / "vocab")
    text = {"context": "name : A", "completion": "A is a pub."}
    sound = {
        "e2e.txt": "name : A||A is a pub.\nname : B||B is not.\n", "formatted.jsonl": f"{json.dumps(text)}\n" * 2,
        "predict.jsonl": '{"id": 0, "predict": [65, 66]}\n{"id": 1, "predict": [65]}\n', "ref.txt": "a b\nc\n\nd e\n\n",
        "sys.txt": "a b\nd\n"}
    spoiled = {
        "empty": "", "cut.jsonl": GOOD + '{"context": [1, 2], "comple', "text.jsonl": GOOD + "name : A||A is\n",
        "unscored.jsonl": f'{{"context": {[7] * 32}, "completion": [1]}}\n' * 3,
        "list.jsonl": GOOD + "[1, 2]\n", "strings.jsonl": GOOD + '{"context": "a", "completion": "b"}\n',
        "half_strings.jsonl": GOOD + '{"context": [1], "completion": "b"}\n',
        "booleans.jsonl": GOOD + '{"context": [true, 2], "completion": [3]}\n',
        "booleans_alone.jsonl": GOOD + '{"context": [true], "completion": [false]}\n',
        "floats.jsonl": GOOD + '{"context": [1.5], "completion": [2]}\n',
        "nested.jsonl": GOOD + '{"context": [[1]], "completion": [[2]]}\n',
        "no_completion.jsonl": GOOD + '{"context": [1], "completion": []}\n', "blank.jsonl": GOOD + "\n" + GOOD,
        "no_context.jsonl": GOOD + '{"context": [], "completion": [1]}\n',
        "missing_key.jsonl": GOOD + '{"context": [1]}\n',
        "large_id.jsonl": GOOD + '{"context": [60], "completion": [1]}\n',
        "negative.jsonl": GOOD + '{"context": [1], "completion": [-1]}\n',
        "huge_id.jsonl": GOOD + '{"context": [100000000000000000000], "completion": [1]}\n',
        "deep.jsonl": "[" * 100000 + "\n",
        "no_bars.txt": "name : A||x\nname : B|x\n", "no_text.txt": "name : A||x\nname : B|| \n",
        "half_pair.jsonl": '{"context": "a", "completion": "\\ud800"}\n',
        "numbers.jsonl": '{"context": 1, "completion": 2}\n',
        "no_json.jsonl": "context\n", "no_predict.jsonl": '{"id": 0, "predict": ["a"]}\n',
        "wild_id.jsonl": '{"id": 7, "predict": [1]}\n',
        "wild_token.jsonl": '{"id": 0, "predict": [999]}\n', "one_predict.jsonl": '{"id": 0, "predict": [1]}\n',
        "two_empty.txt": "a\n\n\nb\n", "three.txt": "a\nb\nc\n", "ragged.csv": "MR,ref\na,b\nc\n",
        "no_header.tsv": "a\tb\tc\n",
        "keys.txt": "1\n", "bad_keys.txt": "1\nb\n", "half.json": '{"entries": [',
        "entries.json": '{"entries": [{"1": {"category": "Food", "lexicalisations": [{"lex": 3}], "modifiedtripleset": '
                        '[{"subject": "a", "property": "b", "object": "c"}]}}]}',
        "triples.json": '[{"tripleset": [["a", "b"]], "annotations": [{"text": "x"}]}]',
        "authors.jsonl": '{"author": "a", "content": "one two"}\n{"author": "b"}\n', "scores.json": "[1]",
        "metrics.jsonl": '{"step": 1, "loss": 2.0}\n[2]\n'}
    for name, content in {**sound, **spoiled}.items():
        (root / name).write_text(content)
    (root / "latin1.jsonl").write_bytes(GOOD.encode() + b'{"context": [1], "completion": [1], "cate": "\xe9"}\n')
    (root / "latin1.txt").write_bytes("name : A||Caf\xe9\n".encode("latin-1"))
    write_tokens(root / "train.jsonl", 40, 1)
    write_tokens(root / "valid.jsonl", 7, 2)
    write_tokens(root / "contexts.jsonl", 2, 2)
    write_model(root / "tiny")
    write_model(root / "other", vocabulary=70)
    (root / "folder").mkdir()
    (root / "no_config").mkdir()
    whole = (root / "tiny/model.safetensors").read_bytes()
    (root / "no_config/model.safetensors").write_bytes(whole)
    (root / "cut.safetensors").write_bytes(whole[:2000])
    (root / "text.bin").write_text("not a checkpoint")
    weights = {name: tensor for name, tensor in torch.load(make_bin(root), weights_only=True).items()}
    torch.save({name: weights[name] for name in list(weights)[1:]}, root / "lacks.bin")
    torch.save({**weights, "h.9.ln_1.weight": torch.ones(16)}, root / "unknown.bin")
    torch.save({**weights, "wte.weight": torch.ones(60, 17)}, root / "shape.bin")
    torch.save([1, 2], root / "list.bin")
    for name, content in {"dora": {"peft_type": "LORA", "use_dora": True}, "loha": {"peft_type": "LOHA"},
                          "no_base": {"peft_type": "LORA", "base_model_name_or_path": "gpt2"}}.items():
        (root / name).mkdir()
        (root / name / "adapter_config.json").write_text(json.dumps(content))
        (root / name / "adapter_model.safetensors").write_bytes(whole)
    with open(root / "malicious.bin", "wb") as handle:
        pickle.dump({"wte.weight": Malicious(str(root / "executed"))}, handle)
    with zipfile.ZipFile(root / "malicious_zip.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Malicious(str(root / "executed"))))
        archive.writestr("archive/version", "3\n")
    (root / "evil_adapter").mkdir()
    (root / "evil_adapter/adapter_model.bin").write_bytes((root / "malicious.bin").read_bytes())
    for name, content in {"not_json": "{", "a_list": "[]", "no_layers": '{"n_embd": 16}',
                          "heads": json.dumps({"vocab_size": 60, "n_positions": 48, "n_embd": 16, "n_layer": 2,
                                               "n_head": 3}),
                          "untied": json.dumps({"vocab_size": 60, "n_positions": 48, "n_embd": 16, "n_layer": 2,
                                                "n_head": 2,
                                                "tie_word_embeddings": False})}.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(content)
    stop = ["signal", {"point": "optimizer:AdamW.step", "when": "after", "nth": 2, "number": signal.SIGTERM}]
    for name in ("run", "damaged_run", "torn_only"):
        (rank,) = start_ranks(flags(root / name, train_data=root / "train.jsonl"), 1, {0: [stop]})
        assert rank.wait() == 143
    ledger = root / "damaged_run/privacy_ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"sigma": 0.8', '"sigma": 8.0', 1))
    os.truncate(root / "torn_only/privacy_ledger.jsonl", 30)
    (root / "torn_only/privacy.json").unlink()
    shutil.copytree(root / "run", root / "other_report")
    report = root / "other_report/privacy.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "epsilon_prv": 0.01, "train_runtime": 1.0}))
    for name, file in LINKED.items():
        shutil.copytree(root / "run", root / name)
        (root / name / file).unlink()
        if name.startswith("pipe"):
            os.mkfifo(root / name / file)
        else:
            os.symlink("/dev/" + name.split("_")[0], root / name / file)
    return root


def make_bin(root: pathlib.Path) -> pathlib.Path:
    import safetensors.torch
    torch.save(safetensors.torch.load_file(str(root / "tiny/model.safetensors")), root / "tiny.bin")
    return root / "tiny.bin"
