"""The loss of each line of token files under a model: what membership inference and the ranks of secrets are made of.

    python src/text_losses.py --init_checkpoint trained_models/e2e --data data/planted/train.jsonl \
        data/planted/held_out.jsonl --output trained_models/e2e/losses.json

A loss is the mean over the line's completion, in nats a token, without label smoothing. The output, which depends on
the lines without any noise, is {"format": 1, "files": {NAME: {"sha256": ..., "losses": [...]}}}; NAME is the file's
without .jsonl.
"""

import base.early  # noqa: F401  # isort: skip  # before torch, which takes seconds

import json
import os

import torch

from base.distributed import start
from base.errors import fail, run_main
from base.files import atomic_write, check_place
from base.flags import Parser, check_least, check_output
from corpus.batching import TightCut
from corpus.examples import Examples, describe_cut, read_examples
from run.canaries import text_losses
from run.settings import DEFAULT_TOKENS
from weights.checkpoint import load_trained

FORMAT = 1


def read(paths: list[str], vocab_size: int, seq_len: int) -> dict[str, Examples]:
    """The files by their names. UserError where two have one, or a line has no token that is scored."""
    found: dict[str, Examples] = {}
    for path in paths:
        name = os.path.basename(path).removesuffix(".jsonl")
        if name in found:
            fail(f"--data {path}: another file is called {name}, too, by which the output tells them apart; rename one")
        found[name] = read_examples(path, "--data", vocab_size, seq_len)
        if found[name].unscored:
            fail(f"--data {path}: {describe_cut(found[name], 'given', seq_len)}; give a larger --seq_len")
    return found


def main() -> None:
    parser = Parser(description="the loss of each line of token files under a model")
    parser.add_argument("--init_checkpoint", required=True, help="a run's folder, a weight file, or a model's folder")
    parser.add_argument("--model_card", help="shape of a bare weight file, as in src/gpt2_ft.py")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="token files")
    parser.add_argument(
        "--seq_len", type=int, help="longest line in tokens; longer ones are cut (default: the model's)"
    )
    parser.add_argument("--output", required=True, help="JSON to write")
    args = parser.parse_args()
    if args.seq_len is not None:
        check_least(args, seq_len=2)
    for path in args.data:
        check_output(args.output, path, "--output")
    check_place(args.output, "--output")
    device = start("local").device
    model = load_trained(args.init_checkpoint, args.model_card, None, None, None, None).model.to(device)
    config = model.config
    seq_len = args.seq_len or config.n_positions
    if seq_len > config.n_positions:
        fail(f"--seq_len {seq_len}: {config.limit}; choose at most {config.n_positions}")
    files = read(args.data, config.vocab_size, seq_len)
    cut, content = TightCut(DEFAULT_TOKENS[device.type]), {}
    for name, examples in files.items():
        if words := describe_cut(examples, f"{name}'s", seq_len):
            print(words)
        with torch.inference_mode():
            losses = text_losses(model, examples, device, cut)
        content[name] = {"sha256": examples.sha256, "losses": losses.tolist()}
        print(f"{name}: {len(losses)} lines, mean loss {losses.mean():.4f}")
    with atomic_write(args.output) as out:
        json.dump({"format": FORMAT, "files": content}, out)
        out.write("\n")


if __name__ == "__main__":
    run_main(main)
