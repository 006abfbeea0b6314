"""Train a drafter: generate texts, train on them, judge on held-out ones, store the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from msgspec.structs import replace
from torch import Tensor

from cascade.core.errors import CorpusError, OutputError
from cascade.core.files import AnyPath
from cascade.core.locks import locked
from cascade.core.provenance import library_versions, machine_of
from cascade.core.run_folder import RunFolder
from cascade.core.schema import to_plain
from cascade.decoding.drafting.tables import NgramTable
from cascade.drafters.acceptance import accepted_by_position, calibration_of
from cascade.drafters.comparison import compare_methods
from cascade.drafters.config import DrafterConfig, Precision
from cascade.drafters.network.architectures import check_architecture
from cascade.drafters.network.drafter_network import (
    DraftHead,
    feature_layers_of,
    usual_start_layer,
)
from cascade.drafters.network.vocabulary import choose_tokens, ends_of
from cascade.drafters.proposer import TrainedDrafter, load_drafter
from cascade.drafters.records import DrafterProvenance, DrafterRecord, DraftEvaluation, TextCounts
from cascade.drafters.stored import RECORD, WEIGHTS, Drafter, write_drafter
from cascade.drafters.texts.batches import GeneratedText
from cascade.drafters.texts.prompts import CorpusSource, load_prompts
from cascade.drafters.texts.shards import TextPlan, TextProgress, counts_of, generate_texts
from cascade.drafters.training import (
    DrafterProgress,
    NetworkTraining,
    TrainedNetwork,
    TrainingData,
    usual_precision,
)
from cascade.models.overrides.hooks import frozen
from cascade.models.stack import DecoderStack

#: In the folder of a drafter: the texts that it was trained on, and the checkpoints.
TEXTS, CHECKPOINTS = "texts", "checkpoints"

#: A text with fewer new tokens gives no draft to train on or to judge.
_SHORTEST = 2


class MakingProgress(TextProgress, DrafterProgress, Protocol):
    """Callbacks while texts are generated and while the drafter is trained."""


class NoProgress:
    """A `MakingProgress` that does nothing. Subclasses override the callbacks they need."""

    def generating(self, tokens: int, done: int) -> None:
        """Do nothing."""

    def generated(self, tokens: int) -> None:
        """Do nothing."""

    def started(self, steps: int, done: int) -> None:
        """Do nothing."""

    def step_done(self, step: int) -> None:
        """Do nothing."""

    def evaluated(self, evaluation: DraftEvaluation) -> None:
        """Do nothing."""


def train_drafter(
    stack: DecoderStack,
    corpora: Sequence[CorpusSource | str],
    folder: AnyPath,
    config: DrafterConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
    progress: MakingProgress | None = None,
) -> TrainedDrafter:
    """Train a drafter for a model on texts that the model generates itself.

    Prompts are split by record. Texts of training prompts train the drafter, those of held-out
    prompts select the best evaluation (one half of them) and judge it (the other half). Texts that
    an earlier call with the same arguments has generated are read from the folder.

    Args:
        stack: The model. Its weights are not changed.
        corpora: Where prompts are taken from: as for `load_blocks`, or with a column and a number
            of records.
        folder: Output folder. Texts and checkpoints are kept in folders below.
        config: Options.
        resume: Continue the training from its last checkpoint.
        overwrite: Replace an earlier drafter, and texts that were generated with other arguments.
        command: Command that the user ran, for the record.
        progress: Called meanwhile.

    Returns:
        The drafter.

    Raises:
        UnsupportedModelError: The layers of the model are not Llama's.
        UsageError: An option is invalid.
        CorpusError: A corpus cannot be read, or gives too few texts.
        OutputError: The folder holds other files or cannot be written, or the disk is too small.
        TrainingError: A loss is not finite, or there is no checkpoint to resume from.

    Example:
        >>> from tempfile import mkdtemp
        >>> from cascade import DrafterConfig, load, train_drafter
        >>> config = DrafterConfig(
        ...     tokens=40, max_new_tokens=8, batch_size=4, held_out_texts=2, steps=1, step_tokens=64
        ... )
        >>> drafter = train_drafter(load("smollm2-135m"), ["embedded"], mkdtemp(), config)
        >>> len(drafter.tokens)
        8192
    """
    config.check()
    folder, shown = Path(folder), progress or NoProgress()
    check_output(folder, overwrite=overwrite or resume)
    layer = usual_start_layer(stack.num_layers) if config.layer is None else config.layer
    layers = feature_layers_of(stack.num_layers, layer)
    check_architecture(config.architecture, stack, layers)
    config = _within_positions(config, stack)
    sources = [CorpusSource(each) if isinstance(each, str) else each for each in corpora]
    prompts = load_prompts(sources, stack.tokenizer, longest=config.longest_prompt, bos=config.bos)
    plan = TextPlan(stack, prompts, config, layers, ends_of(stack))
    with locked(folder / TEXTS, doing="training a drafter in"):
        texts, held_out = generate_texts(plan, folder / TEXTS, overwrite=overwrite, progress=shown)
        texts, held_out = _usable(texts), _usable(held_out)
        if not texts or len(held_out) < 2:
            raise CorpusError(
                f"expected texts with at least {_SHORTEST} generated tokens, two of them held out, "
                f"got {len(texts)} and {len(held_out)}; take other prompts with --corpus"
            )
        training, trained = _train(plan, texts, held_out[::2], folder, shown, resume=resume)
        judging = held_out[1::2]
        table = _table_of(texts)
        record = _record(plan, training, trained, texts, judging, len(table), command)
        tokens = training.data.head.tokens
        # As it is stored.
        made = Drafter(trained.network.to(torch.bfloat16), tokens, table, record)
        methods, use = compare_methods(stack, made, judging)
        made = dataclasses.replace(made, record=replace(record, methods=methods, use=use))
        with RunFolder(folder, (RECORD, WEIGHTS), overwrite=overwrite or resume) as out:
            write_drafter(out, made)
    return load_drafter(folder, stack, network=True)


def _train(
    plan: TextPlan,
    texts: Sequence[GeneratedText],
    selection: Sequence[GeneratedText],
    folder: Path,
    progress: DrafterProgress,
    *,
    resume: bool,
) -> tuple[NetworkTraining, TrainedNetwork]:
    """Train a drafter on some texts; others select the best evaluation."""
    stack, config = plan.stack, plan.config
    tokens = choose_tokens(
        ((text.ids, text.prompt) for text in texts), config.vocabulary, stack.vocab_size, plan.ends
    )
    training = NetworkTraining(
        TrainingData(stack, texts, selection, DraftHead(stack, tokens, torch.float32)),
        plan.feature_layers,
        config,
        usual_precision(),
        {"texts": to_plain(plan.request()), "counts": list(counts_of(texts))},
    )
    with frozen(stack.model):
        return training, training.run(folder / CHECKPOINTS, resume=resume, progress=progress)


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Check that a drafter can be written to a folder. Nothing is written.

    Args:
        folder: The folder.
        overwrite: Allow replacing an existing drafter.

    Raises:
        OutputError: It is a file, or holds a drafter.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, expected a folder; choose another --output")
    if (folder / RECORD).exists() and not overwrite:
        raise OutputError(
            f"{folder} holds a drafter: choose another --output, or replace it with --overwrite"
        )


def _within_positions(config: DrafterConfig, stack: DecoderStack) -> DrafterConfig:
    """Return the options with prompts and texts that fit into the model's positions."""
    limit = stack.max_positions
    if limit is None or config.longest_prompt + config.max_new_tokens <= limit:
        return config
    prompt = min(config.longest_prompt, limit // 2)
    return replace(
        config, longest_prompt=prompt, max_new_tokens=min(config.max_new_tokens, limit - prompt)
    )


def _usable(texts: Sequence[GeneratedText]) -> list[GeneratedText]:
    return [text for text in texts if text.new_tokens >= _SHORTEST and len(text.ids) > _SHORTEST]


def _record(
    plan: TextPlan,
    training: NetworkTraining,
    trained: TrainedNetwork,
    texts: Sequence[GeneratedText],
    judging: Sequence[GeneratedText],
    contexts: int,
    command: str | None,
) -> DrafterRecord:
    """Return the record of a trained drafter, before ways to draft are compared.

    Its figures are from the texts that judge it.
    """
    stack, tokens = plan.stack, training.data.head.tokens
    chains, others = training.chains(judging), training.chains(training.data.selection)
    precision: Precision = training.precision
    request = plan.request()
    return DrafterRecord(
        provenance=DrafterProvenance(
            model=request.model,
            corpora=request.corpora,
            machine=machine_of(stack.device),
            versions=library_versions(),
            command=command,
        ),
        config=plan.config,
        precision=precision,
        feature_layers=list(plan.feature_layers),
        vocabulary=len(tokens),
        ends=list(plan.ends),
        texts=_counts(texts),
        held_out=_counts([*training.data.selection, *judging]),
        coverage=_coverage(judging, tokens),
        evaluations=list(trained.evaluations),
        chosen_step=trained.chosen.step,
        accepted=accepted_by_position(chains),
        calibration=calibration_of([*others, *chains]),
        contexts=contexts,
        methods=[],
        use="none",
        file=WEIGHTS,
        sha256="",
    )


def _table_of(texts: Sequence[GeneratedText]) -> NgramTable:
    """Return the table of what the model generated, also directly behind the prompts."""
    return NgramTable.of(text.ids[max(0, text.prompt - 3) :].tolist() for text in texts)


def _counts(texts: Sequence[GeneratedText]) -> TextCounts:
    number, tokens, greedy = counts_of(texts)
    return TextCounts(texts=number, tokens=tokens, greedy=greedy)


def _coverage(texts: Sequence[GeneratedText], tokens: Tensor) -> float:
    """Return the share of generated tokens that a drafter can propose without the prompt's."""
    known = tokens.cpu()
    new = torch.cat([text.ids[text.prompt :] for text in texts])
    return float(torch.isin(new.long(), known).float().mean())
