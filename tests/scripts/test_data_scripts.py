"""Conversion, encoding and the download scripts, against the published digests, a mirror and a loopback server."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest

from helpers.processes import ROOT, assert_user_error, bash, fresh_copy, run_script

DEMO_VOCAB = ROOT / "vocab/demo"
LINES = [
    '  name : A | near : "B"||A is near "B" .  ',
    "name : Café | price : £ 3||Café || three pounds",
    "x :\u2028y\u0085z\u00a0||\ttab \u2029 and\x0bmore\x1c",
]


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def convert(source, target, **options):
    return run_script(ROOT / "src/format_converting_e2e.py", source, target, **options)


def encode(source, target, *flags, vocab=DEMO_VOCAB):
    return run_script(ROOT / "src/gpt2_encode.py", "--vocab", vocab, "--input", source, "--output", target, *flags)


# ----------------------------------------------- conversion and encoding


def test_a_line_is_stripped_and_split_at_its_first_bars(tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(LINES) + "\r\n", encoding="utf-8", newline="")
    assert convert(tmp_path / "in.txt", tmp_path / "out.jsonl").returncode == 0
    # Only a line feed ends a line; str.strip takes every white space that Unicode knows off the ends.
    expected = [
        {"context": 'name : A | near : "B"', "completion": 'A is near "B" .'},
        {"context": "name : Café | price : £ 3", "completion": "Café || three pounds"},
        {"context": "x :\u2028y\u0085z\u00a0", "completion": "\ttab \u2029 and\x0bmore"},
    ]
    written = (tmp_path / "out.jsonl").read_bytes()
    assert written.isascii() and written == "".join(json.dumps(example) + "\n" for example in expected).encode()


@pytest.mark.parametrize("flags", [[], ["--add_bos"], ["--add_eos"], ["--add_bos", "--add_eos"]])
def test_special_tokens_go_where_the_flags_say(tmp_path, flags):
    from corpus.tokenizer import load_tokenizer

    (tmp_path / "in.jsonl").write_text('{"context": "name : A", "completion": "It is A .", "cate": "x"}\n' * 3)
    assert encode(tmp_path / "in.jsonl", tmp_path / "out.jsonl", *flags).returncode == 0
    tokenizer = load_tokenizer(str(DEMO_VOCAB))
    end = [tokenizer.end_of_text]
    example = {
        "context": tokenizer.encode("name : A") + end * ("--add_bos" in flags),
        "completion": tokenizer.encode(" It is A .") + end * ("--add_eos" in flags),
    }
    assert (tmp_path / "out.jsonl").read_text() == (json.dumps(example) + "\n") * 3


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["is empty"]),
        (b"a||b\nno bars\n", [":2:", "without ||"]),
        (b"a||b\n\nc||d\n", [":2:", "without ||"]),
        (b"a||b\nc|| \n", [":2:", "empty completion"]),
        (b"||b\n", [":1:", "empty context"]),
        (b"a||b\nc\xff||d\n", [":2:", "not UTF-8", "0xff"]),
        (b"mr,ref\n\"name[A]\",A is.\n", [":1:", "the challenge's CSV", ".txt"]),
        (b"\xef\xbb\xbf\"MR\"\tref\n", [":1:", "the challenge's CSV"]),
        (b"\"name[A], customer rating[low]\",A is.\n", [":1:", "the challenge's CSV"]),
        (b'{"meaning_representation": "name[A]", "human_reference": "A is."}\n', [":1:", "is JSON", ".txt"]),
        (b"<entries>\n", [":1:", "is XML"]),
        (b"a||b\rc||d\r", [":1:", "carriage returns"]),
    ],
)
def test_converting_bad_text(tmp_path, content, words):
    (tmp_path / "in.txt").write_bytes(content)
    (tmp_path / "out.jsonl").write_text("what was there")
    assert_user_error(convert(tmp_path / "in.txt", tmp_path / "out.jsonl"), str(tmp_path / "in.txt"), *words)
    assert (tmp_path / "out.jsonl").read_text() == "what was there"
    assert sorted(os.listdir(tmp_path)) == ["in.txt", "out.jsonl"]


@pytest.mark.parametrize(
    "content, words",
    [
        ("", ["is empty"]),
        ('{"context": "a", "completion": "b"}\n{"context": "a", "compl', [":2:", "not a line of JSON"]),
        ('{"context": "a", "completion": "b"}\n\n', [":2:", "not a line of JSON"]),
        ('["a", "b"]\n', [":1:", "wanted a JSON object"]),
        ('{"context": "a"}\n', [":1:", "'completion'", "None"]),
        ('{"context": ["a"], "completion": "b"}\n', [":1:", "'context'"]),
        ('{"context": "a", "completion": "  "}\n', [":1:", "'completion'", "not empty"]),
        ('{"context": "a\\ud800", "completion": "b"}\n', [":1:", "surrogate"]),
        ('{"context": "\\ufeffa", "completion": "b"}\n', [":1:", "'context'", "byte-order mark"]),
        ("[" * 100000, [":1:", "not a line of JSON"]),
    ],
)
def test_encoding_bad_json_lines(tmp_path, content, words):
    (tmp_path / "in.jsonl").write_text(content)
    (tmp_path / "out.jsonl").write_text("what was there")
    assert_user_error(encode(tmp_path / "in.jsonl", tmp_path / "out.jsonl"), str(tmp_path / "in.jsonl"), *words)
    assert (tmp_path / "out.jsonl").read_text() == "what was there"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_paths_that_cannot_be(tmp_path):
    (tmp_path / "in.txt").write_text("a||b\n")
    (tmp_path / "in.jsonl").write_text('{"context": "a", "completion": "b"}\n')
    text, lines, out = tmp_path / "in.txt", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    assert_user_error(convert(tmp_path / "none.txt", out), "none.txt", "No such file")
    assert_user_error(convert(tmp_path, out), "Is a directory")
    assert_user_error(convert(text, text), "is the input itself")
    assert_user_error(convert(text, tmp_path / "none" / "out.jsonl"), "No such file")
    assert_user_error(encode(tmp_path / "none.jsonl", out), "--input", "No such file")
    assert_user_error(encode(lines, lines), "--output", "is the input itself")
    assert_user_error(encode(lines, tmp_path / "none" / "out.jsonl"), "No such file")
    assert_user_error(encode(lines, out, vocab=tmp_path), "--vocab", "encoder.json does not exist")
    assert not out.exists() and text.read_text() == "a||b\n"


def test_real_data_in_one_command_twice_from_anywhere(tmp_path, shared):
    """The digests of reference/encode.json, made by create_datasets.sh in a fresh copy, from another folder."""
    copy = fresh_copy(tmp_path)
    expected = json.loads((shared / "reference/encode.json").read_text())
    environment = {**os.environ, "PYTHON": sys.executable}
    for said in ("fetched", "already made"):
        process = bash(copy / "scripts/create_datasets.sh", "--mirror", shared, cwd=tmp_path, env=environment)
        assert process.returncode == 0, process.stderr
        assert said in process.stdout
        for name in ("train", "valid", "test"):
            for file in (f"{name}_formatted.jsonl", f"{name}.jsonl"):
                assert digest(copy / "data/e2e" / file) == expected[file], file
    # A torn file is noticed and made again; nothing is left half made.
    (copy / "data/e2e/test.jsonl").write_text("torn")
    assert bash(copy / "scripts/create_datasets.sh", cwd="/", env=environment).returncode == 0
    assert digest(copy / "data/e2e/test.jsonl") == expected["test.jsonl"]
    assert len(os.listdir(copy / "data/e2e")) == 9 and len(os.listdir(copy / "vocab")) == 2


# ------------------------------------------------------ download scripts


def fetch(copy, *arguments) -> subprocess.CompletedProcess:
    """Call the function fetch of fetch.sh in the copy."""
    script = 'set -euo pipefail; source "$0"; parse_arguments ${FLAGS:-}; fetch "$@"'
    return bash("-c", script, copy / "scripts/fetch.sh", *arguments)


class Home(http.server.BaseHTTPRequestHandler):
    """A loopback server that serves `files` and can resume; it notes the Range headers it saw."""

    files: dict[str, bytes] = {}
    ranges: list[str | None] = []

    def do_GET(self):
        self.ranges.append(self.headers["Range"])
        body = self.files.get(self.path)
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if body is None or start >= len(body):
            self.send_error(404 if body is None else 416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:])

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def home(files: dict[str, bytes]):
    """(address, list of Range headers) of a server that runs inside the block."""
    handler = type("OneHome", (Home,), {"files": files, "ranges": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.ranges
        finally:
            server.shutdown()
            thread.join()


BODY = bytes(range(256)) * 40
SHA = hashlib.sha256(BODY).hexdigest()


def test_a_download_goes_on_where_it_stopped(tmp_path):
    copy = fresh_copy(tmp_path)
    (copy / "data").mkdir()
    (copy / "data/x.bin.partial").write_bytes(BODY[:1000])
    with home({"/x.bin": BODY}) as (address, ranges):
        process = fetch(copy, "data/x.bin", f"{address}/x.bin", SHA)
    assert process.returncode == 0, process.stderr
    assert ranges == ["bytes=1000-"]
    assert (copy / "data/x.bin").read_bytes() == BODY and os.listdir(copy / "data") == ["x.bin"]


@pytest.mark.parametrize("partial", [BODY[:-1] + b"?", b"?" * 2 * len(BODY)])
def test_a_part_that_is_wrong_does_not_block_the_download_for_ever(tmp_path, partial):
    """As long as the file or longer: the server has nothing to add, so the part is dropped and fetched afresh."""
    copy = fresh_copy(tmp_path)
    (copy / "data").mkdir()
    (copy / "data/x.bin.partial").write_bytes(partial)
    with home({"/x.bin": BODY}) as (address, _):
        process = fetch(copy, "data/x.bin", f"{address}/x.bin", SHA)
    assert process.returncode == 0, process.stderr
    assert (copy / "data/x.bin").read_bytes() == BODY


def test_what_comes_with_another_digest_is_not_kept(tmp_path):
    copy = fresh_copy(tmp_path)
    with home({"/x.bin": BODY[::-1]}) as (address, _):
        process = fetch(copy, "data/x.bin", f"{address}/x.bin", SHA)
    assert_user_error(process, "data/x.bin", SHA, "run again")
    assert os.listdir(copy / "data") == []


def test_an_absent_file_keeps_the_part_and_an_existing_file_is_never_overwritten(tmp_path):
    copy = fresh_copy(tmp_path)
    (copy / "data").mkdir()
    (copy / "data/x.bin.partial").write_bytes(BODY[:1000])
    with home({}) as (address, _):
        assert_user_error(fetch(copy, "data/x.bin", f"{address}/x.bin", SHA), "cannot download", "404", "--mirror")
        assert (copy / "data/x.bin.partial").read_bytes() == BODY[:1000]
        (copy / "data/x.bin").write_bytes(b"mine")
        assert_user_error(fetch(copy, "data/x.bin", f"{address}/x.bin", SHA), "data/x.bin", "move it away")
    assert (copy / "data/x.bin").read_bytes() == b"mine"


def test_without_a_network_every_script_says_so_in_one_line(tmp_path):
    """The public homes are replaced by a port of this machine where nobody listens."""
    copy = fresh_copy(tmp_path)
    with home({}) as (address, _):
        pass
    for script in ("download_e2e", "download_vocab", "download_pretrained_checkpoints"):
        path = copy / f"scripts/{script}.sh"
        text = path.read_text()
        for public in ("https://raw.githubusercontent.com", "https://openaipublic.blob.core.windows.net",
                       "https://huggingface.co"):
            text = text.replace(public, address)
        assert address in text
        path.write_text(text)
    for script in ("download_e2e", "download_vocab", "download_pretrained_checkpoints", "create_datasets"):
        process = bash(copy / f"scripts/{script}.sh")
        assert_user_error(process, "cannot download", "--mirror DIR")
        assert len(process.stderr.splitlines()) == 1
    assert not [path for path in copy.rglob("*") if path.suffix in (".txt", ".json", ".jsonl", ".bin", ".bpe")]


def test_a_mirror_may_begin_with_a_tilde(tmp_path):
    """Which the shell leaves where it stands behind = or in quotes."""
    (tmp_path / "m").mkdir()
    for words in (["--mirror=~/m"], ["--mirror", "~/m"]):
        process = bash("-c", 'source "$0"; parse_arguments "$@"; echo "$MIRROR"', ROOT / "scripts/fetch.sh", *words,
                       env={**os.environ, "HOME": str(tmp_path)})
        assert process.stdout == f"{tmp_path}/m\n"


def test_a_mirror_s_file_is_found_by_name_and_checked(tmp_path):
    """Of several files with the name, the one with the right digest is taken, wherever it lies."""
    copy, mirror = fresh_copy(tmp_path), tmp_path / "mirror with a space"
    (mirror / "a").mkdir(parents=True)
    (mirror / "b/c").mkdir(parents=True)
    (mirror / "a/x.bin").write_bytes(b"another")
    script = 'set -euo pipefail; source "$0"; MIRROR="$1"; shift; fetch "$@"'

    def from_mirror():
        return bash("-c", script, copy / "scripts/fetch.sh", mirror, "data/x.bin", "http://127.0.0.1:9/x", SHA)

    assert_user_error(from_mirror(), "--mirror", "does not have the sha256", SHA)
    (mirror / "b/c/x.bin").write_bytes(BODY)
    (copy / "data/x.bin.partial").write_bytes(b"part of a download")
    assert from_mirror().returncode == 0
    assert (copy / "data/x.bin").read_bytes() == BODY
    assert "already there" in from_mirror().stdout


def test_webnlg_and_dart(tmp_path):
    """WebNLG is checked by what its files say, DART by their bytes. Here by the digests of small files, which stand for
    themselves: this Python formats and encodes by copying."""
    copy, mirror, python = fresh_copy(tmp_path), tmp_path / "mirror", tmp_path / "python"
    python.write_text('#!/bin/bash\necho ran\n[[ "$1" = *format* ]] && cp "$2" "$3" || cp "${@: -3:1}" "${@: -1}"')
    python.chmod(0o755)
    path = copy / "scripts/create_datasets.sh"
    path.write_text(re.sub("[0-9a-f]{64}", SHA, path.read_text()).replace("-ne 4928", f"-ne {BODY.count(10)}"))
    (copy / "scripts/download_vocab.sh").write_text("")

    def make(name):
        return bash(path, "--mirror", mirror, name, env={**os.environ, "PYTHON": str(python)})

    for name in ("webnlg_challenge_2017/train.json", "webnlg/dev.json", "other/test.json",
                 *(f"dart-v1.1.1-full-{part}.json" for part in ("train", "dev", "test"))):
        (mirror / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror / name).write_bytes(BODY)
    assert_user_error(make("webnlg"), "holds no webnlg/test.json")  # another data set's test.json is none
    (mirror / "webnlg/test.json").write_bytes(BODY + b"\n")
    assert_user_error(make("webnlg"), "data/webnlg/test.json", f"{BODY.count(10) + 1} texts", "wanted the 4928")
    (copy / "data/webnlg/test.json").write_bytes(BODY)  # which is newer than what was made of the one before
    assert make("webnlg").stdout.count("ran") == 2 and make("webnlg").stdout.count("already made") == 6
    (copy / "data/webnlg/valid_formatted.jsonl").unlink()
    (copy / "data/webnlg/dev.json").write_bytes(b"another")
    assert_user_error(make("webnlg"), "data/webnlg/valid_formatted.jsonl", SHA, "data/webnlg/dev.json does not say")
    first, second = make("dart"), make("dart")
    assert first.stdout.count("ran") == second.stdout.count("already made") == 6, first.stderr
    assert all((copy / f"data/dart/{part}.jsonl").read_bytes() == BODY for part in ("train", "valid", "test"))


def test_mirror_mistakes(tmp_path):
    copy, empty = fresh_copy(tmp_path), tmp_path / "empty"
    empty.mkdir()
    for script in ("download_e2e", "download_vocab", "create_datasets", "download_pretrained_checkpoints"):
        path = copy / f"scripts/{script}.sh"
        assert_user_error(bash(path, "--mirror", tmp_path / "none"), "--mirror", "no such folder")
        assert_user_error(bash(path, "--mirror"), "--mirror", "wants a folder")
        assert_user_error(bash(path, "--mirror", empty), "--mirror", "holds no")
        assert_user_error(bash(path, "--miror", empty), "--miror", "unknown flag")
        assert_user_error(bash(path, "gpt3"), "gpt3", "unknown")
    assert not [path for path in copy.rglob("*") if path.is_file() and not {"scripts", "src"} & set(path.parts)]


def test_an_unpinned_checkpoint_is_checked_against_the_hub_s_pointer(tmp_path):
    """gpt2-medium: pointer, then file; the digest is kept, so the folder can be another clone's mirror."""
    copy = fresh_copy(tmp_path)
    path = copy / "scripts/download_pretrained_checkpoints.sh"
    text = path.read_text()
    revision = text.split("fetch_checkpoint gpt2-medium ")[1].split()[0]
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{SHA}\nsize {len(BODY)}\n".encode()
    stem = f"/gpt2-medium/%s/{revision}/pytorch_model.bin"
    with home({stem % "raw": pointer, stem % "resolve": BODY}) as (address, _):
        path.write_text(text.replace("https://huggingface.co/openai-community", address))
        process = bash(path, "gpt2-medium")
    assert process.returncode == 0, process.stderr
    folder = copy / "pretrained_checkpoints"
    assert (folder / "gpt2-medium-pytorch_model.bin").read_bytes() == BODY
    assert sorted(os.listdir(folder)) == ["gpt2-medium-pytorch_model.bin", "gpt2-medium-pytorch_model.bin.sha256"]
    assert "already there" in bash(path, "gpt2-medium").stdout  # the server is gone

    (tmp_path / "second").mkdir()
    second = fresh_copy(tmp_path / "second")
    process = bash(second / "scripts/download_pretrained_checkpoints.sh", "gpt2-medium", "--mirror", folder)
    assert process.returncode == 0, process.stderr
    assert (second / "pretrained_checkpoints/gpt2-medium-pytorch_model.bin").read_bytes() == BODY

    (tmp_path / "third").mkdir()
    third = fresh_copy(tmp_path / "third")
    path = third / "scripts/download_pretrained_checkpoints.sh"
    with home({stem % "raw": b"<html>sign in</html>"}) as (address, _):
        path.write_text(text.replace("https://huggingface.co/openai-community", address))
        assert_user_error(bash(path, "gpt2-medium"), "did not send a Git LFS pointer")
    assert os.listdir(third / "pretrained_checkpoints") == []
