"""What other tools do with ten of the unseen cases and with two healthy ones.

python -m benchmarks.doctor_peers [--seed 0] [--write]; needs the extra `adapters`.

Every tool gets the same training from the same seed, and is used as its own documentation says:

- `anomaly mode`: a plain loop under `torch.autograd.set_detect_anomaly(True)`.
- `Lightning`: its Trainer, with `EarlyStopping(check_finite=True)`, which looks at the mean loss
  of each epoch.
- `overflow debugger`: a plain loop with `transformers.debug_utils.DebugUnderflowOverflow`.
- `skip`: a plain loop that leaves out a step whose loss or gradient isn't finite, or that raises an
  error, and says nothing.

The score is that of the weights a tool leaves behind, whether it ended the training or not.
"""

import argparse
import contextlib
import io
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.debug_utils import DebugUnderflowOverflow

import benchmarks.unseen_doctor_cases.processes  # noqa: F401 -- registers every case
from benchmarks.federation import machine_line, write_section
from benchmarks.unseen_doctor_cases.case import REGISTER, Step, Training
from benchmarks.unseen_doctor_cases.harness import (
    compute_gradients,
    final_score,
    gradients_are_finite,
    run_doctored,
    run_plain,
)
from benchmarks.unseen_doctor_cases.judging import TOLERANCE, begin
from benchmarks.unseen_doctor_cases.report import table
from fedrounds.diagnosis.text import verdict

# Chosen by kind before any of the tools had seen one.
PLANTED = (
    "pooling_no_tokens",
    "token_beyond_vocabulary",
    "half_squares",
    "adam_without_epsilon",
    "spike_of_a_schedule",
    "restart_at_old_rate",
    "momentum_in_other_units",
    "focal_root",
    "missing_targets",
    "transcript_too_long",
)
HEALTHY = ("illegal_actions", "infinite_inputs_clamped")
PAGE = "doctor_unseen.md"
FRAME = re.compile(r" {17} \S* ?\w+$")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a tool did with a training.

    `step` is the step (from 1) at which it said something, None where it never did; `words` what it
    said; `is_ended` whether training ended there.
    """

    score: float
    step: int | None = None
    words: str = ""
    is_ended: bool = False


def with_anomaly_mode(training: Training) -> Report:
    """Train in torch's anomaly mode, whose warning names the forward call."""
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("ignore")
        end = _until_an_error(training)
    return _ended(training, end)


def with_overflow_debugger(training: Training) -> Report:
    """Train with Hugging Face's overflow debugger, which prints before it raises."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        DebugUnderflowOverflow(training.model)  # type: ignore[no-untyped-call]
        end = _until_an_error(training)
    # It can't be taken off, and it would refuse to let the model be judged.
    for module in training.model.modules():
        module._forward_hooks.clear()
    if end is not None and "DebugUnderflowOverflow" in end.words:
        lines = printed.getvalue().splitlines()
        # The last frame is that of the module whose weight, input or output isn't finite.
        frames = [line.strip() for line in lines if FRAME.match(line)]
        end = End(step=end.step, words=f"{lines[0]} in {frames[-1]}")
    return _ended(training, end)


def with_skipping(training: Training) -> Report:
    """Train by a loop that skips in silence."""
    return Report(score=run_plain(training, skips=True).score)


def with_doctor(training: Training) -> Report:
    """Train with the doctor."""
    outcome = run_doctored(training)
    first = outcome.diagnoses[0] if outcome.diagnoses else None
    return Report(
        score=final_score(training),
        step=None if first is None else first.step,
        words="" if first is None else verdict(first),
        is_ended=outcome.is_halted or bool(outcome.error),
    )


@dataclass(frozen=True, kw_only=True)
class End:
    """The step (from 1) at which an error ended a loop, and its first line."""

    step: int
    words: str


def _ended(training: Training, end: End | None) -> Report:
    score = final_score(training)
    if end is None:
        return Report(score=score)
    return Report(score=score, step=end.step, words=end.words, is_ended=True)


class _Module(LightningModule):
    """A case as Lightning wants it."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.model = training.model
        self.training_case = training
        self.num_steps = 0

    def training_step(self, step: Step, batch_idx: int) -> Tensor:
        del batch_idx
        self.num_steps += 1
        self.training_case.before_step(self.num_steps)
        answer = self.training_case.compute_loss(self.model, step.batch)
        loss = answer[0] if isinstance(answer, tuple) else answer
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(step.indices))
        return loss

    def train_dataloader(self) -> DataLoader[Step]:
        epoch = self.current_epoch + 1
        steps = [step for step in self.training_case.steps if step.epoch == epoch]
        return DataLoader(cast("Any", steps), batch_size=None, collate_fn=cast("Any", _as_it_is))

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        optimizer, scheduler = self.training_case.optimizer, self.training_case.scheduler
        if scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def _as_it_is(step: Step) -> Step:
    return step


def with_lightning(training: Training) -> Report:
    """Train by Lightning's Trainer, which stops at the end of an epoch whose loss isn't finite."""
    stopping = EarlyStopping("loss", patience=sys.maxsize, check_finite=True)
    module = _Module(training)
    with tempfile.TemporaryDirectory() as folder, _silent():
        trainer = Trainer(
            max_epochs=training.steps[-1].epoch,
            reload_dataloaders_every_n_epochs=1,
            gradient_clip_val=training.clip_norm,
            callbacks=[stopping],
            default_root_dir=folder,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(module)
        # What ends a user's training, whatever it is.
        except Exception as raised:
            return Report(
                score=final_score(training),
                step=module.num_steps,
                words=_first_line(raised),
                is_ended=True,
            )
    is_ended = module.num_steps < len(training.steps)
    words = (stopping.stopping_reason_message or "").partition(" Previous")[0]
    return Report(
        score=final_score(training),
        step=module.num_steps if words else None,
        words=words,
        is_ended=is_ended,
    )


TOOLS: dict[str, Callable[[Training], Report]] = {
    "anomaly mode": with_anomaly_mode,
    "Lightning": with_lightning,
    "overflow debugger": with_overflow_debugger,
    "skip": with_skipping,
    "doctor": with_doctor,
}


def _until_an_error(training: Training, *, stops_at_non_finite: bool = False) -> End | None:
    """Train by a plain loop that an error ends, as a tool that raises one wants it.

    Args:
        training: begun anew for this call.
        stops_at_non_finite: end at the first loss or gradient that isn't finite, too.
    """
    model, optimizer = training.model.train(), training.optimizer
    for number, step in enumerate(training.steps, start=1):
        training.before_step(number)
        try:
            loss = compute_gradients(training, step)
        # What ends a user's training, whatever it is.
        except Exception as raised:
            return End(step=number, words=_first_line(raised))
        if stops_at_non_finite and not (loss.isfinite() and gradients_are_finite(model)):
            return End(step=number, words="not finite")
        if training.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        if training.scheduler is not None:
            training.scheduler.step()
    return None


def _first_line(raised: Exception) -> str:
    return f"{type(raised).__name__}: {raised}".splitlines()[0]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    names = ("lightning.pytorch", "lightning.fabric", "lightning")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A case under every tool; `begins` is the step at which a loss or gradient isn't finite."""

    name: str
    is_planted: bool
    begins: int | None
    twin: float
    reports: dict[str, Report]


def compare(name: str, *, seed: int) -> Comparison:
    """Run a case with every tool, each from its beginning."""
    if name in REGISTER.planted:
        build = REGISTER.planted[name].build
        faulty, whole = partial(build, seed, fault=True), partial(build, seed, fault=False)
    else:
        faulty = whole = partial(REGISTER.healthy[name].build, seed)
    first = _until_an_error(begin(faulty, seed=seed), stops_at_non_finite=True)
    return Comparison(
        name=name,
        is_planted=name in REGISTER.planted,
        begins=None if first is None else first.step,
        twin=run_plain(begin(whole, seed=seed)).score,
        reports={tool: run(begin(faulty, seed=seed)) for tool, run in TOOLS.items()},
    )


def summary_table(comparisons: Sequence[Comparison]) -> str:
    """Return how often each tool gave the right result."""
    planted = [case for case in comparisons if case.is_planted]
    healthy = [case for case in comparisons if not case.is_planted]
    broken = [case for case in planted if case.begins is not None]
    return table(
        (
            "tool",
            "said something",
            "at the step where it begins",
            "training went on",
            "ends as the healthy twin",
            "healthy trainings ended or reported",
        ),
        [
            (
                tool,
                _count(case.reports[tool].step is not None for case in planted),
                _count(case.reports[tool].step == case.begins for case in broken),
                _count(not case.reports[tool].is_ended for case in planted),
                _count(case.reports[tool].score >= case.twin - TOLERANCE for case in planted),
                _count(case.reports[tool].step is not None for case in healthy),
            )
            for tool in TOOLS
        ],
    )


def score_table(comparisons: Sequence[Comparison]) -> str:
    """Return each tool's final metric, the step at which it spoke, and whether it ended there."""
    return table(
        ("case", "begins at step", "healthy twin", *TOOLS),
        [
            (
                case.name,
                "-" if case.begins is None else str(case.begins),
                f"{case.twin:.3f}",
                *(_cell(report) for report in case.reports.values()),
            )
            for case in comparisons
        ],
    )


def words_table(comparisons: Sequence[Comparison]) -> str:
    """Return the messages of each tool."""
    return table(
        ("case", "tool", "what it says"),
        [
            (case.name, tool, report.words.replace("|", "/")[:200])
            for case in comparisons
            for tool, report in case.reports.items()
            if report.words
        ],
    )


def _cell(report: Report) -> str:
    step = "" if report.step is None else f" at {report.step}"
    return f"{report.score:.3f}{step}{', ended' * report.is_ended}"


def _count(answers: Iterable[bool]) -> str:
    known = list(answers)
    return f"{sum(known)} of {len(known)}"


def main() -> int:
    """Run every case with every tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", default=",".join(PLANTED + HEALTHY), help="by comma")
    parser.add_argument("--write", action="store_true", help=f"write the tables to docs/{PAGE}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    comparisons = []
    for name in options.cases.split(","):
        comparisons.append(compare(name, seed=options.seed))
        print(f"{score_table(comparisons[-1:])}\n\n{words_table(comparisons[-1:])}\n", flush=True)
    print(summary_table(comparisons))
    if options.write:
        versions = ", ".join(f"{name} {version(name)}" for name in ("lightning", "transformers"))
        write_section(
            "doctor_peers",
            f"{machine_line()}, torch {torch.__version__}, {versions}; "
            f"`python -m benchmarks.doctor_peers --write`\n\n{summary_table(comparisons)}\n\n"
            f"{score_table(comparisons)}\n\n{words_table(comparisons)}",
            page=PAGE,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
