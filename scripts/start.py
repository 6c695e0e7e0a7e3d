"""Start a program of tables/, benchmarks/ or demo/:

    python scripts/start.py benchmark_training --scaling

Python puts only the folder of the file that it starts on the import path. This file adds src/ and the folders below
scripts/, for the programs that it starts, and for those beside it, which import it first.
"""

import importlib
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
FOLDERS = ("src", "scripts/tables", "scripts/benchmarks", "scripts/demo")
sys.path[1:1] = [os.path.join(ROOT, folder) for folder in FOLDERS]

import base.early  # noqa: F401  # isort: skip  # before slow imports
from base.errors import fail, run_main

PROGRAMS = """
    benchmark_beam benchmark_generate benchmark_training project_memory project_scaling
    make_author_corpus make_demo_data make_demo_vocab make_english_corpus
    runner synthesis
""".split()


def main() -> int | None:
    name = " ".join(sys.argv[1:2])
    if name not in PROGRAMS:
        fail(f"{name or 'PROGRAM'}: no such program; wanted one of {', '.join(PROGRAMS)}")
    sys.argv[:2] = [f"{sys.argv[0]} {name}"]  # what --help calls it
    return importlib.import_module(name).main()


if __name__ == "__main__":
    run_main(main)
