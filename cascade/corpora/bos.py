"""BOS: whether texts and sequences begin with the tokenizer's BOS token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cascade.core.errors import CorpusError, UsageError
from cascade.core.provenance import CorpusProvenance
from cascade.core.schema import UNSET, UnsetType, known

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Whether texts begin with BOS: as the tokenizer does it, always, or never.
BOS_CHOICES = ("auto", "yes", "no")


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer puts its BOS token before a text.

    The tokenizer encodes a text, because its settings and what it does can differ. The text must
    follow BOS: an unknown token that is also the BOS token is no BOS.

    Args:
        tokenizer: The tokenizer of the model.

    Example:
        >>> from cascade import load
        >>> adds_bos(load("smollm2-135m").tokenizer)
        False
    """
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        return False
    plain = _ids("a", tokenizer, special=False)
    begun = _ids("a", tokenizer, special=True)
    first = [token]
    if begun[:1] != first:
        return False
    # Some tokenizers add it whatever they are asked for.
    always = _ids("", tokenizer, special=False)[:1] == first
    return always or plain[:1] != first or begun[: len(plain) + 1] == first + plain


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return list(found)


@dataclass(frozen=True)
class BosRule:
    """How the ids of texts begin.

    Attributes:
        token: The id that every text and sequence begins with; None for none.
        removed: The id of BOS where no text begins with it; None if texts may.
        once: Remove it only from texts with a single one: chat templates such as ChatML begin every
            message with a token that the tokenizer calls BOS but never adds.
        recorded: The `bos` of `CorpusProvenance`.

    Example:
        >>> BosRule(token=5).begin([7, 8]), BosRule(token=5).begin([5, 7])
        ([5, 7, 8], [5, 7])
        >>> BosRule(removed=5).begin([5, 7]), BosRule().begin([5, 7])
        ([7], [5, 7])
    """

    token: int | None = None
    removed: int | None = None
    once: bool = False
    recorded: Literal["yes", "no"] | UnsetType = UNSET

    def begin(self, ids: list[int]) -> list[int]:
        """Return the ids of a text, with one BOS before them, with none, or as they are."""
        if self.token is not None and ids[:1] != [self.token]:
            return [self.token, *ids]
        if self.removed is None or ids[:1] != [self.removed]:
            return ids
        return ids if self.once and ids.count(self.removed) > 1 else ids[1:]


def bos_rule(tokenizer: PreTrainedTokenizerBase, choice: str = "auto") -> BosRule:
    """Return how the ids of texts begin.

    Args:
        tokenizer: The tokenizer of the model.
        choice: "auto" (BOS if the tokenizer adds it), "yes" or "no".

    Raises:
        UsageError: The choice does not exist, or it is "yes" and the tokenizer has no BOS token.
    """
    check_choice(choice)
    token = getattr(tokenizer, "bos_token_id", None)
    if choice == "yes" and token is None:
        raise UsageError(
            "expected a tokenizer with a BOS token to read text with BOS, got none; use --bos no"
        )
    adds = adds_bos(tokenizer)
    if choice == "yes" or (choice == "auto" and adds):
        return BosRule(token=token, recorded="yes")
    if choice == "no":
        return BosRule(removed=token, once=not adds, recorded="no" if adds else UNSET)
    return BosRule()


def check_choice(choice: str) -> None:
    """Check the value of --bos.

    Raises:
        UsageError: It is not one of `BOS_CHOICES`.
    """
    if choice not in BOS_CHOICES:
        raise UsageError(f"expected --bos {', '.join(BOS_CHOICES)}, got {choice!r}; choose one")


def recorded_choice(corpus: CorpusProvenance) -> str:
    """Return the choice that reads a text as a record says that it was read.

    Args:
        corpus: The text of the record.
    """
    return known(corpus.bos) or "auto"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, rule: BosRule) -> list[int]:
    """Return the ids of a prompt, which begins as the texts of corpora do.

    Args:
        tokenizer: The tokenizer of the model.
        prompt: The text; of a chat, the text that the chat template returns.
        rule: How it begins.
    """
    return rule.begin(_ids(prompt, tokenizer, special=False))


def check_same_bos(made_with: object, bos: object, *, what: str, again: str = "") -> None:
    """Check that a text begins with BOS if, and only if, the text that something was made on did.

    Args:
        made_with: The `bos` of the text that it was made on: "yes", or anything else for a text
            without BOS.
        bos: The `bos` of the other text.
        what: What was made, up to the word "text", e.g. "these heads were fitted on text".
        again: What to do instead of reading the other text alike, e.g. "fit them again".

    Raises:
        CorpusError: One text begins with BOS and the other does not.
    """
    if (made_with == "yes") == (bos == "yes"):
        return
    before, now, choice = ("with", "without", "yes") if bos != "yes" else ("without", "with", "no")
    raise CorpusError(
        f"{what} {before} BOS, but this text is read {now} it; use --bos {choice}"
        f"{again and f', or {again}'}"
    )
