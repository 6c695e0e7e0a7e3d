"""Prepare a token file for a training whose leaks will be measured: hold lines out, plant secrets among the others.

    python src/plant_secrets.py --data data/e2e/train.jsonl --vocab vocab --held_out 4000 --output_dir data/planted

Held-out lines are drawn at random, so that they differ from the members in nothing but the training. A secret
("canary") is a line of its own: a context of random tokens that nothing else has, and behind it random tokens, the
secret. Those of one kind are tokens that the data never use, those of the other ordinary words of the data. As many
secrets of each kind are made and not planted. Whether the model knows a secret shows in its rank among --others rivals
behind the same context (Carlini et al., 2019, arXiv:1802.08232).

Leaves in --output_dir: train.jsonl (members, then planted secrets), held_out.jsonl, candidates.jsonl (of each secret:
it, then its rivals) and contexts.jsonl (of each secret), all token files; train_texts.jsonl and held_out_texts.jsonl,
the completions as text; secrets.json.
"""

import base.early  # noqa: F401  # isort: skip  # before torch, which takes seconds

import json
import os
import re
from collections.abc import Iterable

import numpy as np

from base.errors import fail, run_main
from base.files import atomic_write
from base.flags import Parser, check_least
from corpus.examples import Examples, read_examples
from corpus.tokenizer import VOCAB_HELP, Tokenizer, load_tokenizer
from run.canaries import rare_tokens

FORMAT = 1
NEW, ORDINARY = "new tokens", "ordinary words"
CONTEXT, SECRET = 4, 5  # tokens of a secret's context and of the secret
SEEN = 10  # an ordinary word is used so often at least
WORD = r"[Ġ▁][^\W\d_]{2,}"  # a token that is a word with the space before it, as both forms of BPE spell it
LONGEST = 2**31 - 1

Line = tuple[list[int], list[int]]  # context, completion


def lines_of(examples: Examples) -> list[Line]:
    """The lines of a token file again."""
    found = []
    for start, end, first in zip(examples.starts, examples.starts[1:], examples.first_scored, strict=False):
        tokens = examples.tokens[start:end].tolist()
        found.append((tokens[:first], tokens[first:]))
    return found


def shared_end(parts: Iterable[list[int]]) -> list[int]:
    """The token with which all of `parts` end, in a list; empty where they differ."""
    ends = {part[-1] for part in parts}
    return [ends.pop()] if len(ends) == 1 else []


def kinds_of_tokens(examples: Examples, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The token ids of which the secrets of each kind are made."""
    special = {tokenizer.begin_of_text, tokenizer.end_of_text, *tokenizer.ends, *tokenizer.prefix, *tokenizer.suffix}
    rare = [token for token in rare_tokens(examples, tokenizer.vocab_size).tolist() if token not in special]
    counts = np.bincount(examples.tokens, minlength=tokenizer.vocab_size)
    words = [
        token
        for spelled, token in tokenizer.tokens().items()
        if token not in special and counts[token] >= SEEN and re.fullmatch(WORD, spelled)
    ]
    found = {NEW: np.array(rare, np.int64), ORDINARY: np.array(sorted(words), np.int64)}  # tokens() has no fixed order
    for kind, tokens in found.items():
        if len(tokens) < 2 * SECRET:
            fail(
                f"--data: has {len(tokens)} tokens for secrets of {kind}, wanted {2 * SECRET} at least; "
                "give more data, or a larger --vocab"
            )
    return found


def check_room(kinds: dict[str, np.ndarray], secrets: int, others: int) -> None:
    """UserError where the wanted contexts or rivals are more than half of those that there are: to draw different ones
    would take long, or forever."""
    for kind, tokens in kinds.items():
        n = len(tokens)
        for flag, given, most in (("secrets", secrets, n**CONTEXT // 4), ("others", others, n**SECRET // 2 - 1)):
            if given > most:
                fail(f"--{flag} {given}: the data have {n} tokens for secrets of {kind}; choose at most {most}")


def draw_secrets(
    kinds: dict[str, np.ndarray], count: int, others: int, ends: tuple[list[int], list[int]], draw: np.random.Generator
) -> list[dict]:
    """Of each kind `count` secrets that are planted and as many that are not: kind, planted, context, secret, rivals.

    ends: what every context and every completion ends with. No two contexts are equal, nor two of a secret's rivals.
    """
    found: list[dict] = []
    contexts: set[tuple[int, ...]] = set()
    for kind, tokens in kinds.items():
        for number in range(2 * count):
            context = tuple(draw.choice(tokens, CONTEXT).tolist())
            while context in contexts:
                context = tuple(draw.choice(tokens, CONTEXT).tolist())
            contexts.add(context)
            drawn: dict[tuple[int, ...], None] = {}
            while len(drawn) < others + 1:
                drawn[tuple(draw.choice(tokens, SECRET).tolist())] = None
            secret, *rivals = map(list, drawn)
            found.append(
                {
                    "kind": kind,
                    "planted": number < count,
                    "context": [*context, *ends[0]],
                    "secret": secret,
                    "end": ends[1],
                    "rivals": rivals,
                }
            )
    return found


def write_lines(path: str, lines: Iterable[dict]) -> None:
    with atomic_write(path) as out:
        out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def write_all(
    folder: str, members: list[Line], held_out: list[Line], secrets: list[dict], repeats: int, tokenizer: Tokenizer
) -> None:
    def token_line(context: list[int], completion: list[int]) -> dict:
        return {"context": context, "completion": completion}

    def whole(secret: dict) -> dict:
        return token_line(secret["context"], secret["secret"] + secret["end"])

    planted = [secret for secret in secrets if secret["planted"] for _ in range(repeats)]
    train = [token_line(*line) for line in members] + [whole(secret) for secret in planted]
    rivals = [
        token_line(secret["context"], tokens + secret["end"])
        for secret in secrets
        for tokens in (secret["secret"], *secret["rivals"])
    ]
    files = {
        "train": train,
        "held_out": [token_line(*line) for line in held_out],
        "candidates": rivals,
        "contexts": map(whole, secrets),
    }
    for name, lines in files.items():
        write_lines(os.path.join(folder, f"{name}.jsonl"), lines)
    for name in ("train", "held_out"):
        texts = (tokenizer.decode_generated(line["completion"]).strip() for line in files[name])
        write_lines(os.path.join(folder, f"{name}_texts.jsonl"), ({"text": text} for text in texts))
    described = [
        {**{key: one[key] for key in ("kind", "planted", "context", "secret")}, "text": tokenizer.decode(one["secret"])}
        for one in secrets
    ]
    content = {"format": FORMAT, "repeats": repeats, "others": len(secrets[0]["rivals"]), "secrets": described}
    with atomic_write(os.path.join(folder, "secrets.json")) as out:
        json.dump(content, out, indent=1, ensure_ascii=False)
        out.write("\n")


def main() -> None:
    parser = Parser(description="hold lines of a token file out, and plant secrets among the rest")
    parser.add_argument("--data", required=True, help="token file, as src/gpt2_encode.py writes it")
    parser.add_argument("--vocab", default="vocab", help=f"{VOCAB_HELP} (default: vocab)")
    parser.add_argument("--held_out", type=int, default=1000, help="lines that are not trained on (default 1000)")
    parser.add_argument("--secrets", type=int, default=8, help="planted secrets of each kind (default 8)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=1,
        help="lines of each planted secret (default 1); a secret of k lines is k units, which epsilon protects less",
    )
    parser.add_argument("--others", type=int, default=1023, help="rivals of each secret (default 1023: 10 bits)")
    parser.add_argument("--seed", type=int, default=0, help="of the lines and secrets that are drawn (default 0)")
    parser.add_argument("--output_dir", required=True, help="folder of the files, which is made")
    args = parser.parse_args()
    check_least(args, held_out=1, secrets=1, repeats=1, others=1, seed=0)
    if os.path.realpath(args.output_dir) == os.path.dirname(os.path.realpath(args.data)):
        fail(f"--output_dir {args.output_dir}: is the folder of --data, whose files would be replaced; name another")
    tokenizer = load_tokenizer(args.vocab)
    examples = read_examples(args.data, "--data", tokenizer.vocab_size, LONGEST)
    if args.held_out >= len(examples):
        fail(f"--held_out {args.held_out}: {args.data} has {len(examples)} lines, none would be left to train on")
    draw = np.random.default_rng(args.seed)
    lines = lines_of(examples)
    kept_out = set(draw.permutation(len(lines))[: args.held_out].tolist())
    ends = shared_end(context for context, _ in lines), shared_end(completion for _, completion in lines)
    kinds = kinds_of_tokens(examples, tokenizer)
    check_room(kinds, args.secrets, args.others)
    secrets = draw_secrets(kinds, args.secrets, args.others, ends, draw)
    members = [line for k, line in enumerate(lines) if k not in kept_out]
    os.makedirs(args.output_dir, exist_ok=True)
    write_all(args.output_dir, members, [lines[k] for k in sorted(kept_out)], secrets, args.repeats, tokenizer)
    planted = 2 * args.secrets * args.repeats
    print(f"{args.output_dir}: {len(members)} members and {planted} lines of secrets, {args.held_out} lines held out")


if __name__ == "__main__":
    run_main(main)
