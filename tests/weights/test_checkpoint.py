"""Our own checkpoints: round trips, bases that move, pairs, and every way in which writing one can be cut short."""

import dataclasses
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import loralib as lora
from helpers.checkpoints import CONFIG, LORA, assert_same_weights, random_model, refused, train_from, write_base
from helpers.processes import ROOT
from model import LoRAConfig
from weights import checkpoint
from weights.checkpoint import load_model, save_checkpoint

# ------------------------------------------------------------------ our own checkpoints


@pytest.mark.parametrize("lora_config", [LoRAConfig(), LORA])
def test_a_whole_model_round_trip(lora_config, tmp_path):
    """Trained from no file: the checkpoint holds every weight, adapters beside them."""
    model = random_model(lora_config)
    save_checkpoint(str(tmp_path), 12, model, None, {"m": torch.ones(2)})
    loaded = load_model(str(tmp_path))
    assert_same_weights(loaded.model, model)
    assert (loaded.step, loaded.model.config, loaded.model.lora_config) == (12, CONFIG, lora_config)
    assert loaded.path == str(tmp_path / "model.12.pt")
    assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight


def test_files_load_with_weights_only_and_hold_no_more_than_they_need(tmp_path):
    """Parameters that are views of one flat buffer are saved as themselves."""
    model = random_model()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start:start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    save_checkpoint(str(tmp_path), 1, model, None, {"m": torch.ones(2), "note": "x"})
    content = torch.load(tmp_path / "model.1.pt", weights_only=True)
    assert all(value.untyped_storage().nbytes() == 4 * value.numel() for value in content["model_state_dict"].values())
    assert content["model_state_dict"].keys() == dict(model.named_parameters()).keys()
    assert torch.load(tmp_path / "optimizer.1.pt", weights_only=True)["note"] == "x"


def test_a_merged_model_is_not_saved(tmp_path):
    model = random_model(LORA)
    lora.merge(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        save_checkpoint(str(tmp_path), 1, model, None, {})
    assert os.listdir(tmp_path) == []


def test_newest_is_by_step_not_by_name_or_time(tmp_path):
    base = write_base(tmp_path)
    for step in (10, 100, 9):
        train_from(base, tmp_path / "run", step, seed=step)
        (tmp_path / "run" / f"optimizer.{step}.pt").unlink()
    assert load_model(str(tmp_path / "run")).step == 100
    (tmp_path / "run" / "model.100.pt").unlink()
    assert load_model(str(tmp_path / "run")).step == 10
    shutil.copy(base, tmp_path / "run" / "pytorch_model.bin")  # a training's own files come first
    assert load_model(str(tmp_path / "run")).step == 10


def test_adapters_alone_need_no_other_flag(tmp_path):
    model = train_from(write_base(tmp_path / "pretrained"), tmp_path / "runs" / "a")
    content = torch.load(tmp_path / "runs" / "a" / "model.7.pt", weights_only=True)
    assert content["model_state_dict"] and all("lora_" in name for name in content["model_state_dict"])
    loaded = load_model(str(tmp_path / "runs" / "a"))
    assert_same_weights(loaded.model, model)
    assert loaded.model.lora_config == LORA
    without_dropout = dataclasses.replace(LORA, dropout=0.0)
    given = load_model(str(tmp_path / "runs" / "a"), str(tmp_path / "pretrained"), without_dropout)
    assert_same_weights(given.model, model)


def test_flags_that_contradict_the_file(tmp_path):
    train_from(write_base(tmp_path), tmp_path / "run")
    for given, words in ((LoRAConfig(0), "--lora_dim 0"), (LoRAConfig(4, 6.0), "--lora_dim 4"),
                         (LoRAConfig(2, 32.0), "--lora_alpha 32"),
                         (LoRAConfig(2, 6.0, 0.0, ("query",)), "with query: ")):
        refused(lambda given=given: load_model(str(tmp_path / "run"), lora_config=given), words, "model.7.pt")


def test_a_moved_project_still_finds_its_base(tmp_path):
    """Moved once, trained further from there, and moved again."""
    model = train_from(write_base(tmp_path / "one" / "pretrained"), tmp_path / "one" / "runs" / "a")
    os.rename(tmp_path / "one", tmp_path / "two")
    loaded = load_model(str(tmp_path / "two" / "runs" / "a"))
    assert_same_weights(loaded.model, model)
    loaded.model.freeze_for_training()
    (tmp_path / "two" / "runs" / "b").mkdir()
    save_checkpoint(str(tmp_path / "two" / "runs" / "b"), 8, loaded.model, loaded.base, {})
    assert_same_weights(load_model(str(tmp_path / "two" / "runs" / "b")).model, model)
    os.rename(tmp_path / "two", tmp_path / "three")
    assert_same_weights(load_model(str(tmp_path / "three" / "runs" / "b")).model, model)


def test_a_moved_run_finds_the_base_where_it_was(tmp_path):
    model = train_from(write_base(tmp_path / "pretrained"), tmp_path / "runs" / "a")
    os.rename(tmp_path / "runs" / "a", tmp_path / "elsewhere")
    assert_same_weights(load_model(str(tmp_path / "elsewhere")).model, model)


def test_a_run_behind_a_link_is_found_from_both_sides(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "runs").symlink_to(tmp_path / "disk")
    model = train_from(write_base(tmp_path / "project" / "pretrained"), tmp_path / "project" / "runs" / "a")
    os.rename(tmp_path / "project", tmp_path / "moved")
    assert_same_weights(load_model(str(tmp_path / "moved" / "runs" / "a")).model, model)


def test_a_missing_or_wrong_base(tmp_path):
    base, run = write_base(tmp_path / "pretrained"), str(tmp_path / "run")
    model = train_from(base, tmp_path / "run")
    os.rename(base, tmp_path / "away.bin")
    refused(lambda: load_model(run), "holds adapters alone", base, "give --base_checkpoint")
    assert_same_weights(load_model(run, base_checkpoint=str(tmp_path / "away.bin")).model, model)
    refused(lambda: load_model(run, base_checkpoint=str(tmp_path / "none")), "--base_checkpoint", "no such")
    write_base(tmp_path / "pretrained", seed=5)
    refused(lambda: load_model(run), base, "its fingerprint differs")
    weights = torch.load(tmp_path / "away.bin", weights_only=True)
    weights["transformer.wpe.weight"][5, 7] += 2 ** -20  # one weight, by little
    torch.save(weights, tmp_path / "changed.bin")
    refused(lambda: load_model(run, base_checkpoint=str(tmp_path / "changed.bin")), "fingerprint differs")
    refused(lambda: load_model(str(tmp_path / "away.bin"), str(tmp_path / "pretrained"), base_checkpoint=base),
            "--base_checkpoint", "leave the flag out")


def test_fingerprint_is_of_the_weights_not_of_their_file(tmp_path):
    """A base converted to another format, prefix or head is the same base."""
    model = train_from(write_base(tmp_path / "pretrained"), tmp_path / "run")
    weights = torch.load(tmp_path / "pretrained" / "base.bin", weights_only=True)
    bare = {name.removeprefix("transformer."): value for name, value in reversed(weights.items())}
    safetensors.torch.save_file({**bare, "lm_head.weight": bare["wte.weight"].clone()}, tmp_path / "base.safetensors")
    loaded = load_model(str(tmp_path / "run"), base_checkpoint=str(tmp_path / "base.safetensors"))
    assert_same_weights(loaded.model, model)


def test_fresh_adapters_follow_the_seed_and_loading_draws_nothing(tmp_path):
    base = write_base(tmp_path)
    torch.manual_seed(3)
    first = load_model(base, lora_config=LORA).model
    torch.manual_seed(3)
    assert_same_weights(load_model(base, lora_config=LORA).model, first)
    torch.manual_seed(4)
    assert not torch.equal(load_model(base, lora_config=LORA).model.transformer.h[0].attn.c_attn.lora_A,
                           first.transformer.h[0].attn.c_attn.lora_A)
    train_from(base, tmp_path / "run")
    for path in (base, str(tmp_path / "run")):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        load_model(path)
        assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------ format numbers


def test_a_pair_from_before_format_numbers_loads_and_resumes():
    """Files that an earlier version wrote; the weights and the moments are formulas."""
    folder = str(ROOT / "tests" / "fixtures" / "unnumbered")
    assert "format" not in torch.load(f"{folder}/model.7.pt", weights_only=True)
    loaded = load_model(folder)
    assert loaded.step == 7 and loaded.model.config == CONFIG and loaded.model.lora_config == LORA
    assert loaded.base is None and loaded.files == [(f"{folder}/model.7.pt", {"epsilon_prv": 1.5})]
    for k, parameter in enumerate(loaded.model.parameters()):
        wanted = torch.sin(torch.arange(parameter.numel()) ** 2 + k).view_as(parameter)
        torch.testing.assert_close(parameter.detach(), wanted)
    model = random_model(LORA)
    state = checkpoint.load_resumable(folder, 7, model)
    assert_same_weights(model, loaded.model)
    assert torch.equal(state.pop("m"), torch.arange(3.0)) and torch.equal(state.pop("v"), torch.ones(3))
    assert state == {"steps": 7, "privacy": {"epsilon_prv": 1.5}, "base": None}


@pytest.mark.parametrize("name", ["model.7.pt", "optimizer.7.pt"])
@pytest.mark.parametrize("number", [3, 0, True, "1"])
def test_a_pair_has_its_format_and_an_unknown_one_is_refused(number, name, tmp_path):
    run, model = tmp_path / "run", random_model(LORA)
    train_from(write_base(tmp_path), run)
    content = torch.load(run / name, weights_only=True)
    assert content["format"] == 2
    torch.save({**content, "format": number}, run / name)
    refused(lambda: checkpoint.load_resumable(str(run), 7, model), f"--resume {run / name}: format {number!r}")
    if name == "model.7.pt":
        refused(lambda: load_model(str(run)), f"--init_checkpoint {run / name}: format {number!r}")
        torch.save({"format": number, "weights of a later version": {}}, run / name)
        refused(lambda: load_model(str(run)), f"--init_checkpoint {run / name}: format {number!r}")


def test_a_file_of_format_1_knew_three_parts_and_one_family(tmp_path):
    """It says `enable` for `targets`, and no family."""
    saved = train_from(write_base(tmp_path), tmp_path / "run")
    path = tmp_path / "run" / "model.7.pt"
    content = torch.load(path, weights_only=True)
    assert content.pop("family") == "gpt2" and content["lora"].pop("rslora") is False
    assert content["lora"].pop("targets") == ["query", "value"]
    content["lora"]["enable"] = [True, False, True]
    torch.save({name: value for name, value in content.items() if name != "format"}, path)
    loaded = load_model(str(tmp_path / "run")).model
    assert_same_weights(loaded, saved)
    assert loaded.lora_config == saved.lora_config
    for family in ("gpt3", ["gpt2"], None):
        torch.save({**content, "family": family}, path)
        refused(lambda: load_model(str(tmp_path / "run")), f"its entry 'family' is {family!r}")


# ------------------------------------------------------------------ pairs, kills, full disks


def test_resume_copies_into_the_running_model(tmp_path):
    base = write_base(tmp_path)
    saved = train_from(base, tmp_path / "run")
    assert checkpoint.latest_resumable(str(tmp_path / "run")) == 7
    model = load_model(base, lora_config=LORA).model
    model.freeze_for_training()
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    state = checkpoint.load_resumable(str(tmp_path / "run"), 7, model)
    assert state["step"] == 7 and torch.equal(state["moments"], torch.ones(3))
    assert_same_weights(model, saved)
    assert places == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_resume_refuses_another_model(tmp_path):
    base = write_base(tmp_path)
    train_from(base, tmp_path / "run")
    run = str(tmp_path / "run")
    for model, words in ((random_model(), "does not hold the parameters"),
                         (random_model(LoRAConfig(3)), "lora_A is (4, 8)"),
                         (random_model(LORA, config=dataclasses.replace(CONFIG, n_layer=3)), "does not hold"),
                         (random_model(LORA, config=dataclasses.replace(CONFIG, n_layer=1)), "does not hold")):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        refused(lambda model=model: checkpoint.load_resumable(run, 7, model), "--resume", words)
        assert all(map(torch.equal, model.parameters(), before)), "a refused resume changed the model"
    (tmp_path / "run" / "optimizer.7.pt").write_bytes(b"torn")
    model = random_model(LORA)
    refused(lambda: checkpoint.load_resumable(run, 7, model), "--resume", "optimizer.7.pt")


def test_older_partners_go_models_stay(tmp_path):
    base = write_base(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.2.pt.99.partial").write_bytes(b"left by a kill")
    (tmp_path / "run" / "notes.partial").write_bytes(b"not ours")
    for step in (3, 6, 9):
        train_from(base, tmp_path / "run", step)
    left = ["model.3.pt", "model.6.pt", "model.9.pt", "notes.partial", "optimizer.9.pt"]
    assert sorted(os.listdir(tmp_path / "run")) == left
    assert checkpoint.latest_resumable(str(tmp_path / "run")) == 9
    assert checkpoint.latest_resumable(str(tmp_path)) is None


class Killed(BaseException):
    """Stands for SIGKILL: what is on the disk at that moment is what the next run finds."""


KILL_POINTS = ["open", "save", "fsync", "replace", "sync_folder", "unlink"]


@pytest.mark.parametrize("nth", [0, 1])
@pytest.mark.parametrize("point", KILL_POINTS)
def test_killed_at_any_point_a_whole_pair_remains(point, nth, tmp_path, monkeypatch):
    """Each point of writing the pair of step 10 after that of step 9; the nth time it is met, the process is gone."""
    base, run = write_base(tmp_path), tmp_path / "run"
    old = train_from(base, run, 9, seed=9)
    met, snapshot = [], tmp_path / "snapshot"

    def deadly(real, before: bool):
        def call(*arguments, **options):
            met.append(point)
            if len(met) == nth + 1:
                if not before:
                    result = real(*arguments, **options)
                    del result
                shutil.copytree(run, snapshot)  # the clean-up of a living process must not count
                raise Killed
            return real(*arguments, **options)
        return call

    owner = {"open": "builtins", "save": "torch", "fsync": "os", "replace": "os", "sync_folder": "base.files",
             "unlink": "os"}
    module = importlib.import_module(owner[point])
    monkeypatch.setattr(module, point, deadly(getattr(module, point), before=point != "save"))
    try:
        model = load_model(base, lora_config=LORA)
        model.model.freeze_for_training()
        met.clear()
        save_checkpoint(str(run), 10, model.model, model.base, {"step": 10})
    except Killed:
        pass
    monkeypatch.undo()
    if not snapshot.exists():
        assert point == "unlink" and nth == 1  # there is but one old partner
        return
    step = checkpoint.latest_resumable(str(snapshot))
    assert step in (9, 10)
    for left in checkpoint.numbered_checkpoints(str(snapshot)):
        torch.load(left[1], weights_only=True)
    fresh = load_model(base, lora_config=LORA).model
    fresh.freeze_for_training()
    state = checkpoint.load_resumable(str(snapshot), step, fresh)
    assert state["step"] == step, "the partners are of different steps"
    if step == 9:
        assert_same_weights(fresh, old)
    # the next save makes the folder clean again
    save_checkpoint(str(snapshot), 11, fresh, load_model(base).base, {"step": 11})
    assert [name for name in sorted(os.listdir(snapshot)) if not name.startswith("model.") or "partial" in name] == \
        ["optimizer.11.pt"]


def test_a_real_kill_between_the_two_writes(tmp_path):
    base, run = write_base(tmp_path), tmp_path / "run"
    train_from(base, run, 9)
    program = (f"import sys, os, signal\nsys.path.insert(0, {str(ROOT / 'src')!r})\nfrom weights import checkpoint\n"
               "loaded = checkpoint.load_model(sys.argv[1])\nreal, count = os.replace, []\n"
               "def replace(*names):\n"
               "    count.append(1)\n"
               "    os.kill(os.getpid(), signal.SIGKILL) if len(count) == 2 else real(*names)\n"
               "os.replace = replace\n"
               "checkpoint.save_checkpoint(sys.argv[1], 10, loaded.model, loaded.base, {'step': 10})\n")
    done = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (run / "optimizer.10.pt").exists() and not (run / "model.10.pt").exists()
    assert checkpoint.latest_resumable(str(run)) == 9
    assert load_model(str(run)).step == 9


def test_a_full_disk_leaves_the_last_pair_and_names_the_file(tmp_path):
    """A limit on the size of files stands for the full disk: the write fails half-way, at several sizes."""
    base, run = write_base(tmp_path), tmp_path / "run"
    train_from(base, run, 9)
    loaded = load_model(str(run))
    loaded.model.freeze_for_training()
    before = sorted(os.listdir(run))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (0, 100, 1000, 3000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(OSError) as caught:
                save_checkpoint(str(run), 10, loaded.model, loaded.base, {"m": torch.ones(2000)})
            assert caught.value.filename and "10.pt" in caught.value.filename
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert sorted(os.listdir(run)) == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_model(str(run)).step == 9 and checkpoint.latest_resumable(str(run)) == 9
