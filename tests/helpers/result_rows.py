"""Rows of results/ that no run measured, and Markdown tables read back."""

import json
import pathlib


def synthetic(folder: pathlib.Path, **changed: object) -> dict:
    """A row in folder/rows, as scripts/tables/row.py writes it."""
    row = {"task": "e2e", "model": "gpt2.md", "method": "lora", "epsilon": "8", "seed": 1, "processes": 4,
           "scores": {"BLEU": 0.5, "NIST": 6.0, "METEOR": 0.4, "ROUGE_L": 0.6, "CIDEr": 2.0},
           "privacy": {"epsilon_prv": 7.96, "delta": 1e-5, "train_runtime": 100.0, "peak_memory_bytes": 2_500_000_000,
                       "relation": "add or remove one example", "sampling": "poisson"},
           "settings": {"train_sha256": "other"}, "commands": [], "commit": {"hash": "a" * 40, "modified": False},
           "hardware": {"machines": 2, "device": "A100", "gpus": 4, "cores": 32}, "versions": {"torch": "2.13.0"},
           **changed}
    rows = folder / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    (rows / f"{len(list(rows.iterdir()))}.json").write_text(json.dumps(row))
    return row


def lines_of(text: str) -> list[dict[str, str]]:
    """A markdown table's lines as head -> cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(rows[0], line, strict=True)) for line in rows[2:]]
