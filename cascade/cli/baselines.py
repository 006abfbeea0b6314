"""The folder of all baselines that a command is given: local, or the copy of one elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.cli.console import message, status
from cascade.core.errors import RecordError, UsageError
from cascade.core.schema import UNSET, UnsetType
from cascade.core.urls import is_url

if TYPE_CHECKING:
    from cascade.gate.remote.baselines import RemoteBaselines
    from cascade.gate.remote.records import RemoteOrigin


@dataclass(frozen=True)
class BaselinesPlace:
    """Where baselines are looked up.

    Attributes:
        folder: The folder that the user named, or the copy of it; None if none was named.
        remote: The baselines at the address that the user named, if it was one.
    """

    folder: Path | None
    remote: RemoteBaselines | None = None

    @property
    def origin(self) -> RemoteOrigin | UnsetType:
        """The address and revision of remote baselines; absent for local ones."""
        return UNSET if self.remote is None else self.remote.copy.origin

    def name_of(self, path: Path) -> str:
        """Return the name of a baseline as records have it: its path, or its address."""
        return str(path) if self.remote is None else self.remote.name_of(path)

    def described(self, path: Path) -> str:
        """Return where a baseline is from, in words for the user."""
        from cascade.gate.baseline_lookup import described

        if self.remote is None:
            return described(path)
        return f"{self.name_of(path)} of {self.remote.copy.origin.in_words()}"

    def checked(self, path: Path) -> Path:
        """Return the path of a baseline that is stored and can be used; print notes about it.

        Raises:
            RecordError: There is no such baseline, or the newest version of it was refused.
        """
        from cascade.core.run_folder import is_stored
        from cascade.gate.baseline_lookup import LOCAL

        if self.remote is not None:
            self.remote.checked(path)
        if not is_stored(path):
            push = "" if self.remote is None else f", then {self.remote.push_words}"
            folder = LOCAL if self.folder is None or self.remote is not None else self.folder
            raise RecordError(
                f"no baseline {self.name_of(path)}; make one with `cascade analyze --output RUN` "
                f"and `cascade accept RUN --baselines {folder}`{push}, or name one with --baseline"
            )
        for note in () if self.remote is None else self.remote.notes():
            message(note)
        return path


def baselines_place(baselines: str | None) -> BaselinesPlace:
    """Return where baselines are looked up; those at an address are read now.

    Args:
        baselines: What the user named: a folder, or an address.

    Raises:
        CascadeError: The address cannot be read.
    """
    if baselines is None:
        return BaselinesPlace(None)
    if not is_url(baselines):
        return BaselinesPlace(Path(baselines))
    from cascade.gate.remote.baselines import RemoteBaselines

    remote = RemoteBaselines(baselines)
    with status(f"Reading {remote.url}"):
        remote.read()
    return BaselinesPlace(remote.folder, remote)


def local_baselines(baselines: str) -> Path:
    """Return a local folder of baselines, to write to.

    Args:
        baselines: What the user named.

    Raises:
        UsageError: It is an address; says how to write there.
    """
    if not is_url(baselines):
        return Path(baselines)
    from cascade.gate.remote.baselines import RemoteBaselines

    remote = RemoteBaselines(baselines)
    raise UsageError(
        f"expected a local folder for --baselines, got {remote.url}; leave it out, review "
        f"./baselines, then {remote.push_words}"
    )
