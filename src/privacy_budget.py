"""The budget file of a data set: what all runs that name it with --budget may disclose together.

    python src/privacy_budget.py create budget.jsonl --train_data data/e2e/train.jsonl --epsilon 8 --delta 1e-5
    python src/privacy_budget.py show budget.jsonl
    python src/privacy_budget.py release budget.jsonl [RUN ...]     what runs that ended reserved and did not use

A run releases by itself when it is done. One that was killed keeps what it reserved, for --resume, until it is released
here.
"""

import base.early  # noqa: F401  # isort: skip  # before slow imports

import hashlib
import math
import os

from base.errors import fail, run_main
from base.files import check_file, check_pointer
from base.flags import Parser
from base.markdown import markdown
from privacy import accounting
from privacy.accounting import check_delta
from privacy.budget import BudgetState, Reservation, create_budget, names_unit, read_budget
from privacy.composition import phases_of
from run.spending import describe, release_all


def digest_file(path: str) -> str:
    """The sha256 of a training file, as the training scripts compute it."""
    check_file(path, "--train_data")
    check_pointer(path, "--train_data")
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        fail(f"--train_data {path}: cannot be read ({error.strerror})")


def row(held: Reservation, state: BudgetState) -> list[str]:
    uses = sum(held.counted.values())
    epsilon = accounting.epsilon_prv(phases_of(held.counted), state.delta)
    said = "charged" if held.released else "reserved" if held.open else "reserved, closed"
    return [os.path.dirname(held.ledger), held.name, said, str(uses), f"{epsilon:.4f}"]


def show(path: str) -> None:
    state = read_budget(path)
    print(f"budget        {path}: checksums whole from the first line to the last")
    print(f"unit          one {state.unit}")
    for words in state.relations:
        print(f"relation      {words}")
    print(f"data          sha256 {state.data}")
    if state.torn:
        print("cut short     its last line: whoever wrote it had drawn nothing for it")
    if state.reservations:
        heads = ["run", "reservation", "state", "uses of a unit", f"epsilon alone at {state.delta:g}"]
        print(markdown(heads, [row(held, state) for held in state.reservations.values()]), end="")
    print(f"total         {describe(state)}")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="create|show|release")
    for name, words in {
        "create": "write a new budget file",
        "show": "print what is reserved, spent and left",
        "release": "give back what runs that ended reserved and did not use",
    }.items():
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("file", metavar="FILE", help="the budget file")
        if name == "create":
            command.add_argument("--train_data", required=True, help="the training file, by whose sha256 it is known")
            words = "as the runs' reports name it: example (default), author, line, or the field of --unit_field"
            command.add_argument("--unit", default="example", help=words)
            command.add_argument("--epsilon", type=float, required=True, help="the limit of all runs together")
            command.add_argument("--delta", type=float, required=True, help="the delta of that epsilon")
        if name == "release":
            command.add_argument("runs", nargs="*", metavar="RUN", help="training folders (default: all that ended)")
    args = parser.parse_args()
    if args.command == "create":
        if not 0 < args.epsilon < math.inf:
            fail(f"--epsilon {args.epsilon:g}: wanted a number above 0")
        check_delta(args.delta)
        if not names_unit(args.unit):
            fail(f"--unit {args.unit!r}: expected what the runs' reports name, such as example, author or patient")
        create_budget(args.file, args.unit, digest_file(args.train_data), args.epsilon, args.delta)
        print(f"{args.file}: epsilon {args.epsilon:g} at delta {args.delta:g} for one {args.unit} of {args.train_data}")
    elif args.command == "show":
        show(args.file)
    else:
        for line in release_all(args.file, args.runs):
            print(line)
        print(f"total         {describe(read_budget(args.file))}")


if __name__ == "__main__":
    run_main(main)
