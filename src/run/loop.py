"""The step loop of both training scripts: draw, sum clipped gradients, release, update; log, evaluate, save, stop.

What differs between the scripts is in the Task. `data.micro_batches(units, cut, step)` cuts the drawn units, `plan`
draws and releases, `engine.accumulate(batch)` adds to the flat buffer.
"""

import contextlib
import hashlib
import math
import signal
import time

import torch
from torch import Tensor
from tqdm import tqdm

from averages import Average
from base import signals
from base.device import read_back, upload
from base.distributed import World
from base.errors import UserError, fail
from corpus.batching import Cut, TightCut
from language_model import LanguageModel
from losses import token_losses
from optimizer import norm
from privacy.plan import PrivacyPlan, finite_or_text
from run import provenance, spending
from run.log import Display, Meter, WorkDir
from run.risk_words import up
from run.settings import Settings
from run.task import Data, Learner, Position, Task, ValidationData
from weights import average_file, checkpoint

# What a step sums over the ranks beside the gradient: sum of losses, units, real tokens, texts, ranks asked to stop.
EXTRA = 5


class StopRequest:
    """Remembers the first signal that asks to stop, so that the step under way can be finished and saved."""

    def __init__(self):
        self.signal: int | None = None
        signals.on_request(self.remember)

    def remember(self, number: int) -> None:
        self.signal = number


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of the dropout masks of one step on one rank, without privacy: a resumed run draws the same ones."""
    return int.from_bytes(hashlib.sha256(f"dropout {seed} {step} {rank}".encode()).digest()[:7], "big")


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    data: Data,
    world: World,
    cut: Cut,
    bf16: bool,
    show_bar: bool = False,
    stop: StopRequest | None = None,
) -> tuple[float, float] | None:
    """(mean negative log-likelihood of a scored token in nats, perplexity) over `data`, shared out among the ranks;
    None where a rank was asked to stop before its share was done.

    No label smoothing. The mean is over tokens and exact: it does not depend on the world size or the batches.
    """
    model.eval()
    total = torch.zeros(3, dtype=torch.float64, device=world.device)  # losses, tokens, ranks asked to stop
    own = torch.arange(len(data))[world.rank :: world.size]
    bar = tqdm(total=len(own), desc="evaluation", unit="text", leave=False, dynamic_ncols=True, disable=not show_bar)
    with bar, autocast(world.device, bf16):
        for batch in data.micro_batches(own, cut):
            if stop is not None and stop.signal is not None:
                total[2] = 1
                break
            batch = batch.to(world.device)
            losses = token_losses(model, batch, smoothing=0.0, head_trains=False, all_positions=False)
            total[0] += losses.sum(dtype=torch.float64)
            total[1] += len(losses)
            bar.update(batch.units)
    model.train()
    nll, count, asked = read_back("evaluation", world.all_reduce(total)).tolist()
    if asked:
        return None
    if count == 0:
        return math.nan, math.nan
    return nll / count, math.exp(min(nll / count, 700))


class Trainer:
    """One run from its first step, or from the last checkpoint, to its last."""

    def __init__(
        self,
        world: World,
        settings: Settings,
        task: Task,
        learner: Learner,
        plan: PrivacyPlan,
        work: WorkDir,
        position: Position,
    ):
        self.world, self.settings, self.task, self.learner, self.plan = world, settings, task, learner, plan
        self.model, self.work, self.done = learner.loaded.model, work, position.done
        self.saved = position.done if position.done else -1
        self.whole = True  # whether the parameters are those of step `done`, and finite
        self.stop = StopRequest()
        self.last = min(task.steps, task.last_step or task.steps)
        before = position.progress or {"loss": 0.0, "units": 0.0, "seconds": 0.0}
        self.total_loss, self.total_units = before["loss"], before["units"]
        self.peak_memory = before.get("peak_memory_bytes", 0)
        self.meter, self.started = Meter(), time.monotonic() - before["seconds"]
        self.valid_loss: float | None = None
        self.average_loss: float | None = None  # validation loss of the average of iterates
        # Entries of privacy.json beside the plan's: summary(), and what the script adds. Entries without noise are in
        # the table of PRIVACY.md. The training loss is one: only the script that has to report it adds it.
        self.facts: dict = {}
        self.display = Display(
            world.is_main, self.last, position.done, settings.loop.show_bar, settings.loop.show_progress
        )

    def run(self) -> int:
        """Train to the last step that the plan permits. Returns the process's exit status."""
        self.model.train()
        stopped = exhausted = False
        try:
            while self.done < self.last and not stopped:
                drawn = self.plan.open_step(self.done + 1)
                if drawn is None:
                    exhausted = True
                    break
                stopped = self.step(drawn)
                self.display.advance()
                stopped = self.after_step(stopped)
            if exhausted:
                self.display.say(
                    f"the privacy budget permits no step after {self.done}: the run ends here", important=True
                )
            if not stopped:
                stopped = self.finish()
            if self.saved != self.done:
                self.save()
            self.close_report(ended=not stopped)
        except Exception:
            self.rescue()
            raise
        finally:
            self.display.close()
        if stopped:
            number = self.world.gather(self.stop.signal)
            number = next(value for value in number if value is not None)
            self.display.say(
                f"{signal.Signals(number).name}: stopped after step {self.done}; continue with --resume", important=True
            )
            return 128 + number
        return 0

    # ---------------------------------------------------------------- one step

    def step(self, drawn: Tensor) -> bool:
        """One logical step on the drawn units. Returns whether any rank was asked to stop."""
        settings, flat = self.settings, self.learner.flat
        if self.plan.settings.private:
            self.plan.seed_dropout()
        else:
            torch.manual_seed(step_seed(settings.loop.random_seed, self.done + 1, self.world.rank))
        flat.sums.zero_()
        loss, tokens, texts = torch.zeros((), device=self.world.device), 0, 0
        with autocast(self.world.device, settings.loop.bf16):
            for batch in self.task.data.micro_batches(drawn, self.learner.cut, self.done + 1):
                losses = self.learner.engine.accumulate(batch.to(self.world.device))
                loss += losses.nan_to_num(0.0, 0.0, 0.0).sum()
                tokens += batch.tokens
                texts += batch.texts
        asked = float(self.stop.signal is not None)
        sent = torch.tensor([0.0, len(drawn), tokens, texts, asked], dtype=flat.extra.dtype)
        flat.extra.copy_(upload(sent, self.world.device))
        flat.extra[0] = loss
        grad = self.plan.release(flat.sums, flat.size, flat.sharded)
        if self.task.observe is not None:
            self.task.observe(grad)
        lr, grad_norm, most = self.task.lr(self.done), norm(grad, flat.sharers), settings.optimizer.clip
        if most > 0:
            grad.mul_((most / grad_norm).clamp(max=1.0))
        self.whole = False
        self.learner.optimizer.step(grad, lr)
        self.done += 1
        figures = torch.cat([flat.extra.double(), torch.stack([grad_norm, flat.data.sum().double()])])
        total, units, tokens, texts, asked, length, parameters = read_back("step", figures).tolist()
        self.meter.add(total, units, tokens, texts, length)
        self.total_loss += total
        self.total_units += units
        if not math.isfinite(parameters):  # the same bits on every rank: all of them stop
            spent = f"epsilon {self.plan.epsilon()[0]:.4f} is spent" if self.world.is_main else "see rank 0"
            fail(
                f"step {self.done}: a parameter is NaN or infinite; {spent}; lower the learning rate and start from "
                "the last checkpoint",
                on_every_rank=True,
            )
        if self.learner.average is not None:
            self.learner.average.add(self.done)
        self.whole = True
        return asked > 0

    # ---------------------------------------------------------------- between steps

    def after_step(self, stopped: bool) -> bool:
        """Log, evaluate and save where it is time to. Returns whether any rank was asked to stop by now."""
        loop = self.settings.loop
        if self.done % loop.log_interval == 0:
            self.log()
        if stopped or self.done == self.last:
            return stopped  # run() evaluates and saves
        if loop.eval_interval and self.done % loop.eval_interval == 0 and self.evaluate():
            return True
        if self.done % loop.save_interval == 0:
            self.save()
        return False

    @property
    def epochs(self) -> float:
        """Expected uses of a unit so far."""
        return self.done / (self.plan.settings.N / self.plan.settings.batch)

    def head(self) -> dict:
        """What every line of metrics.jsonl begins with."""
        return {
            "step": self.done,
            "epoch": round(self.epochs, 4),
            "lr": self.task.lr(max(0, self.done - 1)),
            "seconds": round(time.monotonic() - self.started, 3),
        }

    def log(self) -> None:
        if not self.world.is_main:
            return
        self.plan.ledger.check(f"step {self.done} was not logged")
        reading = self.meter.read(self.plan.settings.unit)
        prv, rdp = self.plan.epsilon()
        # The norm is of the released gradient and costs no privacy. Norms of units, or of the sum without noise, would.
        record = {
            **self.head(),
            **reading,
            "noise_norm": self.plan.noise_norm(self.learner.flat.size),
            "epsilon": finite_or_text(prv),
            "epsilon_rdp": finite_or_text(rdp),
        }
        self.work.append_metrics(record)
        loss = reading["loss"]
        shown = {
            "loss": "-" if loss is None else f"{loss:.4f}",
            "ppl": "-" if loss is None else f"{math.exp(min(loss, 700)):.2f}",
            "tok/s": f"{reading['tokens_per_s']:.0f}",
            "eps": f"{prv:.3f}",
        }
        self.display.status(**shown)
        self.display.say(
            f"| epoch {record['epoch']:7.2f} step {self.done:>7d} of {self.task.steps} | lr {record['lr']:.3g} | "
            f"loss {shown['loss']} | ppl {shown['ppl']} | {reading['texts_per_s']:.1f} texts/s "
            f"{shown['tok/s']} tokens/s | epsilon {prv:.4f} ({self.plan.bound_name}) {rdp:.4f} (RDP) at delta "
            f"{self.plan.settings.delta:.3g}"
        )

    def evaluate(self) -> bool:
        """The validation loss of the last iterate, and of the average beside it, into the log. Returns whether any rank
        was asked to stop, which ends it at once."""
        if self.task.valid is None:
            return False
        start, average, averaged = time.monotonic(), self.current_average, None
        losses = self.validate(self.task.valid)
        if losses is not None and average is not None:
            with average.in_place():
                averaged = self.validate(self.task.valid)
        if losses is None or (average is not None and averaged is None):
            return True
        self.valid_loss, ppl = losses
        record = {"valid_loss": finite_or_text(self.valid_loss), "valid_ppl": finite_or_text(ppl)}
        words = f"valid loss {self.valid_loss:.4f} | valid ppl {ppl:.3f}"
        if average is not None and averaged is not None:
            self.average_loss, ppl = averaged
            record |= {
                "average_valid_loss": finite_or_text(self.average_loss),
                "average_valid_ppl": finite_or_text(ppl),
            }
            words += f" | of the average {average.rule}: valid loss {self.average_loss:.4f} | valid ppl {ppl:.3f}"
        if self.world.is_main:
            self.work.append_metrics({**self.head(), **record})
            self.display.say(f"| evaluation at step {self.done} | {time.monotonic() - start:.1f} s | {words}")
        self.meter.start += time.monotonic() - start  # rates are of training alone
        return False

    def validate(self, valid: ValidationData) -> tuple[float, float] | None:
        """evaluate() of what the parameters hold."""
        cut, bar = TightCut(self.learner.cut.token_budget), self.display.bar is not None
        return evaluate(self.model, valid, self.world, cut, self.settings.loop.bf16, show_bar=bar, stop=self.stop)

    @property
    def current_average(self) -> Average | None:
        """The average of the iterates, where there is one by now."""
        average = self.learner.average
        return average if average is not None and average.begun(self.done) else None

    def save(self) -> None:
        """Write the checkpoint and privacy.json. All ranks call it; where rank 0 cannot, every rank stops."""
        self.peak_memory = max(self.peak_memory, self.world.peak_memory())
        gathered = self.learner.optimizer.state_dict() if self.learner.flat.sharded else None
        with self.world.raise_if_any_failed():
            if self.world.is_main:
                self.save_files(gathered)
        self.saved = self.done
        also = "" if self.current_average is None else f", and average.{self.done}.pt beside it"
        self.display.say(f"saved {checkpoint.model_path(self.work.path, self.done)}{also}")

    def save_files(self, gathered: dict | None = None) -> None:
        """gathered: the optimizer's state where ranks share it out, which takes a collective; None: rank 0 has it."""
        # Another run's records there would mean that its checkpoints are there, too.
        self.plan.ledger.check(f"the checkpoint of step {self.done} was not written")
        state = {**(gathered or self.learner.optimizer.state_dict()), "progress": self.progress()}
        spent = provenance.excerpt(self.report())
        try:
            base, average = self.learner.loaded.base, self.current_average
            if average is not None:
                average_file.save_average(self.work.path, self.done, self.model, base, spent, average)
            checkpoint.save_checkpoint(self.work.path, self.done, self.model, base, state, spent)
            self.write_report()
        except OSError as error:
            fail(
                f"{self.work.path}: the checkpoint of step {self.done} could not be written "
                f"({error.strerror}); the one before is intact: make room and --resume"
            )

    def rescue(self) -> None:
        """Save what is charged and done, where an error ends the run: another rank died, a file cannot be written.
        Rank 0 alone, without a collective, which cannot be where ranks share the optimizer's moments out. The error
        itself is what is told, also where this fails too."""
        sharded = self.learner.flat.sharded
        if self.whole and not sharded and self.world.is_main and 0 < self.done != self.saved:
            with contextlib.suppress(UserError, OSError):
                self.save_files()
                self.display.say(f"saved {checkpoint.model_path(self.work.path, self.done)}")

    def finish(self) -> bool:
        """The last log line, of the steps since the one before, and the last evaluation. Returns whether any rank was
        asked to stop, which leaves the evaluation to --resume."""
        if self.meter.steps:
            self.log()
        if (average := self.learner.average) is not None and self.current_average is None:
            self.display.say(
                f"--average {average.rule}: would begin with step {average.first}, and the run ends after step "
                f"{self.done}: there is no average",
                important=True,
            )
        return self.evaluate()

    def progress(self) -> dict:
        """What a resumed run continues to count: sum of the units' losses, units, seconds, bytes."""
        return {
            "loss": self.total_loss,
            "units": self.total_units,
            "seconds": time.monotonic() - self.started,
            "peak_memory_bytes": self.peak_memory,
        }

    @property
    def train_loss(self) -> float | None:
        """Mean training loss of a unit over all steps, in nats a scored token, without noise: not covered by epsilon.
        None where no unit was drawn."""
        return self.total_loss / self.total_units if self.total_units else None

    def summary(self) -> dict:
        """The run in five numbers, on rank 0: last evaluation (with an average, of both), epsilons, seconds, the most
        memory that a rank used (World.peak_memory, bytes)."""
        prv, rdp = self.plan.epsilon()
        losses = {"eval_loss": self.valid_loss}
        if self.learner.average is not None:
            losses["average_eval_loss"] = self.average_loss
        return {
            **{name: None if loss is None else finite_or_text(loss) for name, loss in losses.items()},
            "final_epsilon_prv": finite_or_text(prv),
            "final_epsilon_rdp": finite_or_text(rdp),
            "train_runtime": round(time.monotonic() - self.started, 3),
            "peak_memory_bytes": self.peak_memory,
        }

    def report(self) -> dict:
        """The content of privacy.json, on rank 0."""
        return {**self.plan.report(self.task.disclosed), **self.facts}

    def write_report(self) -> dict:
        """Write privacy.json, on rank 0; returns its content."""
        self.plan.ledger.check("privacy.json was not written")
        report = self.report()
        self.work.write_json("privacy.json", report)
        return report

    def close_report(self, ended: bool = True) -> None:
        """Write the last privacy.json of a run that ended, or of one that was stopped and can be continued."""
        if not self.world.is_main:
            return
        if ended:
            self.facts.update(self.summary())
        report = self.write_report()
        if ended and self.plan.hold is not None:
            self.display.say(spending.settle(self.plan.hold, self.plan.ledger), important=True)
        if not self.plan.settings.private:
            self.display.say("epsilon = inf: the run had no noise and gives no privacy", important=True)
            return
        name = self.plan.bound_name
        self.display.say(
            f"epsilon {float(report['epsilon_prv']):.4f} ({name} upper bound), "
            f"{float(report['epsilon_rdp']):.4f} (RDP) at delta {report['delta']:.3g}; "
            f"{float(report['epsilon_prv_strict']):.4f} ({name}) at delta {report['delta_strict']:.3g}; "
            f"{report['relation']}; {report['steps_charged']} steps charged",
            important=True,
        )
        if self.plan.settings.target_advantage is not None:
            self.display.say(
                f"membership advantage at most {up(report['attack_risk']['advantage'])}, of the target "
                f"{self.plan.settings.target_advantage:g}",
                important=True,
            )
