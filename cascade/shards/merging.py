"""Merging the shards of a plan into one profile, with the bits of a single pass.

Shards hold consecutive sequences and are sorted, so the merge of their rows reads one shard after
the other, and one group of rows at a time. Memory does not grow with the number of sequences, apart
from 8 bytes each for fingerprints.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from msgspec import structs
from msgspec.json import encode

from cascade.core.arrays import Array
from cascade.core.errors import RecordError
from cascade.core.files import AnyPath
from cascade.core.provenance import (
    EngineProvenance,
    MachineProvenance,
    MeasuringMachine,
    Provenance,
)
from cascade.core.run_folder import RunFolder
from cascade.core.schema import UNSET, known
from cascade.gate.baselines import PROFILE_FILES, StoredProfile, read_profile, stage_profile
from cascade.saturation.profile import SaturationProfile
from cascade.saturation.row_files import RowWriter, StoredRows
from cascade.shards.plan import Plan
from cascade.shards.records import ShardRecord
from cascade.shards.shard_files import StoredShard, read_shard
from cascade.stats.similarity_statistics import SimilarityStatistics
from cascade.stats.token_statistics import TokenStatistics


def merge(
    plan: Plan | AnyPath,
    output: AnyPath,
    *,
    overwrite: bool = False,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> StoredProfile:
    """Merge the shards of a plan into the profile that one pass would give, bit for bit.

    Args:
        plan: The plan, or its folder. All of its shards must be measured.
        output: The folder of the run, to which `profile.json`, `profile.npz` and
            `profile.parquet` are written.
        overwrite: Replace the files of an earlier run.
        command: The command that the user ran, for the provenance.
        progress: Called with the number of tokens merged since the last call.

    Raises:
        RecordError: A shard is missing, torn, edited, or of another plan, model or version; the
            message names it.
        OutputError: The folder holds another run, or cannot be written.

    Example:
        >>> import cascade
        >>> stack, texts = cascade.load("smollm2-135m"), ["The cat sat on the mat."] * 40
        >>> plan = cascade.plan(stack, texts, "PLAN", shards=2, batch_size=2, seq_len=32)
        >>> for number in range(2):
        ...     done = cascade.measure_shard(plan, number, model=stack)
        >>> profile = cascade.merge(plan, "RUN")
        >>> len(profile.rows), profile.record().provenance.engine.shards
        (9, 2)
    """
    plan = plan if isinstance(plan, Plan) else Plan.read(plan)
    with RunFolder(Path(output), PROFILE_FILES, overwrite=overwrite) as folder:
        with folder.staged("profile.parquet") as path:
            profile = merged(plan, path, command=command, progress=progress)
        stage_profile(folder, profile)
    return read_profile(Path(output))


def merged(
    plan: Plan,
    path: Path,
    *,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> SaturationProfile:
    """Return the profile of all shards of a plan; its rows are written to a file.

    Args:
        plan: The plan.
        path: The file of the rows, which is replaced. It is not written atomically.
        command: The command that the user ran, for the provenance.
        progress: Called with the number of tokens merged since the last call.

    Raises:
        RecordError: As for `merge`.
        OSError: The file cannot be written.
    """
    _check_complete(plan)
    layers, length = plan.record.layers, plan.record.provenance.corpus.seq_len
    tokens = TokenStatistics(layers, plan.edges)
    prints: list[Array] = []
    records: list[ShardRecord] = []
    with RowWriter(path, layers) as writer:
        for shard in plan.record.shards:
            stored = _stored(plan, shard.number)
            records.append(stored.record)
            tokens = tokens.merged_tokens(stored.tokens)
            for rows, fingerprints in stored.rows.groups():
                writer.add(rows, fingerprints)
                prints.append(fingerprints)
                if progress is not None:
                    progress(len(rows) * length)
            stored.rows.close()
    every = StoredRows(path, layers, writer.hashes, range(sum(map(len, prints))))
    return SaturationProfile(
        SimilarityStatistics.of(tokens, every),
        np.concatenate(prints),
        _provenance(plan, records, command),
        noise=plan.record.noise,
        long=plan.long,
        no_long=_no_long(plan),
        parts=known(plan.record.parts),
    )


def _no_long(plan: Plan) -> str | None:
    about = known(plan.record.long_context)
    return None if about is None else known(about.reason)


def missing_shards(plan: Plan) -> list[int]:
    """Return the numbers of the shards that were not measured, without reading the others.

    Args:
        plan: The plan.
    """
    numbers = range(len(plan.record.shards))
    return [number for number in numbers if not plan.shard_folder(number).is_dir()]


def _check_complete(plan: Plan) -> None:
    missing = missing_shards(plan)
    if missing:
        some = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise RecordError(
            f"{plan.folder} lacks {len(missing):,} of {len(plan.record.shards):,} shards ({some}); "
            f"measure each with `cascade measure-shard {plan.folder} --shard {missing[0]}`"
        )


def _stored(plan: Plan, number: int) -> StoredShard:
    stored = read_shard(plan, number)
    if stored is None:
        raise RecordError(f"{plan.shard_folder(number)} was removed while it was merged")
    return stored


# --- Provenance ------------------------------------------------------------------------------


def _provenance(plan: Plan, records: list[ShardRecord], command: str | None) -> Provenance:
    """Return the provenance of the profile: what was measured, and separately by which engine."""
    about = plan.record.provenance
    counted = Counter(encode((record.device, record.machine)) for record in records)
    by_details = {encode((record.device, record.machine)): record for record in records}
    machines = [
        MeasuringMachine(
            device=by_details[key].device, machine=by_details[key].machine, shards=counted[key]
        )
        for key in sorted(counted)
    ]
    engine = EngineProvenance(
        shards=len(records),
        engines=sorted({record.engine for record in records if isinstance(record.engine, str)}),
        machines=machines,
        planned=known(about.machine) or machines[0].machine,
    )
    devices = sorted({one.device for one in machines})
    return structs.replace(
        about,
        model=structs.replace(about.model, device=" and ".join(devices)),
        machine=_one_machine([one.machine for one in machines]),
        command=command,
        engine=engine,
    )


def _one_machine(machines: list[MachineProvenance]) -> MachineProvenance:
    """Return the machine that measured, or one that names all of them: no machine is equal to it.

    So the gate measures the noise of arithmetic where it compares with such a profile.
    """
    first = machines[0]
    if all(one == first for one in machines):
        return first
    named = " and ".join(sorted({one.processor for one in machines}))
    accelerators = sorted({one.accelerator for one in machines if isinstance(one.accelerator, str)})
    products = sorted({known(one.products) or "full" for one in machines})
    return MachineProvenance(
        processor=named,
        threads=max(one.threads for one in machines),
        capability=" and ".join(sorted({known(one.capability) or "unknown" for one in machines})),
        blas=first.blas,
        accelerator=" and ".join(accelerators) if accelerators else UNSET,
        products=" and ".join(products) if products != ["full"] else UNSET,
    )


def machine_notes(record: EngineProvenance) -> list[str]:
    """Return what differs between the machines that measured the shards, one line each.

    Args:
        record: How the tasks were run.
    """
    notes = []
    columns = {
        "on different devices": [one.device for one in record.machines],
        "on different processors": [one.machine.processor for one in record.machines],
        "with different numbers of threads": [str(one.machine.threads) for one in record.machines],
        "with different instruction sets": [
            str(known(one.machine.capability)) for one in record.machines
        ],
        "with different precisions of products": [
            known(one.machine.products) or "full" for one in record.machines
        ],
    }
    for name, values in columns.items():
        different = [value for value, _ in itertools.groupby(sorted(values))]
        if len(different) > 1:
            notes.append(
                f"Shards were measured {name} ({', '.join(different)}), so their last "
                "digits can differ from those of one pass"
            )
    return notes
