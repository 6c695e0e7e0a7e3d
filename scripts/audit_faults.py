"""What the audit sees: src/privacy_audit.py on the code as it is, and on the code with one fault at a time.

    python scripts/audit_faults.py --train_data data/e2e/train.jsonl --model_card MODEL --init_checkpoint MODEL \
        --output results/audit/faults
    python scripts/audit_faults.py ... --only "noise off" "sigma at two thirds"    those, and the sound rows beside

A fault replaces one method of the product in the process of the run. The audit does not know of it, and claims the
epsilon of the sound code. Each row's setting is one in which its fault can show: a
lower bound from a single run stays below epsilon even where the adversary sees all. Writes table.md, faults.json
and the runs' audit.json and plots into --output. The status is 1 where a sound row is refuted or a fault is not.

Settings (canaries; q = expected batch / N):
  participation  100,000 gradient canaries, q = 1/32, sigma 2, 30 steps, delta 1e-6
  noise          20,000 gradient canaries, q = 1, sigma 3, 4 steps, delta 1e-6: the Gaussian bound decides
  text           1,000 text canaries, q = 1, epsilon 2, 4 steps, delta 1e-5; the whole model is trained
  published      1,000 gradient canaries, LoRA of rank 4, sigma 0.6, batch 128, 50 steps, delta 1e-5, 40 guesses, and
                 all of --train_data in place of its first --examples
"""

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable

import torch

import start  # puts src/ and the folders below scripts/ on the path
from base.errors import fail, run_main
from base.files import atomic_write, read_lines
from base.flags import Parser
from measured_tables import audit
from privacy.clipping import ClippingRule
from privacy.randomness import NoiseSource
from privacy.sampling import PoissonSampler

# ------------------------------------------------------------------ faults


def nothing() -> None:
    """The code as it is."""


def noise_off() -> None:
    NoiseSource.add_normal_ = lambda self, buffer, std: None


def sigma_at_two_thirds() -> None:
    add_normal_ = NoiseSource.add_normal_
    NoiseSource.add_normal_ = lambda self, buffer, std: add_normal_(self, buffer, std * 2 / 3)


def participation_fixed() -> None:
    """Every step uses the mask of the first step, as if the generator were seeded anew in each step."""
    draw, masks = PoissonSampler.draw, list[torch.Tensor]()

    def draw_once(self: PoissonSampler, step: int) -> torch.Tensor:
        if not masks:
            masks.append(draw(self, step))
        return masks[0]

    PoissonSampler.draw = draw_once


def q_wrong_by_16() -> None:
    """q is 16 times too large, as if each of 16 ranks drew the whole job's batch from its N / 16 units."""
    init = PoissonSampler.__init__
    PoissonSampler.__init__ = lambda self, N, batch, world, source: init(self, N, min(N, 16 * batch), world, source)


def clipping_off() -> None:
    ClippingRule.factors = lambda self, norms_sq: (torch.ones_like(norms_sq), torch.isfinite(norms_sq.sum(1)))


# ------------------------------------------------------------------ settings and rows

Flags = dict[str, object]


def setting(name: str, examples: int) -> Flags:
    """Flags of src/privacy_audit.py for one setting, where the training data are `examples` examples."""
    if name == "published":
        return {
            "canaries": 1000,
            "train_batch_size": 128,
            "noise_multiplier": 0.6,
            "lora_dim": 4,
            "lora_alpha": 32,
            "lr": 0.0004,
            "max_step": 50,
            "guesses": 40,
        }
    if name == "text":
        return {
            "canaries": 1000,
            "canary_kind": "text",
            "train_batch_size": examples + 1000,
            "target_epsilon": 2,
            "lr": 0.0005,
            "max_step": 4,
        }
    if name == "participation":
        return {
            "canaries": 100_000,
            "train_batch_size": (examples + 100_000) // 32,
            "noise_multiplier": 2,
            "max_step": 30,
            "target_delta": 1e-6,
        }
    return {
        "canaries": 20_000,
        "train_batch_size": examples + 20_000,
        "noise_multiplier": 3,
        "max_step": 4,
        "target_delta": 1e-6,
    }


ROWS: tuple[tuple[str, Callable[[], None], str], ...] = (
    ("none", nothing, "participation"),
    ("participation fixed", participation_fixed, "participation"),
    ("q wrong by 16 ranks", q_wrong_by_16, "participation"),
    ("noise off", noise_off, "participation"),
    ("none", nothing, "noise"),
    ("sigma at two thirds", sigma_at_two_thirds, "noise"),
    ("clipping off", clipping_off, "noise"),
    ("none", nothing, "text"),
    ("noise off", noise_off, "text"),
    ("none", nothing, "published"),
    ("noise off", noise_off, "published"),
)


def run(fault: Callable[[], None], flags: Flags, folder: str) -> dict:
    """src/privacy_audit.py with `flags` in a fork with the fault in it; the content of its audit.json."""
    work = os.path.join(folder, "run")
    argv = ["src/privacy_audit.py", "--work_dir", work, "--plot", os.path.join(folder, "audit.png")]
    for name, value in flags.items():
        argv += [] if value is None else [f"--{name}", str(value)]
    child = os.fork()
    if child == 0:
        status = 2
        try:
            output = os.open(os.path.join(folder, "output.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            fault()
            sys.argv = argv
            runpy.run_path(os.path.join(start.ROOT, "src", "privacy_audit.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 2
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    status = os.waitstatus_to_exitcode(status)
    if status not in (0, 1):
        with open(os.path.join(folder, "output.txt"), encoding="utf-8", errors="replace") as handle:
            fail(f"the audit in {folder} ended with status {status}: {handle.read()[-400:]}")
    shutil.move(os.path.join(work, "audit.json"), os.path.join(folder, "audit.json"))
    shutil.rmtree(work)  # weights and scores are large
    with open(os.path.join(folder, "audit.json"), encoding="utf-8") as handle:
        return {**json.load(handle), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_data", required=True, help="token file; its first --examples are trained on")
    parser.add_argument("--examples", type=int, default=200, help="training examples beside the canaries (default 200)")
    parser.add_argument(
        "--model_card", required=True, help="as for src/privacy_audit.py; of 100,000 coordinates or more"
    )
    parser.add_argument("--init_checkpoint", help="as for src/privacy_audit.py")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(dict.fromkeys(name for name, *_ in ROWS)),
        help="these faults alone, with the sound rows of their settings",
    )
    parser.add_argument(
        "--settings", nargs="+", choices=list(dict.fromkeys(where for *_, where in ROWS)), help="these settings alone"
    )
    parser.add_argument("--output", required=True, help="folder for the table and the runs' results")
    args = parser.parse_args()
    if args.examples < 1:
        fail(f"--examples {args.examples}: expected at least 1")
    chosen = [
        row for row in ROWS if (not args.settings or row[2] in args.settings) and (not args.only or row[0] in args.only)
    ]
    tested = {where for *_, where in chosen}
    rows = [row for row in ROWS if row in chosen or (row[0] == "none" and row[2] in tested)]
    os.makedirs(args.output, exist_ok=True)
    texts = [text for _, text in read_lines(args.train_data, "--train_data")]
    examples, short = min(len(texts), args.examples), os.path.join(args.output, "examples.jsonl")
    with atomic_write(short) as handle:
        handle.writelines(f"{text}\n" for text in texts[:examples])
    results, wrong = [], False
    for name, fault, where in rows:
        folder = os.path.join(args.output, f"{where}-{''.join(c if c.isalnum() else '_' for c in name)}")
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        data = args.train_data if where == "published" else short  # the published q is of all the examples
        found = run(
            fault,
            {
                "train_data": data,
                "model_card": args.model_card,
                "init_checkpoint": args.init_checkpoint,
                "seq_len": args.seq_len,
                **setting(where, examples),
            },
            folder,
        )
        results.append({"fault": name, "setting": where, **found})
        print(audit(results[-1:]).splitlines()[-1], flush=True)
        wrong |= found["refuted"] == (name == "none")
    os.unlink(short)
    for name, content in (("table.md", audit(results)), ("faults.json", json.dumps(results, indent=1) + "\n")):
        with atomic_write(os.path.join(args.output, name)) as handle:
            handle.write(content)
    print(f"\n{audit(results)}\n{args.output}/table.md", end="\n")
    return int(wrong)


if __name__ == "__main__":
    run_main(main)
