"""Users' mistakes, over all scripts: one line on standard error, status 2, no traceback, no file made or changed.

The cases share one folder (`world`) of sound and of spoiled files; each runs the script as a process of its own.
"""

import pathlib

import pytest

import start
from base.errors import UserError
from helpers.processes import ROOT
from helpers.small_runs import flags, server, start_ranks, train
from helpers.spoiled_files import LINKED
from row import write_row

TRAIN, ENCODE, FORMAT = "src/gpt2_ft.py", "src/gpt2_encode.py", "src/format_converting_e2e.py"
DECODE, SCORE, BEAM = "src/gpt2_decode.py", "eval/e2e/measure_scores.py", "src/gpt2_beam.py"
REPORT, EXPORT, AUDIT = "src/privacy_report.py", "src/export.py", "src/privacy_audit.py"
WEBNLG, DART, AUTHORS = "src/format_converting_webnlg.py", "src/format_converting_dart.py", "src/fine-tune-dp.py"
REDDIT, CORPUS, PLOT = "scripts/prepare_reddit.py", "scripts/start.py make_author_corpus", "scripts/plot_run.py"
DEMO_DATA, DEMO_VOCAB = "scripts/start.py make_demo_data", "scripts/start.py make_demo_vocab"
ENGLISH = "scripts/start.py make_english_corpus"
TIME_BEAM, TIME_TRAINING = "scripts/start.py benchmark_beam", "scripts/start.py benchmark_training"
BUDGET, SWEEP = "src/privacy_budget.py", "scripts/sweep.py"
START, SCALING, FAULTS = "scripts/start.py", "scripts/start.py project_scaling", "scripts/audit_faults.py"
GENERATE, TIME_SAMPLES = "src/generate.py", "scripts/start.py benchmark_generate"
MEMORY = "scripts/start.py project_memory"
PLANT, LOSSES, JUDGE = "src/plant_secrets.py", "src/text_losses.py", "eval/synthetic/judge_samples.py"
SYNTHESIS = "scripts/start.py synthesis"
RUNNER, TABLES, SCORE_TRIPLES = "scripts/start.py runner", "scripts/results_tables.py", "eval/webnlg/webnlg_scores.py"


def training(**changed: object):
    """Flags of a small run in the world; @name is a file of the world."""
    def arguments(root: pathlib.Path) -> list[str]:
        named = {name: root / value[1:] if isinstance(value, str) and value.startswith("@") else value
                 for name, value in changed.items()}
        return flags(root / "new", **{"train_data": root / "train.jsonl", "valid_data": root / "valid.jsonl", **named})

    return arguments


def of(line: str):
    """Arguments from one line; @name is a file of the world."""
    return lambda root: [str(root / word[1:]) if word.startswith("@") else word for word in line.split()]


DATA = {name: (TRAIN, training(train_data=f"@{name}"), words) for name, words in {
    "absent.jsonl": ["--train_data", "absent.jsonl"], "folder": ["--train_data", "folder"],
    "empty": ["empty", "--train_data"],
    "cut.jsonl": ["cut.jsonl:2"], "text.jsonl": ["text.jsonl:2"], "list.jsonl": ["list.jsonl:2"],
    "blank.jsonl": ["blank.jsonl:2"],
    "strings.jsonl": ["strings.jsonl:2", "text where token ids are wanted", "src/gpt2_encode.py"],
    "half_strings.jsonl": ["half_strings.jsonl:2", "src/gpt2_encode.py"],
    "booleans.jsonl": ["booleans.jsonl:2", "token ids must be whole numbers"],
    "booleans_alone.jsonl": ["booleans_alone.jsonl:2", "token ids must be whole numbers"],
    "floats.jsonl": ["floats.jsonl:2"], "nested.jsonl": ["nested.jsonl:2"],
    "no_completion.jsonl": ["no_completion.jsonl:2", "completion is empty"],
    "no_context.jsonl": ["no_context.jsonl:2", "context is empty"],
    "missing_key.jsonl": ["missing_key.jsonl:2"], "large_id.jsonl": ["large_id.jsonl:2", "60", "vocabulary of 60"],
    "negative.jsonl": ["negative.jsonl:2", "-1"], "huge_id.jsonl": ["huge_id.jsonl:2"], "deep.jsonl": ["deep.jsonl:1"],
    "latin1.jsonl": ["latin1.jsonl:2", "not UTF-8"]}.items()}

WEIGHTS = {name: (TRAIN, training(init_checkpoint=f"@{name}"), words) for name, words in {
    "absent.bin": ["--init_checkpoint", "absent.bin"], "folder": ["--init_checkpoint", "folder", "holds no"],
    "empty": ["--init_checkpoint", "empty"], "text.bin": ["text.bin"],
    "cut.safetensors": ["cut.safetensors", "truncated"],
    "list.bin": ["list.bin", "holds a list"], "lacks.bin": ["lacks.bin", "lacks"], "unknown.bin": ["h.9.ln_1.weight"],
    "shape.bin": ["shape.bin", "another shape", "(60, 17)"], "malicious.bin": ["malicious.bin", "refused"],
    "malicious_zip.bin": ["malicious_zip.bin", "refused"], "other": ["other", "another shape"],
    "dora": ["adapter_config.json", "use_dora"], "loha": ["peft_type is 'LOHA'"], "evil_adapter": ["refused"],
    "no_base": ["adapts gpt2", "--base_checkpoint"], "train.jsonl": ["train.jsonl"]}.items()}

CARDS = {name: (TRAIN, training(model_card=f"@{name}"), words) for name, words in {
    "absent_card": ["--model_card", "absent_card"], "folder": ["--model_card", "config.json"],
    "not_json": ["config.json", "not JSON"],
    "a_list": ["config.json"], "no_layers": ["config.json", "missing"], "heads": ["n_head is 3"],
    "untied": ["tie_word_embeddings"],
}.items()}

CHANGES = [
    ({"train_batch_size": 41}, ["41", "larger than the training data (40"]),
    ({"train_batch_size": 0}, ["--train_batch_size 0"]),
    ({"train_batch_size": "many"}, ["--train_batch_size", "many"]), ({"grad_acc": 0}, ["--grad_acc 0"]),
    ({"noise_multiplier": -1}, ["--noise_multiplier -1"]), ({"noise_multiplier": "nan"}, ["--noise_multiplier nan"]),
    ({"noise_multiplier": "inf"}, ["--noise_multiplier inf"]), ({"max_grad_norm": 0}, ["--max_grad_norm 0"]),
    ({"max_grad_norm": -1}, ["--max_grad_norm -1"]), ({"max_grad_norm": "nan"}, ["--max_grad_norm nan"]),
    ({"max_grad_norm": 1e-22}, ["--max_grad_norm 1e-22", "from 1e-06"]), ({"max_grad_norm": 1e9}, ["below 1e+08"]),
    ({"noise_multiplier": 1e-160}, ["--noise_multiplier 1e-160", "float32"]),
    ({"noise_multiplier": 1e14, "max_grad_norm": 10}, ["--noise_multiplier 1e+14", "deviation of 1e+15"]),
    ({"max_step": 10**12}, ["--max_step 1000000000000", "at most 1e+09"]),
    ({"target_epsilon": 8}, ["--noise_multiplier and --target_epsilon"]),
    ({"noise_multiplier": None, "target_epsilon": 0}, ["--target_epsilon 0"]),
    ({"noise_multiplier": None, "target_epsilon": -3}, ["--target_epsilon -3"]),
    ({"noise_multiplier": None, "target_epsilon": "nan"}, ["--target_epsilon nan"]),
    ({"target_advantage": 0.1}, ["--noise_multiplier and --target_advantage"]),
    ({"noise_multiplier": None, "target_advantage": 0.1, "target_epsilon": 8}, ["--target_epsilon and --target_adv"]),
    *(({"noise_multiplier": None, "target_advantage": value}, [f"--target_advantage {value}"])
      for value in (0, 1, -0.1, "nan")),
    ({"target_delta": 0}, ["--target_delta 0"]), ({"target_delta": 1}, ["--target_delta 1"]),
    ({"target_delta": "nan"}, ["--target_delta nan"]),
    ({"seq_len": 49}, ["--seq_len 49", "48 positions"]), ({"seq_len": 1}, ["--seq_len 1"]),
    ({"max_step": 0}, ["--max_step 0"]),
    ({"max_step": None}, ["--max_epoch"]), ({"max_step": None, "max_epoch": "nan"}, ["--max_epoch nan"]),
    ({"fp16": True}, ["--fp16"]),
    ({"lora_dim": None, "base_dtype": "bf16"}, ["--base_dtype bf16", "without --lora_dim every weight is trained"]),
    ({"base_dtype": "int8"}, ["--base_dtype", "int8"]),
    ({"lora_dim": -1}, ["--lora_dim -1"]), ({"lora_alpha": 0}, ["--lora_alpha 0"]),
    ({"lora_dropout": 1}, ["--lora_dropout 1"]),
    ({"label_smooth": 1}, ["--label_smooth 1"]), ({"lr": -0.1}, ["--lr -0.1"]), ({"lr": "nan"}, ["--lr nan"]),
    ({"adam_beta2": 1}, ["--adam_beta2 1"]), ({"scheduler": "sawtooth"}, ["--scheduler", "sawtooth"]),
    ({"scheduler": "cycle", "i_steps": "0,5", "i_lrs": "1"}, ["--i_steps"]),
    ({"scheduler": "cycle", "i_steps": "a"}, ["--i_steps a"]),
    ({"platform": "azure"}, ["--platform azure"]), ({"platform": "k8s"}, ["OMPI_COMM_WORLD_RANK"]),
    ({"noise_seed": None}, ["--noise_seed"]),
    ({"noise_source": "os"}, ["--noise_seed 1"]), ({"noise_source": "dice"}, ["--noise_source", "dice"]),
    ({"micro_batch_tokens": 0}, ["--micro_batch_tokens 0"]), ({"save_interval": 0}, ["--save_interval 0"]),
    ({"collective_timeout": 0}, ["--collective_timeout 0"]), ({"resume_changed": "lr"}, ["--resume_changed"]),
    ({"average": "ema:1"}, ["--average ema:1", "above 0 and below 1"]),
    ({"average": "tail"}, ["--average tail: expected ema:B"]),
    ({"no_such_flag": 1}, ["--no_such_flag"]), ({"train_batch": 8}, ["--train_batch"]),
    ({"valid_data": "@cut.jsonl"}, ["cut.jsonl:2"]),
    ({"valid_data": "@unscored.jsonl"}, ["--valid_data", "all 3 contexts fill --seq_len", "larger --seq_len"]),
    ({"valid_data": "@train.jsonl"}, ["--valid_data", "train.jsonl", "is the training file", "give other data"]),
    ({"valid_data": None}, ["--valid_data"]), ({"work_dir": "@e2e.txt/run"}, ["--work_dir", "e2e.txt"]),
    ({"work_dir": "/proc/run"}, ["/proc/run"]),
    ({"work_dir": "@e2e.txt"}, ["--work_dir", "e2e.txt"]), ({"resume": True}, ["--resume", "new"]),
    ({"resume": True, "work_dir": "@folder"}, ["--resume", "privacy_ledger.jsonl is missing"]),
    ({"resume": True, "work_dir": "@run", "lr": 0.5}, ["--resume", "lr 0.01 there, 0.5 here"]),
    ({"resume": True, "work_dir": "@damaged_run"}, ["privacy_ledger.jsonl:1: damaged"]),
    ({"work_dir": "@run"}, ["--work_dir", "--resume"]),
    ({"noise_multiplier": 0, "grad_engine": "opacus"}, ["--grad_engine opacus", "clips nothing"]),
    *(({"work_dir": f"@{name}", "resume": True}, [file, "is a pipe or a device"]) for name, file in LINKED.items()),
    ({"init_checkpoint": "@run", "lora_dim": 3}, ["--lora_dim 3", "rank 2"]),
    ({"base_checkpoint": "@tiny"}, ["--base_checkpoint"]),
    ({"init_checkpoint": "@run", "base_checkpoint": "@other"}, ["--base_checkpoint", "fingerprint"]),
]
FLAGS = {" ".join(f"{name}={value}" for name, value in changed.items()): (TRAIN, training(**changed), words)
         for changed, words in CHANGES}

decode = ("--vocab @vocab --sample_file @predict.jsonl --input_file @formatted.jsonl --output_ref_file @new_ref "
          "--output_pred_file @new_pred")
authors = ("--output_dir @new --model_name @tiny --vocab @vocab --noise_multiplier 1 --sequence_len 24 "
           "--cache_dir @folder --train_file ")
canaries = ("--train_data @train.jsonl --model_card @tiny --init_checkpoint @tiny --seq_len 32 --noise_multiplier 1 "
            "--max_step 2 --canaries 100 --work_dir @new")
search = "--data @contexts.jsonl --init_checkpoint @run --work_dir @new --seq_len 40 --eval_len 8 --eos_token_id 5"
OTHERS = {f"{script.split('/')[-1]} {line}": (script, of(line), words) for script, line, words in [
    (FORMAT, "@absent @new", ["absent"]), (FORMAT, "@empty @new", ["empty"]),
    (FORMAT, "@no_bars.txt @new", ["no_bars.txt:2", "||"]),
    (FORMAT, "@no_text.txt @new", ["no_text.txt:2", "completion"]), (FORMAT, "@latin1.txt @new", ["not UTF-8"]),
    (FORMAT, "@e2e.txt @e2e.txt", ["input itself"]), (FORMAT, "@e2e.txt @folder", ["folder"]),
    (FORMAT, "@e2e.txt @absent/new", ["absent"]),
    *((script, "--no_such_flag", ["--help"]) for script in (
        FORMAT, ENCODE, DECODE, SCORE, BEAM, REPORT, EXPORT, AUDIT, WEBNLG, DART, AUTHORS, REDDIT, CORPUS, PLOT,
        DEMO_DATA, DEMO_VOCAB, ENGLISH, TIME_BEAM, TIME_TRAINING, FAULTS, TABLES, SCALING, SCORE_TRIPLES, BUDGET,
        SWEEP, GENERATE, TIME_SAMPLES, MEMORY)),
    *((script, f"@{name} @new", [f"{name}"]) for script in (WEBNLG, DART)
      for name in ("absent", "folder", "empty", "half.json", "text.jsonl", "latin1.jsonl", "deep.jsonl")),
    (WEBNLG, "@a_list/config.json @new", ["entries"]), (DART, "@a_list/config.json @new", ["holds no text"]),
    *((script, "@train.jsonl @train.jsonl", ["input itself"]) for script in (WEBNLG, DART)),
    (WEBNLG, "@entries.json @new", ["entries.json: entry 1", "lex"]), (DART, "@triples.json @new", ["triples.json"]),
    (EXPORT, "--init_checkpoint @absent --output @new", ["--init_checkpoint", "absent"]),
    (EXPORT, "--init_checkpoint @malicious.bin --model_card gpt2.sm --output @new", ["malicious.bin", "refused"]),
    (EXPORT, "--init_checkpoint @run --base_checkpoint @other --output @new", ["--base_checkpoint", "fingerprint"]),
    (EXPORT, "--init_checkpoint @run --output @tiny", ["--output", "model.safetensors"]),
    (EXPORT, "--init_checkpoint @run --output @e2e.txt", ["e2e.txt"]),
    (EXPORT, "--init_checkpoint @run --output @new --vocab @folder", ["--vocab", "encoder.json"]),
    (AUTHORS, authors + "@authors.jsonl", ["authors.jsonl:2", "content"]),
    (AUTHORS, authors + "@absent", ["--train_file", "absent"]), (AUTHORS, authors + "@deep.jsonl", ["deep.jsonl:1"]),
    (AUTHORS, authors + "@absent --target_epsilon 8", ["--noise_multiplier and --target_epsilon"]),
    (AUTHORS, authors + "@absent --per_sample_max_grad_norm 1e-22", ["--per_sample_max_grad_norm 1e-22", "1e-06"]),
    (AUTHORS, authors.replace("--noise_multiplier 1 ", "--noise_multiplier 1e-160 ") + "@absent",
     ["--noise_multiplier 1e-160", "--per_sample_max_grad_norm 1 ", "float32"]),
    (AUTHORS, authors + "@absent --noise_source seeded", ["--noise_seed"]),
    (AUTHORS, authors.replace("@tiny", "@malicious.bin") + "@authors.jsonl", ["--model_name", "malicious.bin"]),
    (REDDIT, "--archive @absent --output @new", ["--archive", "absent"]),
    (REDDIT, "--archive @e2e.txt --output @new", ["e2e.txt", "zip"]), (REDDIT, "--records 0", ["--records 0"]),
    (CORPUS, "--out @new --authors 0", ["--authors 0"]), (CORPUS, "--out @new --records 1", ["--records 1"]),
    (CORPUS, "--out @new --seed -1", ["--seed -1"]), (CORPUS, "--out @new --exponent nan", ["--exponent nan"]),
    (CORPUS, "--out @absent/new --authors 2 --records 2", ["absent"]),
    (DEMO_DATA, "--domain public --out @absent", ["--out", "absent"]), (DEMO_DATA, "--domain sea", ["sea"]),
    (DEMO_VOCAB, "--train @no_bars.txt --out @folder", ["no_bars.txt:2"]),
    (DEMO_VOCAB, "--train @e2e.txt --out @folder --size 3", ["--size 3"]),
    (ENGLISH, "--webnlg @folder --out @new", ["--text: give a folder"]),
    (ENGLISH, "--text @folder --webnlg @folder --out @new", ["dict-gcide", "No such file", "apt-get download"]),
    (ENGLISH, "--text @folder --webnlg @folder --out @new --size 3", ["--size 3", "258"]),
    (PLOT, "@absent", ["absent"]), (PLOT, "@folder/.. --out @new.png", ["metrics.jsonl:2"]),
    (PLOT, "@run --out @absent/new.png", ["absent"]), (PLOT, "@run --out @new", ["--out", ".png"]),
    (TIME_BEAM, "--init_checkpoint @tiny --data @absent", ["--data", "absent"]),
    (TIME_BEAM, "--init_checkpoint @tiny --data @list.jsonl", ["list.jsonl:2"]),
    (TIME_BEAM, "--init_checkpoint @tiny --data @contexts.jsonl --contexts 3", ["2 different contexts"]),
    (TIME_BEAM, "--init_checkpoint @tiny --slots 0", ["--slots 0"]),
    (TIME_TRAINING, "--repeats 0", ["--repeats 0"]), (TIME_TRAINING, "--tasks dance", ["dance"]),
    (TIME_TRAINING, "--seq_len 2000", ["--seq_len 2000"]),
    (FAULTS, "--train_data @train.jsonl --model_card @tiny --output @new --examples 0", ["--examples 0"]),
    (FAULTS, "--train_data @train.jsonl --model_card @tiny --output @new --only none --settings sea", ["sea"]),
    (BUDGET, "create @new --train_data @absent --epsilon 8 --delta 1e-5", ["--train_data", "absent"]),
    (BUDGET, "show @train.jsonl", ["train.jsonl:1: damaged"]),
    (BUDGET, "release @absent", ["absent", "no such budget"]),
    (REPORT, "@run @damaged_run", ["privacy_ledger.jsonl:1: damaged"]), (REPORT, "@run @absent", ["absent"]),
    (SWEEP, f"{ROOT}/src/gpt2_ft.py --out @new --grid lr=1,2 --score bleu --", ["--score bleu", "no such column"]),
    (SWEEP, "@e2e.txt --out @new --grid lr=1,2 --", ["e2e.txt", "no training script"]),
    *((GENERATE, f"--init_checkpoint @tiny --output @new {line}", words) for line, words in [
        ("--temperature 0", ["--temperature 0", "0.01"]), ("--top_p 0", ["--top_p 0"]), ("--top_k -1", ["--top_k -1"]),
        ("--top_k 1 --top_p 0.5", ["--top_p", "--top_k 1"]), ("--num_samples 0", ["--num_samples 0"]),
        ("--max_new_tokens 0", ["--max_new_tokens 0"]), ("--prompts @new", ["--output", "input itself"])]),
    (GENERATE, "--init_checkpoint @absent --output @new", ["--init_checkpoint", "absent"]),
    (GENERATE, "--init_checkpoint @tiny --output @folder", ["--output", "folder"]),
    (GENERATE, "--init_checkpoint @tiny --output @absent/new", ["--output", "absent"]),
    (GENERATE, "--init_checkpoint @tiny --vocab @absent --output @new", ["absent"]),
    (TIME_SAMPLES, "--batch_sizes 0", ["--batch_sizes 0"]),
    (MEMORY, "--tokens 100 --length 64", ["--tokens 100", "--length 64"]), (MEMORY, "--rank 0", ["--rank 0"]),
    (MEMORY, "--whole", ["--whole", "--measure"]),
    (PLANT, "--data @absent --vocab @vocab --output_dir @new", ["--data", "absent"]),
    (PLANT, "--data @train.jsonl --vocab @absent --output_dir @new", ["absent"]),
    (PLANT, "--data @train.jsonl --vocab @vocab --held_out 0 --output_dir @new", ["--held_out 0"]),
    (LOSSES, "--init_checkpoint @tiny --data @cut.jsonl --output @new", ["cut.jsonl:2"]),
    (LOSSES, "--init_checkpoint @absent --data @train.jsonl --output @new", ["--init_checkpoint", "absent"]),
    (LOSSES, "--init_checkpoint @tiny --data @train.jsonl --output @train.jsonl", ["--output"]),
    (JUDGE, "--samples @absent --private @e2e.txt --held_out @e2e.txt", ["--samples", "absent"]),
    (JUDGE, "--samples @e2e.txt --private @e2e.txt --held_out @e2e.txt", ["--held_out", "swapped"]),
    (JUDGE, "--samples @e2e.txt --private @e2e.txt --held_out @latin1.txt --searched @e2e.txt", ["--searched"]),
    (SYNTHESIS, "--data @folder --runs @new", ["--data", "train.txt"]), (SYNTHESIS, "", ["--runs"]),
    (SYNTHESIS, "--runs @new --samples 0", ["--samples 0"]),
    (RUNNER, "", ["no table"]), (RUNNER, "e2e --no_such_flag", ["--no_such_flag: unknown flag", "--help"]),
    (RUNNER, "author --dry-run --batch 0", ["--batch 0"]), (RUNNER, "dart --seeds", ["--seeds: wants a value"]),
    (SCORE_TRIPLES, "@folder", ["has no SYS"]), (SCORE_TRIPLES, "@folder @sys.txt", ["folder", "no reference0"]),
    (SCORE_TRIPLES, "@ref.txt @three.txt", ["ref.txt", "2", "three.txt", "3"]),
    (SCORE_TRIPLES, "@ref.txt @sys.txt @ref.txt @sys.txt", ["a different name for each"]),
    (SCORE_TRIPLES, "@ref.txt @sys.txt --json @sys.txt", ["--json", "another file"]),
    (SCORE_TRIPLES, "@ref.txt @sys.txt --java_timeout 0", ["--java_timeout 0"]),
    (TABLES, "", ["--readme"]), (TABLES, "--check", ["--readme"]), (TABLES, "@folder", ["folder", "rows/*.json"]),
    (TABLES, "--readme @absent", ["absent"]),
    (SCALING, "--gpus 0", ["--gpus"]), (SCALING, "--N 0", ["--N 0"]), (SCALING, "--reached nan", ["--reached"]),
    (START, "x", ["x: no such program"]),
    (SCORE, "@ref.txt @sys.txt --compare @absent", ["absent"]),
    (SCORE, "@ref.txt @sys.txt --compare @three.txt", ["three"]),
    (SCORE, "@ref.txt @sys.txt --compare @sys.txt --bootstrap_samples 0", ["--bootstrap_samples 0"]),
    (FORMAT, "@e2e.txt", ["OUT_formatted.jsonl"]), (SCORE, "@ref.txt", ["SYS"]),
    (ENCODE, "--vocab @vocab --input @absent --output @new", ["--input", "absent"]),
    (ENCODE, "--vocab @vocab --input @formatted.jsonl --output @new --chat_template x", ["--chat_template: refused"]),
    (ENCODE, "--vocab @absent --input @formatted.jsonl --output @new", ["--vocab", "absent"]),
    (ENCODE, "--vocab @tiny --input @formatted.jsonl --output @new", ["--vocab"]),
    (ENCODE, "--vocab @vocab --input @empty --output @new", ["--input", "empty"]),
    (ENCODE, "--vocab @vocab --input @no_json.jsonl --output @new", ["no_json.jsonl:1"]),
    (ENCODE, "--vocab @vocab --input @numbers.jsonl --output @new", ["numbers.jsonl:1", "context"]),
    (ENCODE, "--vocab @vocab --input @half_pair.jsonl --output @new", ["half_pair.jsonl:1", "surrogate"]),
    (ENCODE, "--vocab @vocab --input @latin1.txt --output @new", ["latin1.txt:1", "not UTF-8"]),
    (ENCODE, "--vocab @vocab --input @deep.jsonl --output @new", ["deep.jsonl:1"]),
    (ENCODE, "--vocab @vocab --input @formatted.jsonl --output @formatted.jsonl", ["--output"]),
    (ENCODE, "--vocab @vocab --input @formatted.jsonl --output @absent/new", ["absent"]),
    (DECODE, decode.replace("@predict.jsonl", "@absent"), ["--sample_file", "absent"]),
    (DECODE, decode.replace("@predict.jsonl", "@no_json.jsonl"), ["no_json.jsonl:1"]),
    (DECODE, decode.replace("@predict.jsonl", "@no_predict.jsonl"), ["no_predict.jsonl:1"]),
    (DECODE, decode.replace("@predict.jsonl", "@wild_id.jsonl"), ["wild_id.jsonl:1", "7"]),
    (DECODE, decode.replace("@predict.jsonl", "@wild_token.jsonl"), ["wild_token.jsonl:1", "999"]),
    (DECODE, decode.replace("@predict.jsonl", "@empty"), ["--sample_file"]),
    (DECODE, decode.replace("@formatted.jsonl", "@empty"), ["--input_file", "empty"]),
    (DECODE, decode.replace("@formatted.jsonl", "@numbers.jsonl"), ["numbers.jsonl:1"]),
    (DECODE, decode.replace("@vocab", "@folder"), ["--vocab"]),
    (DECODE, decode.replace("@new_pred", "@new_ref"), ["--output_pred_file"]),
    (DECODE, decode.replace("@new_pred", "@predict.jsonl"), ["--output_"]),
    (DECODE, decode + " --ref_type webnlg --ref_num 0", ["--ref_num 0"]),
    (DECODE, decode + " --ref_num 3", ["--ref_num"]), (DECODE, decode + " --filter seen", ["cate"]),
    (DECODE, decode + " --ref_unique_file @keys.txt", ["--ref_unique_file"]),
    (DECODE, decode + " --ref_unique_file @bad_keys.txt", ["bad_keys.txt:2"]),
    (DECODE, decode.replace("@new_ref", "@folder"), ["folder"]),
    (DECODE, decode.replace("@new_ref", "@absent/new"), ["absent"]),
    (SCORE, "@absent @sys.txt -p", ["absent"]), (SCORE, "@ref.txt @absent -p", ["absent"]),
    (SCORE, "@ref.txt @empty -p", ["empty"]),
    (SCORE, "@ref.txt @three.txt -p", ["ref.txt", "2", "three.txt", "3"]),
    (SCORE, "@two_empty.txt @sys.txt -p", ["two_empty.txt:3"]),
    (SCORE, "@ref.txt @latin1.txt -p", ["latin1.txt:1", "not UTF-8"]),
    (SCORE, "@ragged.csv @sys.txt -p", ["ragged.csv:3"]),
    (SCORE, "@no_header.tsv @sys.txt -p", ["no_header.tsv:1"]), (SCORE, "@ref.txt @sys.txt -p -H", ["-H"]),
    (SCORE, "@ref.txt @sys.txt -p -l @absent/scores", ["-l"]),
    (SCORE, "@ref.txt @sys.txt -p --bootstrap_samples 5", ["--bootstrap_samples"]),
    (SCORE, "@ref.txt @folder -p", ["folder"]),
    (BEAM, search.replace("@contexts.jsonl", "@absent"), ["--data", "absent"]),
    (BEAM, search.replace("@contexts.jsonl", "@empty"), ["--data", "empty"]),
    (BEAM, search.replace("@contexts.jsonl", "@cut.jsonl"), ["cut.jsonl:2"]),
    (BEAM, search.replace("@contexts.jsonl", "@large_id.jsonl"), ["large_id.jsonl:2", "60"]),
    (BEAM, search.replace("@contexts.jsonl", "@no_context.jsonl"), ["no_context.jsonl:2"]),
    (BEAM, search.replace("@contexts.jsonl", "@strings.jsonl"), ["strings.jsonl:2"]),
    (BEAM, search.replace("@run", "@folder"), ["--init_checkpoint"]),
    (BEAM, search.replace("@run", "@malicious.bin"), ["malicious.bin", "refused"]),
    (BEAM, search.replace("@run", "@text.bin"), ["text.bin"]),
    (BEAM, search + " --lora_dim 3", ["--lora_dim 3"]), (BEAM, search + " --lora_alpha 16", ["--lora_alpha 16"]),
    (BEAM, search + " --beam 0", ["--beam 0"]), (BEAM, search.replace("eval_len 8", "eval_len 40"), ["--eval_len 40"]),
    (BEAM, search.replace("seq_len 40", "seq_len 400"), ["--seq_len 400"]),
    (BEAM, search + " --repetition_penalty 0", ["--repetition_penalty 0"]),
    (BEAM, search + " --length_penalty nan", ["--length_penalty nan"]),
    (BEAM, search.replace("token_id 5", "token_id 60"), ["--eos_token_id"]),
    (BEAM, search + " --fp16", ["--fp16"]), (BEAM, search + " --resume", ["--resume"]),
    (BEAM, search.replace("@run", "@tiny.bin") + " --hyperparam", ["--hyperparam"]),
    (BEAM, search.replace("@new", "@e2e.txt"), ["--work_dir", "e2e.txt"]),
    (BEAM, search + " --base_checkpoint @other", ["--base_checkpoint"]),
    (EXPORT, "--init_checkpoint @run --output @new --vocab @vocab", ["--vocab", "258 ids"]),
    (EXPORT, "--init_checkpoint @run --output @new --format onnx", ["--format", "onnx"]),
    (EXPORT, "--init_checkpoint @run --output @new --base_name gpt2", ["--base_name gpt2"]),
    (EXPORT, "--init_checkpoint @tiny --output @new --format peft", ["--format peft", "no adapter"]),
    (REPORT, "@absent", ["absent"]), (REPORT, "@folder", ["folder"]),
    (REPORT, "@damaged_run", ["privacy_ledger.jsonl:1: damaged"]),
    (REPORT, "@train.jsonl", ["train.jsonl:1"]), (REPORT, "@torn_only", ["privacy_ledger.jsonl"]),
    (REPORT, "@run --delta 1", ["--delta 1"]),
    (REPORT, "@run --sigma 1", ["--sigma"]), (REPORT, "", [""]),
    (REPORT, "--plan 10 20 1 --sigma 1 --delta 1e-5", ["--plan", "larger"]),
    (REPORT, "--plan 100 10 1 --delta 1e-5", ["--sigma", "--epsilon"]),
    (REPORT, "--plan 100 10 1 --sigma 0 --delta 1e-5", ["--sigma 0"]),
    (REPORT, "--plan 100 10 -1 --sigma 1 --delta 1e-5", ["--plan"]),
    (REPORT, "--plan 100 10 1 --sigma 1 --delta 1e-5 --plot @absent/x.png", ["--plot"]),
    *((REPORT, f"@run --prior {value}", [f"--prior {value}"]) for value in ("0", "1", "1.5", "nan")),
    (REPORT, "@run --card @new/card.md", ["--card", "no folder"]), (REPORT, "@run --card @new.pdf", [".md or .html"]),
    (REPORT, "--plan 100 10 1 --sigma 1 --delta 1e-5 --card @new.md", ["--card", "ledger alone"]),
    (REPORT, "--plan 100 10 1 --advantage 1 --delta 1e-5", ["--advantage 1"]),
    (REPORT, "--plan 100 10 1 --advantage 0.1 --sigma 1 --delta 1e-5", ["exactly one of --sigma"]),
    (AUDIT, canaries.replace("@train.jsonl", "@absent"), ["--train_data", "absent"]),
    (AUDIT, canaries.replace("@train.jsonl", "@cut.jsonl"), ["cut.jsonl:2"]),
    (AUDIT, canaries.replace("checkpoint @tiny", "checkpoint @malicious.bin"), ["malicious.bin", "refused"]),
    (AUDIT, canaries.replace("multiplier 1", "multiplier 0"), ["--noise_multiplier 0", "claims nothing"]),
    (AUDIT, canaries.replace("--noise_multiplier 1", ""), ["--noise_multiplier", "--target_epsilon"]),
    (AUDIT, canaries + " --target_epsilon 3", ["--noise_multiplier and --target_epsilon"]),
    (AUDIT, canaries + " --max_grad_norm 1e-22", ["--max_grad_norm 1e-22", "1e-06"]),
    (AUDIT, canaries.replace("multiplier 1", "multiplier 1e-160"), ["--noise_multiplier 1e-160", "float32"]),
    (AUDIT, canaries.replace("--max_step 2", ""), ["--max_epoch", "--max_step"]),
    (AUDIT, canaries.replace("canaries 100", "canaries 15"), ["--canaries 15", "at least 16"]),
    (AUDIT, canaries.replace("canaries 100", "canaries 100000"), ["--canaries 100000", "coordinate"]),
    (AUDIT, canaries + " --guesses 50 101", ["--guesses 101", "100"]),
    (AUDIT, canaries + " --guesses 0", ["--guesses 0"]),
    (AUDIT, canaries + " --canary_kind image", ["--canary_kind", "image"]),
    (AUDIT, canaries.replace("seq_len 32", "seq_len 8") + " --canary_kind text", ["--seq_len 8", "9 tokens"]),
    (AUDIT, canaries.replace("seq_len 32", "seq_len 49"), ["--seq_len 49", "48 positions"]),
    (AUDIT, canaries + " --train_batch_size 141", ["141", "larger than the training data (140"]),
    (AUDIT, canaries + " --plot @absent/x.png", ["--plot"]), (AUDIT, canaries + " --resume", ["--resume: refused"]),
    (AUDIT, canaries + " --target_delta 1", ["--target_delta 1"]), (AUDIT, canaries + " --lr nan", ["--lr nan"]),
    (AUDIT, canaries.replace("@new", "@run"), ["--work_dir", "run"]),
]}

GROUPS = {"data": DATA, "checkpoint": WEIGHTS, "model card": CARDS, "flags": FLAGS, "other scripts": OTHERS}
CASES = {f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()}


def listing(root: pathlib.Path) -> dict[str, tuple[int, int]]:
    """What lies where, when it was written and how long it is. A run's .lock is opened by whoever asks for the
    folder."""
    return {str(path): (path.stat().st_mtime_ns if path.is_file() else 0, path.stat().st_size if path.is_file() else 0)
            for path in root.rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_status_2(world, name):
    (script, *program), arguments, words = CASES[name][0].split(), *CASES[name][1:]
    before = listing(world)
    run = server().start(script, [*program, *arguments(world)], cwd=world / "folder")
    assert run.wait() == 2, run.stdout + run.stderr
    for word in words:
        assert word in run.error
    assert not run.stdout or script == REPORT  # which says what it found before it says what is wrong with it
    assert listing(world) == before


def test_there_are_enough_cases():
    """Of every script of the repository."""
    files = [path for folder in ("src", "eval", "scripts") for path in (ROOT / folder).rglob("*.py")]
    scripts = {str(path.relative_to(ROOT)) for path in files if '\nif __name__ == "__main__":' in path.read_text()}
    scripts |= {f"scripts/start.py {program}" for program in start.PROGRAMS}
    assert len(CASES) >= 250 and {case[0] for case in CASES.values()} == scripts


def test_the_sound_files_are_sound(world, tmp_path):
    """The negative control: what the cases spoil works when it is not spoilt, so a case fails for its own reason."""
    train(training(work_dir=tmp_path / "a", max_step=1)(world))
    train(training(work_dir=tmp_path / "b", max_step=1, init_checkpoint="@tiny.bin")(world))
    for script, line in ((FORMAT, f"@e2e.txt {tmp_path}/formatted"), (REPORT, "@run"),
                         (REPORT, "--plan 100 10 1 --sigma 1 --delta 1e-5"),
                         (AUDIT, canaries.replace("@new", str(tmp_path / "audit"))),
                         (ENCODE, f"--vocab @vocab --input @formatted.jsonl --output {tmp_path}/encoded"),
                         (DECODE, decode.replace("@new", f"{tmp_path}/decoded")),
                         (BEAM, search.replace("@new", str(tmp_path / "beam"))),
                         (EXPORT, f"--init_checkpoint @run --output {tmp_path}/export --format peft")):
        run = server().start(script, of(line)(world), cwd=tmp_path)
        assert run.wait() == 0, run.stderr


def test_every_rank_ends_and_one_speaks(world):
    """A mistake that all ranks see is said once; one that rank 1 alone sees is said with its name."""
    ranks = start_ranks(training(train_data="@cut.jsonl")(world), 2)
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert "cut.jsonl:2" in ranks[0].error and not ranks[1].stderr
    ranks = start_ranks(training(no_such_flag=1)(world), 2)
    assert [rank.wait() for rank in ranks] == [2, 2] and "--no_such_flag" in ranks[0].error and not ranks[1].stderr
    ranks = start_ranks(training(work_dir=world / "e2e.txt/run")(world), 2)
    assert [rank.wait() for rank in ranks] == [2, 2] and "e2e.txt/run" in ranks[0].error and not ranks[1].stderr


def test_a_row_that_disagrees_with_its_ledger_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="other_report/privacy.json: disagrees with the ledger .*: epsilon_prv: 0.01"):
        write_row(str(tmp_path / "row.json"), str(world / "other_report"), {}, trained=True, scored=False)
    assert not list(tmp_path.iterdir())
