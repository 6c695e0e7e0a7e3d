"""Which batch: the noise of an update at equal privacy and equal compute, for several batches (privacy_report.py)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from base.errors import fail
from privacy import accounting
from privacy.plan import Course, choose_sigma

FACTORS = (2, 4, 8, 16, 64, 256)  # of the first batch, where no others are named


@dataclass(frozen=True)
class Row:
    """A batch of `course`, with the noise multiplier that keeps the run within its target."""

    course: Course
    sigma: float

    @property
    def update(self) -> float:
        """Noise of one update in a coordinate, in units of C."""
        return self.sigma / self.course.batch

    @property
    def mean(self) -> float:
        """Noise of the mean of all updates, likewise."""
        return self.update / math.sqrt(self.course.steps)


def courses(N: int, first: int, others: Sequence[int], epochs: float, sampling: str) -> list[Course]:
    """The runs to compare, each of `epochs` epochs: of the batch `first`, and of `others` in their order, or of FACTORS
    times the first. UserError for a batch of which there is no step."""
    larger = [first * factor for factor in FACTORS if first * factor <= min(N, epochs * N)]
    found = []
    for batch in dict.fromkeys([first, *(others or larger)]):
        if not 1 <= batch <= N:
            fail(f"--batches {batch}: expected 1 to {N} units, which is all of the data")
        if (steps := round(epochs * N / batch)) < 1:
            fail(f"--batches {batch}: {epochs:g} epochs are no step of it; wanted at most {math.floor(epochs * N)}")
        found.append(Course(N, batch, steps, sampling))
    return found


def sigma_near(course: Course, delta: float, target: float, guess: float) -> float:
    """choose_sigma() for the target epsilon with half the work, where the answer is known to be near `guess`."""

    def epsilon(sigma: float) -> float:
        return accounting.epsilon_prv(course.phases(sigma), delta)

    def quick(sigma: float) -> float:
        return target * (guess / sigma) ** 3  # how epsilon falls with sigma, roughly: it decides what is tried alone

    aim = target * (1 - accounting.TOLERANCE / 2)
    sigma = accounting.smallest_sigma(epsilon, quick, target, aim, course.words)
    return sigma if epsilon(sigma) <= target else choose_sigma(course, delta, target, None)


def compare(
    found: Sequence[Course],
    delta: float,
    sigma: float | None,
    epsilon: float | None,
    advantage: float | None,
    tick: Callable[[], object],
) -> list[Row]:
    """A row for each course. One of sigma (of the first course, whose epsilon is then the target of all), epsilon and
    advantage is given. tick() is called after each."""
    rows: list[Row] = []
    growth = 1.1
    for course in found:
        if not rows and sigma is not None:
            epsilon, noise = accounting.epsilon_prv(course.phases(sigma), delta), sigma
            if not 0 < epsilon < math.inf:
                fail(f"--sigma {sigma:g}: gives epsilon {epsilon:g}, which no other batch can be compared at")
        elif not rows or epsilon is None:
            noise = choose_sigma(course, delta, epsilon, advantage)
        else:
            before = rows[-1]
            doublings = math.log2(course.batch / before.course.batch)
            noise = sigma_near(course, delta, epsilon, before.sigma * growth**doublings)
            growth = (noise / before.sigma) ** (1 / doublings)
        rows.append(Row(course, noise))
        tick()
    return rows


def lines(rows: Sequence[Row]) -> list[str]:
    """The table, and what it says."""
    first, least, calmest = rows[0], min(rows, key=lambda row: row.update), min(rows, key=lambda row: row.mean)
    found = [
        f"{'batch':>8} {'steps':>8} {'q':>11} {'sigma':>9} {'sigma/batch':>12} {'times less':>10} "
        f"{'of the mean':>12} {'times less':>10}"
    ]
    for row in rows:
        course, marks = row.course, ["  least"] * (row is least) + ["  least of the mean"] * (row is calmest)
        found.append(
            f"{course.batch:8d} {course.steps:8d} {course.batch / course.N:11.6g} {row.sigma:9.5g} {row.update:12.6g} "
            f"{first.update / row.update:10.3g} {row.mean:12.6g} {first.mean / row.mean:10.3g}" + "".join(marks)
        )
    return [
        *found,
        "sigma/batch   noise of an update in a coordinate, in units of C; of the mean: over all updates of the run, "
        "sigma/(batch sqrt(steps))",
        f"least         batch {least.course.batch}: {first.update / least.update:.3g} times less noise an update than "
        f"at batch {first.course.batch}, in {first.course.steps / least.course.steps:.3g} times fewer steps",
    ]
