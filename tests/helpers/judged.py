"""Small files to judge: samples, private and held-out texts, losses, secrets; and a finished folder of synthesis.py."""

import json
import pathlib

ANIMALS = ("cat", "dog", "hen", "cow", "ant")
FLAGS = {"samples": "samples.jsonl", "private": "private.jsonl", "held_out": "held_out.txt", "losses": "losses.json",
         "reference": "reference.json", "secrets": "secrets.json", "searched": "searched.jsonl", "json": "out.json"}


def write(path: pathlib.Path, lines: list) -> None:
    """A line each; what is no string, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def write_world(folder: pathlib.Path) -> pathlib.Path:
    """Two samples of which one is a copy; six private texts of which the last is a planted secret; one not planted."""
    write(folder / "samples.jsonl", [{"text": text, "tokens": tokens} for text, tokens in
                                     (("the dog sat on the mat", [1, 2]), ("a fox <b> & runs", [7, 8, 9]))])
    private = [*(f"the {animal} sat on the mat" for animal in ANIMALS), "q w"]
    write(folder / "private.jsonl", [{"text": text} for text in private])
    write(folder / "held_out.txt", ["the fox sat on the log", "the owl flew", "a fox runs"])
    losses = {"train": [1, 1, 1, 1, 1, 0.1], "held_out": [2, 2, 0.5], "candidates": [0.1, 3, 4, 5, 2, 1, 3, 0.5]}
    for name in ("losses", "reference"):
        files = {key: {"losses": value if name == "losses" else [3] * len(value)} for key, value in losses.items()}
        write(folder / f"{name}.json", [{"format": 1, "files": files}])
    secrets = [{"kind": "new tokens", "planted": planted, "secret": secret, "text": "q <w>"}
               for planted, secret in ((True, [7, 8, 9]), (False, [4, 4, 4]))]
    write(folder / "secrets.json", [{"format": 1, "repeats": 1, "others": 3, "secrets": secrets}])
    write(folder / "searched.jsonl", [{"id": 0, "predict": [7, 8, 9, 0]}, {"id": 1, "predict": [4, 4]}])
    return folder


def flags(world: pathlib.Path, **changed: str | None) -> list[str]:
    """The flags of judge_samples.py for a world; a flag that is None is left out."""
    files = {**FLAGS, **changed}
    return [word for name, file in files.items() if file is not None for word in (f"--{name}", str(world / file))]


def write_runs(runs: pathlib.Path, judgement: dict) -> pathlib.Path:
    """What scripts/synthesize.sh leaves, as far as its table and page read it. judgement: that of both models."""
    for name, epsilon in (("private", 7.5), ("no_privacy", "inf")):
        folder = runs / name
        steps = [{"step": step, "epoch": step / 2, "loss": 3 - step, "grad_norm": 1.0, "noise_norm": 0.5,
                  "epsilon": step * 1.0} for step in (1, 2)]
        write(folder / "metrics.jsonl", steps)
        write(folder / "args.json", [{"delta": 1e-5}])
        risk = {"curve": {"0.001": 0.01, "0.1": 0.5, "0.9": 1.0}}
        write(folder / "privacy.json", [{"epsilon_prv": epsilon, "delta": 1e-5, "unit": "example", "N": 6,
                                         "relation": "add or remove one example", "attack_risk": risk}])
        write(folder / "judgement.json", [judgement])
        write(folder / "samples.jsonl", [{"text": "a", "tokens": [1]}])
    for name in ("nothing", "private", "no_privacy", "private_text"):
        write(runs / f"use_{name}/test_loss.json", [{"files": {"test": {"losses": [1.0, 2.0]}}}])
        write(runs / f"use_{name}/scores.json", [{"scores": {"BLEU": 0.5}}])
    write_world(runs / "planted")
    return runs
