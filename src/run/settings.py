"""The flags of the training scripts: each once, with its range, its help, and whether a resumed run may differ in it.

A script lists the classes whose flags it takes, and may rename some of them (base.flags.spelled). The rest of a run
reads objects of the classes. args.json holds the flags by the names that the script gives them.
"""

import importlib.util
import math
from dataclasses import dataclass, replace
from typing import Any

from averages import read_rule
from base.errors import fail
from base.flags import REQUIRED, Given, flag
from families import PARTS
from language_model import EVERY_PART, LoRAConfig
from model import MODEL_CARDS
from optimizer import SCHEDULES
from privacy.clipping import CLIPPING_RULES
from privacy.ledger import LABEL_COUNTS, NAMES

# Padded tokens of a micro-batch where --micro_batch_tokens is not given: see scripts/benchmarks/benchmark_training.py.
DEFAULT_TOKENS = {"cpu": 2048, "cuda": 16384}
DEFAULT_DELTA = 1e-5  # where the unit is an example; for authors it is 1/N
MOST_EPOCHS = 1e6  # a larger number is a typing error
MOST_STEPS = 10**9  # likewise: 11 days at a millisecond each
# C. Gradients and the squares of their coordinates are float32, whose normal numbers lie between 2^-126 and 2^128;
# smaller ones lose their digits, and some kernels flush them to 0. A unit's squared norm must be right to 2^-20 of
# itself where it is about C^2.
#   Least: the squares of 2^31 coordinates lose up to 2^-95, and per_layer shares C^2 out among up to 2^10 parameters:
#   C = 2^-20 has a margin of 2^25. (Gram matrices are float64 and lose nothing.)
#   Most: the square of the sum of 2^31 units of norm C is below 2^127 where C is below 2^32.
CLIP_RANGE = (1e-6, 1e8)
# sigma C, the standard deviation of the noise.
#   Least: where it is above 2^-102, draws down to 2^-24 of it are normal numbers.
#   Most: where it is below 2^48, its square summed over 2^31 coordinates (the norm of a released gradient) is below
#   2^127. The largest C times the largest sigma that --target_epsilon chooses is below it.
NOISE_RANGE = (1e-30, 1.1e14)
ANY = (0, math.inf)
BASE_DTYPES = ("float32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """The token files of gpt2_ft.py."""

    train_data: str = flag(REQUIRED, "token file of the training examples", may_change=True)
    valid_data: str = flag(
        REQUIRED, "token file of the validation examples, which are not protected at all", may_change=True
    )
    seq_len: int = flag(512, "longest example in tokens; longer ones are cut", least=2)
    obj: str = flag("clm", "score the completion (clm), or context and completion (jlm)", choices=("clm", "jlm"))


@dataclass(frozen=True, kw_only=True)
class Model:
    """The initial weights of a run, and the adapter that it trains."""

    init_checkpoint: str | None = flag(
        help="weights to start from: a file, such as an average.{step}.pt, or a folder (its newest model.{step}.pt, "
        "PEFT's or Hugging Face's file)"
    )
    base_checkpoint: str | None = flag(
        help="the frozen weights of an adapter-only --init_checkpoint (default: those that it names)"
    )
    model_card: str | None = flag(
        "gpt2.md",
        f"{', '.join(MODEL_CARDS)}, or a folder or file in Hugging Face's layout (default: the shape that "
        "--init_checkpoint comes with, or gpt2.md)",
    )
    lora_dim: int = flag(0, "rank of the adapters; 0 trains the whole model", least=0)
    lora_alpha: float = flag(128, positive=math.inf)
    lora_dropout: float = flag(0.0, within=(0, 1))
    lora_target: tuple[str, ...] = flag(
        ("query", "value"),
        "parts of each block that get an adapter (default query value, which are also called q and v): query key value "
        "attn_out mlp_in mlp_out of a GPT-2, q k v o gate up down of a Llama, or all",
        nargs="+",
        choices=(*PARTS, EVERY_PART),
    )
    use_rslora: bool = flag(False, "scale adapters by alpha/sqrt(rank) in place of alpha/rank")
    base_dtype: str | None = flag(
        help="how the frozen matrices under adapters are held: float32, or bf16, rounded to bfloat16 in half the "
        "memory (default: bf16 on a GPU, float32 on a CPU and without adapters); products are those of --bf16 or "
        "float32, either way",
        choices=BASE_DTYPES,
    )

    adapter_dim: int = flag(
        0,
        "inner width of bottleneck adapters after each attention and MLP (Houlsby et al., 2019), in place of low-rank "
        "ones; they cannot be merged into the weights",
        least=0,
    )

    def lora_config(self) -> LoRAConfig:
        return LoRAConfig(
            self.lora_dim, self.lora_alpha, self.lora_dropout, self.lora_target, self.use_rslora, self.adapter_dim
        )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The loss, AdamW, its learning rate, the bound on a released gradient, and the average of iterates."""

    lr: float = flag(1e-5, within=ANY)
    weight_decay: float = flag(0.01, within=ANY)
    correct_bias: bool = flag(False, "Adam's bias corrections")
    adam_epsilon: float = flag(1e-6, names=("adam_epislon", "adam_epsilon"), within=ANY)
    adam_beta1: float = flag(0.9, within=(0, 1))
    adam_beta2: float = flag(0.98, within=(0, 1))
    no_decay_bias: bool = flag(False, "no weight decay on biases and layer norms")
    scheduler: str = flag("linear", choices=SCHEDULES)
    warmup_step: int = flag(0, least=0)
    i_steps: str = flag("0", "cycle: steps, separated by commas")
    i_lrs: str = flag("0.00025", "cycle: learning rates at those steps")
    clip: float = flag(0.0, "bound on the norm of the released gradient; 0 = none", within=ANY)
    label_smooth: float = flag(0.0, within=(0, 1))
    average: str | None = flag(
        help="also keep an average of the iterates, which costs no privacy: ema:0.99 (exponential, debiased) or "
        "tail:0.3 (of the last 0.3 of the planned steps); it is evaluated beside the last iterate, and saved as "
        "average.{step}.pt beside model.{step}.pt, to be used by naming that file",
        metavar="RULE",
    )
    torch_eps: bool = False  # no flag: whether AdamW places eps as torch does


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """The privacy guarantee of a run, and how it is kept."""

    noise_multiplier: float | None = flag(help="sigma; 0 trains without privacy", within=ANY)
    target_epsilon: float | None = flag(
        help="budget of the run: the noise is chosen for it, and training ends before it is exceeded", positive=math.inf
    )
    target_advantage: float | None = flag(
        help="in place of --target_epsilon: the largest membership advantage, from 0 to 1, which is the true-positive "
        "less the false-positive rate of any attack"
    )
    target_delta: float | None = flag(help="delta of the reported epsilon, a public constant")
    max_grad_norm: float = flag(1.0, "C, the norm to which each {unit}'s gradient is clipped", within=CLIP_RANGE)
    sampling: str | None = flag(
        help="poisson (default with noise): every unit in each step with probability q; allocation: every unit in one "
        "step of each epoch at random, for a smaller epsilon; shuffle (default without noise): every unit once an "
        "epoch, reported without amplification",
        choices=NAMES["sampling"],
    )
    clipping: str = flag("flat", "how a unit's gradient is bounded by C (default flat)", choices=CLIPPING_RULES)
    mechanism: str = flag(
        "gaussian",
        "the noise that is added to the clipped sum (default gaussian)",
        choices=[name for name in NAMES["mechanism"] if name != LABEL_COUNTS],
    )
    noise_source: str = flag(
        "os",
        "os (default): a generator seeded by the operating system; secure: a cryptographic stream; seeded: for tests, "
        "whoever knows --noise_seed can subtract the noise",
        choices=NAMES["noise_source"],
    )
    noise_seed: int | None = flag(help="the seed of --noise_source seeded")
    budget: str | None = flag(
        help="the budget file of the training data (src/privacy_budget.py): the run reserves what it may spend before "
        "its first step, or is refused",
        metavar="FILE",
        may_change=True,
    )
    grad_engine: str = flag(
        "book_keeping",
        "how the clipped sum is computed; opacus = by Opacus's GradSampleModule and, with several processes, its "
        "DistributedDataParallel, as the paper's code does, for comparison",
        choices=("book_keeping", "opacus"),
        may_change=True,
    )


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The steps of a run, logging, evaluation, checkpoints, and the folder."""

    work_dir: str = flag("gpt2_model", "folder of everything that the run writes", may_change=True)
    train_batch_size: int = flag(8, "expected {unit}s of a process in one accumulation step", least=1)
    grad_acc: int = flag(1, "accumulation steps of a logical batch", least=1)
    max_step: int | None = flag(help="logical steps of the run", least=1)
    max_epoch: float | None = flag(
        help="expected passes over the data; the smaller of the two ends the run", positive=MOST_EPOCHS
    )
    random_seed: int = flag(10, "seeds initialisation, and dropout where there is no noise", least=0)
    bf16: bool = flag(False, "matrix products in bfloat16; norms, sums and noise stay float64", boolean=True)
    micro_batch_tokens: int | None = flag(
        help="padded tokens of a physical batch; changes nothing but speed and memory (default "
        f"{DEFAULT_TOKENS['cpu']} on CPU, {DEFAULT_TOKENS['cuda']} on a GPU)",
        least=1,
        may_change=True,
    )
    shard: str = flag(
        "none",
        "what the ranks share out among them, with the same result: optimizer = noise, AdamW's work and its moments, "
        "which saves each of them 8 bytes a trained parameter times (1 - 1/ranks), nothing where there is one, and is "
        "slower over gloo (default none)",
        choices=("none", "optimizer"),
        may_change=True,
    )
    recompute: bool = flag(
        False,
        "compute each block again in the backward pass in place of keeping what it computes: less memory, more time, "
        "the same bits",
        boolean=True,
        may_change=True,
    )
    log_interval: int = flag(100, least=1, may_change=True)
    eval_interval: int | None = flag(2000, least=1, may_change=True)
    save_interval: int = flag(500, least=1, may_change=True)
    plan_only: bool = flag(
        False, "print the run's privacy plan as a line of JSON and stop: nothing is written or drawn", may_change=True
    )
    resume: bool = flag(False, "continue the run in the work folder from its last checkpoint", may_change=True)
    resume_changed: tuple[str, ...] = flag(
        (),
        "settings in which the resumed run may differ from the folder's (world_size, lr, ...)",
        nargs="+",
        metavar="NAME",
        may_change=True,
    )
    tensorboard: bool = flag(
        False, "write event files into the work folder's tensorboard/; needs the package tensorboard", may_change=True
    )
    platform: str = flag(
        "local", "local (the launcher's environment, or one process) or k8s (Open MPI's)", may_change=True
    )
    local_rank: int | None = flag(
        names=("local_rank", "local-rank"), help="set by torch.distributed.launch", may_change=True
    )
    collective_timeout: float = flag(
        600, "how long ranks wait for one another before the job ends (default 600)", metavar="SECONDS", may_change=True
    )
    show_bar: bool = True  # no flag: a progress bar on a terminal
    show_progress: bool = True  # no flag: False prints warnings and results only


SHARED = {"model": Model, "optimizer": Optimizer, "privacy": Privacy, "loop": Loop}  # sections of every script


@dataclass(frozen=True)
class Settings:
    """All settings of a run. data, extra: objects of the script's own classes, of its data and of its further flags."""

    given: Given
    data: Any
    model: Model
    optimizer: Optimizer
    privacy: Privacy
    loop: Loop
    extra: Any = None

    def flag_of(self, field: str) -> str:
        """The flag of a field, as its script spells it: --work_dir or --output_dir."""
        return f"--{self.given.names[field]}"

    def changed(self, **sections: dict) -> "Settings":
        """A copy with other values. sections: name -> {field: value}."""
        return replace(self, **{name: replace(getattr(self, name), **values) for name, values in sections.items()})

    def check(self) -> None:
        """Raise UserError for flags that are out of range, contradict each other or mean nothing."""
        self.given.check_ranges()
        privacy, loop = self.privacy, self.loop
        if self.model.adapter_dim and self.model.lora_dim:
            fail(
                f"--adapter_dim {self.model.adapter_dim}: refused with --lora_dim {self.model.lora_dim}, a run trains "
                "adapters of one kind; leave one of the flags out"
            )
        if privacy.target_delta is not None and not 0 < privacy.target_delta < 1:
            fail(f"--target_delta {privacy.target_delta:g}: expected a number between 0 and 1")
        if privacy.noise_source == "seeded" and privacy.noise_seed is None:
            fail("--noise_source seeded: needs --noise_seed")
        if privacy.noise_seed is not None and privacy.noise_source != "seeded":
            fail(f"--noise_seed {privacy.noise_seed}: means nothing with --noise_source {privacy.noise_source}")
        if privacy.target_advantage is not None and not 0 < privacy.target_advantage < 1:
            fail(f"--target_advantage {privacy.target_advantage:g}: expected a number above 0 and below 1, such as 0.1")
        if privacy.budget is not None and privacy.noise_source == "seeded":
            fail(
                f"--budget {privacy.budget}: refused with --noise_source seeded: runs of one seed share their noise, "
                "and what they disclose together is not what the budget counts"
            )
        if privacy.budget is not None and privacy.noise_multiplier == 0:
            fail(f"--budget {privacy.budget}: no limit holds a run without noise; give it noise, or leave --budget out")
        if privacy.budget is not None and privacy.sampling == "allocation":
            fail(
                f"--budget {privacy.budget}: refused with --sampling allocation, whose epochs a budget file does not "
                "reserve; give --sampling poisson, or leave --budget out and compose with src/privacy_report.py"
            )
        if self.model.base_dtype == "bf16" and not self.model.lora_config().adapts:
            fail(
                "--base_dtype bf16: is for the frozen weights under adapters, and without --lora_dim every weight is "
                "trained, in float32; give --lora_dim or --adapter_dim, or leave --base_dtype out"
            )
        check_noise(privacy, self.flag_of("max_grad_norm"))
        if self.optimizer.average is not None:
            try:
                read_rule(self.optimizer.average)
            except ValueError as error:
                fail(f"--average {error}")
        if loop.tensorboard and importlib.util.find_spec("tensorboard") is None:
            fail(
                "--tensorboard: the package tensorboard is not installed; pip install tensorboard, or leave the flag "
                "out"
            )
        if loop.resume_changed and not loop.resume:
            fail("--resume_changed: means nothing without --resume")
        if "average" in loop.resume_changed:
            fail(
                "--resume_changed average: refused, an average goes on from the run's first steps; give the run's own "
                "--average, or start in a new folder"
            )


def noise_flags(privacy: Privacy) -> list[str]:
    """Those of the flags that set the noise which were given. Exactly one of them decides."""
    names = ("noise_multiplier", "target_epsilon", "target_advantage")
    return [f"--{name}" for name in names if getattr(privacy, name) is not None]


def check_noise(privacy: Privacy, clip: str) -> None:
    """Raise UserError where float32 cannot hold noise of standard deviation sigma C. clip: the flag that gave C."""
    sigma, C, (low, high) = privacy.noise_multiplier, privacy.max_grad_norm, NOISE_RANGE
    if sigma and not low <= sigma * C <= high:
        fail(
            f"--noise_multiplier {sigma:g}: times {clip} {C:g} it gives noise with a standard deviation of "
            f"{sigma * C:g}; expected {low:g} to {high:g}, which float32 holds"
        )
