"""The configuration of the benchmark of lossless decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cascade.benchmarks.timing import BenchmarkError, check_least

#: Dtypes that can be timed.
DTYPES = ("float32", "bfloat16", "float16")

#: Kinds of prompts.
KINDS = ("instructions", "rewriting", "long-context")


@dataclass(frozen=True)
class LosslessBenchmarkConfig:
    """Options of the benchmark of lossless decoding.

    Attributes:
        model: Source of the model, as for `load`.
        dtypes: Dtypes of the model, timed one after the other.
        kinds: Kinds of prompts: "instructions", "rewriting" (of a text in the prompt) and
            "long-context".
        prompts: Prompts of each kind.
        new_tokens: Maximum number of new tokens per prompt.
        batch_sizes: Prompts continued together. Each size is timed separately.
        long_tokens: Tokens of a prompt with a long context.
        corpus: Corpus whose held-out records the prompts are made from.
        text_column: Column to read; null to choose it by the form of the records.
        drafter: Folder of a trained drafter; null without one.
        variants: Variants that are timed next to "generate"; null for all.
        compile: Whether `generate` with `torch.compile` is timed as well.
        peers: Whether other libraries are timed, if they are installed.
        threads: Number of torch threads; null to keep the current number.
        seed: Seed of the resamples and of the first order of variants.
        device: "cpu", "cuda", "mps" or "auto".

    Raises:
        BenchmarkError: A number is out of range, or a name is unknown or repeated.
    """

    model: str = "smollm2-135m"
    dtypes: tuple[str, ...] = DTYPES[:2]
    kinds: tuple[str, ...] = KINDS
    prompts: int = 20
    new_tokens: int = 128
    batch_sizes: tuple[int, ...] = (1,)
    long_tokens: int = 1024
    corpus: str = "embedded"
    text_column: str | None = None
    drafter: str | None = None
    variants: tuple[str, ...] | None = None
    compile: bool = False
    peers: bool = True
    threads: int | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        least = {"prompts": 2, "new_tokens": 2, "long_tokens": 16, "threads": 1, "seed": 0}
        check_least(self, least, {"prompts": "one prompt gives no interval"})
        _check_names("--dtypes", self.dtypes, DTYPES)
        _check_names("--kinds", self.kinds, KINDS)
        sizes = self.batch_sizes
        if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
            got = ",".join(map(str, sizes)) or "none"
            raise BenchmarkError(f"expected different --batch of at least 1, got {got}")
        if self.prompts < 2 * max(sizes):
            raise BenchmarkError(
                f"expected --prompts of at least {2 * max(sizes)} (two batches of {max(sizes)}), "
                f"got {self.prompts}"
            )


def _check_names(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    if not given or not set(given) <= set(known) or len(set(given)) < len(given):
        got = ",".join(given) or "none"
        raise BenchmarkError(f"expected {option} among {', '.join(known)}, each once, got {got}")
