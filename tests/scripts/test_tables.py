"""The tables: what the scripts would do, a whole table that is killed and goes on, one of WebNLG, Slurm."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

import runner
from base.errors import UserError
from helpers.author_runs import material as author_material
from helpers.disclosed import Left, e2e_flags
from helpers.foreign_tokenizers import write_tokenizer
from helpers.processes import ROOT, assert_user_error, environment, until
from helpers.published_command import COMMAND
from helpers.result_rows import lines_of
from helpers.small_runs import equal, ledger, read, start_ranks, weights

E2E, WEBNLG, SLURM = (f"scripts/{name}.sh" for name in ("e2e_table", "webnlg_table", "slurm_e2e"))
AUTHORS = "scripts/author_table.sh"
DEMO = ["--data", "data/demo", "--vocab", "vocab/demo", "--seq_len", "256", "pretrained_checkpoints/demo"]


def start(script: str, *arguments: object, **variables: object) -> subprocess.Popen:
    """A script as the leader of a process group of its own."""
    return subprocess.Popen(["bash", script, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env=environment(**{"PYTHON": sys.executable, **variables}))


@pytest.mark.parametrize("number, kept", [(signal.SIGHUP, "SIGTERM,SIGINT,SIGQUIT"), (signal.SIGUSR1, "None")])
def test_under_nohup_no_launcher_heeds_the_hangup(number, kept):
    """torchrun's agent would end its job at a SIGHUP that nohup has it ignore."""
    code = ("import types, start, runner; runner.Table.start(types.SimpleNamespace(args=types.SimpleNamespace("
            "dry_run=False)), 'python', '-c', 'import os; print(os.environ.get(\"PET_SIGNALS_TO_HANDLE\"))')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True,
                          env=environment(), preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == kept, done.stderr


def run(script: str, *arguments: object, **variables: object) -> subprocess.CompletedProcess:
    process = start(script, *arguments, **variables)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def dry(capsys, monkeypatch):
    """A function: the words of each command of a task's dry run, which must write nothing."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(ROOT)

    def run_dry(task: str, *arguments: object) -> list[list[str]]:
        assert runner.main([task, "--dry-run", "--name", "never", *map(str, arguments)]) == 0
        assert not (ROOT / "trained_models" / "table_never").exists()
        return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]

    return run_dry


def commands(lines: list[list[str]], script: str) -> list[list[str]]:
    return [line for line in lines if script in line]


def value(command: list[str], flag: str) -> str | None:
    """The last value of a flag, as argparse takes it."""
    places = [i for i, word in enumerate(command) if word == flag]
    return command[places[-1] + 1] if places else None


def programs(folder: pathlib.Path, **scripts: str) -> str:
    """A PATH on which programs of these names come first."""
    folder.mkdir(exist_ok=True)
    for name, body in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


# ------------------------------------------------------------------ what the scripts would do


@pytest.mark.parametrize("processes", [1, 2, 8, 16, 32, 128])
def test_the_logical_batch_is_kept(dry, processes):
    (training,) = commands(dry("e2e", "gpt2.md", "--nproc", processes), "src/gpt2_ft.py")
    per_device, accumulation = int(value(training, "--train_batch_size")), int(value(training, "--grad_acc"))
    assert per_device * accumulation * processes == 128 and per_device <= 8
    assert (f"--nproc_per_node={processes}" in training) == (processes > 1)
    for training in commands(dry("author", "--nproc", processes), "src/fine-tune-dp.py"):
        assert int(value(training, "--per_device_train_batch_size")) * int(value(
            training, "--gradient_accumulation_steps")) * processes == 1024


def test_sixteen_processes_are_the_published_command(dry):
    (training,) = commands(dry("e2e", "gpt2.md", "--nproc", 16), "src/gpt2_ft.py")
    published, folder = shlex.split(COMMAND), value(training, "--work_dir")
    ours = [word.replace(folder, "trained_models/GPT2_M/e2e") for word in training]
    cut = [word.removeprefix("./") for word in published[published.index("--train_data"):]]
    assert ours[ours.index("--train_data"):] == cut
    full, adapter = commands(dry("author", "--nproc", 16), "src/fine-tune-dp.py")
    for training, batch, accumulation, rate in ((full, "32", "2", "1e-4"), (adapter, "64", "1", "3e-4")):
        assert [value(training, flag) for flag in ("--per_device_train_batch_size", "--gradient_accumulation_steps",
                                                   "--learning_rate", "--target_epsilon", "--seed")] == [
            batch, accumulation, rate, "8", "42"]
    assert "--enable_lora" in adapter and "--enable_lora" not in full


@pytest.mark.parametrize("gpus, cores, batch, expected", [
    (0, 6, 128, 4), (0, 12, 128, 8), (0, 2, 128, 2), (3, 16, 128, 2), (8, 4, 128, 8), (0, 7, 98, 7)])
def test_processes_are_the_gpus_or_else_the_cores_as_far_as_they_divide(monkeypatch, gpus, cores, batch, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(runner, "output_of", lambda *_: "GPU 0: A100\n" * 9 if gpus else None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7"[:2 * gpus - 1] if gpus else "0")
    assert runner.count_processes(batch, None) == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # GPUs that are not to be used
    assert batch % runner.count_processes(batch, None) == 0 and runner.count_processes(batch, None) <= cores


def test_every_combination_is_a_run(dry):
    lines = dry("e2e", "--epsilon", "0 3 inf", "--method", "lora,full", "--seeds=1 2", "--nproc", 2, *DEMO, "--",
                "--lr", "0.5", "--lora_dim", "2")
    trainings = commands(lines, "src/gpt2_ft.py")
    assert len(trainings) == 8 and len({value(line, "--work_dir") for line in trainings}) == 8
    assert {(value(line, "--target_epsilon"), value(line, "--noise_multiplier")) for line in trainings} == {
        ("3", None), (None, "0")}
    assert all(value(line, "--lr") == "0.5" and value(line, "--lora_dim") == "2" for line in trainings)
    searches = commands(lines, "src/gpt2_beam.py")
    started_from = [value(line, "--init_checkpoint") for line in searches]
    assert len(searches) == 9 and started_from.count("pretrained_checkpoints/demo") == 1
    assert not any("--eos_token_id" in line for line in searches)  # this vocabulary has no token of two line feeds
    published, longer = (commands(dry("e2e", "gpt2.sm", *more), "src/gpt2_beam.py")
                         for more in ([], ["--length_penalty", "1.25"]))
    assert [value(line, "--eos_token_id") for line in published] == ["628"]
    assert [value(line, "--length_penalty") for line in published + longer] == ["0.8", "1.25"]


def test_the_steps_of_webnlg_and_dart(dry):
    """The E2E command on other data; what is decoded is what is scored."""
    (published,) = commands(dry("e2e", "gpt2.md", "--nproc", 16, "--epsilon", 8), "src/gpt2_ft.py")
    for task, sets in (("webnlg", ["all", "seen", "unseen"]), ("dart", ["all"])):
        lines = dry(task, "gpt2.md", "--nproc", 16, "--mirror", "/m")
        assert lines[0] == ["bash", "scripts/create_datasets.sh", "--mirror", "/m", task]
        (training,) = commands(lines, "src/gpt2_ft.py")
        assert training == [word.replace("data/e2e", f"data/{task}") for word in published]
        decodings = commands(lines, "src/gpt2_decode.py")
        assert [value(line, "--filter") for line in decodings] == sets
        assert all({"--tokenize", "--lower"} <= {*line} and value(line, "--ref_type") == task
                   and value(line, "--ref_num") == "6" for line in decodings)
        (score,) = commands(lines, "eval/webnlg/webnlg_scores.py")
        assert score[2:-2] == [value(line, f"--output_{what}_file") for line in decodings for what in ("ref", "pred")]


@pytest.mark.parametrize("task, arguments, words", [
    ("e2e", ["--nproc", "3"], ["--nproc 3", "does not divide", "128"]), ("e2e", ["--nproc", "0"], ["--nproc 0"]),
    ("e2e", ["--epsilon", "low"], ["--epsilon low"]), ("e2e", ["--method", "half"], ["--method half"]),
    ("e2e", ["--seeds", "a"], ["--seeds a"]), ("dart", ["--length_penalty", "-1"], ["--length_penalty"]),
    ("e2e", ["--batch"], ["--batch: wants a value"]),
    ("e2e", ["--colour", "red"], ["--colour: unknown flag"]), ("e2e", ["gpt3"], ["gpt3: no such model"]),
    ("e2e", ["--data", "/no/such"], ["--data /no/such", "there is no /no/such/train.txt"]),
    ("e2e", ["--name", "a/b"], ["--name a/b"]), ("e2e", ["--vocab", "vocab/demo"], ["--vocab vocab/demo", "--data"]),
    ("e2e", ["--data", "data/demo", "--vocab", "nosuch"], ["--vocab nosuch", "nosuch/encoder.json does not exist"]),
    ("e2e", ["gpt2.sm", "--", "--train_batch_size", "4"], ["--train_batch_size after --", "--batch"]),
    ("e2e", ["gpt2.sm", "--", "--noise_multiplier=1"], ["--noise_multiplier after --", "--epsilon"]),
    ("author", ["--epsilon", "published"], ["--epsilon published"]), ("author", ["--nproc", "48"], ["does not divide"]),
    ("author", ["--", "--disable_dp"], ["--disable_dp after --"]),
    ("webnlg", ["--test", "t.json"], ["--test", "t.json: wanted --data"]), ("maps", [], ["maps: no table"]),
    ("webnlg", ["--data", "data/demo"], ["there is no data/demo/train.json", "--test FILE"]),
    ("dart", ["--data", "/no"], ["/no/dart-v1.1.1-full-train.json"]),
])
def test_mistakes(dry, task, arguments, words):
    with pytest.raises(UserError) as caught:
        dry(task, *arguments)
    for word in words:
        assert word in str(caught.value)


# ------------------------------------------------------------------ a whole table


@pytest.fixture
def small(tmp_path) -> list:
    """Options of a table of one run: 64 training lines of the demonstration, a test set of six."""
    data = tmp_path / "data"
    data.mkdir()
    for part, lines in (("train", 64), ("valid", 6), ("test", 6)):
        text = (ROOT / f"data/demo/{part}.txt").read_text().splitlines(True)[:lines]
        (data / f"{part}.txt").write_text("".join(text))
    return ["--data", data, "--vocab", "vocab/demo", "--seq_len", 256, "--nproc", 1, "--batch", 16, "--name", "small",
            "pretrained_checkpoints/demo"]


def places(folder: pathlib.Path) -> list:
    return ["--runs", folder / "runs", "--results", folder / "results"]


EXTRA = ["--", "--max_step", 40, "--save_interval", 10, "--noise_source", "seeded", "--noise_seed", 1, "--lr", 0.01]
RUN = "demo-lora-epsilon_8-seed_110"


def row_of(folder: pathlib.Path) -> dict:
    (path,) = folder.glob("results/????-??-??_small/rows/*.json")
    return json.loads(path.read_text())


def test_a_table_that_is_stopped_goes_on(tmp_path, small):
    """SIGTERM in mid-training; the same command ends in a row, the ledger and the weights of the uninterrupted run."""
    arguments = ["--epsilon", 8, *places(tmp_path), *small, *EXTRA]
    work = tmp_path / "runs" / RUN
    process = start(E2E, *arguments)
    until(lambda: (work / "model.10.pt").exists(), 300)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143 and "goes on from here" in err and not list(tmp_path.glob("results/*/rows/*"))
    stopped = len(ledger(work))
    assert 10 <= stopped < 40

    done = run(E2E, *arguments)
    assert done.returncode == 0, done.stderr
    row, report = row_of(tmp_path), read(work)
    assert [record["attempt"] for record in ledger(work)] == [1] * stopped + [2] * (40 - stopped)
    assert row["privacy"] == report and row["privacy"]["epsilon_prv"] < 8 and row["seed"] == 110
    assert row["scores"] == read(work, "scores.json")["scores"]
    assert re.fullmatch("[0-9a-f]{40}", row["commit"]["hash"] or "0" * 40) and row["versions"]["torch"]
    assert row["settings"]["expected_batch"] == 16 and row["hardware"]["cores"] >= 1
    table = done.stdout.splitlines()
    cells = [cell.strip() for cell in next(line for line in table if line.startswith("| demo")).strip("|").split("|")]
    assert cells[:4] == ["demo", "LoRA", f"{report['epsilon_prv']:.2f}", "1e-05"]
    assert cells[4:9] == [f"{row['scores'][name]:.4f}" for name in ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")]
    (folder,) = tmp_path.glob("results/*_small")
    assert sorted(path.name for path in folder.iterdir()) == ["command.txt", "plot.png", "rows", "table.md"]
    assert len((folder / "command.txt").read_text().splitlines()) == 1
    assert not Left(tmp_path, e2e_flags()).unnamed()  # in PRIVACY.md

    training = shlex.split(row["commands"][1])  # what the row says can be typed, and gives the same weights
    again = [str(tmp_path / "again") if word == str(work) else word for word in training[2:]]
    (rank,) = start_ranks(again, cwd=ROOT)
    assert rank.wait(300) == 0, rank.stderr
    assert equal(weights(work, 40), weights(tmp_path / "again", 40))

    other = RUN.replace("lora", "full")  # a row of an earlier call: table and plot are of all rows
    shutil.copytree(work, work.with_name(other))
    (folder / "rows" / f"{other}.json").write_text(json.dumps({**row, "method": "full"}))
    once_more = run(E2E, *arguments)  # nothing is left to do
    assert once_more.returncode == 0 and "already there" in once_more.stdout
    assert "src/gpt2_ft.py" not in once_more.stdout and (folder / "table.md").read_text() in once_more.stdout
    assert f"scripts/plot_run.py {work.with_name(other)} {work} --out" in once_more.stdout
    assert {line["method"] for line in lines_of(once_more.stdout)} == {"LoRA", "full"}
    assert_user_error(run(E2E, *arguments, "--weight_decay", "0.5"), RUN, "other data or commands")


def test_webnlg_from_data_to_table(tmp_path):
    """Seen and unseen categories are scored apart and together, from a test set that holds both; untrained."""
    def entry(category: str, name: str, *texts: str) -> dict:
        return {"1": {"category": category, "lexicalisations": [{"comment": "good", "lex": text} for text in texts],
                      "modifiedtripleset": [{"subject": name, "property": "isA", "object": category}]}}

    sets = {"train": [entry("Food", "Soup", "Soup is food.")], "dev": [entry("City", "Paris", "Paris is a city.")],
            "new": [entry("Artist", "Bach", "Bach wrote music.", "Bach, an artist."),
                    entry("Food", "Rice", "Rice is food.")]}
    for name, entries in sets.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"entries": entries}))
    done = run(WEBNLG, "--data", tmp_path, "--test", tmp_path / "new.json", "--epsilon", 0, "--vocab", "vocab/demo",
               "--seq_len", 128, "--nproc", 1, "--name", "small", *places(tmp_path), "pretrained_checkpoints/demo")
    assert done.returncode == 0, done.stderr
    work = tmp_path / "runs/demo-none-epsilon_0-seed_110"
    texts = {path.relative_to(work / "references").as_posix(): path.read_text().splitlines()
             for path in (work / "references").glob("*/reference[01]")}
    bach, rice = ["bach wrote music .", "bach , an artist ."], ["rice is food ."] * 2
    assert texts == {f"{part}/reference{i}": [group[i] for group in groups] for i in range(2)
                     for part, groups in (("all", (bach, rice)), ("seen", [rice]), ("unseen", [bach]))}
    row = row_of(tmp_path)
    assert row["scores"] == read(work, "scores.json")["scores"] and row["scores"].keys() == {"all", "seen", "unseen"}
    (line,) = lines_of(done.stdout)
    assert [line[f"{name} {part}"] for part, found in row["scores"].items() for name in found] == [
        f"{value:.4f}" for found in row["scores"].values() for value in found.values()]


def test_a_vocabulary_without_a_bos_token(tmp_path, small):
    """Qwen's: the contexts get none, where --add_bos would be refused."""
    encoded = {}
    for vocabulary in (write_tokenizer(tmp_path / "qwen", "Qwen2"), "vocab/demo"):
        planned = run(E2E, "--dry-run", "--epsilon", 0, *places(tmp_path), *small[:2], "--vocab", vocabulary, small[-1])
        assert planned.returncode == 0, planned.stderr
        encoded[vocabulary] = [line for line in planned.stdout.splitlines() if "gpt2_encode.py" in line]
    without, plain = encoded.values()
    assert len(without) == len(plain) == 3
    assert all("--add_eos" in line for line in without + plain) and all("--add_bos" in line for line in plain)
    assert not any("--add_bos" in line for line in without)


def test_tokens_are_of_the_data_and_the_vocabulary_that_are_named(tmp_path, small):
    """Tokens are kept for as long as the files that they are made of stay the same; unknown tokens are made anew."""
    data, tokens = small[1], tmp_path / "runs/data"
    vocabulary = tmp_path / "vocab"
    shutil.copytree(ROOT / "vocab/demo", vocabulary)
    arguments = ["--epsilon", 0, *places(tmp_path), "--data", data, "--vocab", vocabulary, "--name", "small", small[-1]]
    path = programs(tmp_path / "bin", python=f"""
        [ "$1" = -c ] && exec {sys.executable} "$@"
        case "$1" in *start.py | src/format* | src/gpt2_encode.py) exec {sys.executable} "$@" ;; *) exit 7 ;; esac""")
    options = {"PATH": path, "PYTHON": "python"}  # nothing beyond the tokens is made
    tokens.mkdir(parents=True)
    (tokens / "train.jsonl").write_text("of nobody knows what")
    assert run(E2E, *arguments, **options).returncode == 7
    made = {part: (tokens / f"{part}.jsonl").read_bytes() for part in ("train", "valid", "test")}
    assert len(made["train"].splitlines()) == 64
    (tokens / "valid.jsonl").unlink()  # as if stopped
    again = run(E2E, *arguments, **options)
    assert again.returncode == 7 and again.stdout.count("src/gpt2_encode.py") == 1
    assert made == {part: (tokens / f"{part}.jsonl").read_bytes() for part in made}

    with (vocabulary / "vocab.bpe").open("a") as merges:
        merges.write("\n")
    assert_user_error(run(E2E, *arguments, **options), "runs/data", "other data or commands", "another --name")
    assert_user_error(run(E2E, *arguments, "--vocab", "vocab/demo", **options), "runs/data", "other data or commands")
    (vocabulary / "encoder.json").write_text("[]")
    assert_user_error(run(E2E, "--dry-run", *arguments), "encoder.json", "a JSON object")


@pytest.mark.slow
def test_killed_anywhere_the_table_is_the_same(tmp_path, small):
    """SIGKILL to all processes, in the training and in the search: the weights, texts and scores of the undisturbed
    table. Its sigma is given: a run with a target stops before the steps that its repeated ones were charged for."""
    name = "demo-lora-epsilon_published-seed_110"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(E2E, "--epsilon", "0 published", *places(whole), *small, *EXTRA).returncode == 0
    for sign in ("model.10.pt", "model.30.pt", "predict.jsonl.journal.0", "e2e_pred.txt"):
        process = start(E2E, "--epsilon", "0 published", *places(killed), *small, *EXTRA)
        until(lambda: (killed / "runs" / name / sign).exists() or process.poll() is not None, 300)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    done = run(E2E, "--epsilon", "0 published", *places(killed), *small, *EXTRA)
    assert done.returncode == 0, done.stderr
    assert equal(weights(whole / "runs" / name, 40), weights(killed / "runs" / name, 40))
    for file in ("predict.jsonl", "e2e_pred.txt"):
        assert (whole / "runs" / name / file).read_bytes() == (killed / "runs" / name / file).read_bytes()

    def rows(folder: pathlib.Path) -> list[dict]:
        return [json.loads(path.read_text())["scores"] for path in sorted(folder.glob("results/*/rows/*"))]

    assert rows(whole) == rows(killed) and len(rows(whole)) == 2
    assert "| untrained | 0 " in done.stdout


@pytest.mark.slow
def test_an_author_table(tmp_path):
    folder = author_material()
    done = run(AUTHORS, "--train_file", folder / "train.jsonl", "--vocab", "vocab/demo", "--epsilon", "0 8",
               "--nproc", 2, "--batch", 8, "--seeds", "1 2", "--name", "authors", *places(tmp_path), folder / "tiny",
               "--", "--sequence_len", 24, "--eval_fraction", 0.16, "--cache_dir", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("results/*_authors/rows/*.json"))]
    assert sorted((row["method"], row["epsilon"], row["seed"]) for row in rows) == sorted(
        [("none", "0", 1), *((method, "8", seed) for method in ("full", "lora") for seed in (1, 2))])
    assert {row["processes"] for row in rows} == {2} and all(row["privacy"]["eval_loss"] > 0 for row in rows)
    (path,) = tmp_path.glob("results/*_authors/table.md")
    lines = {line["method"]: line for line in lines_of(path.read_text())}
    assert {method: (line["seeds"], "±" in line["held-out loss"]) for method, line in lines.items()} == {
        "untrained": ("1", False), "full": ("2", True), "LoRA": ("2", True)}
    assert lines["untrained"]["epsilon"] == "0" and path.read_text() in done.stdout


# ------------------------------------------------------------------ Slurm


JOB = {"SLURM_JOB_ID": 77, "SLURM_JOB_NUM_NODES": 4, "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_GPUS_ON_NODE": 8,
       "SLURM_SUBMIT_DIR": ROOT}


def test_slurm_starts_the_table_on_every_gpu(tmp_path):
    """The words that reach srun for the training, on 32 GPUs of four machines."""
    path = programs(tmp_path / "bin", srun=f'printf "%s\\n" "$@" > {tmp_path}/words; exit 7', idle=IDLE,
                    scontrol="for i in $(seq 4); do echo node$i; done")
    done = run(SLURM, *places(tmp_path), *DEMO, PATH=path, PYTHON="idle", **JOB)
    assert done.returncode == 7  # srun's own: what fails is not put back into the queue
    words = (tmp_path / "words").read_text().splitlines()
    for word in ("--nodes=4", "--ntasks=4", "--ntasks-per-node=1", "--nnodes=4", "--nproc_per_node=8", "--rdzv_id=77",
                 "--rdzv_endpoint=node1:20077"):
        assert word in words
    assert int(value(words, "--train_batch_size")) * int(value(words, "--grad_acc")) * 32 == 128


def test_slurm_s_warning_saves_and_puts_the_job_back(tmp_path):
    path = programs(tmp_path / "bin", scontrol=f'echo "$@" >> {tmp_path}/scontrol', idle=IDLE, srun=f"""
        trap 'echo stopped > {tmp_path}/srun; exit 143' TERM
        touch {tmp_path}/started
        for i in $(seq 600); do sleep 0.1; done""")
    process = start(SLURM, *places(tmp_path), *DEMO, PATH=path, PYTHON="idle", **JOB)
    until(lambda: (tmp_path / "started").exists(), 60)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143 and (tmp_path / "srun").read_text() == "stopped\n"
    assert (tmp_path / "scontrol").read_text().splitlines()[-1] == "requeue 77"


# a Python that makes no data
IDLE = f"""case "$1" in -c | *start.py) exec {sys.executable} "$@" ;; esac"""

# srun on one machine: the command once for each node, on which a signal is handed to all
SRUN = """
while [[ "$1" == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
trap 'kill -TERM $first $second; wait $first $second; exit 143' TERM
wait $first && wait $second"""


@pytest.mark.slow
def test_a_slurm_job_of_two_machines_is_requeued_and_ends(tmp_path, small):
    """Both agents on the loopback interface: stopped in mid-training, saved, started again with the same job's
    number."""
    path = programs(tmp_path / "bin", srun=SRUN, scontrol='[ "$1" != show ] || echo 127.0.0.1')
    small[small.index("--nproc"):small.index("--nproc") + 2] = []  # slurm_e2e.sh counts them
    job = {**JOB, "SLURM_JOB_NUM_NODES": 2, "SLURM_GPUS_ON_NODE": 1, "PATH": path}
    work = tmp_path / "runs" / RUN
    process = start(SLURM, "--epsilon", 8, *places(tmp_path), *small, *EXTRA, **job)
    until(lambda: (work / "model.10.pt").exists(), 300)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    stopped = ledger(work)
    assert process.returncode == 143 and 10 <= len(stopped) < 40 and stopped[0]["world_size"] == 2
    assert (work / f"model.{len(stopped)}.pt").exists()
    done = run(SLURM, "--epsilon", 8, *places(tmp_path), *small, *EXTRA, **job)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in ledger(work)] == list(range(1, 41)) and row_of(tmp_path)["processes"] == 2


@pytest.mark.parametrize("changed, words", [
    ({"SLURM_JOB_NUM_NODES": 3}, ["--nproc 24", "does not divide"]), ({"SLURM_GPUS_ON_NODE": ""}, ["--gpus-per-node"]),
    ({"SLURM_JOB_ID": ""}, ["SLURM_JOB_ID is not set"]), ({"SLURM_SUBMIT_DIR": "/"}, ["not the repository's root"]),
    ({"PYTHON": "false"}, ["PYTHON=false: is no Python 3.11"]),
])
def test_slurm_mistakes(changed, words):
    assert_user_error(run(SLURM, "gpt2.xl", **{**JOB, **changed}), *words)


@pytest.mark.parametrize("changed, arguments, words", [
    ({"SLURM_JOB_NODELIST": ""}, ["src/gpt2_ft.py"], ["SLURM_JOB_NODELIST is not set", "sbatch"]),
    ({"SLURM_GPUS_ON_NODE": ""}, ["src/gpt2_ft.py"], ["--gpus-per-node"]), ({}, [], ["SCRIPT is missing"]),
    ({}, ["src/gpt2_ft.py"], ["scontrol: no such program"]),
])
def test_slurm_launch_mistakes(tmp_path, changed, arguments, words):
    (tmp_path / "bash").symlink_to(shutil.which("bash"))
    assert_user_error(run("scripts/slurm_launch.sh", *arguments, **{**JOB, "PATH": tmp_path, **changed}), *words)
