"""The arithmetic of training, audit and beam search on a device that is not the CPU
(tests/helpers/other_device.py), without a GPU.

Values are not computed here: they are held by the CPU's tests. What is held: no tensor of the CPU meets one of the
device, nothing is read from the device but at the places of base.device.PLACES, a training step reads once and waits
for no copy, and the noise is drawn on the device by the run's own generator.
"""

import fcntl
import json
import re
import signal
import sys

import pytest
import torch

import gpt2_beam
import gpt2_ft
import privacy_audit
from base import distributed
from base.device import PLACES, read_back, upload
from base.distributed import World
from helpers import author_runs, small_runs
from helpers.other_device import DEVICE, other_device
from llama import LlamaLMModel
from model import MODEL_CARDS, GPT2LMModel, LoRAConfig
from optimizer import AdamW, FlatParameters
from privacy import accounting, attack_risk
from privacy.clipping import BookKeeping, ClippingRule
from privacy.company import probe_batch
from privacy.ledger import Ledger
from privacy.randomness import NoiseSource
from privacy.unit_gradients import unless_all
from run.loop import Trainer

LLAMA = {"model_type": "llama", "vocab_size": small_runs.VOCABULARY, "hidden_size": 16, "intermediate_size": 20,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48,
         "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "eos_token_id": 2, "hidden_act": "silu"}


LEDGERS: list[Ledger] = []


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama in Hugging Face's layout."""
    import safetensors.torch
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    weights = LlamaLMModel(LlamaLMModel.read_config(LLAMA)).state_dict()
    names = {name: name.replace("transformer.", "model.", 1) for name in weights}
    safetensors.torch.save_file({names[name]: value.clone() for name, value in weights.items()},
                                folder / "model.safetensors")
    return folder


@pytest.fixture
def device(monkeypatch):
    """The other device, on which the scripts then run; what epsilon costs to compute is left out."""
    small_runs.material(), author_runs.material()
    monkeypatch.setattr(accounting, "epsilon_prv", lambda *_: 1.0)
    monkeypatch.setattr(accounting, "epsilon_rdp", lambda *_: 1.0)
    monkeypatch.setattr(attack_risk, "figures", lambda *_: {})
    monkeypatch.setattr(distributed, "start", lambda *_, **__: World(device=DEVICE))
    monkeypatch.setattr(gpt2_beam, "start", lambda *_, **__: World(device=DEVICE))
    opened = Ledger.__init__
    monkeypatch.setattr(Ledger, "__init__", lambda self, *given: LEDGERS.append(self) or opened(self, *given))
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with other_device(monkeypatch) as mode:
        yield mode
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def steps(device, monkeypatch):
    """A list that gets what crossed between the CPU and the device in each training step."""
    found: list[list[tuple[str, str]]] = []
    real = Trainer.step

    def step(self, drawn):
        before = len(device.events)
        try:
            return real(self, drawn)
        finally:
            found.append(device.events[before:])

    monkeypatch.setattr(Trainer, "step", step)
    return found


def run(monkeypatch, main, arguments: list) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    assert main() in (0, None)
    while LEDGERS:
        fcntl.flock(LEDGERS.pop().handle, fcntl.LOCK_UN)  # as at the end of a process


FULL = {"lora_dim": 0, "lora_dropout": 0}
QUICK = {"micro_batch_tokens": 100, "seq_len": 16, "max_step": 1, "log_interval": 1, "save_interval": 1}
ORDINARY = {"noise_multiplier": 0, "noise_source": None, "noise_seed": None}
TRAININGS = {  # name -> flags of gpt2_ft.py
    "lora": {},
    "lora bf16, secure": {"bf16": True, "noise_source": "secure", "noise_seed": None, "label_smooth": 0.1},
    "full per_layer, os": {**FULL, "clipping": "per_layer", "noise_source": "os", "noise_seed": None},
    "full automatic bf16": {**FULL, "clipping": "automatic", "bf16": True, "clip": 1.0, "sampling": "allocation"},
    "opacus lora bf16": {"grad_engine": "opacus", "bf16": True},
    "opacus full per_layer": {**FULL, "grad_engine": "opacus", "clipping": "per_layer", "no_decay_bias": True},
    "ordinary full bf16": {**FULL, **ORDINARY, "bf16": True},
    "ordinary lora": {**ORDINARY, "sampling": "shuffle"},
    "llama lora bf16": {"llama": True, "bf16": True, "lora_target": "all"},
    "llama full per_layer": {"llama": True, **FULL, "clipping": "per_layer"},
    "llama opacus": {"llama": True, "grad_engine": "opacus"},
    "full recompute": {**FULL, "recompute": True},
}


SHORT = ("lora", "full automatic bf16", "llama lora bf16")


@pytest.mark.parametrize("name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow)
                                  for name in TRAININGS])
def test_training_for_examples(device, steps, monkeypatch, tmp_path, llama, name):
    """A step, its evaluation and its checkpoint, and one more after --resume: a step reads once, at its end."""
    changed, resumed = {**QUICK, **TRAININGS[name]}, name == "lora"
    if changed.pop("llama", False):
        changed |= {"model_card": llama, "init_checkpoint": llama}
    run(monkeypatch, gpt2_ft.main, small_runs.flags(tmp_path, **changed))
    if resumed:
        run(monkeypatch, gpt2_ft.main, [*small_runs.flags(tmp_path, **{**changed, "max_step": 2}), "--resume",
                                        "--resume_changed", "max_step", "steps"])
    check_steps(device, steps, 1 + resumed, "ordinary" not in name, "secure" in name, "recompute" in name)
    assert {"evaluation", "checkpoint"} <= set(device.of("read"))


def check_steps(device, steps, count: int, private=True, secure=False, recompute=False) -> None:
    assert len(steps) == count
    for events in steps:
        reads = [place for kind, place in events if kind == "read"]
        assert [place for place in reads if place != "recompute"] == ["step"] and ("recompute" in reads) == recompute
        assert events[-1] == ("read", "step"), events
        assert not [what for kind, what in events if kind == "blocking"], events
        # Gaussian noise comes from the run's own generator on the device, or is made of the CPU's words
        drawn = {what for kind, what in events if kind == "random"}
        assert ("normal_ by a generator" in drawn) == (private and not secure), drawn
        assert drawn <= {"normal_ by a generator", "bernoulli_", "native_dropout", "rand_like"}, drawn
    assert all(where.type == DEVICE.type for where in device.generators)
    assert bool(device.generators) == (not secure)


@pytest.mark.parametrize("changed", [
    {"samples_per_author": 2, "bf16": True},
    *(pytest.param(changed, marks=pytest.mark.slow) for changed in (
        {"enable_lora": None, "lora_dim": None, "lora_dropout": None, "clipping": "per_layer"},
        {"grad_engine": "opacus", "samples_per_author": 2},
        {"disable_dp": True, "noise_multiplier": None, "noise_source": None, "noise_seed": None})),
], ids=lambda changed: " ".join(changed))
def test_training_for_authors(device, steps, monkeypatch, tmp_path, changed):
    changed = {"micro_batch_tokens": 100, "logging_steps": 1, "eval_strategy": "steps", "max_steps": 1,
               **changed}
    run(monkeypatch, author_runs.script().main, author_runs.flags(tmp_path, **changed))
    check_steps(device, steps, 1, private="disable_dp" not in changed)
    assert {"evaluation", "checkpoint"} <= set(device.of("read"))


@pytest.mark.slow
@pytest.mark.parametrize("changed", [
    {"canary_kind": "gradient"}, {"canary_kind": "text"}, {"canary_kind": "text", "lora_dim": 2}], ids=str)
def test_an_audit(device, monkeypatch, tmp_path, changed):
    folder = small_runs.material()
    flags = {"train_data": folder / "train.jsonl", "model_card": folder / "tiny", "init_checkpoint": folder / "tiny",
             "seq_len": 32, "canaries": 100, "train_batch_size": 20, "noise_multiplier": 1.5, "max_step": 1,
             "guesses": 10, "work_dir": tmp_path, **changed}
    monkeypatch.setattr(privacy_audit, "audit", lambda *_, **__: {})
    monkeypatch.setattr(privacy_audit, "write_results", lambda *_: 0)
    run(monkeypatch, privacy_audit.main, [word for name, value in flags.items() for word in (f"--{name}", value)])
    assert "canaries" in device.of("read")


@pytest.mark.parametrize("family, more", [
    ("gpt2", ["--repetition_penalty", 1.2, "--min_length", 2, "--bf16"]),
    pytest.param("gpt2", ["--no_repeat_ngram_size", 2], marks=pytest.mark.slow),
    pytest.param("llama", ["--length_penalty", 0.8], marks=pytest.mark.slow)],
    ids=lambda value: str(value).replace("--", ""))
def test_beam_search(device, monkeypatch, tmp_path, llama, family, more):
    """A read a token for all contexts, and one more where the cache is full."""
    folder = small_runs.material()
    model = llama if family == "llama" else folder / "tiny"
    run(monkeypatch, gpt2_beam.main, ["--data", folder / "valid.jsonl", "--seq_len", 32, "--eval_len", 6, "--beam", 2,
                                      "--work_dir", tmp_path, "--init_checkpoint", model, "--model_card", model,
                                      "--eos_token_id", 2, "--output_file", "out.jsonl", *more])
    assert (tmp_path / "out.jsonl").exists()
    reads = device.of("read")
    assert set(reads) <= {"barrier", "beams", "beam room"} and reads.count("beams") == 6


# ------------------------------------------------------------------ the device itself


def test_what_the_device_refuses(device):
    """Each mistake that the other tests look for is one here: a control of the whole file."""
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(AssertionError, match="CPU among the device's"):
        x + torch.ones(3)
    for read in (lambda: x.sum().item(), lambda: bool((x > 0).all()), lambda: x[x > 0], lambda: x.nonzero(),
                 lambda: x.tolist(), lambda: x.cpu(), lambda: torch.empty(3).copy_(x),
                 lambda: torch.arange(3, device=DEVICE).repeat_interleave(torch.ones(3, dtype=int, device=DEVICE))):
        with pytest.raises((AssertionError, RuntimeError, torch._subclasses.fake_tensor.DataDependentOutputException,
                            torch._subclasses.fake_tensor.DynamicOutputShapeException)):
            read()
    assert not device.events
    assert read_back("step", x).tolist() == [0, 0, 0] and upload(torch.ones(2), DEVICE).device == DEVICE
    torch.ones(2).to(DEVICE)
    x.normal_()
    assert device.events == [("read", "step"), ("upload", "(2,)"), ("blocking", "(2,)"), ("random", "normal_")]
    with pytest.raises(ValueError, match="list of places"):
        read_back("nowhere", x)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = torch.nn.functional.linear(torch.ones(2, 3, device=DEVICE), torch.ones(4, 3, device=DEVICE))
        assert y.dtype == torch.bfloat16 and y.softmax(1).dtype == torch.float32


def test_each_place_is_one_in_the_code():
    """PLACES has no entry that nothing reads, and no read goes by another way."""
    text = "\n".join(path.read_text() for path in sorted((small_runs.ROOT / "src").rglob("*.py")))
    assert set(re.findall(r'read_back\(\s*"([a-z ]+)",', text)) == set(PLACES)
    assert not re.findall(r"(?m)^(?!\s*#).*\.cpu\(\)", text)


def test_units_that_are_not_finite_are_masked(device):
    """Also where nobody may ask if there is one."""
    finite = torch.ones(3, dtype=bool, device=DEVICE)
    assert unless_all(finite) is finite and unless_all(torch.ones(3, dtype=bool)) is None


def test_noise_refuses_another_device(device):
    """A source for the CPU adds nothing on the device, nor the other way round."""
    for own, other in ((DEVICE, torch.device("cpu")), (torch.device("cpu"), DEVICE)):
        with pytest.raises(ValueError, match="expected a vector of floats"):
            NoiseSource("os", "noise", device=own).add_normal_(torch.zeros(3, device=other), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_memory_of_gpt2_xl(device, rank):
    """One step of the true size on 16 texts of 64 tokens in bf16: bytes by phase, against the count of the tensors.

    Of P parameters float32, of n trained: parameters 4P (of which the flat buffer is the trained part), sums 8n,
    moments 8n. A micro-batch adds notes: of each trained product its input and the gradient at its output. The update
    adds the released gradient, 4n, and the second moment's root, 4n, and takes nothing else of that size.
    """
    config, texts, T = MODEL_CARDS["gpt2.xl"], 16, 64
    device.counting = True
    with torch.device(DEVICE):
        model = GPT2LMModel(config, LoRAConfig(rank, 32))
    model.freeze_for_training()
    P = sum(parameter.numel() for parameter in model.parameters())
    flat = FlatParameters(model, extra=5)
    optimizer, n = AdamW(flat, (0.9, 0.98), 1e-6, 0.01, True), flat.size
    assert n == (1_557_611_200 if rank == 0 else 48 * 2 * rank * (1600 + 1600))
    resident = 4 * P + 8 * n + 8 * n
    assert device.held == pytest.approx(resident, rel=0.01)
    engine = BookKeeping(model, flat, ClippingRule("flat", 1.0))
    device.forget()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        engine.accumulate(probe_batch(T, texts, config.vocab_size).to(DEVICE))
    micro_batch = device.peak - resident
    assert not device.of("read") and device.held == pytest.approx(resident, rel=0.01)
    device.forget()
    noise = NoiseSource("os", "noise", device=DEVICE)
    noise.add_normal_(flat.sums[:n], 1.0)
    grad = flat.sums[:n].div_(16).float()
    optimizer.step(grad, 1e-4)
    update = device.peak - resident
    print(f"rank {rank}: {resident / 1e9:.2f} GB resident, {micro_batch / 1e9:.2f} more for a micro-batch, "
          f"{update / 1e9:.2f} for the update")
    assert update == pytest.approx(8 * n, rel=0.05)
