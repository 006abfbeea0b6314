"""Generated texts on disk: shards of a fixed number of prompts, each written once."""

from __future__ import annotations

import json
import random
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cascade.core.errors import OutputError, os_reason
from cascade.core.files import make_folder, write_text
from cascade.core.reading import UnreadableError, read_json
from cascade.core.schema import to_plain
from cascade.drafters.config import DrafterConfig
from cascade.drafters.records import TextsRequest
from cascade.drafters.sealed import read_sealed, write_sealed
from cascade.drafters.texts.batches import BatchedGenerator, GeneratedText, Job
from cascade.drafters.texts.prompts import Prompts
from cascade.models.stack import DecoderStack

#: Texts of a shard, in batches. An interruption loses one shard at most: about two minutes of work
#: for SmolLM2-135M on two cores.
_BATCHES = 3

#: The file with the request, and the name of the held-out shard.
_REQUEST, _HELD_OUT = "request.json", "held-out"

#: Most tokens of an instruction that the model generates, and its temperature.
_INSTRUCTION_TOKENS, _INSTRUCTION_TEMPERATURE = 100, 1.0

#: Fewer tokens are no instruction.
_SHORTEST_INSTRUCTION = 6


class TextProgress(Protocol):
    """Callbacks while texts are generated."""

    def generating(self, tokens: int, done: int) -> None:
        """Called before the first text.

        Args:
            tokens: Tokens to generate, about.
            done: Tokens that an earlier run has generated.
        """

    def generated(self, tokens: int) -> None:
        """Called after every pass, with the tokens generated since the last call."""


@dataclass(frozen=True)
class TextPlan:
    """Which texts are generated.

    Attributes:
        stack: The model.
        prompts: The prompts.
        config: Options of the training.
        feature_layers: The layers whose inputs are stored, 1..N.
        ends: Tokens that end a text.
    """

    stack: DecoderStack
    prompts: Prompts
    config: DrafterConfig
    feature_layers: tuple[int, ...]
    ends: tuple[int, ...]

    def request(self) -> TextsRequest:
        """Return everything that determines the texts."""
        from msgspec.structs import replace

        config = self.config
        return TextsRequest(
            model=replace(self.stack.provenance, weights_hash=self.stack.weights_hash()),
            corpora=list(self.prompts.corpora),
            feature_layers=list(self.feature_layers),
            max_new_tokens=config.max_new_tokens,
            longest_prompt=config.longest_prompt,
            temperature=config.temperature,
            own_instructions=config.own_instructions,
            batch_size=config.batch_size,
            held_out_texts=config.held_out_texts,
            seed=config.seed,
        )

    @property
    def per_shard(self) -> int:
        """Texts of a shard."""
        return _BATCHES * self.config.batch_size

    def held_out_jobs(self) -> list[Job]:
        """Return the held-out texts: prompts evenly spaced over all of them, continued greedily."""
        prompts = self.prompts.held_out
        wanted = min(self.config.held_out_texts, len(prompts))
        rows = [(2 * at + 1) * len(prompts) // (2 * wanted) for at in range(wanted)]
        return [self._job(prompts[row], 0.0, f"held-out {row}") for row in rows]

    def jobs(self, shard: int) -> list[Job]:
        """Return the texts of a training shard.

        The prompts of corpora are shuffled and taken in turn: greedily for the first time, then
        sampled.
        """
        config, prompts = self.config, self.prompts.train
        draw = random.Random(f"{config.seed} {shard}")
        own = round(config.own_instructions * self.per_shard) if self.prompts.around else 0
        own = min(own, self.per_shard - 1)
        jobs, orders = [], dict[int, list[int]]()
        for place in range(self.per_shard - own):
            number = shard * (self.per_shard - own) + place
            epoch, at = divmod(number, len(prompts))
            if epoch not in orders:
                orders[epoch] = list(range(len(prompts)))
                random.Random(f"{config.seed} order {epoch}").shuffle(orders[epoch])
            temperature = config.temperature if epoch else 0.0
            ids = prompts[orders[epoch][at]]
            jobs.append(self._job(ids, temperature, f"{config.seed} {number}"))
        for place in range(own):
            assert self.prompts.around is not None
            name = f"{config.seed} {shard} own {place}"
            before = self.prompts.around[0]
            most = min(_INSTRUCTION_TOKENS, config.longest_prompt)
            jobs.append(Job(before, _INSTRUCTION_TEMPERATURE, name, most, instruction=True))
        draw.shuffle(jobs)
        return jobs

    def _job(self, ids: Sequence[int], temperature: float, seed: str) -> Job:
        return Job(tuple(ids), temperature, seed, self.config.max_new_tokens)

    def answer(self, job: Job, instruction: GeneratedText) -> Job | None:
        """Return the text that answers an instruction which the model generated, or None."""
        assert self.prompts.around is not None
        words = instruction.ids[instruction.prompt :].tolist()
        if words[-1] not in self.ends or len(words) <= _SHORTEST_INSTRUCTION:
            return None
        before, after = self.prompts.around
        ids = (*before, *words[:-1], *after)
        if len(ids) > self.config.longest_prompt or ids in self.prompts.held_out:
            return None
        greedy = random.Random(job.seed).random() < 0.5
        return self._job(ids, 0.0 if greedy else self.config.temperature, f"{job.seed} answer")

    def generator(self) -> BatchedGenerator:
        """Return a generator with empty rows."""
        config = self.config
        return BatchedGenerator(
            self.stack,
            self.feature_layers,
            batch_size=config.batch_size,
            longest_prompt=config.longest_prompt,
            longest=config.longest_prompt + config.max_new_tokens,
            ends=self.ends,
        )


def generate_texts(
    plan: TextPlan, folder: Path, *, overwrite: bool, progress: TextProgress
) -> tuple[list[GeneratedText], list[GeneratedText]]:
    """Generate texts, or read those that an earlier run has generated.

    Args:
        plan: Which texts.
        folder: Folder of the texts.
        overwrite: Replace the texts of another plan.
        progress: Called while texts are generated.

    Returns:
        The training texts, and the held-out ones.

    Raises:
        OutputError: The folder holds texts of another plan, or cannot be written.
        ModelError: Logits are not finite.
    """
    _prepare(plan, folder, overwrite=overwrite)
    held_out, done = _stored(folder / f"{_HELD_OUT}.safetensors"), 0
    shards: list[list[GeneratedText]] = []
    while done < plan.config.tokens:
        found = _stored(_path(folder, len(shards)))
        if found is None:
            break
        shards.append(found)
        done += _tokens(found)
    if held_out is None or done < plan.config.tokens:
        _check_disk(plan, folder, plan.config.tokens - done)
        progress.generating(plan.config.tokens, done)
    if held_out is None:
        held_out = _generate(plan, plan.held_out_jobs(), progress, counted=False)
        _write(folder / f"{_HELD_OUT}.safetensors", held_out)
    while done < plan.config.tokens:
        made = _generate(plan, plan.jobs(len(shards)), progress)
        _write(_path(folder, len(shards)), made)
        shards.append(made)
        done += _tokens(made)
    return [text for shard in shards for text in shard], held_out


def _path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.safetensors"


def _tokens(texts: Sequence[GeneratedText]) -> int:
    return sum(text.new_tokens for text in texts)


class _NoProgress:
    def generating(self, tokens: int, done: int) -> None:
        pass

    def generated(self, tokens: int) -> None:
        pass


def _generate(
    plan: TextPlan, jobs: Sequence[Job], progress: TextProgress, *, counted: bool = True
) -> list[GeneratedText]:
    """Generate the texts of some jobs, in the order of the jobs."""
    waiting, found = deque(jobs), dict[str, GeneratedText]()

    def next_job() -> Job | None:
        return waiting.popleft() if waiting else None

    def done(job: Job, text: GeneratedText) -> None:
        if not job.instruction:
            found[job.seed] = text
            return
        answer = plan.answer(job, text)
        if answer is not None:
            waiting.append(answer)

    shown = progress if counted else _NoProgress()
    plan.generator().run(next_job, done, shown.generated)
    order = [job.seed if not job.instruction else f"{job.seed} answer" for job in jobs]
    return [found[name] for name in order if name in found]


def _prepare(plan: TextPlan, folder: Path, *, overwrite: bool) -> None:
    """Keep the texts of the same plan, and remove those of another one where that is allowed."""
    path, wanted = folder / _REQUEST, to_plain(plan.request())
    try:
        before: Any = read_json(path)
    except FileNotFoundError:
        before = wanted if not folder.is_dir() or not any(folder.iterdir()) else None
    except UnreadableError:
        before = None
    difference = _difference(before, wanted)
    if difference is not None and not overwrite:
        raise OutputError(
            f"{folder} holds texts of another run ({difference}); continue with its arguments, "
            "choose another --output, or replace it with --overwrite"
        )
    try:
        if difference is not None:
            shutil.rmtree(folder)
        make_folder(folder)
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {os_reason(error)}; choose another --output"
        ) from error
    write_text(path, json.dumps(wanted, indent=1, allow_nan=False) + "\n")


def _difference(before: Any, now: dict[str, Any]) -> str | None:
    if not isinstance(before, dict):
        return f"its {_REQUEST} is missing or torn"
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return names[0].replace("_", " ") if names else None


def _check_disk(plan: TextPlan, folder: Path, tokens: int) -> None:
    """Check that the disk has room for the texts. Prompts have about as many tokens.

    Raises:
        OutputError: It has not; the message names the needed and the free space.
    """
    per_token = 2 * (len(plan.feature_layers) + 1) * plan.stack.hidden_size
    needed, free = 2 * max(tokens, 0) * per_token, shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder} needs about {needed / 1e9:.3g} GB, but the disk has {free / 1e9:.3g} GB "
            "free; free some space, or choose fewer --tokens or another --output"
        )


def _write(path: Path, texts: Sequence[GeneratedText]) -> None:
    def numbers(values: Iterator[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32)

    tensors = {
        "ids": torch.cat([text.ids for text in texts]),
        "lengths": numbers(len(text.ids) for text in texts),
        "prompts": numbers(text.prompt for text in texts),
        "greedy": numbers(int(text.greedy) for text in texts),
        "features": torch.cat([text.features for text in texts]),
    }
    write_sealed(path, tensors, {"texts": len(texts)})


def _stored(path: Path) -> list[GeneratedText] | None:
    """Return the texts of a shard; None if it is missing, incomplete or edited."""
    try:
        tensors, _ = read_sealed(path)
        lengths = tensors["lengths"].tolist()
        rows = zip(
            tensors["ids"].split(lengths),
            tensors["prompts"].tolist(),
            tensors["greedy"].tolist(),
            tensors["features"].split([length - 1 for length in lengths]),
            strict=True,
        )
        return [
            GeneratedText(ids, prompt, bool(greedy), states) for ids, prompt, greedy, states in rows
        ]
    except (FileNotFoundError, UnreadableError, KeyError, ValueError, RuntimeError):
        return None


def counts_of(texts: Sequence[GeneratedText]) -> tuple[int, int, float]:
    """Return the number of texts and of generated tokens, and the share of greedy texts."""
    greedy = sum(text.greedy for text in texts) / len(texts)
    return len(texts), _tokens(texts), greedy
