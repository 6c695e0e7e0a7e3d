"""Bottleneck adapters (--adapter_dim): their place, training, checkpoints and refusals. Gradients: tests/privacy/."""

import math

import pytest
import torch

from families import family_of
from helpers import author_runs
from helpers.interrupted_runs import CHARGE, interrupted, kill
from helpers.llamas import tiny_config
from helpers.small_runs import STEPS, equal, flags, initial, material, metrics, server, start_ranks, train, weights
from language_model import is_adapter
from model import GPT2Config, LoRAConfig
from weights.checkpoint import load_model

CONFIGS = {"gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=37, n_positions=20), "llama": tiny_config()}
PLAIN = {"lora_dim": None, "lora_alpha": None, "lora_dropout": None}
ADAPTER = {**PLAIN, "adapter_dim": 3}


def built(family: str, width: int, seed: int = 0):
    torch.manual_seed(seed)
    return family_of(CONFIGS[family])(CONFIGS[family], LoRAConfig(bottleneck=width)).double().eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_new_adapter_changes_nothing_and_is_all_that_trains(family):
    """Its up-projection is zero. Of width R, two of them a block have 2 (2 R D + R + D) numbers."""
    model, plain, ids = built(family, 3), built(family, 0), torch.randint(0, 30, (2, 9))
    own = dict(model.named_parameters())
    for name, value in plain.named_parameters():
        value.data.copy_(own[name])
    assert torch.equal(model(ids), plain(ids))
    model.freeze_for_training()
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    D, blocks = model.embedding.weight.shape[1], len(model.transformer.blocks)
    assert trained == own.keys() - dict(plain.named_parameters()).keys() == set(filter(is_adapter, own))
    assert sum(own[name].numel() for name in trained) == blocks * 2 * (2 * 3 * D + 3 + D)
    assert all(own[name].any() == name.endswith("down.weight") for name in trained)


@pytest.mark.parametrize("family", CONFIGS)
def test_it_stands_behind_each_sublayer_before_the_sum(family):
    """A block written out, with the adapter by its formula (Houlsby et al., 2019): x + W_up gelu(W_down x + b) + b."""
    model = built(family, 3)
    for name, value in model.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(value, 0, 0.5)
    block = model.transformer.blocks[0]
    x, y = torch.randn(2, 5, 16).double(), torch.randn(2, 5, block_width(block)).double()

    def adapter(module, x):
        hidden = x @ module.down.weight.T + module.down.bias
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        return x + hidden @ module.up.weight.T + module.up.bias

    attention, norm = (block.attn.c_proj, block.ln_2) if family == "gpt2" else (
        block.self_attn.o_proj, block.post_attention_layernorm)
    middle = x + adapter(block.adapter_attn, attention(y))
    expected = middle + adapter(block.adapter_mlp, block.mlp(norm(middle)))
    torch.testing.assert_close(block.finish(x, y), expected, rtol=1e-12, atol=1e-12)


def block_width(block) -> int:
    """H W, what attention gives."""
    layer = block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj
    return layer.weight.shape[0 if hasattr(block, "attn") else 1]


def test_a_run_saves_them_alone_and_is_resumed_to_the_bit(tmp_path):
    work, other = tmp_path / "run", tmp_path / "other"
    train(flags(work, **ADAPTER, average="ema:0.5"))
    interrupted(other, 1, {0: [kill(CHARGE, "before", 4)]}, **ADAPTER)
    train(flags(other, resume=True, **ADAPTER))
    assert equal(weights(work), weights(other)) and all(map(is_adapter, weights(work)))
    loaded = load_model(str(work))
    assert loaded.model.lora_config.bottleneck == 3 and loaded.base["absolute"].endswith("tiny/model.safetensors")
    held, base = dict(loaded.model.named_parameters()), initial()
    assert all(torch.equal(held[name], base[name]) for name in base)
    assert all(torch.equal(held[name], value) for name, value in weights(work).items())
    assert any(value.any() for name, value in weights(work).items() if name.endswith("up.weight"))  # it learned
    # used where it lies: trained further, searched with
    train(flags(tmp_path / "further", **{**ADAPTER, "init_checkpoint": work, "max_step": 1}))
    search = ["--data", material() / "valid.jsonl", "--init_checkpoint", work / f"average.{STEPS}.pt", "--seq_len", 40,
              "--eval_len", 4, "--work_dir", tmp_path, "--output_file", "out.jsonl", "--eos_token_id", 5]
    done = server().start("src/gpt2_beam.py", search)
    assert done.wait() == 0 and len((tmp_path / "out.jsonl").read_text().splitlines()) > 0, done.stderr
    for given, words in [
        ({"adapter_dim": 4}, "--adapter_dim 4: "), ({"lora_dim": 2}, "--adapter_dim 0: "), ({}, "--adapter_dim 0: ")]:
        rank, = start_ranks(flags(tmp_path / "x", **{**PLAIN, **given, "init_checkpoint": work}))
        assert rank.wait() == 2 and words in rank.error and "bottleneck adapters of width 3" in rank.error
    for form in ("merged", "peft"):
        given = ["--init_checkpoint", work, "--output", tmp_path / "e", "--format", form]
        done = server().start("src/export.py", given)
        assert done.wait() == 2 and "bottleneck adapters (--adapter_dim), which cannot be merged" in done.error


def test_one_kind_of_adapter(tmp_path):
    rank, = start_ranks(flags(tmp_path / "x", adapter_dim=3))
    assert rank.wait() == 2 and "--adapter_dim 3: refused with --lora_dim 2" in rank.error
    train(flags(tmp_path / "lora", max_step=1))
    rank, = start_ranks(flags(tmp_path / "x", **ADAPTER, init_checkpoint=tmp_path / "lora"))
    assert rank.wait() == 2 and "--adapter_dim 3: " in rank.error and "holds low-rank adapters" in rank.error


def test_authors_by_opacus(tmp_path):
    """The other script, the other engine: the same released gradients but for rounding."""
    losses = []
    for engine in ("book_keeping", "opacus"):
        work = tmp_path / engine
        rank, = author_runs.train(author_runs.flags(
            work, enable_lora=None, lora_dim=None, lora_dropout=None, adapter_dim=3, grad_engine=engine))
        assert "| Adapter |" in rank.stdout
        losses.append(metrics(work)[-1]["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
