"""Write a trained drafter as a checkpoint in the layout of the library `speculators`."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save

from cascade.core.errors import OutputError, UsageError
from cascade.core.files import AnyPath
from cascade.core.provenance import library_versions
from cascade.core.reading import UnreadableError, parse_json, read_bytes
from cascade.core.records import read_typed
from cascade.core.run_folder import RunFolder, is_stored
from cascade.core.schema import known
from cascade.drafters.export.layout import Origin, config_of, tensors_of
from cascade.drafters.records import DrafterRecord
from cascade.drafters.stored import RECORD, read_drafter
from cascade.models.stack import DecoderStack

#: The files of a checkpoint.
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def export_drafter(
    path: AnyPath,
    stack: DecoderStack,
    folder: AnyPath,
    *,
    verifier: str | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> Path:
    """Write a drafter as an EAGLE-3 checkpoint of the library `speculators`, which vLLM reads.

    The checkpoint has the drafter's weights, the rows of the model's LM head for its tokens, and
    the model's embeddings, all in bfloat16.

    Args:
        path: The folder of the drafter, trained with `DrafterConfig(architecture="eagle3")`.
        stack: The model that it belongs to.
        folder: Output folder.
        verifier: The hub id or the folder from which a server loads the model (default: where
            it was loaded from).
        overwrite: Replace an earlier export.
        command: Command that the user ran, for the config.

    Returns:
        The output folder.

    Raises:
        UsageError: The drafter has another architecture, or no server could load the model from
            where it was loaded from.
        RecordError: A file of the drafter is missing, torn or edited.
        ModelError: The drafter belongs to another model.
        OutputError: The folder holds other files or cannot be written.

    Example:
        >>> from cascade import CascadeError, export_drafter, load
        >>> stack = load("smollm2-135m")
        >>> try:
        ...     export_drafter("no-such-folder", stack, "exported")
        ... except CascadeError as error:
        ...     print(error)
        no record no-such-folder/record.json; make one with `cascade train-drafter`
    """
    folder = Path(folder)
    check_can_be_exported(path)
    check_output(folder, overwrite=overwrite)
    name = _server_name(stack) if verifier is None else verifier
    drafter = read_drafter(path, stack)
    origin = Origin(
        version=library_versions()["cascade-exit"],
        command=command,
        drafter=drafter.record.sha256,
        model=drafter.record.provenance.model,
        accepted=drafter.record.accepted,
    )
    config = config_of(drafter, stack, name, origin)
    with RunFolder(folder, (CONFIG, WEIGHTS), overwrite=overwrite) as out:
        out.write(WEIGHTS, save(tensors_of(drafter, stack), metadata={"format": "pt"}))
        out.write(CONFIG, config.to_json())
    return folder


def check_can_be_exported(path: AnyPath) -> None:
    """Check that a drafter has an architecture that can be exported.

    Args:
        path: The folder of the drafter.

    Raises:
        UsageError: It has another one.
        RecordError: Its record is missing, torn or edited.
    """
    record = read_typed(Path(path) / RECORD, DrafterRecord)
    if record.config.architecture != "eagle3":
        raise UsageError(
            f"expected a drafter of architecture eagle3, got {record.config.architecture} in"
            f" {path}, which other programs cannot load; train one with `cascade train-drafter"
            " --architecture eagle3`"
        )


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Check that a drafter can be exported to a folder. Nothing is written.

    Args:
        folder: The folder.
        overwrite: Allow replacing an earlier export.

    Raises:
        OutputError: It is a file, or holds an export or the files of a model.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, expected a folder; choose another --output")
    present = [name for name in (CONFIG, WEIGHTS) if is_stored(folder / name)]
    if present and not _is_export(folder):
        raise OutputError(f"{folder} holds {present[0]} of another model; choose another --output")
    if present and not overwrite:
        raise OutputError(
            f"{folder} holds an exported drafter: choose another --output, or replace it with"
            " --overwrite"
        )


def _is_export(folder: Path) -> bool:
    try:
        content = parse_json(read_bytes(folder / CONFIG), foreign=True)
    except (OSError, UnreadableError):
        return False
    return isinstance(content, dict) and "cascade" in content and "speculators_config" in content


def _server_name(stack: DecoderStack) -> str:
    """Return the folder or hub id that a model was loaded from.

    Raises:
        UsageError: It was loaded from something else, or is known under a short name.
    """
    source = known(stack.provenance.source)
    if source is not None and os.path.isdir(source):
        return os.path.abspath(source)
    if source is None or "/" not in source or os.path.exists(source):
        raise UsageError(
            "expected --verifier, the hub id or the folder from which a server loads the model, as"
            f" {source or 'a model in memory'} is neither"
        )
    return source
