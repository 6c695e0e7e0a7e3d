"""Markdown tables from results/: a line for each model, method and budget, mean and standard deviation over its seeds.

    python scripts/results_tables.py results/2026-01-31_e2e          # print its table, and write it to table.md there
    python scripts/results_tables.py --readme README.md docs/*.md            # rewrite the tables of these files
    python scripts/results_tables.py --readme README.md docs/*.md --check    # status 1 where a table is out of date

A table stands between `<!-- table NAME -->` and `<!-- end -->`: NAME is the folder results/DATE_NAME (the newest of
that name), whose rows/*.json are written by the scripts *_table.sh; or a folder of scripts/measured_tables.py. The key
`note` of a row is printed beside it.
"""

import glob
import json
import os
import re
import statistics
from collections.abc import Callable

import start  # puts src/ and the folders below scripts/ on the path
from base.errors import fail, run_main
from base.files import atomic_write, open_text
from base.flags import Parser
from base.markdown import dict_table
from measured_tables import measured_table
from row import E2E_SHA256
from tasks import TASKS

KEYS = {"task", "model", "method", "epsilon", "seed", "processes", "commit", "hardware", "versions"}
PARTS = {
    "hardware": {"machines", "gpus", "cores", "device"},
    "privacy": {"epsilon_prv", "delta", "relation", "sampling"},
}
METHODS = {"lora": "LoRA", "full": "full", "none": "untrained"}
# BLEU without privacy on E2E's test set, as LoRA's authors report it (Hu et al., 2021, table 3). Other published
# figures are left out: their epsilon is not the one they state, or their held-out data are different.
PUBLISHED = {
    ("gpt2.md", "lora"): 0.704,
    ("gpt2.lg", "lora"): 0.704,
    ("gpt2.md", "full"): 0.682,
    ("gpt2.lg", "full"): 0.685,
}
# Settings in which the seeds of one line may differ: folders, processes, logging, and what follows from the seed (the
# held-out authors). Rows that differ in any other setting are refused.
OF_ONE_RUN = set(
    """random_seed seed work_dir output_dir platform local_rank world_size train_batch_size grad_acc
    per_device_train_batch_size gradient_accumulation_steps micro_batch_tokens valid_batch_size
    per_device_eval_batch_size log_interval logging_steps eval_interval eval_steps save_interval save_steps log_level
    disable_tqdm tensorboard collective_timeout resume resume_changed resume_from_checkpoint cache_dir
    dataloader_num_workers N sigma delta steps""".split()
)
MARKED = re.compile(r"(<!-- table ([\w.-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Rows = list[dict]
Cell = Callable[[Rows], str]


def is_row(row: dict) -> bool:
    """Whether a row has what its table shows: scores, except for authors; privacy, if anything was trained."""
    parts = {"hardware"} | ({"privacy"} if row["epsilon"] != "0" or not TASKS[row["task"]].scores else set())
    # A test set may lack seen or unseen categories.
    scored = {name for name in TASKS[row["task"]].scores if not name.endswith("seen")}
    return (
        KEYS <= row.keys()
        and row["method"] in METHODS
        and scored <= row.get("scores", {}).keys()
        and isinstance(row.get("note", ""), str)
        and all(PARTS[part] <= row[part].keys() for part in parts)
    )


def flat(row: dict) -> dict:
    """The row with one dictionary of scores: "BLEU seen" for those of several sets, "BLEU" for those of one."""
    scores, columns = row.get("scores", {}), TASKS[row["task"]].scores
    if not any(isinstance(found, dict) for found in scores.values()):
        return row
    return {
        **row,
        "scores": {
            f"{name} {part}" if "BLEU all" in columns else name: value
            for part, found in scores.items()
            for name, value in found.items()
        },
    }


def read_rows(folder: str) -> Rows:
    """The rows of results/DATE_NAME."""
    rows = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "rows", "*.json"))):
        with open_text(path) as handle:
            try:
                row = flat(json.load(handle))
                if not is_row(row):
                    raise ValueError
                rows.append({**row, "order": (row["model"], budget_order(row), row["method"], row["seed"])})
            except (ValueError, KeyError, TypeError, AttributeError):
                fail(f"{path}: not a row of results; remove it, and its run will be written again")
    if not rows:
        fail(f"{folder}: holds no rows/*.json; wanted a folder that one of the scripts *_table.sh has made")
    tasks = sorted({row["task"] for row in rows})
    if len(tasks) > 1:
        fail(
            f"{folder}: holds rows of {' and '.join(tasks)}, which are different tables; give each a folder of its own"
        )
    rows = sorted(rows, key=lambda row: row["order"])
    for first, *others in groups(rows):
        for other in others:
            check_same(first, other, folder)
    return rows


def check_same(first: dict, other: dict, folder: str) -> None:
    """UserError where two rows of a line are not of the same experiment: a mean over seeds must be over seeds alone."""
    one, two = first.get("settings", {}), other.get("settings", {})
    for name in sorted(one.keys() & two.keys() - OF_ONE_RUN):
        if one[name] != two[name]:
            fail(
                f"{folder}: seeds {first['seed']} and {other['seed']} of {first['model']}, {first['method']}, epsilon "
                f"{first['epsilon']} differ in {name}: {one[name]} and {two[name]}; a line's mean is over "
                "seeds alone: move one row away, and run it under another --name"
            )


def budget_order(row: dict) -> float:
    """The epsilon that was asked for, by which rows are sorted."""
    return 5.43 if row["epsilon"] == "published" else float(row["epsilon"])


def spread(rows: Rows, value: Callable[[dict], float | None], form: str) -> str:
    """Mean of value(row), and the standard deviation over seeds where there are several; "-" where a row has none."""
    found = [number for row in rows if (number := value(row)) is not None]
    if len(found) < len(rows):
        return "-"
    if len(found) == 1:
        return format(found[0], form)
    return f"{statistics.mean(found):{form}} ± {statistics.stdev(found):{form}}"


def report(name: str, scale: float = 1.0) -> Callable[[dict], float | None]:
    """A function of a row: the number `name` of its privacy.json times `scale`, or None."""

    def value(row: dict) -> float | None:
        number = row.get("privacy", {}).get(name)
        return number * scale if isinstance(number, (int, float)) else None

    return value


def epsilon(rows: Rows) -> str:
    """The largest epsilon over the seeds. A run that was killed has a larger one: its repeated steps were charged."""
    if rows[0]["epsilon"] == "0":
        return "0"
    spent = [row["privacy"]["epsilon_prv"] for row in rows]
    return "inf" if "inf" in spent else f"{max(spent):.2f}"


def published(rows: Rows) -> str:
    first = rows[0]
    figure = PUBLISHED.get((first["model"], first["method"])) if first["epsilon"] == "inf" else None
    same_data = first.get("settings", {}).get("train_sha256") == E2E_SHA256
    return f"{figure:.3f}" if figure is not None and same_data else ""


def columns(rows: Rows) -> list[tuple[str, Cell]]:
    """The columns of a table of these rows: (head, function from the rows of a line to the cell)."""
    task = TASKS[rows[0]["task"]]

    def trained(cell: Cell) -> Cell:
        return lambda rows: "-" if rows[0]["epsilon"] == "0" else cell(rows)

    def private(cell: Cell) -> Cell:
        return lambda rows: "-" if epsilon(rows) in ("0", "inf") else cell(rows)

    def notes(rows: Rows) -> str:
        return "; ".join(dict.fromkeys(row["note"] for row in rows if row.get("note")))

    first = [
        ("model", lambda rows: rows[0]["model"]),
        ("method", lambda rows: METHODS[rows[0]["method"]]),
        ("epsilon", epsilon),
        ("delta", private(lambda rows: f"{rows[0]['privacy']['delta']:.2g}")),
    ]
    last = [
        ("time [s]", trained(lambda rows: spread(rows, report("train_runtime"), ".0f"))),
        ("memory [GB]", trained(lambda rows: spread(rows, report("peak_memory_bytes", 1e-9), ".2f"))),
        ("seeds", lambda rows: str(len(rows))),
        ("note", notes),
    ]
    if not task.scores:
        return [
            *first,
            ("training loss", trained(lambda rows: spread(rows, report("train_loss"), ".3f"))),
            ("held-out loss", lambda rows: spread(rows, report("eval_loss"), ".3f")),
            *last,
        ]
    names = dict.fromkeys([*task.scores, *(name for row in rows for name in row["scores"])])  # and a later metric's
    scores = [
        (name, lambda rows, name=name: spread(rows, lambda row: row["scores"].get(name), ".4f")) for name in names
    ]
    return [*first, *scores, *last, ("published BLEU", published)]


def place_of(folder: str) -> str:
    """The folder as seen from the repository's root."""
    place = os.path.relpath(folder, start.ROOT)
    return os.path.basename(os.path.normpath(folder)) if place.startswith("..") else place


def provenance(folder: str, rows: Rows) -> str:
    """One line: the meaning of epsilon, the hardware, the commit, the versions, and the folder with the rest."""

    def all_of(value: Callable[[dict], str], of: Rows = rows) -> str:
        return ", ".join(dict.fromkeys(map(value, of)))

    def on(row: dict) -> str:
        found = row["hardware"]
        machines = f"{found['machines']} machines of " if found["machines"] > 1 else ""
        count = f"{found['gpus']} x " if found["gpus"] else f"{found['cores']} cores of "
        return f"{row['processes']} process{'es' * (row['processes'] > 1)} on {machines}{count}{found['device']}"

    machine = all_of(on)
    code = all_of(lambda row: (row["commit"]["hash"] or "unknown")[:8] + " (modified)" * row["commit"]["modified"])
    versions = all_of(lambda row: "torch " + row["versions"]["torch"])
    several = any(len(group) > 1 for group in groups(rows))
    private = [row for row in rows if row["epsilon"] not in ("0", "inf")]
    meaning = all_of(lambda row: f"{row['privacy']['relation']}; {row['privacy']['sampling']} sampling", private)
    bound = all_of(lambda row: "PLD" if row["privacy"]["sampling"] == "allocation" else "PRV", private)
    return (
        (f"Epsilon ({bound} upper bound): {meaning}. " if private else "")
        + ("± is the standard deviation over seeds. " if several else "")
        + f"{machine}; commit {code}; {versions}. Commands, seeds and every figure: `{place_of(folder)}/`.\n"
    )


def groups(rows: Rows) -> list[Rows]:
    """Lists of rows that differ only in their seeds."""
    found: dict[tuple, Rows] = {}
    for row in rows:
        found.setdefault((row["model"], row["epsilon"], row["method"]), []).append(row)
    return list(found.values())


def table(folder: str) -> str:
    if not os.path.isdir(os.path.join(folder, "rows")):
        measured = measured_table(folder, place_of(folder))
        if measured is not None:
            return measured
    rows = read_rows(folder)
    heads = columns(rows)
    lines = [{head: cell(group) for head, cell in heads} for group in groups(rows)]
    # Sets that no row has: no column.
    lacking = {head for head in lines[0] if head.endswith("seen") and {line[head] for line in lines} == {"-"}}
    lines = [{head: line[head] for head in line if head not in lacking} for line in lines]
    return dict_table(lines) + "\n" + provenance(folder, rows)


def rewritten(text: str, path: str, results: str) -> str:
    """`text` with each marked table made anew."""

    def replace(found: re.Match) -> str:
        folders = sorted(glob.glob(os.path.join(glob.escape(results), f"????-??-??_{found[2]}")))
        if not folders:
            fail(
                f"{path}: <!-- table {found[2]} -->: there is no {results}/DATE_{found[2]}; make it, or remove the mark"
            )
        return f"{found[1]}{table(folders[-1])}{found[4]}"

    if text.count("<!-- table ") != len(MARKED.findall(text)):
        fail(f"{path}: a <!-- table NAME --> has no <!-- end -->; wanted each on a line of its own")
    return MARKED.sub(replace, text)


def main() -> int:
    parser = Parser(description="markdown tables from results/")
    parser.add_argument("folders", nargs="*", help="results/DATE_NAME: print and write their table.md")
    parser.add_argument("--readme", nargs="+", metavar="FILE", help="rewrite the marked tables of these files")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where --readme would change")
    parser.add_argument(
        "--results",
        default=os.path.relpath(os.path.join(start.ROOT, "results")),
        help="folder of all results (default: the repository's)",
    )
    args = parser.parse_args()
    if not args.folders and args.readme is None:
        fail("give folders of results, or --readme FILE; see --help")
    if args.check and args.readme is None:
        fail("--check: means nothing without --readme")
    for folder in args.folders:
        text = table(folder)
        with atomic_write(os.path.join(folder, "table.md")) as handle:
            handle.write(text)
        print(text, end="")
    if args.readme is None:
        return 0
    stale = False
    for path in args.readme:
        with open_text(path) as handle:
            before = handle.read()
        after = rewritten(before, path, args.results)
        if before == after:
            continue
        stale = True
        if args.check:
            print(f"{path}: its tables are not those of {args.results}; run without --check")
        else:
            with atomic_write(path) as handle:
                handle.write(after)
    return int(args.check and stale)


if __name__ == "__main__":
    run_main(main)
