"""What commands write: folders, reports and messages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cascade.cli.console import message, show_record
from cascade.core.errors import OutputError
from cascade.core.printable import is_utf8

if TYPE_CHECKING:
    from cascade.cli.options import OutputOptions
    from cascade.core.run_folder import RunFolder
    from cascade.core.schema import StoredRecord
    from cascade.report.common.sections import Report

R = TypeVar("R", bound="StoredRecord")


@contextlib.contextmanager
def run_folder(
    output: Path | None, names: Sequence[str], *, optional: Sequence[str] = (), overwrite: bool
) -> Iterator[RunFolder | None]:
    """Yield the folder for a command's files, after checking that they can be written.

    Args:
        output: The folder; None yields None.
        names: The files that the command writes.
        optional: The files that it may write.
        overwrite: Replace the files of an earlier run.

    Raises:
        OutputError: The folder holds another run, or cannot be written to.
    """
    if output is None:
        yield None
        return
    from cascade.core.run_folder import RunFolder

    with RunFolder(output, tuple(names), optional=optional, overwrite=overwrite) as folder:
        yield folder


def report_folder(
    output: OutputOptions, stem: str, pictures: Sequence[str]
) -> contextlib.AbstractContextManager[RunFolder | None]:
    """Yield the folder for a report, after checking that its files can be written.

    Args:
        output: The folder, and whether to replace the files of an earlier run.
        stem: The record is written to `stem.json`, the page to `stem.html`.
        pictures: The files of all pictures that the report may have.

    Raises:
        OutputError: The folder holds another run, or cannot be written to.
    """
    names = (f"{stem}.json", f"{stem}.html")
    return run_folder(output.output, names, optional=pictures, overwrite=output.overwrite)


def write_json(folder: RunFolder | None, name: str, record: StoredRecord) -> None:
    """Write a record to a file in a run's folder, if there is a folder."""
    from cascade.core.records import to_file

    if folder is not None:
        folder.write(name, to_file(record))


def finish(folder: RunFolder | None, stem: str, record: R, draw: Callable[[R], Report]) -> Report:
    """Draw a record's report, stage its files, and return it.

    Args:
        folder: The folder of `report_folder`; None writes nothing.
        stem: As for `report_folder`.
        record: The record.
        draw: Returns the report of the record.
    """
    from cascade.report.common.sections import html_page

    report = draw(record)
    write_json(folder, f"{stem}.json", record)
    if folder is not None:
        folder.write(f"{stem}.html", html_page(report))
        for picture in report.pictures():
            folder.write(picture.file, picture.svg)
    return report


def show(record: object, report: Report, output: Path | None, name: str) -> None:
    """Print a record or its report, and the path of the file that was written, if any."""
    from cascade.report.common.sections import print_sections

    show_record(record, lambda _, console: print_sections(report, console))
    say_wrote(output, name)


def say_wrote(output: Path | None, name: str) -> None:
    """Print the path of the file that was written, if there is a folder for it."""
    if output is not None:
        message(f"Wrote {output / name}")


def check_utf8(path: Path) -> None:
    """Check that libraries which know paths as text alone can write to a folder.

    Raises:
        OutputError: Its name is no UTF-8.
    """
    if not is_utf8(str(path)):
        raise OutputError(f"expected a folder with a name in UTF-8, got {path}; choose another")


def check_free(path: Path, *, overwrite: bool) -> None:
    """Check that an output file can be written.

    Raises:
        OutputError: It is no .safetensors file, exists already, or cannot be written.
    """
    from cascade.core.files import check_writable

    if path.suffix != ".safetensors":
        raise OutputError(f"expected --output to be a .safetensors file, got {path}")
    # os.path answers for any string, where Path raises for an overlong name.
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder, expected a file; choose another --output")
    if os.path.exists(path) and not overwrite:
        raise OutputError(f"{path} exists: choose another --output, or replace it with --overwrite")
    check_writable(path)
