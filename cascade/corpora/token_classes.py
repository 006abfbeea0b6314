"""Token classes: what kind of text each token of a corpus is."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The classes. Each token has exactly one.
CLASSES = (
    "start",
    "special",
    "whitespace",
    "punctuation",
    "digits",
    "word start",
    "continuation",
)

#: Marks between sentences and clauses. Massive activations were found at the first token and at
#: such delimiters (Sun et al. 2024, arXiv:2402.17762, section 2).
_DELIMITERS = set(".,;:!?")

#: The marks of a space before a word in byte-level BPE, SentencePiece and plain text.
_BLANKS = ("\u0120", "\u2581", " ")


def token_texts(ids: npt.NDArray[np.integer[Any]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each distinct id, in the order of `numpy.unique`, with its leading space.

    Args:
        ids: Token ids, any shape.
        tokenizer: The tokenizer of the model.
    """
    distinct = np.unique(ids).tolist()
    spelled = tokenizer.convert_ids_to_tokens(distinct)
    texts = []
    for number, token in zip(distinct, spelled, strict=True):
        text = str(tokenizer.decode([number], clean_up_tokenization_spaces=False))
        marked = isinstance(token, str) and token.startswith(_BLANKS)
        texts.append(f" {text}" if marked and not text.startswith(" ") else text)
    return texts


def classify(
    ids: npt.NDArray[np.integer[Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.bool_]]:
    """Return each token's class, and whether it is a delimiter.

    A token of letters starts a word unless it directly follows a letter.

    Args:
        ids: `[S, T]`, one sequence per row.
        tokenizer: The tokenizer of the model.

    Returns:
        `[S, T]`, indices into CLASSES; and `[S, T]`, true for marks between sentences and clauses
        and for line breaks.
    """
    distinct, places = np.unique(ids, return_inverse=True)
    places = places.reshape(ids.shape)
    texts = token_texts(ids, tokenizer)
    special = set(tokenizer.all_special_ids)
    kinds = np.array(
        [_kind(text, int(number) in special) for number, text in zip(distinct, texts, strict=True)],
        dtype=np.int8,
    )
    starts = np.array([text.startswith(" ") for text in texts])
    ends = np.array([text[-1:].isalpha() for text in texts])
    marks = np.array([_is_delimiter(text) for text in texts])
    classes = kinds[places]
    word = classes == CLASSES.index("word start")
    # A token that follows a letter without a space between continues the word.
    before = np.zeros(ids.shape, dtype=bool)
    before[:, 1:] = ends[places][:, :-1]
    classes[word & before & ~starts[places]] = CLASSES.index("continuation")
    classes[:, 0] = CLASSES.index("start")
    return classes, marks[places]


def _kind(text: str, special: bool) -> int:
    """Return the class of a token without its context; all words count as word starts."""
    stripped = text.strip()
    if special:
        name = "special"
    elif not stripped:
        name = "whitespace"
    elif "\ufffd" in stripped:  # a part of a character
        name = "continuation"
    elif stripped.isnumeric():
        name = "digits"
    elif all(unicodedata.category(character)[0] in "PS" for character in stripped):
        name = "punctuation"
    else:
        name = "word start"
    return CLASSES.index(name)


def _is_delimiter(text: str) -> bool:
    stripped = text.strip()
    return "\n" in text or (bool(stripped) and set(stripped) <= _DELIMITERS)
