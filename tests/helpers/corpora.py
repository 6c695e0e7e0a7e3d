"""Random references with outputs, and files of lines, for the scorers."""

import pathlib
import random


def write_lines(path: pathlib.Path, lines) -> pathlib.Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    return path


def random_corpus(seed: int, count: int, shortest: int) -> tuple[list[list[str]], list[str]]:
    """References (1 to 5 a segment) over few words, and as outputs a reference each with some of its words replaced."""
    generator = random.Random(seed)
    words = "the a Eagle pub is near , . £20 child-friendly it's 3.5 of café 1,000".split()

    def text(length: int) -> list[str]:
        return generator.choices(words, k=length)

    references, outputs = [], []
    for _ in range(count):
        group = [text(generator.randint(shortest, 14)) for _ in range(generator.randint(1, 5))]
        kept = generator.choice(group)
        output = [word if generator.random() < 0.85 else generator.choice(words) for word in kept]
        references.append([" ".join(reference) for reference in group])
        outputs.append(" ".join(output))
    return references, outputs
