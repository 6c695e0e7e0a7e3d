"""What each table runs: its defaults, its data, and the steps of a run from the data to the scores.

A new table is a Task in ALL_TASKS: `bash scripts/tables/start.sh NAME` makes it, and a scripts/NAME_table.sh may
shorten that. `table` is always the runner's Table.
"""

import argparse
import glob
import hashlib
import json
import os
import string
from collections.abc import Callable
from dataclasses import dataclass

from base.errors import fail
from base.files import read_object
from corpus.tokenizer import load_tokenizer, vocabulary_files

HUGGING_FACE = {"gpt2.sm": "gpt2", "gpt2.md": "gpt2-medium", "gpt2.lg": "gpt2-large", "gpt2.xl": "gpt2-xl"}
LORA = "--lora_dim 4 --lora_alpha 32 --lora_dropout 0.0".split()
# The published commands, in which $name is filled in.
TEXT_TRAINING = """
    $launch --train_data $tokens/train.jsonl --valid_data $tokens/valid.jsonl --train_batch_size $per_device
    --grad_acc $accumulation $noise --max_grad_norm 1.0 --valid_batch_size 4 --seq_len $seq_len --model_card $model
    --init_checkpoint $checkpoint --platform local --clip 0.0 --lr 0.0004 --weight_decay 0.01 --correct_bias
    --adam_beta2 0.999 --scheduler constant --warmup_step 0 --max_epoch 20 --save_interval 1000 $adapter
    --label_smooth 0.1 --work_dir $run --random_seed $seed $extra"""
TEXT_SEARCH = """
    $launch --data $tokens/test.jsonl --batch_size 1 --seq_len $seq_len --eval_len 64 --model_card $model
    --init_checkpoint $checkpoint --platform local --beam 10 --length_penalty $length_penalty
    --no_repeat_ngram_size 4 --repetition_penalty 1.0 $end --work_dir $run --output_file predict.jsonl"""
TEXT_DECODING = """
    python src/gpt2_decode.py --vocab $vocab --sample_file $run/predict.jsonl --input_file $tokens/test_formatted.jsonl
    $references --output_ref_file $refs --output_pred_file $texts"""
AUTHOR_TRAINING = """
    $launch --output_dir $run --model_name $model --train_file $train_file --vocab $vocab --sequence_len 128
    --per_device_train_batch_size $per_device --gradient_accumulation_steps $accumulation --evaluation_strategy steps
    --eval_steps 45 --log_level info --per_device_eval_batch_size 64 --eval_accumulation_steps 1 --seed $seed
    --prediction_loss_only --weight_decay 0.01 --remove_unused_columns False --num_train_epochs 3 --logging_steps 5
    --max_grad_norm 0 --lr_scheduler_type constant --learning_rate $rate --disable_tqdm True --label_names labels
    --dataloader_num_workers 2 $adapter $extra $privacy"""

SETS = ("all", "seen", "unseen")  # of test categories: all, those of the training data, the others
Option = tuple[str, str, object, str]  # name, metavar, default, help


def fill(command: str, **values: object) -> list[str]:
    """The words of a command. $name stands for a value within a word; alone, it may stand for a list of words."""
    words: list[str] = []
    for word in command.split():
        value = values.get(word[1:])
        words += value if word[0] == "$" and isinstance(value, list) else [string.Template(word).substitute(values)]
    return words


@dataclass(frozen=True)
class Run:
    """One seed of a line of the table. model: a name or a folder. folder: where the run keeps its files."""

    model: str
    method: str
    epsilon: str
    seed: int
    folder: str


@dataclass(frozen=True)
class Step:
    """A command of a run. It is skipped where is_done() and gets --resume where is_begun()."""

    command: list[str]
    is_done: Callable[[], bool] = lambda: False
    is_begun: Callable[[], bool] = lambda: False


def training_step(run: Run, command: list[str]) -> Step:
    def is_done() -> bool:
        report = os.path.join(run.folder, "privacy.json")
        return os.path.exists(report) and "train_runtime" in read_object(report, "what the run wrote")

    ledger = os.path.join(run.folder, "privacy_ledger.jsonl")
    return Step(command, is_done, lambda: os.path.exists(ledger) and os.path.getsize(ledger) > 0)


@dataclass(frozen=True)
class Task:
    """A table's name, its --help and its defaults.

    models: name -> its checkpoint's name. options: those that other tasks lack. reserved: flags of its training script
    that may not stand behind --. instead: what to use in their place.
    """

    name: str
    title: str
    models: dict[str, str]
    default_models: list[str]
    epsilons: str
    methods: str
    seeds: str
    batch: int
    options: list[Option]
    reserved: str
    instead: str
    script: str

    @property
    def scores(self) -> list[str]:
        """The columns of its scores; none where the generated texts are not scored."""
        return []

    def checkpoint(self, model: str) -> str:
        """The checkpoint from which a model's training starts."""
        return f"pretrained_checkpoints/{self.models[model]}-pytorch_model.bin" if model in self.models else model

    def fetch_checkpoints(self, table) -> None:
        for model in table.args.models:
            if not os.path.exists(self.checkpoint(model)):
                table.start("bash", "scripts/download_pretrained_checkpoints.sh", *table.mirror, self.models[model])


@dataclass(frozen=True)
class TextTask(Task):
    """Contexts with completions: training, beam search, decoding and scores. parts: the files of train, valid, test."""

    parts: tuple[str, str, str] = ("train.txt", "valid.txt", "test.txt")
    references: str = ""  # flags of gpt2_decode.py for parallel files; without them, E2E's one file
    by_seen: bool = False  # scores of seen and unseen categories too

    @property
    def scores(self) -> list[str]:
        names = (
            ("BLEU", "METEOR", "TER", "chrF++") if self.references else ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
        )
        return [f"{name} {part}" for name in names for part in SETS] if self.by_seen else list(names)

    def check(self, args: argparse.Namespace) -> None:
        """UserError for a mistake in the options."""
        for flag, value in (("--vocab", args.vocab), ("--test", args.test)) if args.data is None else ():
            if value is not None:
                fail(
                    f"{flag} {value}: wanted --data beside it; the tokens of data/{self.name} are of GPT-2's "
                    "vocabulary" + " and of its own test set" * (flag == "--test")
                )
        args.vocab = args.vocab or "vocab"
        for file in self.texts(args) if args.data is not None else ():
            if not os.path.isfile(file):
                fail(f"--data {args.data}: there is no {file}; wanted {', '.join(self.parts)} (or --test FILE)")
        if args.data is not None:
            vocabulary_files(args.vocab)

    def texts(self, args: argparse.Namespace) -> list[str]:
        train, valid, test = (os.path.join(args.data, part) for part in self.parts)
        return [train, valid, args.test or test]

    def sources(self, args: argparse.Namespace) -> list[str]:
        """The files of which the tokens are made."""
        return [*self.texts(args), *vocabulary_files(args.vocab)]

    def prepare(self, table) -> None:
        """Make or fetch data, vocabulary and checkpoints that are missing."""
        args, dry = table.args, table.args.dry_run
        if args.data is None:
            table.start("bash", "scripts/create_datasets.sh", *table.mirror, *[self.name] * (self.name != "e2e"))
            args.data = args.tokens = f"data/{self.name}"
        else:
            args.tokens = f"{args.runs}/data"
            if not dry:
                if not os.path.exists(f"{args.tokens}/made_of.txt"):  # of unknown origin
                    for path in glob.glob(f"{glob.escape(args.tokens)}/*.jsonl"):
                        os.unlink(path)
                table.keep(f"{args.tokens}/made_of.txt", [f"{sha256(path)}  {path}" for path in self.sources(args)])
            for part, source in zip(("train", "valid", "test"), self.sources(args)[:3], strict=True):
                tokens = f"{args.tokens}/{part}.jsonl"
                if not os.path.exists(tokens):
                    formatted = f"{args.tokens}/{part}_formatted.jsonl"
                    table.start("python", f"src/format_converting_{self.name}.py", source, formatted)
                    bos = ["--add_bos"] * (load_tokenizer(args.vocab).begin_of_text is not None)  # a Qwen has none
                    encode = ["src/gpt2_encode.py", "--vocab", args.vocab, *bos, "--add_eos"]
                    table.start("python", *encode, "--input", formatted, "--output", tokens)
        self.fetch_checkpoints(table)
        end: object = 628  # GPT-2's token of two line feeds, which ends a text in the published command
        if args.vocab != "vocab":
            two, *others = load_tokenizer(args.vocab).encode("\n\n")
            end = None if others else two
        args.end = [] if end is None else ["--eos_token_id", str(end)]

    def steps(self, table, run: Run) -> tuple[list[str], list[Step]]:
        """(lines for commands.txt beside the commands, the steps of the run)."""
        args, predictions, scores = table.args, f"{run.folder}/predict.jsonl", f"{run.folder}/scores.json"
        names = {
            **vars(args),
            "model": run.model,
            "run": run.folder,
            "seed": run.seed,
            "checkpoint": self.checkpoint(run.model),
        }
        training = []
        if run.method != "none":
            noise = {"published": ["--noise_multiplier", "0.6"], "inf": ["--noise_multiplier", "0"]}
            per_device, accumulation = table.split_batch(8)  # as published, where there are 16 processes
            command = fill(
                TEXT_TRAINING,
                launch=table.launch(self.script),
                per_device=per_device,
                accumulation=accumulation,
                noise=noise.get(run.epsilon, ["--target_epsilon", run.epsilon]),
                adapter=LORA if run.method == "lora" else ["--lora_dim", "0"],
                **names,
            )
            training = [training_step(run, command)]
            names["checkpoint"] = run.folder
        search = Step(
            fill(TEXT_SEARCH, launch=table.launch("src/gpt2_beam.py"), **names),
            lambda: os.path.exists(predictions),
            lambda: bool(glob.glob(f"{glob.escape(predictions)}.journal.*")),
        )
        if self.references:
            flags = self.references.split()
            decoded = [
                (f"{run.folder}/references/{keep}", f"{run.folder}/predictions_{keep}.txt", [*flags, "--filter", keep])
                for keep in self.sets(args.tokens)
            ]
            scorer = ["eval/webnlg/webnlg_scores.py", *(path for *pair, _ in decoded for path in pair)]
        else:
            decoded = [(f"{run.folder}/e2e_ref.txt", f"{run.folder}/e2e_pred.txt", [])]
            scorer = ["eval/e2e/measure_scores.py", *decoded[0][:2], "-p"]
        decoding = [
            Step(fill(TEXT_DECODING, refs=refs, texts=texts, references=flags, **names))
            for refs, texts, flags in decoded
        ]
        score = Step(["python", *scorer, "--json", scores], lambda: os.path.exists(scores))
        return [f"# data: {args.data}, vocabulary: {args.vocab}"], [*training, search, *decoding, score]

    def sets(self, tokens: str) -> list[str]:
        """The sets to score: all and, where by_seen, seen and unseen as far as the test set has them (both where the
        data are not made yet, in a dry run)."""
        formatted = f"{tokens}/test_formatted.jsonl"
        if not self.by_seen or not os.path.exists(formatted):
            return list(SETS) if self.by_seen else ["all"]
        with open(formatted, encoding="utf-8") as handle:
            found = {json.loads(line)["cate"] for line in handle}
        return ["all", *["seen"] * (True in found), *["unseen"] * (False in found)]


@dataclass(frozen=True)
class AuthorTask(Task):
    """Texts of authors: a training that ends with an evaluation."""

    def check(self, args: argparse.Namespace) -> None:
        """UserError for a mistake in the options."""
        if "published" in args.epsilon:
            fail("--epsilon published: is 8 here")
        args.vocab, args.train_file = args.vocab or "vocab", args.train_file or "data/reddit/train.jsonl"

    def prepare(self, table) -> None:
        """Make or fetch corpus, vocabulary and checkpoints that are missing."""
        args = table.args
        if args.vocab == "vocab":
            table.start("bash", "scripts/download_vocab.sh", *table.mirror)
        if args.train_file == "data/reddit/train.jsonl" and not os.path.isfile(args.train_file):
            table.start("python", "scripts/prepare_reddit.py")
        if not args.dry_run and os.path.isfile(args.train_file):
            table.keep(f"{args.runs}/made_of.txt", [f"{sha256(args.train_file)}  {args.train_file}"])
        self.fetch_checkpoints(table)

    def steps(self, table, run: Run) -> tuple[list[str], list[Step]]:
        """(no lines, the training)."""
        rate, adapter, largest = ("1e-4", [], 32) if run.method == "full" else ("3e-4", [*LORA, "--enable_lora"], 64)
        privacy = {
            "inf": ["--disable_dp"],  # the untrained model takes one step of rate 0
            "0": ["--disable_dp", "--max_steps", "1", "--learning_rate", "0"],
        }
        private = ["--target_epsilon", run.epsilon, "--per_sample_max_grad_norm", "1.0"]
        per_device, accumulation = table.split_batch(largest)
        command = fill(
            AUTHOR_TRAINING,
            launch=table.launch(self.script),
            run=run.folder,
            model=run.model,
            seed=run.seed,
            per_device=per_device,
            accumulation=accumulation,
            adapter=adapter,
            rate="0" if run.epsilon == "0" else rate,
            privacy=privacy.get(run.epsilon, private),
            **vars(table.args),
        )
        return [], [training_step(run, command)]


def sha256(path: str) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


TEXT_RESERVED = """
    --train_batch_size --grad_acc --noise_multiplier --target_epsilon --random_seed --seq_len --train_data --valid_data
    --model_card --init_checkpoint --work_dir --resume"""
AUTHOR_RESERVED = """
    --per_device_train_batch_size --gradient_accumulation_steps --noise_multiplier --target_epsilon --disable_dp --seed
    --train_file --vocab --model_name --output_dir --resume --resume_from_checkpoint --dry_run --enable_lora"""


def text_task(name: str, title: str, epsilons: str, parts: tuple[str, str, str], **more) -> TextTask:
    """A task whose runs are those of E2E on other data."""
    options: list[Option] = [
        ("data", "DIR", None, f"folder of {', '.join(parts)} (default: data/{name}, fetched where it is missing)"),
        ("test", "FILE", None, f"with --data: another test set than its {parts[2]}"),
        ("vocab", "DIR", None, "with --data: folder of the vocabulary to encode it with (default: vocab)"),
        ("seq_len", "T", 512, "longest example in tokens (default 512)"),
        ("length_penalty", "A", "0.8", "of the beam search; longer texts with a larger one (default 0.8)"),
    ]
    return TextTask(
        name=name,
        title=title,
        models=HUGGING_FACE,
        default_models=[*HUGGING_FACE],
        epsilons=epsilons,
        methods="lora",
        seeds="110",
        batch=128,
        options=options,
        reserved=TEXT_RESERVED,
        instead="--epsilon, --seeds, --batch, --seq_len, --data, --method or MODEL",
        script="src/gpt2_ft.py",
        parts=parts,
        **more,
    )


AnyTask = TextTask | AuthorTask
E2E = """\
The E2E experiment as a table: for each model the four published steps (training, beam search, decoding, scores), one
row each in results/DATE_NAME/: BLEU, NIST, METEOR, ROUGE-L, CIDEr, epsilon, delta, time, peak memory."""
WEBNLG = """\
WebNLG 2017 as a table, one row a run in results/DATE_NAME/: the steps and flags of the E2E table, six references as in
LoRA's example, and BLEU, METEOR, TER and chrF++ of all categories, those that training has seen, and the others.
The challenge's test set has 4,928 texts. Without it, --data DIR --test DIR/dev.json scores seen categories."""
DART = """\
DART v1.1.1 as a table, one row a run in results/DATE_NAME/: the steps and flags of the E2E table, six references as in
LoRA's example, and BLEU, METEOR, TER and chrF++."""
AUTHOR = """\
The author-level experiment as a table: full fine-tuning and LoRA, one row each in results/DATE_NAME/: training and
held-out loss, epsilon, delta, time, peak memory. A seed chooses the held-out authors too.

For a small corpus (Shakespeare's 299 speakers), with four texts of an author in each step:
  bash scripts/author_table.sh --train_file plays.jsonl --name plays-4 --batch 64 --method full --epsilon "0 8 inf" \\
      --seeds "1 2 3" MODEL -- --samples_per_author 4 --learning_rate 1e-3 --lr_scheduler_type linear \\
      --sequence_len 32 --eval_fraction 0.1 --num_train_epochs 10
and --method lora --epsilon "8 inf" with --learning_rate 1e-2. With so few authors the table compares methods only. It
is no example of a private release: delta = 1/N is 4e-3, which also allows publishing all texts of one random author."""
AUTHOR_OPTIONS: list[Option] = [
    (
        "train_file",
        "FILE",
        None,
        "JSON lines with author and content (default: data/reddit/train.jsonl, made where missing)",
    ),
    ("vocab", "DIR", None, "folder of the vocabulary (default: vocab, fetched where it is missing)"),
]
DART_PARTS = ("dart-v1.1.1-full-train.json", "dart-v1.1.1-full-dev.json", "dart-v1.1.1-full-test.json")
SIX_REFERENCES = "--ref_type {} --ref_num 6 --tokenize --lower"
ALL_TASKS: list[AnyTask] = [
    text_task("e2e", E2E, "published", ("train.txt", "valid.txt", "test.txt")),
    text_task(
        "webnlg",
        WEBNLG,
        "8",
        ("train.json", "dev.json", "test.json"),
        references=SIX_REFERENCES.format("webnlg"),
        by_seen=True,
    ),
    text_task("dart", DART, "8", DART_PARTS, references=SIX_REFERENCES.format("dart")),
    AuthorTask(
        name="author",
        title=AUTHOR,
        models={name: name for name in HUGGING_FACE.values()},
        default_models=["gpt2"],
        epsilons="8",
        methods="full lora",
        seeds="42",
        batch=1024,
        options=AUTHOR_OPTIONS,
        reserved=AUTHOR_RESERVED,
        instead="--epsilon, --seeds, --batch, --train_file, --vocab, --method or MODEL",
        script="src/fine-tune-dp.py",
    ),
]
TASKS = {task.name: task for task in ALL_TASKS}
