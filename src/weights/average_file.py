"""average.{step}.pt, which a run with --average saves beside model.{step}.pt: a file of the same entries, whose weights
are the average of the iterates. Its entry `average` holds Average.entry. It is written before the model, so a model of
such a run never stands without it."""

import os
import re

from averages import Average
from base.errors import fail
from language_model import LanguageModel
from weights.checkpoint import load_parameters, model_content, model_path, write


def average_path(work_dir: str, step: int) -> str:
    return os.path.join(work_dir, f"average.{step}.pt")


def save_average(
    work_dir: str, step: int, model: LanguageModel, base: dict | None, privacy: dict | None, average: Average
) -> None:
    """Write the average of step `step`. One that stands without its model, whose attempt was killed, goes. Raises
    OSError naming the file when the disk is full."""
    for name in os.listdir(work_dir):
        match = re.fullmatch(r"average\.(\d+)\.pt", name)
        if match and not os.path.exists(model_path(work_dir, int(match[1]))):
            os.unlink(os.path.join(work_dir, name))
    with average.in_place():
        content = model_content(work_dir, step, model, base, privacy)
    write(average_path(work_dir, step), {**content, "average": average.entry})


def load_average(work_dir: str, step: int, model: LanguageModel, average: Average) -> None:
    """Continue `average` of `model`'s parameters from the file of step `step`. UserError where that is not there, or of
    another average."""
    path = average_path(work_dir, step)
    if not os.path.isfile(path):
        fail(
            f"--resume {path}: is not there, and --average {average.rule} goes on from it; restore it, or start in a "
            "new folder"
        )
    with average.in_place():
        content = load_parameters(path, model)
    if content.get("average") != average.entry:
        fail(
            f"--resume {path}: its entry 'average' is {content.get('average')!r:.80}, this run wants {average.entry}; "
            "give the run's own --average and number of steps, or start in a new folder"
        )
