"""Reading the versions of a file from git, without changing the work tree.

Only `git` itself reads a repository: it knows packs, worktrees, alternates and partial clones.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cascade.core.errors import RecordError, first_line, os_reason
from cascade.core.printable import printable

#: One commit of `git log`: hash, short hash, date and subject, then the statuses of its files.
_FORMAT = "%x01%H%x02%h%x02%cI%x02%s%x02"
_COMMIT = re.compile(r"\x01(?=[0-9a-f]{40,64}\x02)")

#: Options that users set and that would change what is printed.
_PLAIN = ("-c", "log.showSignature=false", "-c", "log.follow=false", "-c", "core.quotePath=false")


@dataclass(frozen=True)
class Commit:
    """A commit.

    Attributes:
        number: Its whole hash.
        short: Its short hash.
        date: The date on which it was committed, in ISO 8601.
        subject: The first line of its message.
    """

    number: str
    short: str
    date: str
    subject: str


@dataclass(frozen=True)
class CommittedFile:
    """A file and its companions as they are in one commit.

    Attributes:
        commit: The commit.
        path: The path of the file at that time, relative to the work tree.
        blob: The object that holds its content.
        companions: The objects that hold the companions' content; None for one that is not in the
            commit.
    """

    commit: Commit
    path: str
    blob: str
    companions: tuple[str | None, ...]


class WorkTree:
    """A work tree of git.

    Args:
        folder: A folder in the work tree.

    Attributes:
        top: The top folder of the work tree.
        shallow: Whether the oldest commits are missing, as in a clone with `--depth`.

    Raises:
        RecordError: Git is not installed, or the folder is in no work tree.
    """

    def __init__(self, folder: Path) -> None:
        self.top = folder
        found = self._run("rev-parse", "--show-toplevel", "--is-shallow-repository")
        if found.returncode:
            reason = first_line(ValueError(_text(found.stderr))).removeprefix("fatal: ")
            raise RecordError(
                f"expected {folder} to be in a git work tree, got: {reason}; run the command in a "
                "clone of the project, or name a folder of reports"
            )
        top, _, shallow = _text(found.stdout).rstrip("\n").rpartition("\n")
        self.top = Path(top)
        self.shallow = shallow == "true"

    def _run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[bytes]:
        command = ["git", "-C", str(self.top), "--no-pager", "--literal-pathspecs", *_PLAIN]
        # A reader must neither wait for a password nor take a lock, and messages are English.
        quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
        try:
            return subprocess.run(
                [*command, *arguments],
                input=os.fsencode(stdin),
                capture_output=True,
                env=os.environ | quiet,
                check=False,
            )
        except FileNotFoundError:
            raise RecordError(
                "expected the program git, got none in PATH; install git, or name a folder of "
                "reports"
            ) from None
        except OSError as error:
            raise RecordError(f"cannot run git: {os_reason(error)}; install git again") from error

    def _git(self, *arguments: str, stdin: str = "") -> bytes:
        """Return what a git command prints.

        Raises:
            RecordError: It failed.
        """
        done = self._run(*arguments, stdin=stdin)
        if done.returncode:
            reason = first_line(ValueError(_text(done.stderr))).removeprefix("fatal: ")
            raise RecordError(
                f"git {arguments[0]} failed in {self.top}: {reason}; run `git fsck` there"
            )
        return done.stdout

    def files(self, folder: Path, suffix: str) -> list[str]:
        """Return the files below a folder that git knows or would add, relative to the top.

        Args:
            folder: The folder; it may be missing in the work tree.
            suffix: How their names end.
        """
        listed = ("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--")
        names = _text(self._git(*listed, self.relative(folder))).split("\0")
        return sorted({name for name in names if name.endswith(suffix)})

    def relative(self, path: Path) -> str:
        """Return a path relative to the top, as git writes it."""
        return Path(os.path.relpath(os.path.realpath(path), os.path.realpath(self.top))).as_posix()

    def versions(self, path: str, companion_suffixes: Sequence[str]) -> list[CommittedFile]:
        """Return every version of a file in the commits below HEAD, the oldest first.

        A renamed file is followed. A merge counts if its version is not the one before. Equal
        neighbours are one version.

        Args:
            path: The file, relative to the top.
            companion_suffixes: What replaces the suffix of the file in its companions' names.

        Raises:
            RecordError: Git cannot read the repository.
        """
        if self._run("rev-parse", "--verify", "--quiet", "HEAD").returncode:
            return []  # no commit yet
        names = self._names(path)
        if not names:
            return []
        # `--follow` shows no merges. They count where the two sides were merged into a third.
        log = ("log", "--topo-order", "--full-history", f"--format={_FORMAT}", "--encoding=UTF-8")
        groups = [
            (name, *(str(PurePosixPath(name).with_suffix(end)) for end in companion_suffixes))
            for name in names
        ]
        paths = [path for group in groups for path in group]
        commits = [commit for commit, _ in _commits(self._git(*log, "-z", "--", *paths))]
        found: list[CommittedFile] = []
        for version in self._contents(commits[::-1], groups):
            before = found[-1] if found else None
            if before is None or (before.blob, before.companions) != (
                version.blob,
                version.companions,
            ):
                found.append(version)
        return found

    def _names(self, path: str) -> list[str]:
        """Return the names that a file has had, the newest first."""
        log = ("log", "--follow", "--topo-order", "--name-status", f"--format={_FORMAT}", "-z")
        names = []
        for _, statuses in _commits(self._git(*log, "--", path)):
            renamed = statuses[0].startswith(("R", "C"))
            names += statuses[2 if renamed else 1 :][:1]
            if statuses[0].startswith("C"):
                break  # a copy of another baseline, whose history is its own
        if any("\n" in name for name in names):
            raise RecordError(f"expected {path} to have names in one line; rename the file")
        return list(dict.fromkeys(names))

    def _contents(
        self, commits: Sequence[Commit], groups: Sequence[tuple[str, ...]]
    ) -> Iterator[CommittedFile]:
        """Yield file and companions of each commit that has the file, under its newest name."""
        asked = [
            f"{commit.number}:{name}\n" for commit in commits for group in groups for name in group
        ]
        answers = _text(self._git("cat-file", "--batch-check", stdin="".join(asked))).splitlines()
        blobs = [None if answer.endswith(" missing") else answer.split()[0] for answer in answers]
        size = len(groups[0])
        each = size * len(groups)
        for place, commit in enumerate(commits):
            own = blobs[place * each : (place + 1) * each]
            for number, (name, *_) in enumerate(groups):
                blob, *companions = own[size * number : size * (number + 1)]
                if blob is not None:
                    yield CommittedFile(commit, name, blob, tuple(companions))
                    break

    def content(self, blob: str) -> bytes:
        """Return the content of an object.

        Raises:
            RecordError: The repository lacks it.
        """
        return self._git("cat-file", "blob", blob)


def _text(output: bytes) -> str:
    return os.fsdecode(output)


def _commits(output: bytes) -> Iterator[tuple[Commit, list[str]]]:
    """Yield the commits of a log with the statuses and paths of their files, the newest first."""
    for part in _COMMIT.split(_text(output))[1:]:
        number, short, date, rest = part.split("\x02", 3)
        subject, _, statuses = rest.rpartition("\x02")
        yield (
            Commit(number, short, date, printable(subject)),
            statuses.strip("\0\n").split("\0"),
        )
