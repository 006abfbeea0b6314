"""Baselines with a history: a git repository that a test makes, and profiles that drift."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from cascade.core.records import packed, to_json
from cascade.core.schema import to_plain
from cascade.gate.baselines import StoredProfile
from support.build_profiles import profile_of, provenance, similarities_of, write_rows

#: Where a baseline lies in the repositories of these tests.
BASELINE = "baselines/tiny/words.saturation.json"

#: Small enough for the gate, whose tolerance is at least 2e-6.
SMALL = 1.5e-6

#: Git as on a machine without settings of a user.
_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    **{
        f"GIT_{role}_{name}": value
        for role in ("AUTHOR", "COMMITTER")
        for name, value in (("NAME", "n"), ("EMAIL", "n@example.org"))
    },
}


def drifted(steps: float, *, layer: int = 1, **about: Any) -> StoredProfile:
    """Return a profile in which one row moved by a number of small steps.

    Args:
        steps: The number of steps of size `SMALL`.
        layer: The number of the row, from 0.
        about: Changes of the provenance, as `provenance` takes them.
    """
    values = similarities_of(12)
    values[layer] += steps * SMALL
    return profile_of(values, about=provenance(**about))


def other_text(seed: int, shift: float = 0.0) -> StoredProfile:
    """Return a profile of other sequences of the same corpus, some of which moved."""
    values = similarities_of(200, seed=seed, shift=shift)
    return profile_of(values, fingerprints=np.arange(200) + 1000 * seed)


def write_profile(path: Path, profile: StoredProfile) -> None:
    """Write a profile and its arrays, as `cascade accept` and `cascade analyze` do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(to_plain(profile.content)) + "\n", encoding="utf-8")
    path.with_suffix(".npz").write_bytes(packed(profile.state))
    write_rows(path.with_suffix(".parquet"), profile)


class Repository:
    """A git repository.

    Args:
        folder: Where it is made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commits = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *arguments: str) -> str:
        """Run git and return what it prints."""
        day = f"2026-01-{1 + self.commits % 28:02d}T12:00:00Z"
        dates = {"GIT_AUTHOR_DATE": day, "GIT_COMMITTER_DATE": day}
        done = subprocess.run(
            ["git", "-C", str(self.folder), *arguments],
            capture_output=True,
            text=True,
            env=os.environ | _ENVIRONMENT | dates,
            check=True,
        )
        return done.stdout.strip()

    def commit(self, subject: str) -> str:
        """Commit everything in the work tree; return the short hash."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", subject)
        self.commits += 1
        return self.git("rev-parse", "--short", "HEAD")

    def accept(self, profile: StoredProfile, subject: str, path: str = BASELINE) -> str:
        """Commit a profile as a baseline; return the short hash."""
        write_profile(self.folder / path, profile)
        return self.commit(subject)
