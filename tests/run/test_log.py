"""What a run shows of itself: the norm of its gradients, TensorBoard's event files, and plots of it."""

import importlib.util
import json
import math
import pathlib
import signal
import sys

import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gpt2_ft
from helpers import author_runs
from helpers.checkpoints import refused
from helpers.processes import ROOT, assert_user_error, run_script
from helpers.small_runs import equal, flags, metrics, read, start_ranks, train, weights
from optimizer import CACHE_CHUNK, norm

PLOT = "scripts/plot_run.py"


# ------------------------------------------------------------------ gradient norms


def moments(work: pathlib.Path, step: int) -> torch.Tensor:
    return torch.load(work / f"optimizer.{step}.pt", weights_only=True)["m"].double()


@pytest.mark.parametrize("sigma", [0.8, 0])
@pytest.mark.parametrize("size", [1, 2])
def test_the_norm_is_that_of_the_released_gradient(sigma, size, tmp_path):
    """From Adam's first moments m1 = (1-b) g1, m2 = b m1 + (1-b) g2, which know nothing of the log."""
    same = dict(noise_multiplier=sigma, scheduler="constant", adam_beta1=0.5, train_batch_size=8 // size)
    for steps in (1, 2):
        train(flags(tmp_path / str(steps), max_step=steps, **same), size)
    m1, m2 = moments(tmp_path / "1", 1), moments(tmp_path / "2", 2)
    norms = [float((m1 / 0.5).norm()), float(((m2 - 0.5 * m1) / 0.5).norm())]
    (record,) = [line for line in metrics(tmp_path / "2") if "loss" in line]  # of two steps: --log_interval 2
    assert record["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-5)
    S = 1.0 * (1 + read(tmp_path / "2")["rounding"])
    assert record["noise_norm"] == pytest.approx(sigma * S * math.sqrt(len(m1)) / 8, rel=1e-12)
    if size == 1:  # --clip bounds what the optimizer gets, not what is shown
        train(flags(tmp_path / "clipped", max_step=1, **same, clip=norms[0] / 10))
        assert metrics(tmp_path / "clipped")[0]["grad_norm"] == pytest.approx(norms[0], rel=1e-5)
        assert float((moments(tmp_path / "clipped", 1) / 0.5).norm()) == pytest.approx(norms[0] / 10, rel=1e-5)


def test_much_noise_has_the_norm_that_is_said_of_it(tmp_path):
    """The norm of P normals is spread by a share 1/sqrt(2P) of its mean; fewer than 40 units of norm C add at most
    40/(sigma sqrt(P)) to it."""
    for size in (1, 2):
        train(flags(tmp_path / str(size), noise_multiplier=1e3, lora_dim=0, max_step=1, lr=0,
                    train_batch_size=8 // size), size)
        P, (record, *_) = len(moments(tmp_path / str(size), 1)), metrics(tmp_path / str(size))
        assert P > 5000
        tolerance = 5 / math.sqrt(2 * P) + 0.04 / math.sqrt(P)
        assert record["grad_norm"] / record["noise_norm"] == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("of, sigma, loud", [("texts", 0.8, False), ("texts", 40, True), ("texts", 0, False),
                                             ("authors", 0.9, False), ("authors", 40, True)])
def test_the_noise_is_said_beside_c_before_the_first_step(of, sigma, loud, tmp_path):
    """The terminal says what metrics.jsonl has later, and warns where a step is next to all noise."""
    runs = {"texts": (flags, train), "authors": (author_runs.flags, author_runs.train)}[of]
    batch = {"texts": "train_batch_size", "authors": "per_device_train_batch_size"}[of]
    given = {"noise_multiplier": sigma, batch: 4, "max_step" if of == "texts" else "max_steps": 1}
    given |= {"max_grad_norm": 0.5} if of == "texts" else {"per_sample_max_grad_norm": 0.5, "target_epsilon": None}
    (rank,) = runs[1](runs[0](tmp_path, **given))
    (line,) = [line for line in rank.stdout.splitlines() if "norm of a step's noise" in line] if sigma else [""]
    noise = next(record["noise_norm"] for record in metrics(tmp_path) if "noise_norm" in record)
    if sigma:
        assert f"noise {noise:.3g} (" in line and "at most C = 0.5, with 4 " in line
        assert rank.stdout.index(line) < rank.stdout.index("| epoch")
    assert loud == (noise > 5 * 0.5)
    assert rank.stdout.count(f"is {noise / 0.5:.3g} times the most that its signal can have: raise --{batch}") == loud


def test_norms_of_large_buffers():
    """Far more float32 than a chunk. The negative control: torch's own norm of as many loses digits on one thread."""
    values = torch.randn(200 * CACHE_CHUNK + 3, generator=torch.Generator().manual_seed(0))
    exact, threads = float(values.double().norm()), torch.get_num_threads()
    torch.set_num_threads(1)
    assert abs(float(norm(values)) - exact) < 2e-6 * exact < abs(float(values.norm()) - exact)
    torch.set_num_threads(threads)
    assert float(norm(torch.tensor([3.0, 4.0]))) == 5.0 and float(norm(torch.zeros(3))) == 0.0


# ------------------------------------------------------------------ --tensorboard


def events(work: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: name -> [(step, value), ...]."""
    accumulator = EventAccumulator(str(work / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {name: [(event.step, event.value) for event in accumulator.Scalars(name)]
            for name in accumulator.Tags()["scalars"]}


def lines_as_events(work: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in metrics(work):
        for name, value in line.items():
            if name != "step" and type(value) in (int, float):
                found.setdefault(name, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    return found


@pytest.mark.parametrize("sigma", [0.8, 0])
def test_event_files_hold_what_the_metrics_hold_and_change_nothing(sigma, tmp_path):
    train(flags(tmp_path / "without", noise_multiplier=sigma, eval_interval=3))
    train(flags(tmp_path / "with", noise_multiplier=sigma, eval_interval=3, tensorboard=True))
    assert equal(weights(tmp_path / "without"), weights(tmp_path / "with"))
    assert not (tmp_path / "without" / "tensorboard").exists()
    found = events(tmp_path / "with")
    assert found == lines_as_events(tmp_path / "with")
    assert [step for step, _ in found["loss"]] == [2, 4, 6] and [step for step, _ in found["valid_loss"]] == [3, 6]
    assert ("epsilon" in found) == (sigma > 0)


def test_author_runs_have_event_files_too(tmp_path):
    author_runs.train(author_runs.flags(tmp_path / "run", tensorboard=True), 2)
    assert events(tmp_path / "run") == lines_as_events(tmp_path / "run")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1  # rank 0 alone writes


def test_a_kill_leaves_the_events_and_a_resumed_run_replaces_those_done_again(tmp_path):
    same = dict(tensorboard=True, log_interval=1, save_interval=4)
    kill = ["signal", {"point": "optimizer:AdamW.step", "when": "before", "nth": 6}]
    (rank,) = start_ranks(flags(tmp_path / "run", **same), 1, {0: [kill]})
    assert rank.wait() == -signal.SIGKILL
    assert [step for step, _ in events(tmp_path / "run")["loss"]] == [1, 2, 3, 4, 5]  # all that was logged
    train(flags(tmp_path / "run", **same, resume=True))
    found, lines = events(tmp_path / "run"), metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 5, 6]
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5, 6]
    assert dict(found["epsilon"])[5] == pytest.approx([line["epsilon"] for line in lines if line["step"] == 5][1])


def test_a_resumed_run_may_take_the_flag_up(tmp_path):
    stop = ["signal", {"point": "optimizer:AdamW.step", "when": "after", "nth": 4, "number": signal.SIGTERM}]
    (rank,) = start_ranks(flags(tmp_path / "run"), 1, {0: [stop]})
    assert rank.wait() == 128 + signal.SIGTERM
    train(flags(tmp_path / "run", resume=True, tensorboard=True))
    assert [step for step, _ in events(tmp_path / "run")["loss"]] == [6]


def test_the_package_is_asked_for_where_it_is_missing(monkeypatch):
    plain = ["--train_data", "x", "--valid_data", "x"]
    gpt2_ft.parse([*plain, "--tensorboard"]).check()
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # what an import of a missing package meets
    refused(gpt2_ft.parse([*plain, "--tensorboard"]).check, "pip install tensorboard")
    gpt2_ft.parse(plain).check()


# ------------------------------------------------------------------ plots


def write_metrics(folder: pathlib.Path, records: list[dict], delta: float | None = None) -> pathlib.Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if delta is not None:
        (folder / "args.json").write_text(json.dumps({"delta": delta}))
    return folder


@pytest.fixture
def plot(monkeypatch):
    """scripts/plot_run.py as a module."""
    spec = importlib.util.spec_from_file_location("plot_run", ROOT / PLOT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    module.plt.close("all")


def lines_of(figure) -> dict[str, list[tuple[list, list, str]]]:
    return {axes.get_title(): [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle())
                               for line in axes.lines] for axes in figure.axes}


def test_a_plot_shows_the_runs_numbers(plot, tmp_path):
    private = [{"step": 1, "epoch": 0.5, "loss": 2.0, "epsilon": 0.5, "grad_norm": 3.0, "noise_norm": 2.5},
               {"step": 2, "epoch": 1.0, "loss": None, "epsilon": 0.7, "grad_norm": 2.8, "noise_norm": 2.5},
               {"step": 2, "epoch": 1.0, "valid_loss": 1.5}]
    open_run = [{"step": 1, "epoch": 0.1, "loss": 1.0, "epsilon": "inf", "grad_norm": 1.0, "noise_norm": 0.0}]
    runs = {"a": plot.read_metrics(str(write_metrics(tmp_path / "a", private))),
            "b": plot.read_metrics(str(write_metrics(tmp_path / "b", open_run)))}
    figure = plot.draw(runs, {1e-5}, "step")
    assert lines_of(figure) == {
        plot.PANELS["loss"]: [([1], [2.0], "-"), ([1], [1.0], "-")],
        plot.PANELS["valid_loss"]: [([2], [1.5], "-"), ([], [], "-")],
        plot.PANELS["epsilon"] + ", delta 1e-05": [([1, 2], [0.5, 0.7], "-"), ([], [], "-")],
        plot.PANELS["grad_norm"]: [([1, 2], [3.0, 2.8], "-"), ([1, 2], [2.5, 2.5], "--"), ([1], [1.0], "-")]}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert lines_of(plot.draw(runs, set(), "epoch"))[plot.PANELS["grad_norm"]][0][0] == [0.5, 1.0]
    alone = plot.draw({"b": runs["b"]}, set(), "step")  # no panel without a number in it
    assert lines_of(alone).keys() == {plot.PANELS["loss"], plot.PANELS["grad_norm"]}


def test_steps_done_again_count_once_and_a_torn_line_not_at_all(plot, tmp_path):
    folder = write_metrics(tmp_path / "run", [{"step": step, "loss": loss} for step, loss in
                                              ((2, 9.0), (4, 8.0), (6, 7.0), (4, 5.0), (8, 4.0))])
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 10, "lo')
    assert plot.series(plot.read_metrics(str(folder)), "loss", "step") == ([2, 4, 8], [9.0, 5.0, 4.0])


def test_runs_of_one_name_are_told_apart(plot):
    assert plot.label_runs(["/x/a/run", "/x/b/run", "/x/c"]) == ["a/run", "b/run", "x/c"]
    assert plot.label_runs(["/x/a", "/x/b"]) == ["a", "b"]


def test_the_command_draws_real_runs(plot, monkeypatch, tmp_path):
    for name, sigma in (("private", 0.8), ("open", 0)):
        train(flags(tmp_path / name, noise_multiplier=sigma))
    done = run_script(PLOT, tmp_path / "private", tmp_path / "open", "--out", tmp_path / "runs.png")
    assert done.returncode == 0 and (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG"), done.stderr
    assert imread(tmp_path / "runs.png").std() > 0.01  # something is drawn
    for form, magic in ((".svg", b"<?xml"), (".pdf", b"%PDF")):
        monkeypatch.setattr(sys, "argv", [PLOT, str(tmp_path / "open"), "--out", str(tmp_path / f"runs{form}")])
        plot.main()
        assert (tmp_path / f"runs{form}").read_bytes().startswith(magic)
    assert not list(tmp_path.glob("*.partial"))


def test_the_command_refuses(plot, monkeypatch, tmp_path):
    good = write_metrics(tmp_path / "good", [{"step": 1, "loss": 1.0}])
    bad = {"empty": "", "text": "hello\n", "later": '{"step": 1}\nhello\n{"step": 2}\n',
           "list": '{"step": 1}\n[2]\n{"step": 3}\n', "no_step": '{"loss": 1}\n',
           "half": '{"step": 1.5}\n', "deep": "[" * 100_000 + "\n{}\n"}
    for name, content in bad.items():
        write_metrics(tmp_path / name, [])
        (tmp_path / name / "metrics.jsonl").write_text(content)
    monkeypatch.chdir(tmp_path)
    for arguments, *words in (
            (["none"], "none", "cannot be read"), ([], "runs"), (["empty"], "is empty"),
            (["good", "text"], "metrics.jsonl:1"), (["later"], "metrics.jsonl:2"),
            (["list"], "metrics.jsonl:2"), (["no_step"], "metrics.jsonl:1"),
            (["half"], "metrics.jsonl:1"), (["deep"], "metrics.jsonl:1"), (["good", "--out", "x.jpg"], "--out", ".png"),
            (["good", "--out", "no/x.png"], "--out", "no"), (["good", "--against", "time"], "--against"),
            (["good", "--o", "x.png"], "--o")):
        monkeypatch.setattr(sys, "argv", [PLOT, *arguments])
        refused(plot.main, *words)
    assert not list(tmp_path.glob("*.png"))
    assert_user_error(run_script(PLOT, good, tmp_path / "text"), "metrics.jsonl:1")
