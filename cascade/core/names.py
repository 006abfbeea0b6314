"""Names of models and corpora in baseline paths, and whether two sources are the same one."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from pathlib import Path, PurePath

from cascade.core.cache import hub_cache

#: Words that say nothing about which model or corpus a folder or file holds. A name that consists
#: of them, of numbers and of quantizations takes the name of its parent folder along.
_GENERAL = re.compile(
    r"(adapter|base|best|checkpoint|checkpoints|ckpt|ckpts|data|dataset|dev|epoch|epochs"
    r"|eval|export|exports|final|finetuned|fp|gguf|ggml|global|hf|inference|iter"
    r"|iteration|last|latest|lora|main|merged|model|models|of|out|output|outputs|part"
    r"|peft|pretrained|result|results|run|safetensors|save|saved|shard|snapshot"
    r"|snapshots|split|step|steps|test|tmp|train|trained|training|tune|tuned|v|val"
    r"|valid|validation|version|weights)\d*"
)
_NUMBER_OR_QUANTIZATION = re.compile(
    r"\d+|[a-f0-9]{32,64}|r\d+|i?q\d+|[klmsx]{1,2}|b?f(p)?\d+|int\d+|\d+bit|w\d+a\d+|nf4|gptq|awq"
)

#: Files at the top of a project. Its folder has another name in every checkout.
_PROJECT = (".git", "pyproject.toml", "setup.py", "setup.cfg", "pytest.ini", "tox.ini")

#: The most parent folders that a name takes along.
_MOST_PARENTS = 3

#: Characters that Windows does not allow, that no file name can hold (half of a character), or that
#: steer a terminal which lists the names. Bytes that are no UTF-8 are kept (U+DC80 to U+DCFF).
_UNSAFE = re.compile(
    r'[\x00-\x1f\x7f-\x9f<>:"|?*\\\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udc7f\udd00-\udfff]'
)

#: Names that Windows reserves, whatever their suffix.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")

#: The most bytes of a name. File systems allow 255, including suffixes and temporary prefixes.
_MOST_BYTES = 160


#: What file systems allow, in bytes.
_LONGEST_NAME, _LONGEST_PATH = 255, 4000


def file_name(text: str) -> str:
    """Return a name of a model or corpus as a name of a file or folder on every system.

    Args:
        text: The name. Slashes become "--".

    Example:
        >>> file_name("ORG/Name"), file_name(".hidden"), file_name("aux")
        ('org--name', 'hidden', '_aux')
    """
    name = unicodedata.normalize("NFC", text).lower().replace("/", "--")
    name = _UNSAFE.sub("-", name).lstrip(".").rstrip(". ") or "unnamed"
    if _RESERVED.fullmatch(name):
        name = f"_{name}"
    data = name.encode("utf-8", "surrogateescape")
    if len(data) > _MOST_BYTES:
        digest = hashlib.sha256(data).hexdigest()[:8]
        name = f"{data[: _MOST_BYTES - 9].decode('utf-8', 'ignore')}-{digest}"
    return name


def path_flaw(text: str) -> str | None:
    """Return what is wrong with a path that no file can have, in words; None if nothing is.

    Example:
        >>> path_flaw("runs/a") is None, path_flaw("x" * 300)
        (True, 'expected names of at most 255 bytes in a path, got one of 300')
    """
    longest = max(len(part.encode("utf-8", "surrogatepass")) for part in text.split("/"))
    if longest > _LONGEST_NAME:
        return f"expected names of at most {_LONGEST_NAME} bytes in a path, got one of {longest:,}"
    if len(text.encode("utf-8", "surrogatepass")) > _LONGEST_PATH:
        return f"expected a path of at most {_LONGEST_PATH:,} bytes, got {len(text):,} characters"
    return "expected a path without NUL" if "\0" in text else None


def path_name(path: str | os.PathLike[str], name: str | None = None) -> str:
    """Return the name of a model or corpus that is a file or folder.

    A general name such as `checkpoint-500` or `train` takes the names of its parent folders along,
    up to the top of a project or the home folder. A snapshot in the hub's cache is named after its
    hub id.

    Args:
        path: The file or folder.
        name: Its own name, without suffix (default: its last part).

    Example:
        >>> path_name("/runs/a/checkpoint-500"), path_name("/runs/a/tiny-llama")
        ('a--checkpoint-500', 'tiny-llama')
    """
    place = Path(os.path.realpath(path))
    return file_name(_with_parents(place, place.name if name is None else name, on_disk=True))


def _with_parents(place: PurePath, own: str, *, on_disk: bool) -> str:
    parts = [own]
    for parent in list(place.parents)[:_MOST_PARENTS]:
        if not _is_general(parts[0]) or not parent.name or parent.name == "..":
            break
        repository = re.fullmatch("(?:models|datasets)--(.+)", parent.name)
        if repository is not None and parts[0] == "snapshots":
            return repository[1]
        if on_disk and (parent == Path.home() or _is_project(parent)):
            break
        parts.insert(0, parent.name)
    return "--".join(parts)


def _is_project(folder: PurePath) -> bool:
    return any(os.path.lexists(os.path.join(folder, name)) for name in _PROJECT)


def _is_general(name: str) -> bool:
    words = [word for word in re.split(r"[-_.= ]+", name.lower()) if word]
    says_something = any(
        not _GENERAL.fullmatch(word) and not _NUMBER_OR_QUANTIZATION.fullmatch(word)
        for word in words
    )
    # One letter that a quantization has too is a name of its own.
    return not says_something and not re.fullmatch("[klmsx]{1,2}", name.lower())


def same_source(one: str, other: str) -> bool:
    """Return whether two sources, as users gave them, are or can be the same model or corpus.

    Two paths can be the same if one is the end of the other, since records hold the path as it was
    typed: `runs/a` and `/home/me/runs/a`.

    Args:
        one: A hub id, a short name or a path.
        other: Another one.

    Example:
        >>> same_source("runs/a", "/home/me/runs/a/"), same_source("runs/a", "runs/b")
        (True, False)
    """
    first, second = (_parts(source) for source in (one, other))
    shorter = min(len(first), len(second))
    return first[len(first) - shorter :] == second[len(second) - shorter :]


def _parts(source: str) -> tuple[str, ...]:
    """Return the parts of a source below what only a working directory can say."""
    path = os.path.expanduser(source)
    if os.path.exists(path) and not any(part.strip(".") for part in PurePath(path).parts):
        path = os.path.realpath(path)  # "." or ".." alone
    parts = PurePath(unicodedata.normalize("NFC", os.path.normpath(path))).parts
    return tuple(part for part in parts if part not in ("..", os.sep)) or (source,)


def recorded_name(source: str) -> str:
    """Return the name that `path_name` gives a path from a record, without looking at the disk."""
    place = PurePath(os.path.normpath(source))
    return file_name(_with_parents(place, place.name, on_disk=False))


def hidden_hub_id(source: str, kind: str) -> str | None:
    """Return a note that a path hides what the hub's cache has under the same id, or None.

    Args:
        source: The model or corpus, as the user named it.
        kind: "model" or "dataset".

    Example:
        >>> hidden_hub_id("no-such-folder", "model") is None
        True
    """
    cached = hub_cache() / f"{kind}s--{source.replace('/', '--')}"
    if not os.path.isdir(cached) or not os.path.exists(source):
        return None
    return f"{source} is the path {Path(source).resolve()}, not the {kind} of that id on the hub"
