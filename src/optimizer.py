"""Parameters, gradients and AdamW over flat buffers: a handful of large calls a step, whatever the number of tensors.

Shapes: P trainable coordinates; n = P, or with the optimizer in shares P/ranks rounded up, this rank's share.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from base.device import read_back
from base.distributed import World

# On a CPU the update walks the buffers in pieces that stay in the cache, so that memory is read once and not six times.
CACHE_CHUNK = 1 << 17


class FlatParameters:
    """A model's trainable parameters, moved into one buffer `data` (P,) of which they become views; those that decay
    come first. `grad` (P,) is the front of `sums` (P + extra,), so that one all-reduce carries both. Parameters are
    float32 (or float64, where a test compares with an oracle); other types are refused. `sums` is float64: what
    rounding does to the sum over units is then negligible for any data (privacy.clipping.rounding_share). Non-private
    training takes float32, as autograd adds.

    sharers: the ranks among which the optimizer's work and moments are shared out, each its own n coordinates (the
    ZeRO-1 of Rajbhandari et al., 2020, arXiv:1910.02054); alone, every rank does and holds all of it. Both buffers are
    then padded with zeros to a multiple of the number of ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        extra: int = 0,
        no_decay_bias: bool = False,
        sums: torch.dtype = torch.float64,
        sharers: World | None = None,
    ):
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not named:
            raise ValueError("the model has no trainable parameter")
        for name, parameter in named:
            if parameter.dtype not in (torch.float32, torch.float64) or parameter.dtype != named[0][1].dtype:
                raise ValueError(f"{name} is {parameter.dtype}: trainable parameters must be float32, all of them")
        undecayed = {name for name, parameter in named if no_decay_bias and parameter.dim() < 2}
        self.named = sorted(named, key=lambda item: item[0] in undecayed)
        self.decayed = sum(parameter.numel() for name, parameter in self.named if name not in undecayed)
        self.size = sum(parameter.numel() for _, parameter in self.named)
        self.sharers = sharers or World()
        n = self.sharers.share_length(self.size)
        self.own = slice(n * self.sharers.rank, n * (self.sharers.rank + 1))
        self.padded = torch.zeros(n * self.sharers.size, device=named[0][1].device, dtype=named[0][1].dtype)
        self.data = self.padded[: self.size]
        self.sums = torch.zeros(len(self.padded) + extra, device=self.data.device, dtype=sums)
        self.grad = self.sums[: self.size]
        self.slices: dict[int, slice] = {}
        start = 0
        for _, parameter in self.named:
            span = slice(start, start + parameter.numel())
            self.data[span] = parameter.detach().flatten()
            parameter.data = self.data[span].view_as(parameter)
            self.slices[id(parameter)] = span
            start = span.stop

    @property
    def extra(self) -> Tensor:
        """The tail of `sums`: what else a step sums over the ranks."""
        return self.sums[len(self.padded) :]

    @property
    def sharded(self) -> bool:
        return self.sharers.size > 1

    def grad_of(self, parameter: nn.Parameter | None) -> Tensor | None:
        """The view of `grad` that belongs to a parameter, in its shape; None for one that is not trained."""
        span = self.slices.get(id(parameter))
        return None if span is None else self.grad[span].view_as(parameter)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, autograd computes no gradient for the parameters."""
        for _, parameter in self.named:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for _, parameter in self.named:
                parameter.requires_grad_(True)


def norm(values: Tensor, sharers: World | None = None) -> Tensor:
    """Euclidean norm of values (n,), a float64 scalar; of all ranks' shares where there are sharers.

    In pieces, since on a CPU torch's norm of 124 M float32 at once came out 1.3 % wrong.
    """
    chunks = values.split(CACHE_CHUNK if values.device.type == "cpu" else len(values))
    whole = torch.stack([torch.linalg.vector_norm(chunk) for chunk in chunks]).double().norm()
    return whole if sharers is None or sharers.size == 1 else sharers.all_reduce(whole.square()).sqrt()


class AdamW:
    """AdamW as in the published code: eps stands beside the uncorrected sqrt(v), the decay comes after the update.

        m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2
        p -= lr sqrt(1-b2^t)/(1-b1^t) m / (sqrt(v) + eps)     (without correct_bias: p -= lr m / (sqrt(v) + eps))
        p -= lr wd p

    torch_eps: eps stands beside the corrected root, sqrt(v/(1-b2^t)), as in torch.optim.AdamW.
    """

    def __init__(
        self,
        flat: FlatParameters,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        correct_bias: bool,
        torch_eps: bool = False,
    ):
        self.flat, self.betas, self.eps = flat, betas, eps
        self.weight_decay, self.correct_bias, self.torch_eps = weight_decay, correct_bias, torch_eps
        self.steps = 0
        self.m, self.v = torch.zeros_like(flat.padded[flat.own]), torch.zeros_like(flat.padded[flat.own])

    @torch.no_grad()
    def step(self, grad: Tensor, lr: float) -> None:
        """Update the parameters with the gradient (n,) of this rank's share. Collective where there are sharers."""
        self.steps += 1
        b1, b2 = self.betas
        size, eps = lr, self.eps
        if self.correct_bias:
            size *= math.sqrt(1 - b2**self.steps) / (1 - b1**self.steps)
        if self.torch_eps:
            eps *= math.sqrt(1 - b2**self.steps)
        own, decayed = self.flat.padded[self.flat.own], self.flat.decayed - self.flat.own.start
        chunk = CACHE_CHUNK if grad.device.type == "cpu" else len(grad)
        for start in range(0, len(grad), chunk):
            span = slice(start, min(start + chunk, len(grad)))
            p, g, m, v = own[span], grad[span], self.m[span], self.v[span]
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            p.addcdiv_(m, v.sqrt().add_(eps), value=-size)
            if self.weight_decay and start < decayed:
                p[: decayed - start].mul_(1 - lr * self.weight_decay)
        self.flat.sharers.all_gather(self.flat.padded)

    def state_dict(self) -> dict:
        """The state of all coordinates, m and v (P,), on the CPU. Collective where there are sharers; ranks beside
        rank 0 then have None for them."""
        state: dict = {"steps": self.steps}
        for name in ("m", "v"):
            whole = self.flat.sharers.gather_tensor(getattr(self, name))
            state[name] = None if whole is None else read_back("checkpoint", whole[: self.flat.size])
        return state

    def load_state_dict(self, state: dict) -> None:
        """Take this rank's share of a state_dict(), whatever the shares were that it was gathered from."""
        for name in ("m", "v"):
            if state[name].shape != self.flat.data.shape:
                raise ValueError(
                    f"optimizer state {name} has {state[name].numel()} coordinates, the run has {self.flat.size}"
                )
            own = state[name][self.flat.own]
            getattr(self, name)[: len(own)] = own
        self.steps = int(state["steps"])


SCHEDULES = ("cosine", "inv_sqrt", "dev_perf", "constant", "linear", "cycle")


def schedule(
    name: str, lr: float, max_step: int, warmup: int = 0, points: Sequence[tuple[int, float]] = ()
) -> Callable[[int], float]:
    """The learning rate of logical step t, counted from 0, as a function of t.

    All but cycle begin with a linear warm-up lr t/warmup, then
      constant, dev_perf  lr (the published code gives dev_perf no schedule of its own)
      linear              lr (max_step - t)/(max_step - warmup), down to 0
      cosine              lr (1 + cos(pi t/max_step))/2
      inv_sqrt            lr sqrt(warmup/t)
    cycle is linear between the points (step, rate), the last rate kept.
    """

    def cycle(t: int) -> float:
        for (left, start), (right, stop) in pairwise(points):
            if left <= t < right:
                return start + (stop - start) * (t - left) / (right - left)
        return points[0][1] if t < points[0][0] else points[-1][1]

    after_warmup = {
        "constant": lambda t: lr,
        "dev_perf": lambda t: lr,
        "linear": lambda t: lr * max(0.0, (max_step - t) / max(1, max_step - warmup)),
        "cosine": lambda t: lr * (1 + math.cos(math.pi * min(t, max_step) / max_step)) / 2,
        "inv_sqrt": lambda t: lr * math.sqrt(max(1, warmup) / max(1, t)),
    }
    if name == "cycle":
        return cycle
    return lambda t: lr * t / warmup if t < warmup else after_warmup[name](t)


HUGGING_FACE_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")


def hugging_face_schedule(name: str, lr: float, steps: int, warmup: int = 0) -> Callable[[int], float]:
    """The learning rate as Hugging Face's Trainer has it: as schedule(), but that cosine falls to 0 over what the
    warm-up leaves, and inverse_sqrt without warm-up has a time scale of 10,000 steps."""
    if name == "cosine":
        rising, falling = schedule("constant", lr, steps, warmup), schedule("cosine", lr, max(1, steps - warmup))
        return lambda t: rising(t) if t < warmup else falling(t - warmup)
    if name == "inverse_sqrt":
        scale = warmup or 10_000
        return lambda t: lr * t / warmup if t < warmup else lr * math.sqrt(scale / (t + scale - warmup))
    return schedule("constant" if name == "constant_with_warmup" else name, lr, steps, warmup)
