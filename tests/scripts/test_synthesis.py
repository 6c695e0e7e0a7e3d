"""scripts/synthesize.sh: its jobs, its mistakes, its table, and its page in a real browser."""

import concurrent.futures
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

import judge_samples
import synthesis
import synthesis_page
from base.errors import UserError
from helpers.judged import flags, write, write_runs, write_world
from helpers.processes import ROOT, alive, assert_user_error, bash, environment, until
from synthesis import Job, Work
from synthesis_table import MODELS, lines_of, row_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished folder: small files, really judged."""
    world = write_world(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["judge_samples.py", *flags(world)])
        judge_samples.main()
    return write_runs(tmp_path_factory.mktemp("runs"), json.loads((world / "out.json").read_text()))


@pytest.fixture(scope="module")
def page(runs):
    path = runs / "page.html"
    synthesis_page.write_page(str(path), str(runs), [row_of(str(runs), name, {}) for name in MODELS])
    return path


def test_the_table(runs):
    rows = [row_of(str(runs), name, {"train private": {"wall": 1.0, "cpu": 3.0}}) for name in MODELS]
    lines = {line["a small model of"]: line for line in lines_of(rows)}
    private, nothing = lines["samples, with privacy"], lines["nothing (the start)"]
    assert private["epsilon"] == "7.50" and lines["samples, without privacy"]["epsilon"] == "inf"
    assert private["new tokens: recovered"] == "1 of 1" and private["new tokens: exposure [bits]"] == "2.0 (0.4)"
    assert private["ordinary words: recovered"] == "-"
    assert private["membership: area by loss, by reference"] == "0.667, 0.667"
    assert private["true positives at 1 %"] == "-, -"  # of three others
    assert private["training, CPU [s]"] == "3" and private["samples, CPU [s]"] == "-"
    assert private["copied span [words]"] == "2.0 (2.5)"  # of two samples; one of three private texts that hold all
    assert nothing["epsilon"] == "0" and nothing["test loss"] == "1.500"
    assert nothing["membership: area by loss, by reference"] == "-"
    assert "examples" not in rows[1]["judged"] and "curve" not in rows[1]["judged"]["membership"]["loss"]


def test_the_page_needs_nothing_else_and_says_what_it_is(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|iframe|object)\b|url\(|@import|https?://", text)
    assert set(re.findall(r'src="([^,"]*)', text)) == {"data:image/png;base64"}
    assert "a fox &lt;b&gt; &amp; runs" in text.replace("<mark>", "").replace("</mark>", "") and "<b> &" not in text
    assert "<mark>the dog sat on the mat</mark>" in text and "q &lt;w&gt;" in text
    assert "epsilon &le; 7.5000" in text and "<b>Covered:</b>" in text and "<b>Not covered:</b>" in text
    assert text.count(synthesis_page.MARK) > 20  # the banner, the first table, and each figure


def test_the_page_in_a_browser(page, tmp_path):
    """A headless browser without network shows both plots and every table, and nothing is wider than its window."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser to open the page: {', '.join(BROWSERS)}")
    asks = """<script>document.title = JSON.stringify({images: [...document.images].map(i => i.naturalWidth),
        rows: document.querySelectorAll("tr").length, text: document.body.innerText.length,
        wide: document.documentElement.scrollWidth - innerWidth, found: performance.getEntriesByType("resource")
        .filter(e => !e.name.startsWith("data:")).length})</script></body>"""
    copy, shot = tmp_path / "page.html", tmp_path / "page.png"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", asks), encoding="utf-8")
    common = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
              f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2400"]
    done = subprocess.run([*common, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found, done.stderr[-500:]
    seen = json.loads(found[1])
    assert len(seen["images"]) == 2 and min(seen["images"]) > 500
    assert seen["rows"] > 30 and seen["text"] > 2000 and seen["wide"] <= 0 and seen["found"] == 0
    subprocess.run([*common, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120, check=True)
    from matplotlib.image import imread

    assert imread(shot)[..., :3].std() > 0.05  # no blank page


# ------------------------------------------------------------------ jobs


@pytest.fixture
def work(tmp_path):
    (tmp_path / "logs").mkdir()
    return Work(SimpleNamespace(runs=str(tmp_path), nproc=2))


def python(body: str, name: str, done: object, **more) -> Job:
    return Job(name, ["python", "-c", body], str(done), **more)


def test_jobs_of_a_chain_follow_each_other_and_are_done_once(work, tmp_path):
    first, second = tmp_path / "new/first", tmp_path / "second"
    jobs = [python(f"open({str(first)!r}, 'w').write('a')", "one", first),
            python(f"open({str(second)!r}, 'w').write(open({str(tmp_path / 'made')!r}).read())", "two", second,
                   before=lambda: (tmp_path / "made").write_text(first.read_text() + "b"))]
    work.chains(jobs)
    assert second.read_text() == "ab" and set(work.seconds) == {"one", "two"}
    assert json.loads((tmp_path / "seconds.json").read_text()) == work.seconds
    first.write_text("kept")
    second.unlink()
    again = Work(work.args)
    again.chains(jobs)
    assert first.read_text() == "kept" and second.read_text() == "keptb" and set(again.seconds) == {"one", "two"}


@pytest.mark.parametrize("body, said", [
    ("import sys; sys.exit('error: the cause in one line')", "the cause in one line"),
    ("print('last words'); raise SystemExit(3)", "status 3: last words")])
def test_a_job_that_fails_ends_all_and_names_its_log(work, tmp_path, body, said):
    failing, later = python(body, "bad job", tmp_path / "a"), python("1", "later", tmp_path / "b")
    with pytest.raises(UserError, match=f"(?s)bad job: .*{said}.*bad_job.txt"):
        work.chains([failing, later])
    assert "later" not in work.seconds


def test_after_a_failure_no_job_is_started(work, tmp_path):
    """Not even by a chain that is between two jobs."""
    done, failed = tmp_path / "done", threading.Event()
    between = python(f"open({str(done)!r}, 'w')", "later", done, before=lambda: (failed.wait(30), time.sleep(0.5)))
    failing = python("raise SystemExit(3)", "bad", tmp_path / "a")
    shutdown = concurrent.futures.ThreadPoolExecutor.shutdown
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concurrent.futures.ThreadPoolExecutor, "shutdown", lambda pool, *given, **named: (
            failed.set(), shutdown(pool, *given, **named)))
        with pytest.raises(UserError, match="bad: .* status 3"):
            work.chains([between], [failing])
    assert not done.exists()


def test_a_signal_ends_the_jobs(tmp_path):
    """The driver passes a request to stop on to what it has started, and ends with the signal's status."""
    (tmp_path / "logs").mkdir()
    done = tmp_path / "pid"
    body = f"import os, time; open({str(done)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    driver = tmp_path / "driver.py"
    driver.write_text(f"""import sys, types
sys.path[:0] = [{str(ROOT / 'scripts')!r}]
import start
from base.errors import run_main
from synthesis import Job, Work
work = Work(types.SimpleNamespace(runs={str(tmp_path)!r}, nproc=2))
run_main(lambda: work.chains([Job("sleep", ["python", "-c", {body!r}], {str(tmp_path / 'never')!r})]))
""")
    driver = subprocess.Popen([sys.executable, driver], env=environment())
    until(lambda: done.exists() and done.read_text())
    driver.terminate()
    assert driver.wait(timeout=60) == 128 + signal.SIGTERM and not alive(int(done.read_text()))


def test_samples_become_lines_to_train_on(tmp_path):
    """The k-th sample stands behind the context of its prompt; a sample without tokens is left out."""
    write(tmp_path / "data/prompts.jsonl", [{"context": [1]}, {"context": [2, 3]}])
    write(tmp_path / "private/samples.jsonl", [{"tokens": tokens} for tokens in ([7], [], [8, 9], [6])])
    synthesis.write_training_lines(str(tmp_path), "private", 2)
    lines = (tmp_path / "use_private/train.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [{"context": [1], "completion": [7]},
                                            {"context": [2, 3], "completion": [8, 9]},
                                            {"context": [2, 3], "completion": [6]}]


# ------------------------------------------------------------------ mistakes


def data(folder, **changed: list[str]):
    parts = {part: [f"name : {part} {k}||A {part} {k} ." for k in range(6)] for part in ("train", "valid", "test")}
    for part, lines in {**parts, **changed}.items():
        write(folder / f"data/{part}.txt", lines)
    return folder / "data"


def parse(monkeypatch, *words: object):
    monkeypatch.setattr(sys, "argv", ["synthesize.sh", *map(str, words)])
    return synthesis.parse()


TRAIN = [f"name : train {k}||A train {k} ." for k in range(6)]


@pytest.mark.parametrize("changed, said", [
    ({"test": TRAIN[:4]}, "lines of test.txt are lines of train.txt.*swapped"),
    ({"valid": TRAIN}, "lines of valid.txt are lines of train.txt"),
    ({"test": [*TRAIN, *(f"x : y||{k}" for k in range(60))]}, "lines of train.txt are lines of test.txt")])
def test_swapped_files_are_refused(monkeypatch, tmp_path, changed, said):
    with pytest.raises(UserError, match=said):
        synthesis.check_files(parse(monkeypatch, "--data", data(tmp_path, **changed), "--runs", tmp_path / "runs"))


def test_a_folder_without_an_embedder_is_refused_before_any_training(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--embedder .* holds no config.json"):
        synthesis.check_files(parse(monkeypatch, "--data", data(tmp_path), "--runs", tmp_path, "--embedder", tmp_path))


@pytest.mark.parametrize("words, said", [
    (["--samples", 0], "--samples 0"), (["--epsilon", -1], "--epsilon -1"),
    (["--temperature", "warm"], "--temperature"), (["--temperature", 0], "--temperature 0"),
    (["--nproc", 3, "--batch", 512], "--nproc 3"), ([], "--runs"), (["--sample", 3], "--sample")])
def test_mistakes_of_the_options(monkeypatch, tmp_path, words, said):
    own = ["--runs", tmp_path] if words else []
    with pytest.raises(UserError, match=re.escape(said)):
        parse(monkeypatch, *own, *words)


def test_other_options_do_not_continue_a_folder(monkeypatch, tmp_path):
    synthesis.keep_command(parse(monkeypatch, "--runs", tmp_path, "--nproc", 1))
    synthesis.keep_command(parse(monkeypatch, "--runs", tmp_path, "--nproc", 2))
    with pytest.raises(UserError, match="other options \\(seed\\)"):
        synthesis.keep_command(parse(monkeypatch, "--runs", tmp_path, "--seed", 2))


def test_the_command_says_a_mistake_in_one_line(tmp_path):
    folder = data(tmp_path, test=TRAIN)
    done = bash(ROOT / "scripts/synthesize.sh", "--data", folder, "--runs", tmp_path / "runs",
                env=environment(PYTHON=sys.executable))
    assert_user_error(done, "test.txt", "swapped")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_from_the_data_to_the_page(tmp_path):
    """The whole command on a few hundred lines; called again, it has nothing left to do."""
    for part, lines in (("train", 300), ("valid", 12), ("test", 12)):
        text = (ROOT / f"data/demo/{part}.txt").read_text(encoding="utf-8").splitlines()[:lines]
        write(tmp_path / f"data/{part}.txt", text)
    common = "--scheduler constant --lr 0.001 --max_step 3 --log_interval 1"
    options = {"data": tmp_path / "data", "vocab": ROOT / "vocab/demo", "model": ROOT / "pretrained_checkpoints/demo",
               "runs": tmp_path / "runs", "seq_len": 128, "held_out": 60, "secrets": 2, "others": 15, "samples": 2,
               "max_new_tokens": 20, "batch": 32, "open_batch": 4, "nproc": 2,
               **{f"{kind}_flags": common for kind in ("private", "open", "use")}}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    env = environment(PYTHON=sys.executable)
    command = ["bash", str(ROOT / "scripts/synthesize.sh"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sample: ") >= 1 and "| samples, with privacy " in done.stdout
    result = json.loads((tmp_path / "runs/synthesis.json").read_text())
    private, open_model = ({row["name"]: row for row in result["rows"]}[name] for name in ("private", "no_privacy"))
    assert private["privacy"]["N"] == 240 + 4 and 7 < private["privacy"]["epsilon_prv"] <= 8
    assert open_model["privacy"]["epsilon_prv"] == "inf"
    again = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert again.returncode == 0 and " s, CPU " not in again.stdout and json.loads(
        (tmp_path / "runs/synthesis.json").read_text())["seconds"] == result["seconds"]
