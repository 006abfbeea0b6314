"""Options for training a drafter."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from cascade.core.arguments import check_seed
from cascade.core.errors import UsageError

#: How products are computed in training: in bfloat16 with fp32 weights, or in fp32.
Precision = Literal["bfloat16", "float32"]

#: What a drafter's layer reads: a projected state, as the model's own layers do; or an embedding
#: and a state side by side, as in EAGLE-3, for which other programs have loaders.
Architecture = Literal["cascade", "eagle3"]
ARCHITECTURES: tuple[Architecture, ...] = ("cascade", "eagle3")


def checked_architecture(name: str) -> Architecture:
    """Return the architecture with a name.

    Args:
        name: The name.

    Raises:
        UsageError: There is none.
    """
    for known in ARCHITECTURES:
        if name == known:
            return known
    raise UsageError(f"expected --architecture {' or '.join(ARCHITECTURES)}, got {name}")


class DrafterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options for training a drafter.

    Attributes:
        tokens: Tokens to generate for training, without prompts.
        max_new_tokens: The most tokens of a generated text.
        longest_prompt: The most tokens of a prompt; longer ones are left out.
        temperature: Temperature of the texts that are sampled. The others are greedy.
        own_instructions: Share of texts that answer an instruction which the model generated from
            its chat template alone. Without a template there are none.
        batch_size: Texts that are generated at a time.
        held_out_texts: Most held-out prompts that are continued, to select and to judge.
        layer: Layer whose copy the drafter is, 1..N (default: nine tenths up).
        architecture: "cascade", or "eagle3" for a drafter that `export_drafter` can write.
        vocabulary: Number of tokens that the drafter can propose.
        steps: Training steps.
        step_tokens: Tokens of the texts of a step, with padding.
        learning_rate: Peak learning rate of AdamW. It warms up and decays along a half cosine.
        draft_steps: Draft steps that each text is unrolled for in training.
        evaluations: Evaluations on held-out texts, in addition to the one before the first step.
        bos: Whether prompts begin with BOS, as for `load_blocks`.
        seed: Seed of prompts, sampling and batch order.

    Example:
        >>> DrafterConfig(steps=100).vocabulary
        8192
    """

    tokens: int = 80_000
    max_new_tokens: int = 256
    longest_prompt: int = 256
    temperature: float = 0.7
    own_instructions: float = 0.4
    batch_size: int = 64
    held_out_texts: int = 64
    layer: int | None = None
    architecture: Architecture = "cascade"
    vocabulary: int = 8192
    steps: int = 300
    step_tokens: int = 2048
    learning_rate: float = 1e-3
    draft_steps: int = 3
    evaluations: int = 6
    bos: str = "auto"
    seed: int = 0

    def check(self) -> None:
        """Check the options.

        Raises:
            UsageError: An option is invalid. The message names it and the expected values.
        """
        check_seed(self.seed)
        checked_architecture(self.architecture)
        for name in (
            *("tokens", "max_new_tokens", "longest_prompt", "batch_size", "vocabulary", "steps"),
            *("step_tokens", "draft_steps", "evaluations"),
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.held_out_texts < 2:
            raise UsageError(
                "expected held_out_texts of at least 2, one to select by and one to judge by, got "
                f"{self.held_out_texts}"
            )
        for name in ("temperature", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"expected {name} above 0, got {getattr(self, name)}")
        if not 0 <= self.own_instructions < 1:
            raise UsageError(
                f"expected own_instructions in 0 to below 1, got {self.own_instructions}"
            )
