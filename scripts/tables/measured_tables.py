"""The tables of results/DATE_benchmark_training, DATE_generate and DATE_audit, from the JSON that their scripts wrote.

scripts/results_tables.py calls measured_table for each folder without rows/. A `note` in a row of the JSON is printed
beside it. command.txt holds the command; made_with.json, where a script does not write them itself, the keys `device`,
`torch`, `commit` and `note`.
"""

import glob
import json
import os
import statistics

from base.errors import fail
from base.files import open_text
from base.markdown import dict_table

Line = dict[str, str]  # head -> cell
TASKS = {"e2e_lora": "E2E, LoRA", "author_full": "authors, full", "author_lora": "authors, LoRA"}
VARIANTS = {
    "ordinary": "non-private, our code",
    "plain": "non-private, Hugging Face loop",
    "opacus": "Opacus hooks",
    "ghost": "Opacus ghost clipping",
    "padded": "Opacus hooks, padded",
    "published": "Yu et al.'s arithmetic",
}


def comparison(result: dict, row: dict) -> Line:
    """A line: our code against a variant. A share of the floor above 1 is left out, since other jobs slowed the matrix
    products by which the floor was measured."""
    ours, other = row["ours"], row["other"]
    share = ours["share_of_matmul_rate"]
    return {
        "task": TASKS[row["task"]] + ", bf16" * result["options"]["bf16"],
        "against": VARIANTS[row["variant"]],
        "ours/other": f"{row['ratio_median']:.2f}",
        "range": f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}",
        "steps": str(len(ours["seconds"])),
        "ours [units/s]": f"{ours['units_per_s']:.2f}",
        "other [units/s]": f"{other['units_per_s']:.2f}",
        "ours [tokens/s]": f"{ours['tokens_per_s']:.0f}",
        "share of the floor": f"{share:.2f}" if share <= 1 else "-",
        "ours [GB]": f"{ours['peak_gb']:.2f}",
        "other [GB]": f"{other['peak_gb']:.2f}",
        "note": row.get("note", ""),
    }


def scaled(row: dict) -> Line:
    """A line: our code alone, at one logical batch and length."""
    seconds = statistics.median(row["seconds"])
    return {
        "task": TASKS[row["task"]],
        "logical batch": str(row["units"]),
        "tokens of a text": "as E2E's" if row["task"] == "e2e_lora" else str(row["length"]),
        "real tokens": f"{row['tokens']:,}",
        "step [s]": f"{seconds:.2f}",
        "ours [tokens/s]": f"{row['tokens'] / seconds:.0f}",
    }


def speed(results: list[dict]) -> str:
    """Comparisons by task and variant, those with a note last; then the steps over batches and lengths."""
    pairs = [(result, row) for result in results for row in result["rows"]]
    pairs.sort(key=lambda pair: "note" in pair[1])
    compared = [
        comparison(*pair)
        for task in TASKS
        for variant in VARIANTS
        for pair in pairs
        if (pair[1]["task"], pair[1].get("variant")) == (task, variant)
    ]
    alone = [scaled(row) for _, row in pairs if "variant" not in row]
    if len(compared) + len(alone) != len(pairs):
        raise ValueError("a task or a variant without a name")
    return "\n".join(dict_table(lines) for lines in (compared, alone) if lines)


def generation(results: list[dict]) -> str:
    """The table of scripts/benchmarks/benchmark_generate.py: a line for each setting and type."""

    def line(row: dict) -> Line:
        theirs, share = row["transformers_tokens_per_s"], row["share_of_floor"]
        return {
            "setting": row["setting"],
            "dtype": row["dtype"],
            "ours [tokens/s]": f"{statistics.median(row['ours_tokens_per_s']):.0f}",
            "transformers [tokens/s], by batch": ", ".join(f"{batch}: {speed:.0f}" for batch, speed in theirs.items()),
            "ours/best": f"{row['ratio']:.2f}",
            "share of the floor": f"{share:.2f}" if share <= 1 else "-",
            "note": row.get("note", ""),
        }

    return dict_table([line(row) for result in results for row in result["generate"]])


def audit(rows: list[dict]) -> str:
    """The table of scripts/audit_faults.py: a line for each fault; "none" is the unchanged code. Behind a bound of
    epsilon stand the right ones of the guesses; the bound that decides is bold."""

    def bound(row: dict, found: dict, name: str) -> str:
        shown = f"{found['epsilon_lower']:.2f}"
        shown = f"**{shown}**" if row["decides"] == name else shown
        return f"{shown} ({found['guesses_right']:,} of {found['guesses_made']:,})"

    def line(row: dict) -> Line:
        verdict = "refuted" if row["refuted"] else "NOT SEEN"
        if row["fault"] == "none":
            verdict = "REFUTED, and should not be" if row["refuted"] else "not refuted"
        return {
            "fault": row["fault"],
            "setting": row["setting"],
            "canaries": f"{row['canaries']:,} {row['canary_kind']}",
            "delta": f"{row['delta']:.0e}",
            "claimed epsilon": f"{float(row['epsilon_claimed']):.2f}",
            "bound of 2023": bound(row, row, "2023"),
            "Gaussian bound": bound(row, row["gaussian"], "gaussian"),
            "claim": verdict,
            "CPU [s]": f"{row['cpu_seconds']:.0f}",
        }

    return dict_table([line(row) for row in rows])


def measured_table(folder: str, place: str) -> str | None:
    """The table of a folder that one of these scripts wrote, and a line on the machine and on `place`. None for any
    other folder. UserError for JSON that the script does not write."""
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.json")))
    found, said = [], {}
    where = folder
    try:
        for where in paths:
            with open_text(where) as handle:
                if os.path.basename(where) == "made_with.json":
                    said = dict(json.load(handle))
                else:
                    found.append(json.load(handle))
        if not found:
            return None
        where = folder
        if isinstance(found[0], list):
            text = audit(found[0])
        elif "generate" in found[0]:
            text, first = generation(found), found[0]
            threads, load = first["threads"], f"load {first['load']:.0f}"
            device = f"{first['options']['model_card']} on {first['device']}, {threads} threads, {load}"
            said = {"device": device, "torch": f"{first['torch']}, transformers {first['transformers']}", **said}
        else:
            text, first = speed(found), found[0]
            said = {"device": f"{first['options']['model_card']} on {first['device']}", "torch": first["torch"], **said}
        commit = said["commit"][:8] if "commit" in said else None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        fail(
            f"{where}: scripts/benchmarks/benchmark_training.py, benchmark_generate.py or audit_faults.py did not "
            f"write this ({error!r}); remove it"
        )
    named = {"": said.get("device"), " ": said.get("note"), "commit ": commit, "torch ": said.get("torch")}
    facts = "; ".join(f"{name}{value}".strip() for name, value in named.items() if value)
    return f"{text}\n{facts + '. ' if facts else ''}Command and every figure: `{place}/`.\n"
