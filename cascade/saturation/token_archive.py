"""An archive with one similarity per token and layer, like the seed study's `cos_sim_data.npz`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cascade.core.errors import OutputError, os_reason
from cascade.core.files import atomic_path, make_folder, remove_empty, staging_folder
from cascade.core.provenance import Provenance
from cascade.core.schema import to_plain


def check_free(path: Path, *, overwrite: bool) -> None:
    """Check that a file may be written, before any work is done.

    Raises:
        OutputError: The file exists and `overwrite` is false, or it is a folder.
    """
    # os.path accepts any string, where Path raises for long names.
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder, expected a file name for --npz")
    if os.path.exists(path) and not overwrite:
        raise OutputError(f"{path} exists: choose another --npz, or replace it with --overwrite")


class SimilarityArchive:
    """Collects similarities on disk, not in memory, and packs them into one `.npz` file.

    Its entries `layer_1` ... `layer_N` are float32, one value per token. As in the seed study,
    `layer_N` compares with the *normed* last state if the model has a final norm, so there is also
    `layer_N_residual`. The entry `metadata` is the provenance as JSON text.

    Args:
        path: The `.npz` file to write.
        labels: Row labels, "1".."N" and, with a final norm, "N+norm".
        overwrite: Replace an existing file.

    Raises:
        OutputError: The file exists and `overwrite` is false, or it cannot be written.
    """

    def __init__(self, path: Path, labels: Sequence[str], *, overwrite: bool = False) -> None:
        check_free(path, overwrite=overwrite)
        self.path = path
        self.names = _entry_names(labels)
        self._tokens = 0
        self._made: list[Path] = []
        self._held = contextlib.ExitStack()
        self._files: list[IO[bytes]] = []
        try:
            self._made = make_folder(path.parent)
            folder = self._held.enter_context(staging_folder(path.parent))
            for row in range(len(labels)):
                self._files.append((folder / str(row)).open("w+b"))
        except OSError as error:
            self._remove()
            raise OutputError(
                f"cannot write {path}: {os_reason(error)}; choose an --npz you can write to"
            ) from error

    def __enter__(self) -> SimilarityArchive:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the working files, and folders created for an archive that was not saved."""
        self._remove()

    def _remove(self) -> None:
        for file in self._files:
            # Closing flushes, which fails again on a full disk. The folder is removed anyway.
            try:
                file.close()
            except OSError:
                continue
        self._held.close()
        remove_empty(self._made)

    def add(self, similarity: npt.NDArray[Any], sequences: npt.NDArray[Any]) -> None:
        """Add one batch, `[L, B, T]`, in corpus order (the `sink` of `saturation.analyze`).

        Raises:
            OutputError: The disk is full.
        """
        self._tokens += similarity[0].size
        try:
            for file, values in zip(self._files, similarity, strict=True):
                file.write(np.ascontiguousarray(values, dtype="<f4").tobytes())
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {os_reason(error)}; free some space"
            ) from error

    def save(self, provenance: Provenance) -> None:
        """Pack everything into the `.npz` file, atomically.

        Args:
            provenance: The provenance of the similarities.

        Raises:
            OutputError: The disk is full.
        """
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._tokens,)}
        with atomic_path(self.path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for row, names in self.names.items():
                for name in names:
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array_header_1_0(entry, header)
                        self._files[row].seek(0, os.SEEK_SET)
                        shutil.copyfileobj(self._files[row], entry)
            with archive.open("metadata.npy", "w") as entry:
                np.lib.format.write_array(
                    entry, np.array(json.dumps(to_plain(provenance), allow_nan=False))
                )


def _entry_names(labels: Sequence[str]) -> dict[int, list[str]]:
    """Return the entry names of each row; without a final norm the last row has two."""
    last = len(labels) - 1
    normed = labels[last].endswith("+norm")
    depth = len(labels) - normed
    names = {row: [f"layer_{row + 1}"] for row in range(depth)}
    if normed:
        names[depth - 1] = []
    names[last] = [f"layer_{depth}"]
    names[depth - 1] = [*names[depth - 1], f"layer_{depth}_residual"]
    return names
