"""Synthetic text from private text, judged: data -> training with and without privacy -> samples -> judgement.

    bash scripts/synthesize.sh --data data/demo --vocab vocab/demo --model pretrained_checkpoints/demo --runs RUNS

The data are train.txt, valid.txt and test.txt in E2E's form. Of train.txt, lines are held out and secrets planted
(src/plant_secrets.py). Two models are trained on the rest: one with --epsilon, and one without privacy and long enough
to overfit, which shows what epsilon prevents. Both write texts behind the contexts of valid.txt, which are taken for
public. Then: a small model is trained on the samples alone, another on the private text, and each is tested on
test.txt; eval/synthetic/ judges likeness and leaks. --model is the start of all of them. The reference model of
membership inference is trained on valid.txt.

Leaves in --runs: page.html, table.md, synthesis.json, and a folder for each model. The same command goes on with what
was stopped.
"""

import concurrent.futures
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from base.errors import fail
from base.files import atomic_write, open_text, read_lines, read_object
from base.flags import Parser, check_least, check_positive
from base.markdown import dict_table
from row import ROOT, commit, from_root, hardware
from synthesis_page import write_page
from synthesis_table import MODELS, NO_PRIVACY, NOTHING, PRIVATE, PRIVATE_TEXT, lines_of, row_of
from tasks import fill

PARTS = ("train", "valid", "test")
REFERENCE = "reference"
FORMAT = """python src/format_converting_e2e.py $data/$part.txt $runs/data/${part}_formatted.jsonl"""
ENCODE = """python src/gpt2_encode.py --vocab $vocab --add_bos --add_eos --input $runs/data/${part}_formatted.jsonl
    --output $runs/data/$part.jsonl"""
PLANT = """python src/plant_secrets.py --data $runs/data/train.jsonl --vocab $vocab --held_out $held_out
    --secrets $secrets --others $others --seed $seed --output_dir $runs/planted"""
TRAIN = """$launch src/gpt2_ft.py --init_checkpoint $model --seq_len $seq_len --random_seed $seed $flags
    --train_data $train --valid_data $valid --work_dir $folder"""
SAMPLE = """python src/generate.py --init_checkpoint $folder --vocab $vocab --prompts $runs/data/prompts.jsonl
    --num_samples $samples --temperature $temperature --max_new_tokens $max_new_tokens --seed $seed
    --output $folder/samples.jsonl"""
LOSSES = """python src/text_losses.py --init_checkpoint $weights --seq_len $seq_len --data $runs/planted/train.jsonl
    $runs/planted/held_out.jsonl $runs/planted/candidates.jsonl --output $folder/losses.json"""
SEARCH = """python src/gpt2_beam.py --init_checkpoint $folder --data $runs/planted/contexts.jsonl --seq_len $seq_len
    --eval_len 16 --beam 10 --length_penalty 1.0 --no_repeat_ngram_size 0 --work_dir $folder
    --output_file secrets_found.jsonl"""
JUDGE = """python eval/synthetic/judge_samples.py --samples $folder/samples.jsonl
    --private $runs/planted/train_texts.jsonl --held_out $runs/planted/held_out_texts.jsonl
    --losses $folder/losses.json --reference $runs/reference/losses.json --secrets $runs/planted/secrets.json
    --searched $folder/secrets_found.jsonl $embedder --json $folder/judgement.json"""
TEST_LOSS = """python src/text_losses.py --init_checkpoint $weights --seq_len $seq_len --data $runs/data/test.jsonl
    --output $folder/test_loss.json"""
TEST_SEARCH = """python src/gpt2_beam.py --init_checkpoint $weights --data $runs/data/test.jsonl --seq_len $seq_len
    --eval_len $max_new_tokens --beam 4 --length_penalty 0.8 --work_dir $folder --output_file predict.jsonl"""
DECODE = """python src/gpt2_decode.py --vocab $vocab --sample_file $folder/predict.jsonl
    --input_file $runs/data/test_formatted.jsonl --output_ref_file $folder/references.txt
    --output_pred_file $folder/predictions.txt"""
SCORE = (
    """python eval/e2e/measure_scores.py $folder/references.txt $folder/predictions.txt --json $folder/scores.json"""
)
PRIVATE_FLAGS = """--lora_dim 4 --lora_alpha 32 --lr 0.0004 --scheduler constant --adam_beta2 0.999 --correct_bias
    --label_smooth 0.1 --max_epoch 20"""
OPEN_FLAGS = "--lr 0.0002 --scheduler linear --correct_bias --weight_decay 0.0 --max_epoch 10"
USE_FLAGS = "--lr 0.0005 --scheduler linear --correct_bias --weight_decay 0.0 --max_step 400"
MOST_SHARED = 0.5  # of a file's lines may be training lines; with more, files were swapped


@dataclass(frozen=True)
class Job:
    """One command, and the file that it writes last: where that is there, the job is done.

    before: what has to be made first, once the earlier jobs of the chain are done.
    """

    name: str
    command: list[str]
    done: str
    is_done: Callable[[], bool] | None = None
    before: Callable[[], None] | None = None


@dataclass
class Work:
    """The jobs of one command. seconds: of each, "wall", and "cpu" of its processes together."""

    args: Any
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    children: list[subprocess.Popen] = field(default_factory=list)
    guard: threading.Lock = field(default_factory=threading.Lock)
    stopped: bool = False  # no further job is started

    def __post_init__(self) -> None:
        self.clock = os.path.join(self.args.runs, "seconds.json")
        if os.path.exists(self.clock):
            self.seconds = read_object(self.clock, "what this script writes; remove it")

    def do(self, job: Job) -> None:
        """Run a job that is not done; its output goes into logs/, and its last line is the error's cause."""
        if job.is_done() if job.is_done else os.path.exists(job.done):
            return
        if job.before is not None:
            job.before()
        os.makedirs(os.path.dirname(job.done), exist_ok=True)
        log = os.path.join(self.args.runs, "logs", f"{job.name.replace(' ', '_')}.txt")
        words = [sys.executable if job.command[0] == "python" else job.command[0], *job.command[1:]]
        begun = time.monotonic()
        with open(log, "w", encoding="utf-8") as out:
            environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
            with self.guard:
                if self.stopped:
                    return
                child = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=environment)
                self.children.append(child)
            status, cpu = ended(child)
        took = time.monotonic() - begun
        if status:
            with open_text(log) as handle:
                said = [line.strip() for line in handle if line.strip()] or ["nothing"]
            cause = next((line.removeprefix("error: ") for line in said if line.startswith("error: ")), said[-1])
            fail(f"{job.name}: {shlex.join(job.command)[:200]} ended with status {status}: {cause[:300]}; see {log}")
        with self.guard:
            self.seconds[job.name] = {"wall": round(took, 2), "cpu": round(cpu, 2)}
            with atomic_write(self.clock) as out:
                json.dump(self.seconds, out, indent=1)
            print(f"{job.name}: {took:.1f} s, CPU {cpu:.1f} s", flush=True)

    def chains(self, *chains: list[Job]) -> None:
        """Do chains of jobs at once, as many as --nproc; each chain in its order."""

        def one(chain: list[Job]) -> None:
            for job in chain:
                self.do(job)

        with concurrent.futures.ThreadPoolExecutor(self.args.nproc) as pool:
            running = [pool.submit(one, chain) for chain in chains]
            try:
                for future in concurrent.futures.as_completed(running):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                with self.guard:
                    self.stopped = True
                    for child in self.children:
                        if child.poll() is None:
                            child.terminate()
                raise


def ended(child: subprocess.Popen) -> tuple[int, float]:
    """(exit status of a process, below 0 for a signal; the CPU seconds of it and of all that it started)."""
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_utime + usage.ru_stime


def parse() -> Any:
    parser = Parser(description=__doc__.splitlines()[0], prog="bash scripts/synthesize.sh")
    add = parser.add_argument
    add("--data", default="data/demo", help="folder of train.txt, valid.txt, test.txt (default data/demo)")
    add("--vocab", default="vocab/demo", help="folder of the vocabulary (default vocab/demo)")
    add("--model", default="pretrained_checkpoints/demo", help="where every training starts: a model's folder")
    add("--runs", required=True, help="folder of all results")
    add("--epsilon", type=float, default=8.0, help="of the private training (default 8)")
    add("--seq_len", type=int, default=256, help="longest line in tokens (default 256)")
    add("--held_out", type=int, default=1000, help="lines of train.txt that are not trained on (default 1000)")
    add("--secrets", type=int, default=8, help="planted secrets of each kind (default 8)")
    add("--others", type=int, default=1023, help="rivals of each secret (default 1023)")
    add("--samples", type=int, default=4, help="samples of each different context of valid.txt (default 4)")
    add("--temperature", type=float, default=1.0, help="of the samples (default 1.0)")
    add("--max_new_tokens", type=int, default=64, help="longest sample in tokens (default 64)")
    add("--batch", type=int, default=512, help="expected batch of the private training (default 512)")
    add("--seed", type=int, default=0, help="of held-out lines, secrets and samples (default 0)")
    add("--nproc", type=int, default=len(os.sched_getaffinity(0)), help="processes at once (default: the cores)")
    add("--private_flags", default=PRIVATE_FLAGS, help="flags of gpt2_ft.py for the private training")
    add("--open_flags", default=OPEN_FLAGS, help="flags of gpt2_ft.py for the training without privacy")
    add("--use_flags", default=USE_FLAGS, help="flags of gpt2_ft.py for the small models that are tested")
    add("--open_batch", type=int, default=16, help="batch of the trainings without privacy (default 16)")
    add("--embedder", help="model for MAUVE, in Hugging Face's layout (default: no MAUVE)")
    args = parser.parse_args()
    check_least(args, seq_len=2, held_out=1, secrets=1, others=1, samples=1, max_new_tokens=1, seed=0, nproc=1, batch=1)
    check_positive(args, epsilon=float("inf"), temperature=100)
    for name in ("batch", "open_batch"):
        if getattr(args, name) % args.nproc:
            fail(f"--{name} {getattr(args, name)}: is no multiple of --nproc {args.nproc}; give another of either")
    for name in ("data", "vocab", "model", "runs", "embedder"):
        if getattr(args, name) is not None:
            setattr(args, name, from_root(getattr(args, name)))
    return args


def check_files(args: Any) -> None:
    """UserError where a file is not there, or holds the training file's lines."""
    lines = {}
    for part in PARTS:
        path = os.path.join(args.data, f"{part}.txt")
        if not os.path.isfile(path):
            fail(f"--data {args.data}: there is no {part}.txt; wanted train.txt, valid.txt and test.txt")
        lines[part] = [line for _, line in read_lines(path, "--data")]
    if args.embedder is not None and not os.path.isfile(os.path.join(args.embedder, "config.json")):
        fail(f"--embedder {args.embedder}: holds no config.json; wanted a model's folder, or leave it out")
    for part, other in (("valid", "train"), ("test", "train"), ("train", "valid"), ("train", "test")):
        known = set(lines[other])
        shared = sum(line in known for line in lines[part])
        if shared > MOST_SHARED * len(lines[part]):
            fail(
                f"--data {args.data}: {shared} of the {len(lines[part])} lines of {part}.txt are lines of {other}.txt; "
                "wanted held-out texts that no training sees: were the files swapped, or cut from one another?"
            )


def read_json_lines(path: str) -> list[dict]:
    return [json.loads(line) for _, line in read_lines(path)]


def write_json_lines(path: str, lines: list[dict]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path) as out:
        out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def write_prompts(runs: str) -> None:
    """The different contexts of valid.txt, as token lines."""
    contexts = dict.fromkeys(tuple(line["context"]) for line in read_json_lines(f"{runs}/data/valid.jsonl"))
    write_json_lines(f"{runs}/data/prompts.jsonl", [{"context": list(context)} for context in contexts])


def write_training_lines(runs: str, name: str, each: int) -> None:
    """The samples of a model as token lines, to train on: context, completion."""
    prompts = [line["context"] for line in read_json_lines(f"{runs}/data/prompts.jsonl")]
    samples = read_json_lines(f"{runs}/{name}/samples.jsonl")
    lines = [
        {"context": prompts[k // each], "completion": sample["tokens"]}
        for k, sample in enumerate(samples)
        if sample["tokens"]
    ]
    write_json_lines(f"{runs}/use_{name}/train.jsonl", lines)


class Plan:
    """The jobs, from the data to the judgement."""

    def __init__(self, args: Any):
        self.args, runs = args, args.runs
        launch = ["python"]
        if args.nproc > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"]
        self.values: dict[str, Any] = {
            **vars(args),
            "launch": launch,
            "valid": f"{runs}/data/valid.jsonl",
            "train": f"{runs}/planted/train.jsonl",
            "embedder": ["--embedder", args.embedder] if args.embedder else [],
        }

    def job(self, name: str, command: str, done: str, **more: Any) -> Job:
        given = {key: more.pop(key) for key in ("before", "is_done") if key in more}
        return Job(name, fill(command, **{**self.values, **more}), done, **given)

    def prepare(self) -> list[list[Job]]:
        data = f"{self.args.runs}/data"
        return [
            [
                self.job(f"format {part}", FORMAT, f"{data}/{part}_formatted.jsonl", part=part),
                self.job(f"encode {part}", ENCODE, f"{data}/{part}.jsonl", part=part),
            ]
            for part in PARTS
        ]

    def plant(self) -> Job:
        return self.job("plant", PLANT, f"{self.args.runs}/planted/secrets.json")

    def training(self, name: str, flags: str, **more: Any) -> Job:
        folder = f"{self.args.runs}/{name}"
        report = f"{folder}/privacy.json"

        def is_done() -> bool:
            return os.path.exists(report) and "train_runtime" in read_object(report, "what the run wrote")

        words = shlex.split(flags)
        if os.path.exists(f"{folder}/privacy_ledger.jsonl") and not is_done():
            words.append("--resume")
        return self.job(f"train {name}", TRAIN, report, folder=folder, flags=words, is_done=is_done, **more)

    def trainings(self) -> list[Job]:
        args = self.args
        share, open_share = args.batch // args.nproc, args.open_batch // args.nproc
        return [
            self.training(
                PRIVATE, f"{args.private_flags} --train_batch_size {share} --target_epsilon {args.epsilon:g}"
            ),
            self.training(NO_PRIVACY, f"{args.open_flags} --train_batch_size {open_share} --noise_multiplier 0"),
        ]

    def leaks(self, name: str) -> list[Job]:
        """Samples, losses and a search of a model; of REFERENCE, which is trained first, losses alone."""
        folder = f"{self.args.runs}/{name}"
        values = {"folder": folder, "weights": folder}
        losses = self.job(f"losses {name}", LOSSES, f"{folder}/losses.json", **values)
        if name == REFERENCE:
            flags = f"{self.args.use_flags} --train_batch_size {self.args.open_batch} --noise_multiplier 0"
            data = {"train": f"{self.args.runs}/data/valid.jsonl", "valid": f"{self.args.runs}/data/test.jsonl"}
            return [self.training(name, flags, launch=["python"], **data), losses]
        return [
            self.job(f"sample {name}", SAMPLE, f"{folder}/samples.jsonl", **values),
            losses,
            self.job(f"search {name}", SEARCH, f"{folder}/secrets_found.jsonl", **values),
        ]

    def use(self, name: str) -> list[Job]:
        """A small model of samples (a model's name), of the private text, or of nothing, tested on test.txt."""
        runs, folder = self.args.runs, f"{self.args.runs}/use_{name}"
        values = {"folder": folder, "weights": self.args.model if name == NOTHING else folder}
        chain = []
        if name != NOTHING:
            more: dict[str, Any] = {"train": f"{folder}/train.jsonl", "launch": ["python"]}
            if name == PRIVATE_TEXT:
                more["train"] = f"{runs}/planted/train.jsonl"
            else:
                more["before"] = lambda: write_training_lines(runs, name, self.args.samples)
            flags = f"{self.args.use_flags} --train_batch_size {self.args.open_batch} --noise_multiplier 0"
            chain.append(self.training(f"use_{name}", flags, **more))
        return [
            *chain,
            self.job(f"test loss {name}", TEST_LOSS, f"{folder}/test_loss.json", **values),
            self.job(f"test search {name}", TEST_SEARCH, f"{folder}/predict.jsonl", **values),
            self.job(f"test decode {name}", DECODE, f"{folder}/predictions.txt", **values),
            self.job(f"test score {name}", SCORE, f"{folder}/scores.json", **values),
        ]

    def judge(self, name: str) -> list[Job]:
        folder = f"{self.args.runs}/{name}"
        return [self.job(f"judge {name}", JUDGE, f"{folder}/judgement.json", folder=folder)]


def keep_command(args: Any) -> None:
    """Write the options to RUNS/options.json; UserError where other ones began the folder."""
    path, options = os.path.join(args.runs, "options.json"), {k: v for k, v in vars(args).items() if k != "nproc"}
    if os.path.exists(path):
        before = read_object(path, "what this script writes; remove the folder")
        changed = sorted(key for key in options if options[key] != before.get(key))
        if changed:
            fail(f"--runs {args.runs}: was begun with other options ({', '.join(changed)}); name another folder")
    os.makedirs(os.path.join(args.runs, "logs"), exist_ok=True)
    with atomic_write(path) as out:
        json.dump(options, out, indent=1)


def main() -> None:
    args = parse()
    os.chdir(ROOT)
    check_files(args)
    keep_command(args)
    work, plan = Work(args), Plan(args)
    begun = time.monotonic()
    work.chains(*plan.prepare())
    write_prompts(args.runs)
    work.chains([plan.plant()])
    for training in plan.trainings():  # one after the other: each takes all processes
        work.chains([training])
    work.chains(*map(plan.leaks, (REFERENCE, PRIVATE, NO_PRIVACY)))
    work.chains(*map(plan.use, (PRIVATE_TEXT, PRIVATE, NO_PRIVACY, NOTHING)), *map(plan.judge, (PRIVATE, NO_PRIVACY)))
    rows = [row_of(args.runs, name, work.seconds) for name in MODELS]
    result = {
        "kind": "synthesis",
        "rows": rows,
        "seconds": work.seconds,
        "hardware": hardware(),
        "commit": commit(),
        "torch": importlib.metadata.version("torch"),
    }
    with atomic_write(os.path.join(args.runs, "synthesis.json")) as out:
        json.dump(result, out, indent=1)
        out.write("\n")
    text = dict_table(lines_of(rows))
    with atomic_write(os.path.join(args.runs, "table.md")) as out:
        out.write(text)
    page = os.path.join(args.runs, "page.html")
    write_page(page, args.runs, rows)
    for sample in read_json_lines(f"{args.runs}/{PRIVATE}/samples.jsonl")[:: 7 * args.samples][:5]:
        print(f"\nsample: {' '.join(sample['text'].split())}", end="")
    print(f"\n\n{text}\n{time.monotonic() - begun:.0f} s in all; page: {page}")
