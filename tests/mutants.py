"""Shows that the privacy tests can fail: puts one mistake at a time into a copy of src/, names the tests that see it.

    python tests/mutants.py              all mutants (some minutes)
    python tests/mutants.py noise key    those whose names hold one of the words

Prints a table, mutant -> caught by. The status is 1 where a mutant survives, does not even run, or where the tests fail
without one. Each mutant runs in a fork of this process, which has imported the libraries and nothing of src/.
"""

import importlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

from mistakes import MUTANTS, Mutant

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRELOADED = ("torch", "torch.distributed", "opacus", "opacus.grad_sample", "opacus.accountants", "scipy.stats",
             "pytest")
MOST_FAILURES = 3  # of a mutant, then the next one


def find_test_file(name: str) -> pathlib.Path:
    """The one file of a name, anywhere under tests/."""
    found = list((ROOT / "tests").rglob(name))
    if len(found) != 1:
        raise ValueError(f"tests/ holds {len(found)} files {name}, expected one")
    return found[0]


def address(test: str) -> str:
    """`test_file.py::test_name` with its folder, tests/ included; ValueError where there is no such test."""
    file, _, name = test.partition("::")
    path = find_test_file(file)
    if f"\ndef {name}(" not in path.read_text(encoding="utf-8"):
        raise ValueError(f"{path.relative_to(ROOT)} has no {name}, which tests/mutants.py names")
    return f"{path.relative_to(ROOT)}::{name}"


def mutated(text: str, mutant: Mutant) -> str:
    """The file with the mistake in it; ValueError where the text to change is gone, so that no mutant goes stale."""
    for old, new in mutant.changes:
        if text.count(old) != 1:
            raise ValueError(f"{mutant.name}: src/{mutant.file} holds {text.count(old)} times: {old!r}")
        text = text.replace(old, new)
    return text


def run_tests(tests: tuple[str, ...], folder: pathlib.Path, mutant: Mutant | None) -> tuple[str, list[str]]:
    """("passed", "failed" or "broken", the tests that failed) of a copy of the project with the mutant in it."""
    for name in ("src", "tests", "scripts", "vocab/demo", "pretrained_checkpoints/demo"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "PRIVACY.md"):
        shutil.copy(ROOT / name, folder)
    if mutant is not None:
        file = folder / "src" / mutant.file
        file.write_text(mutated(file.read_text(encoding="utf-8"), mutant), encoding="utf-8")
    outcome = folder / "outcome.json"
    child = os.fork()
    if child == 0:
        try:
            run_here(tests, folder, outcome)
        finally:
            os._exit(1)  # reached by an error alone
    os.waitpid(child, 0)
    if not outcome.exists():
        return "broken", []
    code, failed = json.loads(outcome.read_text())
    return {0: "passed", 1: "failed"}.get(code, "broken"), failed


def run_here(tests: tuple[str, ...], folder: pathlib.Path, outcome: pathlib.Path) -> None:
    """In the fork: pytest on the copy, its output in a file there."""
    import pytest

    class Failures:
        def __init__(self):
            self.names: list[str] = []

        def pytest_runtest_logreport(self, report) -> None:
            if report.failed:
                self.names.append(report.nodeid.split("/")[-1])

    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    failures = Failures()
    code = pytest.main(["-p", "no:cacheprovider", f"--maxfail={MOST_FAILURES}", f"--rootdir={folder}",
                        *map(address, tests)], plugins=[failures])
    outcome.write_text(json.dumps([int(code), failures.names]))
    sys.stdout.flush()
    os._exit(0)


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    if not chosen:
        print(f"error: no mutant's name holds {' or '.join(words)}", file=sys.stderr)
        return 2
    needed = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
    try:
        for test in needed:  # before the first of them runs
            address(test)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    for name in PRELOADED:
        importlib.import_module(name)
    survivors = 0
    width = max(len(mutant.name) for mutant in chosen)
    for mutant in (None, *chosen):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            tests = needed if mutant is None else mutant.tests
            result, failed = run_tests(tests, pathlib.Path(folder).resolve(), mutant)
            output = pathlib.Path(folder, "output.txt")
            tail = output.read_text(errors="replace")[-2000:] if output.exists() else ""
        good = result == ("passed" if mutant is None else "failed")
        survivors += not good
        said = {"passed": "passed" if mutant is None else "SURVIVED", "broken": f"DOES NOT RUN\n{tail}",
                "failed": ", ".join(failed)}[result]
        name = "(none)" if mutant is None else mutant.name
        print(f"{name:{width}}  {time.monotonic() - started:5.0f} s  {said}", flush=True)
        if mutant is None and not good:
            print(tail)
            return 1
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
