"""What is recorded of baselines that live elsewhere: where they are from, and what a copy holds."""

from __future__ import annotations

from typing import ClassVar, Literal

from cascade.core.schema import Index, Part, PathBelow, StoredRecord, Text


class RemoteOrigin(Part, frozen=True, kw_only=True):
    """Where baselines were read from, and which version of them.

    Attributes:
        url: The address of the folder of all baselines, without credentials.
        revision: A hash over the names and contents of all baselines that were read.
        fetched: When the last change was read, in UTC.
        checked: Whether this session compared the copy with the address.
        reason: Why it did not; None if it did.
    """

    url: Text
    revision: Text
    fetched: Text
    checked: bool
    reason: str | None

    def in_words(self) -> str:
        """Return the address, the revision, and whether it is the newest one."""
        state = "checked now" if self.checked else f"copy of {self.fetched}, not checked"
        return f"{self.url}, revision {self.revision[:19]} ({state})"


class BaselinesCopy(Part, frozen=True, kw_only=True):
    """What one session knows of its copy of remote baselines.

    Attributes:
        origin: Where they were read from, and which version of them.
        refused: The `.json` or exit heads of baselines that did not enter the copy, and why.
        removed: The names of files that the address no longer has.
    """

    origin: RemoteOrigin
    refused: dict[str, str]
    removed: list[str]


class CopiedFile(Part, frozen=True, kw_only=True):
    """A file of a copy.

    Attributes:
        name: Its path below the folder of all baselines.
        size: In bytes.
        sha256: The SHA-256 of its content.
        stamp: What the file system said of this version of it; None if it says nothing.
    """

    name: PathBelow
    size: Index
    sha256: Text
    stamp: str | None


class BaselinesCopyRecord(StoredRecord, frozen=True, kw_only=True):
    """What a copy of remote baselines in the cache holds: kind `baselines-copy`.

    Attributes:
        url: The address of the folder of all baselines, without credentials.
        fetched: When the last change was read, in UTC.
        files: The files of the copy.
    """

    KIND: ClassVar[str] = "baselines-copy"
    COMMAND: ClassVar[str] = "gate --baselines URL"

    schema: int = 1
    kind: Literal["baselines-copy"] = "baselines-copy"
    url: Text
    fetched: Text
    files: list[CopiedFile]
