"""The training of a drafter: from closed-form input matrices, by AdamW, with exact resuming."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cascade.core.errors import OutputError, TrainingError, os_reason
from cascade.core.files import make_folder
from cascade.core.reading import UnreadableError
from cascade.core.schema import SchemaError, from_plain, to_plain
from cascade.drafters.acceptance import Chains, chains_of, evaluation_of
from cascade.drafters.config import DrafterConfig, Precision
from cascade.drafters.network.architectures import new_network
from cascade.drafters.network.drafter_network import (
    DrafterNetwork,
    DraftHead,
    FitRows,
    embeddings_of,
)
from cascade.drafters.network.layers import rotary_tables
from cascade.drafters.records import DraftEvaluation
from cascade.drafters.sealed import read_sealed, write_sealed
from cascade.drafters.texts.batches import GeneratedText
from cascade.models.stack import DecoderStack

#: Tokens that the closed form is fitted on.
_FITTED_TOKENS = 50_000

#: Each further draft step counts this much less; a prompt's own tokens count this much.
_DECAY, _PROMPT_WEIGHT = 0.8, 0.4

#: Steps of the warm-up, and the last learning rate as a share of the highest.
_WARMUP, _LAST_RATE = 15, 0.05

_CHECKPOINT = re.compile(r"step-(\d{6})\.safetensors")


class DrafterProgress(Protocol):
    """Callbacks during training."""

    def started(self, steps: int, done: int) -> None:
        """Called before the first step, with the number of steps and of those already done."""

    def step_done(self, step: int) -> None:
        """Called after every step, with its number from 1."""

    def evaluated(self, evaluation: DraftEvaluation) -> None:
        """Called after every evaluation on held-out texts, also with those before resuming."""


@dataclass(frozen=True)
class TrainingData:
    """What a drafter is trained and selected on.

    Attributes:
        stack: The model.
        train: Texts to train on.
        selection: Held-out texts that select the best evaluation.
        head: The rows of the LM head that the drafter chooses from, in fp32.
    """

    stack: DecoderStack
    train: Sequence[GeneratedText]
    selection: Sequence[GeneratedText]
    head: DraftHead


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network and its training history.

    Attributes:
        network: The network, with the weights of the best evaluation.
        evaluations: All evaluations, step 0 first.
        chosen: The best one.
    """

    network: DrafterNetwork
    evaluations: tuple[DraftEvaluation, ...]
    chosen: DraftEvaluation


def usual_precision() -> Precision:
    """Return how products are computed in training: in bfloat16 where the processor has them."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return "bfloat16" if fast else "float32"


class NetworkTraining:
    """Trains the network of a drafter.

    Args:
        data: What it is trained on.
        feature_layers: The layers whose inputs it reads, 1..N.
        config: Options of the training.
        precision: How products are computed.
        request: Everything else that determines the weights; only an equal request can resume.

    Attributes:
        network: The network.
        step: The number of steps made.
        evaluations: The evaluations so far.
    """

    def __init__(
        self,
        data: TrainingData,
        feature_layers: Sequence[int],
        config: DrafterConfig,
        precision: Precision,
        request: Mapping[str, Any],
    ) -> None:
        self.data, self.config, self.precision = data, config, precision
        self._request = {
            **request,
            "config": to_plain(config),
            "precision": precision,
            "feature_layers": list(feature_layers),
        }
        self.step = 0
        self.evaluations: list[DraftEvaluation] = []
        self.network = new_network(config.architecture, data.stack, feature_layers)
        self._best: dict[str, Tensor] = {}
        self._embedding = embeddings_of(data.stack)
        self._tables = rotary_tables(data.stack, max(len(text.ids) for text in data.train))
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )

    def run(self, folder: Path, *, resume: bool, progress: DrafterProgress) -> TrainedNetwork:
        """Train the network.

        Args:
            folder: Folder of the checkpoints. The last two are kept.
            resume: Continue from the last checkpoint. Otherwise, earlier ones are removed.
            progress: Called during training.

        Raises:
            TrainingError: A loss is not finite, or there is no checkpoint to resume from that is
                complete and of the same request.
            OutputError: A checkpoint cannot be written.
        """
        if resume:
            self._load(folder)
        else:
            _remove(folder, keep=0)
            fit_inputs(self.network, self._embedding, self.data.train)
            self._evaluate()
        progress.started(self.config.steps, self.step)
        for evaluation in self.evaluations:
            progress.evaluated(evaluation)
        every = max(1, self.config.steps // self.config.evaluations)
        for batch in self._batches():
            self._train(batch)
            progress.step_done(self.step)
            if self.step % every == 0 or self.step == self.config.steps:
                self._evaluate()
                progress.evaluated(self.evaluations[-1])
                self._save(folder)
        self.network.load_state_dict(self._best)
        return TrainedNetwork(self.network, tuple(self.evaluations), self._chosen())

    def _chosen(self) -> DraftEvaluation:
        return max(self.evaluations, key=lambda evaluation: evaluation.tokens_per_pass)

    def _evaluate(self) -> None:
        found = self.chains(self.data.selection)
        self.evaluations.append(evaluation_of(self.step, self.data.selection, found))
        if self._chosen() is self.evaluations[-1]:
            self._best = {
                name: weight.detach().clone() for name, weight in self.network.state_dict().items()
            }

    def chains(self, texts: Sequence[GeneratedText]) -> list[Chains]:
        """Return the chains of the network, as it is now, on some texts."""
        network, head = self.network, self.data.head
        tables = rotary_tables(self.data.stack, max((len(text.ids) for text in texts), default=1))
        return [chains_of(network, head, self._embedding, text, tables) for text in texts]

    # --- Batches and loss ---

    def _batches(self) -> Iterator[list[GeneratedText]]:
        """Yield the batches of the steps that are left. Each epoch has an order of its own."""
        made, epoch = 0, 0
        while made < self.config.steps:
            batches = _epoch(self.data.train, self.config, epoch)
            for batch in batches[: self.config.steps - made]:
                made += 1
                if made > self.step:
                    yield batch
            epoch += 1

    def _train(self, batch: Sequence[GeneratedText]) -> None:
        self.step += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * _rate(self.step, self.config.steps)
        self._optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = self.loss(batch)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss of the drafter is {loss.item():g} at step {self.step}; choose a smaller"
                " --lr"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self._optimizer.step()

    def loss(self, batch: Sequence[GeneratedText]) -> Tensor:
        """Return the loss of some texts.

        Half of it is the cross entropy of the model's own distribution over the drafter's tokens,
        half that of the model's likeliest one of them. Each chain is unrolled for a few steps.

        Args:
            batch: The texts.
        """
        padded = _Padded.of(batch, self._embedding.device)
        length = padded.ids.shape[1] - 2
        tables = (self._tables[0][:, :length], self._tables[1][:, :length])
        total = torch.zeros((), device=padded.ids.device)
        with torch.autocast(
            padded.ids.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        ):
            states = self.network.unroll(
                self._embedding[padded.ids[:, 1:-1]].float(),
                padded.features[:, :-1],
                tables,
                self.config.draft_steps,
            )
            # What a row is to predict does not depend on the draft step.
            wanted, place = self._targets(padded)
            for step, state in enumerate(states):
                weights = padded.weights(step)
                rows = weights > 0
                logits = self.data.head.logits(self.network.norm(state[rows])).float()
                targets = wanted if step == 0 else wanted[place[rows]]
                loss = logits.logsumexp(dim=-1) - (targets * logits).sum(dim=-1)
                share = (loss * weights[rows]).sum() / weights.sum().clamp_min(1e-6)
                total = total + _DECAY**step * share
        return total

    @torch.no_grad()
    def _targets(self, padded: _Padded) -> tuple[Tensor, Tensor]:
        """Return the distributions that the rows are to predict, and the place of each row's.

        Returns:
            `[n, V']`, half the model's own distribution and half its likeliest token; and
            `[B, L - 2]`, where a row with a weight has its distribution.
        """
        rows = padded.weights(0) > 0
        own = self.data.head.logits(padded.features[:, 1:, -1][rows].float()).float()
        best = own.argmax(dim=-1, keepdim=True)
        wanted = own.softmax(dim=-1).div_(2)
        wanted.scatter_add_(1, best, torch.full_like(best, 0.5, dtype=wanted.dtype))
        return wanted, (rows.flatten().cumsum(0) - 1).view(rows.shape)

    # --- Checkpoints ---

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"network.{name}": each for name, each in self.network.state_dict().items()}
        tensors |= {f"best.{name}": each for name, each in self._best.items()}
        for number, values in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": each for name, each in values.items()}
        return {name: each.detach().contiguous() for name, each in tensors.items()}

    def _save(self, folder: Path) -> None:
        about = {
            "step": self.step,
            "request": self._request,
            "evaluations": [to_plain(each) for each in self.evaluations],
        }
        write_sealed(folder / f"step-{self.step:06d}.safetensors", self._tensors(), about)
        _remove(folder, keep=2)

    def _load(self, folder: Path) -> None:
        paths = _checkpoints(folder)
        if not paths:
            raise TrainingError(f"no checkpoint in {folder} to resume from; train without --resume")
        path = paths[-1]
        try:
            tensors, about = read_sealed(path)
            request, self.step = about["request"], int(about["step"])
            self.evaluations = from_plain(about["evaluations"], list[DraftEvaluation])
            self._check(folder, request)
            self._restore(tensors)
        except TrainingError:
            raise
        except (
            UnreadableError,
            SchemaError,
            KeyError,
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:
            raise TrainingError(
                f"cannot resume from {path}, which is torn or edited; remove it to resume from the"
                " previous one, or train without --resume"
            ) from error

    def _check(self, folder: Path, made: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(self._request, allow_nan=False))
        for name in wanted:
            if made.get(name) != wanted[name]:
                raise TrainingError(
                    f"the checkpoints in {folder} belong to another run ({name} differs); continue"
                    " with its options, or train without --resume"
                )

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        def named(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): each
                for name, each in tensors.items()
                if name.startswith(prefix)
            }

        self.network.load_state_dict(named("network."))
        self._best = named("best.")
        state: dict[int, dict[str, Tensor]] = {}
        for name, each in named("optimizer.").items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = each
        whole = self._optimizer.state_dict()
        if len(state) != len(whole["param_groups"][0]["params"]):
            raise ValueError("the optimizer's state is incomplete")
        self._optimizer.load_state_dict(whole | {"state": state})


@torch.no_grad()
def fit_inputs(network: DrafterNetwork, embedding: Tensor, texts: Sequence[GeneratedText]) -> None:
    """Set the input matrices of a network to the closed form that predicts its layer's next input.

    Args:
        network: The network.
        embedding: Embeddings of all tokens, `[V, D]`.
        texts: Training texts.
    """
    network.fit(_fitted_rows(len(network.feature_layers), embedding, texts))


def _fitted_rows(
    layers: int, embedding: Tensor, texts: Sequence[GeneratedText]
) -> Iterator[FitRows]:
    """Yield the rows of texts, from the last token of each prompt on, until there are enough."""
    device, count = embedding.device, 0
    for text in texts:
        states = text.features.to(device).float()
        start = min(max(0, text.prompt - 1), len(states) - 2)
        embedded = embedding[text.ids[1:-1].long().to(device)]
        # The input of the network's layer is the last of those that are read.
        yield FitRows(embedded[start:], states[start:-1], states[start + 1 :, layers - 1])
        count += len(states) - 1 - start
        if count >= _FITTED_TOKENS:
            return


def _rate(step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of the highest: warm-up and half cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return min(1.0, step / _WARMUP) * (_LAST_RATE + (1 - _LAST_RATE) * cosine)


def _epoch(
    texts: Sequence[GeneratedText], config: DrafterConfig, epoch: int
) -> list[list[GeneratedText]]:
    """Return the batches of an epoch: texts of about the same length, in random order."""
    draw = random.Random(f"{config.seed} epoch {epoch}")
    order = sorted(texts, key=lambda text: len(text.ids) + 20 * draw.random())
    batches: list[list[GeneratedText]] = [[]]
    for text in order:
        batches[-1].append(text)
        if len(batches[-1]) * len(text.ids) >= config.step_tokens:
            batches.append([])
    batches = [batch for batch in batches if batch]
    draw.shuffle(batches)
    return batches


@dataclass(frozen=True)
class _Padded:
    """Texts of a batch, padded to the length of the longest, L.

    Attributes:
        ids: `[B, L]`.
        features: `[B, L - 1, F + 1, D]`.
        kinds: What row t, which predicts the token at position t + 2, counts for, `[B, L - 2]`:
            2 for a token behind the prompt and its first token, 1 for one of the prompt, 0 for
            padding.
    """

    ids: Tensor
    features: Tensor
    kinds: Tensor

    @classmethod
    def of(cls, batch: Sequence[GeneratedText], device: torch.device) -> _Padded:
        """Return a batch of texts."""
        longest = max(len(text.ids) for text in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        shape = (len(batch), longest - 1, *batch[0].features.shape[1:])
        features = torch.zeros(shape, dtype=batch[0].features.dtype)
        kinds = torch.zeros((len(batch), longest - 2), dtype=torch.long)
        for row, text in enumerate(batch):
            ids[row, : len(text.ids)] = text.ids
            features[row, : len(text.features)] = text.features
            kinds[row, : len(text.ids) - 2] = 1
            kinds[row, text.prompt - 1 : len(text.ids) - 2] = 2
        return cls(ids.to(device), features.to(device), kinds.to(device))

    def weights(self, step: int) -> Tensor:
        """Return what each row counts at a draft step, `[B, L - 2]`."""
        if step == 0:
            return torch.where(self.kinds == 1, _PROMPT_WEIGHT, (self.kinds == 2).float())
        # The chain must have begun behind the prompt.
        begun = torch.zeros_like(self.kinds)
        begun[:, step:] = self.kinds[:, :-step]
        return ((self.kinds == 2) & (begun == 2)).float()


def _checkpoints(folder: Path) -> list[Path]:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TrainingError(
            f"cannot read {folder}: {os_reason(error)}; make it readable or choose another --output"
        ) from error
    return [folder / name for name in names if _CHECKPOINT.fullmatch(name)]


def _remove(folder: Path, *, keep: int) -> None:
    """Remove all checkpoints but the last ones."""
    try:
        make_folder(folder)
        found = _checkpoints(folder)
        for path in found[: len(found) - keep]:
            path.unlink()
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {os_reason(error)}; make it writable or choose another"
            " --output"
        ) from error
