"""More than one machine: two agents of torchrun on the loopback interface, and runs that torchrun starts again.

Agents are real processes. What a worker does when it is started again is tried on forks of the test server, which are
given the environment that an agent gives its workers.
"""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from base import distributed
from helpers.interrupted_runs import DRAW, check_charged, counted
from helpers.processes import ROOT, children, environment, free_port, until
from helpers.small_runs import STEPS, equal, flags, ledger, read, server, train, weights


def agent(node: int, port: int, arguments: list, **variables: object) -> subprocess.Popen:
    """One machine's torchrun, in a process group of its own; node 0 holds the meeting point."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
               f"--rdzv_endpoint=127.0.0.1:{port}", f"--rdzv_conf=is_host={int(node == 0)}", "--rdzv_id=small",
               "--local_addr=127.0.0.1", "--max_restarts=3", str(ROOT / "src/gpt2_ft.py"), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(**variables), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def kill_group(process: subprocess.Popen) -> None:
    """SIGKILL to an agent and its workers at once, as when a machine is lost."""
    workers = children(process.pid)  # each leads a session of its own
    os.kill(process.pid, signal.SIGKILL)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_two_machines_give_what_one_gives(tmp_path):
    """The same weights bit for bit, the same ledger, from two agents with a rank each and from one place with two."""
    port, work = free_port(), tmp_path / "two"
    agents = [agent(node, port, flags(work, max_step=4)) for node in (0, 1)]
    for process in agents:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    train(flags(tmp_path / "one", max_step=4), 2)
    assert equal(weights(work, 4), weights(tmp_path / "one", 4))
    assert ledger(work) == ledger(tmp_path / "one")
    assert read(work)["epsilon_prv"] == read(tmp_path / "one")["epsilon_prv"]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_that_is_lost_is_replaced(tmp_path, lost):
    """One agent and its worker are killed in mid-run and the agent is started again, by the same command: the run goes
    on from its checkpoint, its ledger remembers the steps that are done twice, and the result is the uninterrupted
    one."""
    port, work = free_port(), tmp_path / "run"
    arguments = flags(work, max_step=400, save_interval=50, log_interval=20)
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1}
    agents = [agent(node, port, arguments, **own_store) for node in (0, 1)]
    until(lambda: (work / "model.50.pt").exists() and len(ledger(work)) >= 60, 180)
    kill_group(agents[lost])
    if lost == 0:  # it held the meeting point: the other agent ends too, and both machines start anew
        agents[1].communicate(timeout=300)
        before = len(ledger(work))
        agents = [agent(node, port, arguments, **own_store) for node in (0, 1)]
    else:
        before = len(ledger(work))
        agents[lost] = agent(lost, port, arguments, **own_store)
    outputs = [process.communicate(timeout=300) for process in agents]
    assert [process.returncode for process in agents] == [0, 0], outputs
    assert "started again: continued as by --resume" in "".join(out for out, _ in outputs)
    records = ledger(work)
    again = [record["step"] for record in records if record["attempt"] > 1]
    assert records[before]["attempt"] >= 2 and again[-1] == 400 and again[0] <= before
    assert len(records) == read(work)["steps_charged"] > 400
    train(flags(tmp_path / "whole", max_step=400, save_interval=400, log_interval=20), 2)
    assert equal(weights(work, 400), weights(tmp_path / "whole", 400))


@pytest.mark.slow
def test_a_killed_rank_under_one_agent(tmp_path):
    """torchrun starts both ranks again in the store that it keeps."""
    work = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=2",
               str(ROOT / "src/gpt2_ft.py"), *flags(work, max_step=300, save_interval=50, log_interval=50)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    until(lambda: (work / "model.50.pt").exists() and len(ledger(work)) >= 60, 180)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("started again: continued as by --resume") == 1
    assert ledger(work)[-1]["attempt"] == 2 and len(ledger(work)) > 300
    train(flags(tmp_path / "whole", max_step=300, save_interval=300, log_interval=50), 2)
    assert equal(weights(work, 300), weights(tmp_path / "whole", 300))


# ------------------------------------------------------------------ who is started again


def ranks_of(job: str, arguments: list, faults: dict[int, list] | None = None) -> list:
    """Two ranks in the environment of torchrun's job `job`; all have ended."""
    port = free_port()
    ranks = [server().start("src/gpt2_ft.py", arguments, faults=(faults or {}).get(rank), env={
        "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": job}) for rank in (0, 1)]
    for rank in ranks:
        rank.status = rank.wait(180)
    return ranks


def killed(point: str, when: str, nth: int) -> dict[int, list]:
    return {1: [["signal", {"point": point, "when": when, "nth": nth, "number": int(signal.SIGKILL)}]]}


def test_the_job_that_began_a_run_continues_it_and_no_other(tmp_path):
    work = tmp_path / "run"
    ranks = ranks_of("mine", flags(work), {0: counted(work), **killed(DRAW, "after", 4)})
    assert ranks[0].status == 2 and ranks[1].status == -signal.SIGKILL
    assert check_charged(work) == 4  # at least the masks drawn and the sums noised
    before = ledger(work)
    assert [record["step"] for record in before] == [1, 2, 3, 4]
    for other in ("other", "none"):  # none: torchrun's word where --rdzv_id was not given
        ranks = ranks_of(other, flags(work))
        assert [rank.status for rank in ranks] == [2, 2] and "continue it with --resume" in ranks[0].error
    assert ledger(work) == before
    ranks = ranks_of("mine", flags(work, lr=0.02))  # as strict as --resume
    assert ranks[0].status == 2 and "lr 0.01 there, 0.02 here" in ranks[0].error and ledger(work) == before
    dumps = [tmp_path / f"rank{rank}" for rank in (0, 1)]
    ranks = ranks_of("mine", flags(work), {rank: [["dump", {"file": str(dumps[rank])}], *(counted(work) * (rank == 0))]
                                           for rank in (0, 1)})
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].stderr
    assert "continued as by --resume" in ranks[0].stdout and not ranks[1].stdout
    assert check_charged(work) == 7 and dumps[0].read_bytes() == dumps[1].read_bytes()
    assert [(record["attempt"], record["step"]) for record in ledger(work)[4:]] == [(2, step) for step in (4, 5, 6)]
    train(flags(tmp_path / "whole"), 2)
    assert equal(weights(work), weights(tmp_path / "whole"))


@pytest.mark.parametrize("point, when", [
    ("run.log:WorkDir.write_json", "before"), ("run.log:WorkDir.write_json", "after"),
    ("privacy.ledger:Ledger.charge", "before")])
def test_killed_before_the_first_record(tmp_path, point, when):
    """Nothing was spent: the job starts again, from the first step, whatever files are there."""
    work = tmp_path / "run"
    ranks = ranks_of("mine", flags(work), {0: killed(point, when, 1)[1]})
    assert ranks[0].status == -signal.SIGKILL and not ledger(work)
    ranks = ranks_of("mine", flags(work))
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].stderr
    assert [record["step"] for record in ledger(work)] == list(range(1, STEPS + 1))


def test_a_job_without_its_ledger_does_not_go_on(tmp_path):
    work = tmp_path / "run"
    ranks_of("mine", flags(work), killed(DRAW, "after", 4))
    (work / "privacy_ledger.jsonl").unlink()
    ranks = ranks_of("mine", flags(work))
    assert ranks[0].status == 2 and "privacy_ledger.jsonl is missing" in ranks[0].error


# ------------------------------------------------------------------ the meeting of the ranks


def meet(store: dist.Store, ranks: list[int], seconds: float = 5) -> list:
    """What distributed.meeting_name() gives each of `ranks` of two, who come at once."""
    names: list = [None] * len(ranks)

    def come(place: int) -> None:
        try:
            names[place] = distributed.meeting_name(store, ranks[place], 2, seconds)
        except RuntimeError as error:
            names[place] = error

    threads = [threading.Thread(target=come, args=(place,)) for place in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_ranks_meet_in_a_store_that_earlier_ones_used():
    """Each meeting has a name of its own, also where one rank of an earlier attempt came and died."""
    store = dist.HashStore()
    first = meet(store, [0, 1])
    assert first[0] == first[1]
    (alone,) = meet(store, [1], seconds=0.3)  # its partner of before is dead and confirms nothing
    assert isinstance(alone, RuntimeError)
    late = threading.Timer(0.4, lambda: names.append(distributed.meeting_name(store, 0, 2, 5)))
    names: list[str] = []
    late.start()
    names += meet(store, [1])
    late.join()
    assert len(names) == 2 and names[0] == names[1] != first[0]
