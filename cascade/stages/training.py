"""Training a stage on hard tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from cascade.core.errors import TrainingError, UsageError, first_line
from cascade.core.provenance import machine_of
from cascade.core.schema import known, to_plain
from cascade.decoding.forward import slices
from cascade.exits.history import HiddenHistory
from cascade.exits.rules import ExitPoint, find_rule
from cascade.models.hooks import frozen
from cascade.models.stack import DecoderStack
from cascade.stages.checkpoints import begin, checkpoint_of, checkpoints, request_of
from cascade.stages.dataset import HardTokens
from cascade.stages.stage import Stage, extended, new_stage, run_stage
from cascade.stages.training_config import Recipe

#: What every figure is given for.
SCOPES = ("all", "hard", "response", "hard_response")

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Look:
    """One look at the held-out part.

    Attributes:
        step: After so many steps; 0 before the first.
        ratios: Per scope in which there are tokens, the cascade's perplexity relative to that
            without the stage.
    """

    step: int
    ratios: dict[str, float]

    @property
    def worst(self) -> float:
        """What stages are chosen by: the larger ratio of all tokens and of response text."""
        return max(self.ratios["all"], self.ratios.get("response", 0.0))


@dataclass(frozen=True)
class Training:
    """A trained stage and how it came about.

    Attributes:
        stage: With the weights of the best look, which may be those it started with.
        looks: Every look, step 0 first.
        chosen: The look whose weights it has.
        steps: Steps made.
        perplexities: Held-out perplexity without the stage, per scope in which there are tokens.
    """

    stage: Stage
    looks: tuple[Look, ...]
    chosen: Look
    steps: int
    perplexities: dict[str, float]


def train_stage(
    stack: DecoderStack,
    tokens: HardTokens,
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    steps: int | None = None,
    tensorboard: Path | None = None,
    told: Callable[[str, dict[str, Any]], None] | None = None,
) -> Training:
    """Train a stage that follows a model, on what is stored of it; the model is never run.

    The loss is the cross entropy of the tokens that enter the stage. The stage is chosen by the
    held-out perplexity of the whole cascade, tokens that leave before it included, over all text
    and over response text alone, whichever ratio is worse; step 0, the identity, takes part, so
    that the chosen stage is never worse than none.

    Args:
        stack: The model that the stage follows; its weights are not touched.
        tokens: Its exit states; see `collect_hard`.
        recipe: How.
        folder: For checkpoints, of which the last and the best are kept.
        resume: Go on from the last checkpoint in the folder; those of an earlier training go
            where this one starts anew.
        steps: Make exactly so many steps, without patience; the recipe's epochs where not given.
        tensorboard: A folder to log to, for TensorBoard.
        told: Called with "start" (steps, how many of them are done), "step" (step) and "look"
            (step, ratios) as they happen.

    Raises:
        UsageError: A recipe that cannot be, or TensorBoard that is not installed.
        ModelError: The states belong to another model.
        TrainingError: A loss that is NaN or infinite (says at which step, and what is left), or
            nothing to resume from, or a checkpoint that is cut short or of another recipe.
    """
    recipe.check()
    if tensorboard is not None:
        _check_tensorboard()
    tokens.check(stack)
    before = stack.weights_in_memory()
    stage = _untrained(stack, recipe)
    module = _StageModule(stack, stage, tokens, recipe)
    trainer = _StageTrainer(module, tokens, _arguments(recipe, folder, stack, tokens, steps))
    trainer.follow(recipe, told or (lambda *_: None), patient=steps is None)
    if tensorboard is not None:
        trainer.add_callback(_logging_to(tensorboard))
    with frozen(stack.model):
        start = trainer.look_now()
        request = request_of(tokens, recipe, steps)
        if not resume:
            begin(folder, request)
        trainer.run(checkpoint_of(folder, request) if resume else None)
        training = trainer.chosen(start, stage)
    if stack.weights_in_memory() != before:
        raise AssertionError("training changed the base's weights")  # cannot be: it has no gradient
    stage.provenance = _provenance(stack, tokens, recipe, training)
    return training


def _untrained(stack: DecoderStack, recipe: Recipe) -> Stage:
    return new_stage(
        stack,
        recipe.additional_layers,
        start=recipe.start,
        own_head=recipe.own_head,
        seed=recipe.seed,
    )


def goes_on(batch: Batch, recipe: Recipe, num_layers: int, hard_ratio: float) -> Tensor:
    """Return which tokens of a batch enter the stage, `[B, T]`, by the recipe's routing.

    Args:
        batch: Of `HardTokens.batches`.
        recipe: Its routing and seed.
        num_layers: Of the model below the stage.
        hard_ratio: The share that the random routing lets in.
    """
    if recipe.routing == "hard":
        return batch["hard"]
    if recipe.routing == "all":
        return torch.ones_like(batch["hard"])
    ids, positions = batch["input_ids"].flatten(), batch["positions"].flatten()

    def no_logits() -> Tensor:
        raise NotImplementedError  # the random rule looks at ids and positions alone

    history = HiddenHistory(num_layers)
    point = ExitPoint(num_layers, history, no_logits, ids, positions, seed=recipe.seed)
    drawn = find_rule("random").confidence(point)
    return (drawn < hard_ratio).view_as(batch["hard"])


class _StageModule(nn.Module):
    """What the Trainer trains: a stage's weights, and its loss over stored states."""

    def __init__(
        self, stack: DecoderStack, stage: Stage, tokens: HardTokens, recipe: Recipe
    ) -> None:
        super().__init__()
        self.layers = stage.layers
        if stage.head is not None:
            self.head = stage.head
        # In a tuple, so that the base is no part of this module: neither saved nor trained.
        self._held = (stack, stage, recipe, _behind(stack, stage))
        self._hard_ratio = float(tokens.record["parts"]["train"]["hard_ratio"])

    def selected(self, batch: Batch) -> Tensor:
        """Return which tokens enter the stage, `[B, T]`."""
        stack, _, recipe, _ = self._held
        return goes_on(batch, recipe, stack.num_layers, self._hard_ratio)

    def states(self, batch: Batch, selected: Tensor) -> Tensor:
        """Return the states behind the stage, `[B, T, D]`."""
        stack, stage, _, _ = self._held
        return run_stage(stack, stage, batch["input_ids"], batch["states"], selected)

    def losses(self, states: Tensor, labels: Tensor, *, own: bool = True) -> Tensor:
        """Return each row's negative log-probability of its label in nats, `[n]`.

        Args:
            states: `[n, D]`, before the final norm.
            labels: `[n]`.
            own: Through the stage's own LM head, where it has one; else through the model's.
        """
        below, _, _, through = self._held
        stack = through if own else below
        parts = [
            functional.cross_entropy(
                stack.decode(states[some][None].to(stack.dtype))[0].float(),
                labels[some],
                reduction="none",
            )
            for some in slices(len(states), stack.max_positions)
        ]
        return torch.cat(parts) if parts else states.new_zeros(0)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Return the mean loss of the tokens that enter the stage."""
        selected = self.selected(batch)
        counted = selected & (batch["labels"] >= 0)
        if not counted.any():
            # Nothing is learned from such a batch: a loss of zero, with a gradient of zero.
            return {"loss": torch.stack([0 * weight.sum() for weight in self.parameters()]).sum()}
        losses = self.losses(self.states(batch, selected)[counted], batch["labels"][counted])
        return {"loss": losses.sum() / counted.sum()}


def _behind(stack: DecoderStack, stage: Stage) -> DecoderStack:
    """Return the stack whose last steps make the stage's logits."""
    if stage.head is None:
        return stack
    return extended(stack, dataclasses.replace(stage, head=_InFp32(stage.head)))


class _InFp32(nn.Module):
    """A head in training: it is in fp32, whatever the model's dtype is."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, normed: Tensor) -> Tensor:
        """Return fp32 logits of normed states in any dtype."""
        logits: Tensor = self.head(normed.float())
        return logits


class _Sequences(Dataset[int]):
    """Numbers of stored sequences; batches are read from disk together."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> int:
        return number


class _StageTrainer(Trainer):
    """A Trainer whose evaluation is the whole cascade's held-out perplexity."""

    def __init__(
        self, module: _StageModule, tokens: HardTokens, arguments: TrainingArguments
    ) -> None:
        self._tokens = tokens
        self._stage_module = module
        self._without: list[Tensor] = []
        self.perplexities: dict[str, float] = {}
        self._told: Callable[[str, dict[str, Any]], None] = lambda *_: None
        super().__init__(
            model=module,
            args=arguments,
            train_dataset=_Sequences(len(tokens.part("train"))),
            eval_dataset=_Sequences(len(tokens.part("held-out"))),
            data_collator=self._collate,
        )
        for callback in list(self.callback_handler.callbacks):
            if "Printer" in type(callback).__name__ or "Progress" in type(callback).__name__:
                self.remove_callback(callback)

    def _collate(self, numbers: Sequence[int]) -> Batch:
        batch = next(iter(self._tokens.batches("train", len(numbers), order=list(numbers))))
        _check_whole(batch)
        return batch

    def follow(
        self, recipe: Recipe, told: Callable[[str, dict[str, Any]], None], *, patient: bool
    ) -> None:
        """Stop where patience ends, and tell what happens."""
        self._told = told
        if recipe.patience is not None and patient:
            self.add_callback(EarlyStoppingCallback(recipe.patience))
        self.add_callback(_Teller(told))

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """Return the loss; refuse to go on from one that is not finite."""
        loss = model(**inputs)["loss"]
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item():g} at step {self.state.global_step + 1}; "
                f"{self._kept()}; take a smaller --lr"
            )
        return loss

    def _kept(self) -> str:
        last = max(checkpoints(Path(str(self.args.output_dir))), default=None)
        if last is None:
            return "no checkpoint was made yet"
        return f"the last good checkpoint, of step {last[0]}, is {last[1]}"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Look at the held-out part; a look that is not finite ends the training."""
        look = self.look_now()
        if not all(map(math.isfinite, look.ratios.values())):
            raise TrainingError(
                f"the held-out perplexity is not finite at step {look.step}; {self._kept()}; take "
                "a smaller --lr"
            )
        metrics = {f"eval_{scope}": ratio for scope, ratio in look.ratios.items()}
        metrics["eval_worst"] = look.worst
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @torch.no_grad()
    def look_now(self) -> Look:
        """Return the cascade's held-out perplexity relative to that without the stage."""
        module, device = self._stage_module, self.args.device
        sums = torch.zeros((2, len(SCOPES)), dtype=torch.float64)
        counts = torch.zeros(len(SCOPES), dtype=torch.float64)
        first = not self._without
        batches = self._tokens.batches("held-out", self.args.per_device_train_batch_size)
        for number, read in enumerate(batches):
            batch = {name: value.to(device) for name, value in read.items()}
            if first:
                _check_whole(batch)
                self._without.append(_without(module, batch))
            without = self._without[number].to(device)
            selected = module.selected(batch)
            counted = selected & (batch["labels"] >= 0)
            losses = without.clone()
            states = module.states(batch, selected)
            if not first:
                losses[counted] = module.losses(states[counted], batch["labels"][counted])
            elif not torch.equal(states, batch["states"]):
                raise TrainingError(
                    "the untrained stage is not the identity on the held-out states, as it must "
                    "be; report this with the model's family"
                )
            for place, mask in enumerate(_scopes(batch, selected)):
                sums[0, place] += without[mask].double().sum().cpu()
                sums[1, place] += losses[mask].double().sum().cpu()
                counts[place] += mask.sum().cpu()
        if first:
            found = zip(SCOPES, _perplexity(sums[0] / counts), strict=True)
            self.perplexities = {scope: value for scope, value in found if not math.isnan(value)}
        ratios = _perplexity((sums[1] - sums[0]) / counts)
        there = zip(SCOPES, ratios, counts.tolist(), strict=True)
        look = Look(
            self.state.global_step, {scope: ratio for scope, ratio, tokens in there if tokens}
        )
        self._told("look", {"step": look.step, **look.ratios})
        return look

    def run(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint where there is one."""
        if checkpoint is None:
            self.train()
            return
        try:
            self.train(resume_from_checkpoint=str(checkpoint))
        except TrainingError:
            raise
        except Exception as error:
            # Trainer, torch and safetensors each have errors of their own for a torn file.
            raise TrainingError(
                f"cannot resume from {checkpoint}: {first_line(error)}; it is cut short: "
                "remove it to go on from the one before, or train without --resume"
            ) from error

    def chosen(self, start: Look, stage: Stage) -> Training:
        """Give the stage the weights of the best look of all, step 0 included."""
        looks = _history(self.state.log_history, start)
        best = min(looks, key=lambda look: look.worst)
        if best.step == 0:
            stack, _, recipe, _ = self._stage_module._held
            stage.load(_untrained(stack, recipe).weights())  # the identity
        return Training(stage, looks, best, self.state.global_step, self.perplexities)


class _Teller(TrainerCallback):
    """Tells about steps."""

    def __init__(self, told: Callable[[str, dict[str, Any]], None]) -> None:
        self.told = told

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell how many steps are to come."""
        self.told("start", {"steps": state.max_steps, "done": state.global_step})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell that a step was made."""
        self.told("step", {"step": state.global_step})


def _history(log: Sequence[dict[str, Any]], start: Look) -> tuple[Look, ...]:
    """Return all looks, those before an interruption included."""
    looks = [start]
    for entry in log:
        if "eval_worst" in entry:
            ratios = {
                scope: float(entry[f"eval_{scope}"]) for scope in SCOPES if f"eval_{scope}" in entry
            }
            looks.append(Look(int(entry["step"]), ratios))
    return tuple(looks)


def _without(module: _StageModule, batch: Batch) -> Tensor:
    """Return the losses `[B, T]` of a batch without the stage, 0 where there is no label."""
    counted = batch["labels"] >= 0
    losses = torch.zeros(counted.shape, device=counted.device)
    losses[counted] = module.losses(batch["states"][counted], batch["labels"][counted], own=False)
    return losses


def _check_whole(batch: Batch) -> None:
    """Refuse tokens of different sequences glued together, or out of their places.

    The stage would learn to attend to what it will not see. It is what made the first CASCADE
    worse, and nothing else would notice: such a stage starts as the identity, too.
    """
    ids, positions = batch["input_ids"], batch["positions"]
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(positions)
    if not torch.equal(positions, places) or not torch.equal(batch["labels"][:, :-1], ids[:, 1:]):
        raise TrainingError(
            "expected whole sequences, each token at its own position and followed by its label, "
            "got others; collect the dataset anew"
        )


def _scopes(batch: Batch, selected: Tensor) -> Iterator[Tensor]:
    """Yield the tokens of each of `SCOPES`; a token counts by the text that it predicts."""
    counted = batch["labels"] >= 0
    response = torch.zeros_like(counted)
    response[:, :-1] = batch["response"][:, 1:]
    yield counted
    yield counted & selected
    yield counted & response
    yield counted & selected & response


def _perplexity(losses: Tensor) -> list[float]:
    return [float(value) for value in losses.exp()]


def _arguments(
    recipe: Recipe,
    folder: Path,
    stack: DecoderStack,
    tokens: HardTokens,
    steps: int | None,
) -> TrainingArguments:
    per_epoch = math.ceil(len(tokens.part("train")) / recipe.batch_size)
    total = steps or max(1, math.ceil(recipe.epochs * per_epoch))
    every = max(1, per_epoch // recipe.looks)
    on_cpu = stack.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=total,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(total / 20),
        weight_decay=recipe.weight_decay,
        adam_beta2=0.99,  # an epoch has only some hundred steps
        max_grad_norm=recipe.clipping,
        seed=recipe.seed,
        use_cpu=on_cpu,
        bf16=not on_cpu and stack.dtype == torch.bfloat16,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_worst",
        greater_is_better=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        report_to="none",
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # a stage is small: one device
    return arguments


def _logging_to(folder: Path) -> TrainerCallback:
    """Return what logs every step and look to a folder, for TensorBoard."""
    from transformers.integrations.integration_utils import TensorBoardCallback

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found, no-redef]
    callback: TrainerCallback = TensorBoardCallback(SummaryWriter(str(folder)))
    return callback


def _check_tensorboard() -> None:
    from importlib.util import find_spec

    if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
        raise UsageError("TensorBoard is not installed; `pip install tensorboard`, or log without")


def _provenance(
    stack: DecoderStack, tokens: HardTokens, recipe: Recipe, training: Training
) -> dict[str, Any]:
    *_, base = stack.with_those_below()  # of stages that follow stages, the same as theirs
    return {
        "base": {
            "name": known(base.provenance.name),
            "weights_hash": base.weights_hash(),
            "tokenizer_hash": known(base.provenance.tokenizer_hash),
            "vocab_size": base.vocab_size,
        },
        "tokens": {
            "layer": tokens.layer,
            "threshold": tokens.threshold,
            "parts": tokens.record["parts"],
            "corpora": tokens.record["provenance"]["corpora"],
        },
        "recipe": dataclasses.asdict(recipe),
        "steps": training.steps,
        "chosen_step": training.chosen.step,
        "perplexities_without": training.perplexities,
        "looks": [{"step": look.step, **look.ratios} for look in training.looks],
        "machine": to_plain(machine_of(stack.device)),
    }
