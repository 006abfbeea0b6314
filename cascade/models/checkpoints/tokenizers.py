"""Reading the tokenizer of a checkpoint, with errors that name the file or the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cascade.core.errors import ModelError
from cascade.models.checkpoints.configs import read_json
from cascade.models.checkpoints.files import check_is_no_pointer
from cascade.models.checkpoints.reading import is_installed, read_or_explain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Files of which a tokenizer consists; it needs one of the first group.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_OTHERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")

#: Packages for formats that transformers converts, by the pattern of the file's name.
_PACKAGES = {
    "*tiktoken*": "tiktoken",
    "tekken.json": "mistral-common",
    "*.model": "sentencepiece",
    "*.spm": "sentencepiece",
}

_COPY = "copy the tokenizer's files from the model that it was made from"


def read_tokenizer(folder: Path, source: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder.

    Args:
        folder: The folder.
        source: The model, for errors.

    Raises:
        ModelError: It is absent or damaged, or a package is missing that reads it.
    """
    from transformers import AutoTokenizer

    for name in (*_VOCABULARIES, *_OTHERS):
        check_is_no_pointer(folder / name)
    try:
        tokenizer: PreTrainedTokenizerBase = read_or_explain(
            f"the tokenizer of {source} (expected tokenizer.json or similar in {folder})",
            lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
            advice=_COPY,
        )
    except ModelError:
        _check_files(folder, source)
        raise
    return tokenizer


def _check_files(folder: Path, source: str) -> None:
    """Find out why a tokenizer cannot be read.

    Raises:
        ModelError: A file is damaged, a package is missing, or there is no tokenizer.
    """
    for path in [folder / name for name in (*_VOCABULARIES, *_OTHERS) if name.endswith(".json")]:
        if path.exists():
            read_json(path)
    if (folder / "tokenizer.json").exists():
        return
    for pattern, package in _PACKAGES.items():
        file = next(iter(sorted(folder.glob(pattern))), None)
        if file is not None and not is_installed(package.replace("-", "_")):
            raise ModelError(
                f"the tokenizer of {source} is {file.name}, which needs the package {package}; run"
                f" `pip install {package}`, or copy a tokenizer.json into {folder}"
            )
    if not any((folder / name).exists() for name in _VOCABULARIES):
        raise ModelError(
            f"cannot read the tokenizer of {source}: {folder} holds none; expected tokenizer.json"
            f" or similar, {_COPY}"
        )
