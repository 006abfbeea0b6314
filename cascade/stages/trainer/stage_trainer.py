"""The `transformers.Trainer` of a stage. It evaluates the perplexity of the whole cascade."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from cascade.core.errors import OutputError, TrainingError, first_line, os_reason
from cascade.core.schema import known
from cascade.stages.hard_tokens.dataset import Batch, HardTokens
from cascade.stages.records import HeldOutEvaluation
from cascade.stages.trainer.checkpoints import checkpoints, finish
from cascade.stages.trainer.stage_module import SCOPES, StageModule, scope_masks
from cascade.stats.perplexity import as_ratio


class TrainingProgress(Protocol):
    """Callbacks during training."""

    def started(self, steps: int, done: int) -> None:
        """Called before the first step.

        Args:
            steps: Total number of training steps.
            done: Steps already done before resuming.
        """

    def step_done(self, step: int) -> None:
        """Called after every step.

        Args:
            step: Number of the step, from 1.
        """

    def evaluated(self, evaluation: HeldOutEvaluation) -> None:
        """Called after every evaluation on the held-out split, starting with step 0.

        Args:
            evaluation: Figures of the evaluation.
        """


class NoProgress:
    """A `TrainingProgress` that does nothing. Subclasses override the callbacks they need."""

    def started(self, steps: int, done: int) -> None:
        """Do nothing."""

    def step_done(self, step: int) -> None:
        """Do nothing."""

    def evaluated(self, evaluation: HeldOutEvaluation) -> None:
        """Do nothing."""


class StageTrainer(Trainer):
    """A Trainer that evaluates the held-out perplexity of the whole cascade.

    Args:
        module: Module with the stage's weights.
        tokens: Stored states.
        arguments: Arguments of the Trainer.
        patience: Stop after this many evaluations without improvement; None to never stop early.
        progress: Called during training.
    """

    def __init__(
        self,
        module: StageModule,
        tokens: HardTokens,
        arguments: TrainingArguments,
        *,
        patience: int | None,
        progress: TrainingProgress,
    ) -> None:
        self._tokens = tokens
        self._stage_module = module
        self._progress = progress
        self._losses_without: list[Tensor] = []
        self.nats_without: dict[str, float] = {}
        super().__init__(
            model=module,
            args=arguments,
            train_dataset=_Sequences(len(tokens.split("train"))),
            eval_dataset=_Sequences(len(tokens.split("held-out"))),
            data_collator=self._collate,
        )
        for callback in list(self.callback_handler.callbacks):
            if "Printer" in type(callback).__name__ or "Progress" in type(callback).__name__:
                self.remove_callback(callback)
        if patience is not None:
            self.add_callback(EarlyStoppingCallback(patience))
        self.add_callback(_StepCallback(progress))

    def _collate(self, numbers: Sequence[int]) -> Batch:
        batch = next(iter(self._tokens.batches("train", len(numbers), order=list(numbers))))
        _check_whole(batch)
        return batch

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """Return the loss. Raise a `TrainingError` if it is not finite."""
        loss = model(**inputs)["loss"]
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item():g} at step {self.state.global_step + 1}; "
                f"{self._last_checkpoint()}; choose a smaller --lr"
            )
        return loss

    def _last_checkpoint(self) -> str:
        last = max(checkpoints(Path(str(self.args.output_dir))), default=None)
        if last is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {last[1]} (step {last[0]})"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint and mark it as finished. Raise a `TrainingError` on a full disk."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            finish(folder)
        # torch raises a RuntimeError where it cannot write, safetensors an error of its own.
        except (OSError, RuntimeError, SafetensorError, OutputError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            reason = os_reason(error) if isinstance(error, OSError) else first_line(error)
            raise TrainingError(
                f"cannot write the checkpoint of step {self.state.global_step} ({reason});"
                f" {self._last_checkpoint()}; free some space and go on with --resume"
            ) from error

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on the held-out split. Raise a `TrainingError` if a ratio is not finite."""
        evaluation = self.evaluate_now()
        nats = known(evaluation.nats) or {}
        if not all(map(math.isfinite, nats.values())):
            raise TrainingError(
                f"the held-out perplexity is not finite at step {evaluation.step}; "
                f"{self._last_checkpoint()}; choose a smaller --lr"
            )
        # Transformers logs, compares and stores numbers only.
        metrics = {f"eval_{scope}": _logged(as_ratio(each)) for scope, each in nats.items()}
        metrics |= {f"eval_nats_{scope}": each for scope, each in nats.items()}
        metrics["eval_worst"] = _logged(evaluation.worst)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @torch.no_grad()
    def evaluate_now(self) -> HeldOutEvaluation:
        """Return the held-out perplexity of the cascade, relative to the one without the stage.

        The first call, before any step, also computes the perplexity without the stage and checks
        that the untrained stage is the identity.
        """
        first = not self._losses_without
        without, with_stage, counts = torch.zeros((3, len(SCOPES)), dtype=torch.float64)
        for number, batch in enumerate(self._held_out_batches()):
            selected = self._stage_module.selected(batch)
            before, after = self._losses(number, batch, selected, first=first)
            for scope, mask in enumerate(scope_masks(batch, selected)):
                without[scope] += before[mask].double().sum().cpu()
                with_stage[scope] += after[mask].double().sum().cpu()
                counts[scope] += mask.sum().cpu()
        if first:
            found = zip(SCOPES, (without / counts).tolist(), strict=True)
            self.nats_without = {scope: nats for scope, nats in found if not math.isnan(nats)}
        rows = zip(SCOPES, ((with_stage - without) / counts).tolist(), counts.tolist(), strict=True)
        evaluation = HeldOutEvaluation.of(
            self.state.global_step, {name: nats for name, nats, count in rows if count}
        )
        self._progress.evaluated(evaluation)
        return evaluation

    def _held_out_batches(self) -> Iterator[Batch]:
        size = self.args.per_device_train_batch_size
        for batch in self._tokens.batches("held-out", size):
            yield {name: value.to(self.args.device) for name, value in batch.items()}

    def _losses(
        self, number: int, batch: Batch, selected: Tensor, *, first: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of a batch without and with the stage, each `[B, T]`."""
        module = self._stage_module
        if first:
            _check_whole(batch)
            self._losses_without.append(module.losses_without(batch))
        without = self._losses_without[number].to(self.args.device)
        losses = without.clone()
        states = module.states(batch, selected)
        if not first:
            counted = selected & (batch["labels"] >= 0)
            losses[counted] = module.losses(states[counted], batch["labels"][counted])
        elif not torch.equal(states, batch["states"]):
            raise TrainingError(
                "the untrained stage is not the identity on the held-out states; report this as a "
                "bug and name the model family"
            )
        return without, losses

    def run(self, checkpoint: Path | None) -> None:
        """Train the stage.

        Args:
            checkpoint: Checkpoint to resume from; None to start from the first step.

        Raises:
            TrainingError: The checkpoint is incomplete, or a loss is not finite.
        """
        if checkpoint is None:
            self.train()
            return
        try:
            self.train(resume_from_checkpoint=str(checkpoint))
        except TrainingError:
            raise
        except Exception as error:
            # Trainer, torch and safetensors raise different errors for a torn file.
            raise TrainingError(
                f"cannot resume from {checkpoint}, which is incomplete ({first_line(error)}); "
                "remove it to resume from the previous one, or train without --resume"
            ) from error

    def evaluations(self) -> list[HeldOutEvaluation]:
        """Return all evaluations after step 0, including those before an interruption."""
        return [
            HeldOutEvaluation.of(
                int(entry["step"]),
                {scope: _nats_of(entry, scope) for scope in SCOPES if f"eval_{scope}" in entry},
            )
            for entry in self.state.log_history
            if "eval_worst" in entry
        ]


class _Sequences(Dataset[int]):
    """Indices of stored sequences. Whole batches are read from disk at once."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> int:
        return number


class _StepCallback(TrainerCallback):
    """Forward the Trainer's steps to a `TrainingProgress`."""

    def __init__(self, progress: TrainingProgress) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the number of steps."""
        self.progress.started(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report a finished step."""
        self.progress.step_done(state.global_step)


def _check_whole(batch: Batch) -> None:
    """Check that a batch holds whole sequences with every token at its own position.

    Otherwise, the stage would learn to attend to tokens that it does not see later. No other check
    finds this, because such a stage also starts as the identity. This mistake made the first
    version of CASCADE worse than its base.
    """
    ids, positions = batch["input_ids"], batch["positions"]
    expected = torch.arange(ids.shape[1], device=ids.device).expand_as(positions)
    if not torch.equal(positions, expected) or not torch.equal(batch["labels"][:, :-1], ids[:, 1:]):
        raise TrainingError(
            "expected whole sequences, each token at its own position and followed by its label, "
            "got joined or shifted ones; collect the dataset again"
        )


def _nats_of(entry: Mapping[str, float], scope: str) -> float:
    """Return a difference of losses from the Trainer's log, also of earlier checkpoints."""
    nats = entry.get(f"eval_nats_{scope}")
    return math.log(entry[f"eval_{scope}"]) if nats is None else float(nats)


def _logged(ratio: float) -> float:
    """Return a ratio, cut off at the largest number where it is infinite."""
    return min(ratio, sys.float_info.max)
