"""Readers of files under random damage: every file is read, or refused as a user's mistake; nothing else is raised.

hypothesis chooses the damage, so what it finds is shrunk to the least damage that does it, and printed.
"""

import contextlib
import json
import os
import pathlib
import random
import shutil
import time

import pytest
import safetensors.torch
from hypothesis import HealthCheck, Phase, given, settings, strategies
from hypothesis import seed as seeded

from base import errors
from corpus.gpt2_tokenizer import ALPHABET, END_OF_TEXT
from helpers.small_runs import VOCABULARY, material


def read_everything(kind: str, path: str, world: pathlib.Path) -> None:
    """What the scripts do with a file of this kind before they work with it."""
    import format_converting_webnlg
    import gpt2_decode
    import gpt2_encode
    from corpus import author_cache, examples, records
    from corpus.tokenizer import load_tokenizer
    from privacy.ledger import read_ledger
    from privacy.plan import epsilons
    from weights import checkpoint, foreign
    if kind == "tokens":
        examples.read_examples(path, "--train_data", VOCABULARY, 32)
    elif kind == "formatted":
        list(gpt2_encode.read_examples(path))
    elif kind == "predictions":
        gpt2_decode.read_predictions(path, 2, load_tokenizer(str(world / "vocab")))
    elif kind == "authors":
        source = records.Source(path, "--train_file", str(world / "vocab"), 24)
        words = records.WordTokens(load_tokenizer(source.vocab))
        for part in author_cache.scan(path, source.flag)[1]:
            author_cache.tokenise(part, source, words)
    elif kind == "webnlg":
        list(format_converting_webnlg.convert(path, "2017", "en"))
    elif kind == "ledger":
        epsilons(read_ledger(path), 1e-5)
    elif kind == "tokenizer":
        load_tokenizer(os.path.dirname(path)).encode("a pub")
    elif kind in ("safetensors", "bin", "ours", "index"):
        checkpoint.load_model(path, str(material() / "tiny"))
    elif kind == "config":
        foreign.read_config(path)


def read_scores(path: str, world: pathlib.Path) -> None:
    import segments
    read = 0
    for name in (path, path + ".tsv", path + ".csv"):
        if name != path:
            os.replace(path if name.endswith("tsv") else path + ".tsv", name)
        for references, outputs in ((name, str(world / "sys.txt")), (str(world / "ref.txt"), name), (name, name)):
            with contextlib.suppress(segments.UserError):
                segments.load_segments(references, outputs)
                read += 1
    if not read:
        errors.fail("refused in every form")


def spoil(draw: random.Random, content: bytes) -> bytes:
    """A few changes of the kinds that disks, editors and attackers make."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        at, length = draw.randrange(len(content) + 1), draw.choice([1, 1, 4, 50])
        token = draw.choice([b"null", b"NaN", b"1e999", b"-1", b"[", b"{}", b"\n", b"\0", b'"', b"\xff", b"9" * 30,
                             b"true", b"\xe2\x80\xa8",
                             bytes(draw.randrange(256) for _ in range(length))])
        kind = draw.randrange(5)
        if kind == 0:
            content[at:at + length] = token
        elif kind == 1:
            content[at:at] = token
        elif kind == 2:
            del content[at:at + length]
        elif kind == 3 and content:
            content[min(at, len(content) - 1)] ^= 1 << draw.randrange(8)
        else:
            content = content[:at] if draw.random() < 0.3 else content + content[at:at + length]
    return bytes(content)


def fuzz(world: pathlib.Path, folder: pathlib.Path, seconds: float, seed: int) -> dict[str, tuple[int, int]]:
    """Spoil sound files and read them for a while, every kind in turn: {kind: (files, refused)}. Anything but an answer
    or a UserError raises, with the least damage that does it in `folder`/found.KIND."""
    sound = {"tokens": world / "contexts.jsonl", "formatted": world / "formatted.jsonl",
             "predictions": world / "predict.jsonl",
             "ledger": world / "run/privacy_ledger.jsonl", "safetensors": world / "tiny/model.safetensors",
             "bin": world / "tiny.bin",
             "ours": world / "run/model.2.pt", "config": world / "tiny/config.json", "scores": world / "ref.txt",
             "authors": folder / "sound.authors", "webnlg": folder / "sound.webnlg"}
    sound["authors"].write_text('{"author": "a", "content": "one two"}\n{"author": "b", "content": "x \\u00e9"}\n')
    sound["webnlg"].write_text('{"entries": [{"1": {"category": "Food", "lexicalisations": [{"lex": "a", "comment": '
                               '"good"}], "modifiedtripleset": [{"subject": "a", "property": "b", "object": "c"}]}}]}')
    sound["index"], sound["tokenizer"] = folder / "sound.index", folder / "sound.tokenizer"
    weights = safetensors.torch.load_file(world / "tiny/model.safetensors")
    shutil.copy(world / "tiny/model.safetensors", folder / "shard.safetensors")
    sound["index"].write_text(json.dumps({"weight_map": dict.fromkeys(weights, "shard.safetensors")}))
    symbols = [*sorted(ALPHABET), "ab", END_OF_TEXT]
    model = {"type": "BPE", "vocab": {symbol: i for i, symbol in enumerate(symbols)}, "merges": [["a", "b"]]}
    sound["tokenizer"].write_text(json.dumps({
        "model": model, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}, "normalizer": None,
        "added_tokens": [{"id": 257, "content": END_OF_TEXT}], "post_processor": {"type": "ByteLevel"}}))
    (folder / "vocabulary").mkdir()
    names = {"index": "x.safetensors.index.json", "tokenizer": "vocabulary/tokenizer.json",
             "config": "config.json", "safetensors": "x.safetensors", "bin": "x.bin", "ours": "model.2.pt"}
    count, refused = dict.fromkeys(sound, 0), dict.fromkeys(sound, 0)

    def read(kind: str, content: bytes) -> None:
        path = folder / names.get(kind, kind)
        path.write_bytes(content)
        count[kind] += 1
        try:
            read_scores(str(path), world) if kind == "scores" else read_everything(kind, str(path), world)
        except errors.UserError:
            refused[kind] += 1
        except BaseException:
            (folder / f"found.{kind}").write_bytes(content)
            raise

    end, round_seed = time.monotonic() + seconds, seed
    while time.monotonic() < end:
        round_seed += 1
        for kind, source in sound.items():
            whole = source.read_bytes()

            @seeded(round_seed)
            @settings(max_examples=10, deadline=None, database=None, report_multiple_bugs=False,
                      phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
            @given(strategies.randoms(use_true_random=False))
            def spoil_and_read(draw: random.Random) -> None:
                read(kind, spoil(draw, whole))

            spoil_and_read()
    return {kind: (count[kind], refused[kind]) for kind in sound}


def test_a_reader_that_breaks_is_found(world, tmp_path, monkeypatch):
    """Negative control: a reader that does not expect a wrong type."""
    from corpus import examples
    monkeypatch.setattr(examples, "fail", lambda message: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        fuzz(world, tmp_path, 3, seed=0)
    assert (tmp_path / "found.tokens").exists()


def test_spoiled_files_are_read_or_refused(world, tmp_path):
    """Three seconds of it."""
    result = fuzz(world, tmp_path, 3, seed=0)
    assert all(files >= 5 for files, _ in result.values())


@pytest.mark.slow
def test_spoiled_files_for_ten_minutes(world, tmp_path, capsys):
    result = fuzz(world, tmp_path, 600, seed=random.randrange(2**32))
    with capsys.disabled():
        print(f"\nfiles read, of these refused: {result}")
    assert not (world / "executed").exists()
