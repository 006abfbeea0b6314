"""Train a stage on hard tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments

from cascade.core.errors import TrainingError, UsageError
from cascade.core.files import AnyPath
from cascade.core.provenance import machine_of
from cascade.core.schema import known
from cascade.models.overrides.hooks import frozen
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.dataset import HardTokens
from cascade.stages.records import HeldOutEvaluation, StageBase, StageTokens, TrainingProvenance
from cascade.stages.stage import Stage, new_stage
from cascade.stages.trainer.checkpoints import TrainingRequest, begin, checkpoint_of
from cascade.stages.trainer.stage_module import StageInTraining, StageModule
from cascade.stages.trainer.stage_trainer import NoProgress, StageTrainer, TrainingProgress
from cascade.stages.training_config import TrainingConfig
from cascade.stats.perplexity import perplexity


@dataclass(frozen=True)
class Training:
    """A trained stage and its training history.

    Attributes:
        stage: The stage, with the weights of the best evaluation. These can be the initial weights.
        evaluations: All evaluations on the held-out split, step 0 first.
        chosen: The best evaluation, whose weights the stage has.
        steps: Number of training steps.
        perplexities: Held-out perplexity without the stage, by scope; None above e^700. Scopes
            without tokens are absent.
        provenance: Training provenance, as stored in records.
    """

    stage: Stage
    evaluations: tuple[HeldOutEvaluation, ...]
    chosen: HeldOutEvaluation
    steps: int
    perplexities: dict[str, float | None]
    provenance: TrainingProvenance


def train_stage(
    stack: DecoderStack,
    tokens: HardTokens,
    config: TrainingConfig,
    folder: AnyPath,
    *,
    resume: bool = False,
    steps: int | None = None,
    tensorboard: AnyPath | None = None,
    progress: TrainingProgress | None = None,
) -> Training:
    """Train a stage on a model's stored exit states. The model itself is never run.

    The loss is the cross entropy of the tokens that enter the stage. The best evaluation is the one
    with the lowest held-out perplexity of the whole cascade, including tokens that exit before the
    stage. Of the two perplexity ratios, over all text and over response text, the worse one counts.
    Step 0, where the stage is the identity, is one of the candidates, so the result is never worse
    than the model without a stage on the held-out split.

    Args:
        stack: Model that the stage follows. Its weights are not changed.
        tokens: Exit states of that model, from `collect_hard`.
        config: Training options.
        folder: Folder for checkpoints. The last and the best one are kept.
        resume: Continue from the last checkpoint in the folder. Otherwise, checkpoints of an
            earlier training run are removed.
        steps: Make exactly this many steps and ignore patience (default: all steps of the epochs).
        tensorboard: Folder for TensorBoard logs.
        progress: Called during training.

    Returns:
        The stage with the weights of the best evaluation, and the training history.

    Raises:
        UsageError: An option is invalid, or TensorBoard is not installed.
        ModelError: The states belong to another model.
        TrainingError: A loss is NaN or infinite (the message names the step and the last good
            checkpoint), there is no checkpoint to resume from, a checkpoint is incomplete or
            belongs to another configuration, or the base's weights were changed.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from cascade import CollectingConfig, TrainingConfig, collect_hard, load, load_blocks
        >>> from cascade import train_stage
        >>> base, folder = load("smollm2-135m"), Path(mkdtemp())
        >>> splits = {
        ...     split: load_blocks(
        ...         "embedded", base.tokenizer, max_tokens=256, record_split=split, marks=True
        ...     )
        ...     for split in ("train", "held-out")
        ... }
        >>> tokens = collect_hard(base, splits, folder / "tokens", CollectingConfig(hard_ratio=0.5))
        >>> config = TrainingConfig(additional_layers=1)
        >>> training = train_stage(base, tokens, config, folder / "checkpoints", steps=1)
        >>> len(training.stage.layers)
        1
    """
    config.check()
    folder = Path(folder)
    if tensorboard is not None:
        _check_tensorboard()
    tokens.check(stack)
    before = stack.weights_in_memory()
    stage = _untrained(stack, config)
    trainer = StageTrainer(
        StageModule(
            StageInTraining.of(stack, stage, config, tokens.record.splits["train"].hard_ratio)
        ),
        tokens,
        _arguments(config, folder, stack, tokens, steps),
        patience=config.patience if steps is None else None,
        progress=progress or NoProgress(),
    )
    if tensorboard is not None:
        trainer.add_callback(_logging_to(tensorboard))
    with frozen(stack.model):
        start = trainer.evaluate_now()
        request = TrainingRequest.of(tokens, config, steps)
        if not resume:
            begin(folder, request)
        trainer.run(checkpoint_of(folder, request) if resume else None)
        evaluations = (start, *trainer.evaluations())
        chosen = _best(evaluations)
        if chosen.step == 0:
            stage.load(_untrained(stack, config).weights())  # the identity
    if stack.weights_in_memory() != before:
        raise TrainingError(
            "training changed the base's weights, which must stay fixed; report this as a bug and "
            "name the model family"
        )
    provenance = _provenance(stack, tokens, config, trainer, evaluations)
    stage.provenance = provenance
    steps_made = trainer.state.global_step
    perplexities = provenance.perplexities_without
    return Training(stage, evaluations, chosen, steps_made, perplexities, provenance)


def _best(evaluations: Sequence[HeldOutEvaluation]) -> HeldOutEvaluation:
    return min(evaluations, key=lambda evaluation: evaluation.worst)


def _provenance(
    stack: DecoderStack,
    tokens: HardTokens,
    config: TrainingConfig,
    trainer: StageTrainer,
    evaluations: Sequence[HeldOutEvaluation],
) -> TrainingProvenance:
    return TrainingProvenance(
        base=_base(stack),
        tokens=_tokens(tokens),
        config=config,
        steps=trainer.state.global_step,
        chosen_step=_best(evaluations).step,
        perplexities_without={
            scope: perplexity(nats) for scope, nats in trainer.nats_without.items()
        },
        nats_without=trainer.nats_without,
        evaluations=list(evaluations),
        machine=machine_of(stack.device),
    )


def _base(stack: DecoderStack) -> StageBase:
    *_, base = stack.with_base_models()  # the base model, also for a second or later stage
    return StageBase(
        name=known(base.provenance.name),
        weights_hash=base.weights_hash(),
        tokenizer_hash=known(base.provenance.tokenizer_hash),
        vocab_size=base.vocab_size,
    )


def _tokens(tokens: HardTokens) -> StageTokens:
    return StageTokens(
        layer=tokens.layer,
        threshold=tokens.threshold,
        splits=tokens.record.splits,
        corpora=tokens.record.provenance.corpora,
    )


def _untrained(stack: DecoderStack, config: TrainingConfig) -> Stage:
    return new_stage(
        stack,
        config.additional_layers,
        start=config.start,
        own_head=config.own_head,
        seed=config.seed,
    )


def _arguments(
    config: TrainingConfig,
    folder: Path,
    stack: DecoderStack,
    tokens: HardTokens,
    steps: int | None,
) -> TrainingArguments:
    per_epoch = math.ceil(len(tokens.split("train")) / config.batch_size)
    total = steps or max(1, math.ceil(config.epochs * per_epoch))
    every = max(1, per_epoch // config.evaluations_per_epoch)
    on_cpu = stack.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=total,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(total / 20),
        weight_decay=config.weight_decay,
        adam_beta2=0.99,  # an epoch has only a few hundred steps
        max_grad_norm=config.clipping,
        seed=config.seed,
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
    arguments._n_gpu = min(1, arguments.n_gpu)  # a stage is small, one device is enough
    return arguments


def _logging_to(folder: AnyPath) -> TrainerCallback:
    """Return a callback that logs every step and evaluation to a TensorBoard folder."""
    from transformers.integrations.integration_utils import TensorBoardCallback

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found, no-redef]
    callback: TrainerCallback = TensorBoardCallback(SummaryWriter(os.fspath(folder)))
    return callback


def _check_tensorboard() -> None:
    from importlib.util import find_spec

    if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
        raise UsageError(
            "TensorBoard is not installed; run `pip install tensorboard`, or leave out "
            "--tensorboard"
        )
