"""Runs the project's scripts in forks of one process that has imported them: 0.1 s a start in place of 5 s.

A fork executes the script file itself as __main__, with its own arguments, environment, folder and output files, so it
does what `python src/SCRIPT.py` does. It can be told, per fork, to misbehave at the n-th call of a named function:
faults are wrapped around the product's functions here, and the product knows nothing of them.

Protocol: a line of JSON in (a job), a line of JSON out for its start {"id", "pid"} and one for its end {"pid",
"status"}. The end of standard input ends the server and what it started.
"""

import functools
import importlib
import io
import itertools
import json
import os
import pathlib
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[2]
PRELOADED = ("torch", "opacus", "opacus.distributed", "torch.distributed.distributed_c10d", "tokenizers", "run.loop",
             "privacy.opacus_engine", "safetensors.torch", "decoding.tree_decoder", "decoding.beam_search",
             "run.setup", "tqdm", "scipy.stats")


# ------------------------------------------------------------------ faults


def wrap(point: str, when: str, nth: int, action) -> None:
    """Call action(arguments, keywords) before or after the `nth` call (from 1; 0 = every call) of `point`.

    point: "module:function" or "module:Class.method".
    """
    module, _, path = point.partition(":")
    owner = importlib.import_module(module)
    *holders, name = path.split(".")
    for holder in holders:
        owner = getattr(owner, holder)
    original, calls = getattr(owner, name), [0]

    @functools.wraps(original)
    def wrapped(*arguments, **keywords):
        calls[0] += 1
        due = nth in (0, calls[0])
        if due and when == "before":
            action(arguments, keywords)
        result = original(*arguments, **keywords)
        if due and when == "after":
            action(arguments, keywords)
        return result

    setattr(owner, name, wrapped)


def fault_signal(point: str, when: str, nth: int, number: int = signal.SIGKILL, to: int = 0) -> None:
    """Send a signal to the process itself, or to process `to`."""
    wrap(point, when, nth, lambda *_: os.kill(to or os.getpid(), number))


def fault_tear(point: str, nth: int) -> None:
    """Kill in the middle of the `nth` call of os.write(handle, bytes), os.pwrite(handle, bytes, offset) or
    torch.save(object, handle): half is written."""
    import torch
    write, save = getattr(os, point.removeprefix("os:"), None), torch.save

    def half(arguments, _):
        if write is not None:
            write(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
        else:
            whole = io.BytesIO()
            save(arguments[0], whole)
            arguments[1].write(whole.getvalue()[: len(whole.getvalue()) // 2])
            arguments[1].flush()
        os.kill(os.getpid(), signal.SIGKILL)

    wrap(point, "before", nth, half)


def fault_count(point: str, file: str) -> None:
    """Append a byte to `file` before every call, so that calls are counted across kills."""
    def add(*_) -> None:
        with open(file, "ab") as handle:  # not by os.write, whose calls are counted
            handle.write(b"x")

    wrap(point, "before", 0, add)


def fault_sleep(point: str, seconds: float, nth: int = 0) -> None:
    wrap(point, "before", nth, lambda *_: time.sleep(seconds))


def fault_allocate(point: str, nth: int, size: int) -> None:
    """Use `size` bytes more for a moment."""
    wrap(point, "before", nth, lambda *_: len(bytearray(b"x") * size))


def fault_error(point: str, nth: int, number: int) -> None:
    """Raise OSError(number), as a device that fails does."""
    def fail(*_) -> None:
        raise OSError(number, os.strerror(number))

    wrap(point, "before", nth, fail)


def fault_shell(point: str, when: str, nth: int, command: str) -> None:
    """Run a command of the shell, which must succeed."""
    wrap(point, when, nth, lambda *_: subprocess.run(command, shell=True, check=True))


def fault_late_ledger() -> None:
    """A mutant: a step's record is written when the step is over, where it ought to be on disk before the mask is
    drawn."""
    from privacy.ledger import Ledger
    charge, late = Ledger.charge, []
    Ledger.charge = lambda self, step: late.append((self, step))
    wrap("run.loop:Trainer.after_step", "before", 0, lambda *_: charge(*late.pop()))


def fault_entropy(file: str) -> None:
    """Write what os.urandom gives, in hexadecimal, to `file`."""
    original = os.urandom

    def urandom(count: int) -> bytes:
        drawn = original(count)
        with open(file, "a") as handle:
            handle.write(drawn.hex() + "\n")
        return drawn

    os.urandom = urandom


def fault_dump(file: str) -> None:
    """Write the parameters that this rank ends with to `file`."""
    wrap("run.loop:Trainer.close_report", "before", 1,
         lambda arguments, _: pathlib.Path(file).write_bytes(arguments[0].learner.flat.data.numpy().tobytes()))


def fault_released(file: str) -> None:
    """Write the gradient that the first step releases, times the expected batch, to `file`."""
    def keep(arguments, _) -> None:
        plan, sums, coordinates, *_ = arguments
        pathlib.Path(file).write_bytes((sums[:coordinates].double() * plan.settings.batch).numpy().tobytes())

    wrap("privacy.plan:PrivacyPlan.release", "after", 1, keep)


def fault_tf32(file: str) -> None:
    """Products of lower precision, as an environment variable can set them; what the first gradient is computed with is
    written to `file`."""
    import torch
    torch.set_float32_matmul_precision("high")
    wrap("privacy.clipping:BookKeeping.accumulate", "before", 1,
         lambda *_: pathlib.Path(file).write_text(torch.get_float32_matmul_precision()))


def fault_unlike(factor: float) -> None:
    """A machine whose products come out otherwise."""
    from base import products
    product = products.product
    products.product = lambda a, b, bias=None: product(a, b, bias) * factor


def fault_file_limit(size: int, point: str) -> None:
    """From the first call of `point` on, no file of this process may grow beyond `size` bytes (EFBIG)."""
    import resource
    wrap(point, "before", 1, lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)))


def fault_weaken(name: str) -> None:
    """Put in a fault of scripts/audit_faults.py, by the name of its function."""
    sys.path.insert(0, str(ROOT / "scripts"))  # as when it is started
    runpy.run_path(str(ROOT / "scripts" / "audit_faults.py"))[name]()


FAULTS = {"signal": fault_signal, "tear": fault_tear, "count": fault_count, "sleep": fault_sleep, "error": fault_error,
          "allocate": fault_allocate,
          "dump": fault_dump, "released": fault_released, "entropy": fault_entropy, "late_ledger": fault_late_ledger,
          "shell": fault_shell, "file_limit": fault_file_limit, "unlike": fault_unlike, "tf32": fault_tf32,
          "weaken": fault_weaken}


# ------------------------------------------------------------------ the server


def execute(job: dict) -> None:
    """Become `python SCRIPT ARGUMENTS`."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for handle, (path, flags) in enumerate(((os.devnull, os.O_RDONLY),
                                            (job["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
                                            (job["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND))):
        os.dup2(os.open(path, flags, 0o644), handle)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    script = str(ROOT / job["script"])
    sys.argv, sys.path[0] = [script, *job["arguments"]], os.path.dirname(script)
    status = 1
    try:
        for name, keywords in job["faults"]:
            FAULTS[name](**keywords)
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def warm_up() -> None:
    """Epsilons of the usual small run (small_runs.flags) and of one with the target 3 are remembered by the accountant:
    its forks need not compute them."""
    from privacy import accounting
    for steps, delta in itertools.product(range(1, 13), (1e-5, 1 / 400)):
        phases = [accounting.Phase(0.8, 0.2, steps)]
        accounting.epsilon_prv(phases, delta), accounting.epsilon_rdp(phases, delta)
    sigma = accounting.sigma_for(3, 1e-5, lambda sigma: [accounting.Phase(sigma, 0.2, 6)], "6 steps")
    for steps in range(13):
        accounting.epsilon_prv([accounting.Phase(sigma, 0.2, steps)], 1e-5)


def serve() -> None:
    sys.path.insert(0, str(ROOT / "src"))
    sys.path.insert(0, "")  # execute() puts the script's folder there
    for name in PRELOADED:
        importlib.import_module(name)
    warm_up()
    answers, running = os.fdopen(os.dup(1), "w"), set()
    pending = b""
    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    while True:
        readable, _, _ = select.select([0], [], [], 0.005 if running else None)
        if readable:
            received = os.read(0, 1 << 16)
            if not received:
                break
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                job = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    execute(job)
                running.add(pid)
                print(json.dumps({"id": job["id"], "pid": pid}), file=answers, flush=True)
        running = reap(running, answers)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def reap(running: set[int], answers) -> set[int]:
    """Report who ended."""
    left = set()
    for pid in running:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            print(json.dumps({"pid": pid, "status": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)
        else:
            left.add(pid)
    return left


if __name__ == "__main__":
    serve()
