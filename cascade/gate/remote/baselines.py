"""Baselines at an address such as `hf://datasets/ORG/NAME`: read-only, from a copy in the cache."""

from __future__ import annotations

import re
import shlex
from functools import cached_property
from pathlib import Path

from cascade.core.errors import RecordError
from cascade.core.run_folder import is_stored
from cascade.core.urls import without_user
from cascade.gate.remote.copies import OFFLINE, address, copy_folder, up_to_date
from cascade.gate.remote.records import BaselinesCopy

#: "hf://datasets/ORG/NAME@REVISION/FOLDER", of which the last two can be missing.
_HUB = re.compile(
    r"hf://(datasets|spaces|models)?/?([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?(?:/(.+))?"
)


class RemoteBaselines:
    """The folder of all baselines at an address, read once on first use.

    Args:
        url: The address, as the user gave it.
        copy: What another process of this session knows of the copy; None compares it with the
            address on first use.

    Attributes:
        url: The address without credentials.
        folder: The folder of the copy, which need not exist before `copy` is used.
    """

    def __init__(self, url: str, copy: BaselinesCopy | None = None) -> None:
        self._url = url
        self.url = address(url)
        self.folder = copy_folder(url)
        if copy is not None:
            self.__dict__["copy"] = copy

    @property
    def is_read(self) -> bool:
        """Whether the copy was compared with the address, or could not be."""
        return "copy" in self.__dict__

    def read(self) -> None:
        """Compare the copy with the address now, unless that is done.

        Raises:
            CascadeError: As for `copy`.
        """
        _ = self.copy

    @cached_property
    def copy(self) -> BaselinesCopy:
        """What is known of the copy, which is compared with the address once.

        Raises:
            UsageError: No installed package reads such an address; names the package.
            RecordError: The address cannot be reached and there is no copy, or it has no baselines.
            OutputError: The copy cannot be written; the earlier one is unharmed.
        """
        return up_to_date(self._url)

    def name_of(self, path: Path) -> str:
        """Return the name of a file of the copy at the address.

        Args:
            path: The file in the copy.
        """
        return f"{self.url}/{path.relative_to(self.folder).as_posix()}"

    def checked(self, path: Path) -> Path:
        """Return the path of a baseline in the copy, if it can be trusted.

        Args:
            path: Its `.json`, which need not exist.

        Raises:
            RecordError: Its newest version was refused; the copy has at most an earlier one.
        """
        refused = self.copy.refused
        name = path.relative_to(self.folder).as_posix()
        if name in refused:
            kept = f"; the copy of {self.copy.origin.fetched} in the cache is unharmed"
            raise RecordError(f"{refused[name]}{kept if is_stored(path) else ''}")
        if refused and not is_stored(path):  # it may be the one that is sought
            raise RecordError(f"no baseline {self.name_of(path)}; refused: {_joined(refused)}")
        return path

    def notes(self) -> list[str]:
        """Return lines about what differs from the address: what was not checked, or is gone."""
        found = self.copy
        lines = [f"Baseline not used: {reason}" for reason in found.refused.values()]
        if found.removed:
            lines.append(f"No longer in {self.url}: {', '.join(found.removed)}")
        if found.origin.reason not in (None, OFFLINE):
            lines.append(
                f"Baselines of {self.url}: {found.origin.reason}; the copy of "
                f"{found.origin.fetched} is used"
            )
        return lines

    @property
    def push_command(self) -> str | None:
        """The command that pushes local baselines to the address; None if none is known."""
        target = address(without_user(self._url))  # such tools have credentials of their own
        if target.startswith(("s3://", "s3a://")):
            return shlex.join(["aws", "s3", "sync", "baselines", target.replace("s3a:", "s3:")])
        if target.startswith(("gs://", "gcs://")):
            target = target.replace("gcs:", "gs:")
            return shlex.join(["gcloud", "storage", "rsync", "--recursive", "baselines", target])
        found = _HUB.fullmatch(target)
        if found is None:
            return None
        kind, name, revision, folder = found.groups()
        words = ["hf", "upload", name, "baselines", *([folder] if folder else [])]
        words += ["--repo-type", kind.removesuffix("s")] if kind in ("datasets", "spaces") else []
        return shlex.join([*words, *(["--revision", revision] if revision else [])])

    @property
    def push_words(self) -> str:
        """How local baselines get to the address, as the end of a sentence."""
        command = self.push_command
        return f"push them with `{command}`" if command else f"copy that folder to {self.url}"


def _joined(refused: dict[str, str]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in refused.items())
