"""The archive holds all similarities of a pass, under the names of the seed study."""

from __future__ import annotations

import errno
import json
import os
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.disk import contents, largest_file
from support.tiny_models import random_ids, tiny_model

from cascade.core.errors import OutputError
from cascade.core.provenance import CorpusProvenance, ModelProvenance, Provenance
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import analyze
from cascade.saturation.token_archive import SimilarityArchive, check_free

Array = npt.NDArray[Any]

NORMED = ["1", "2", "3", "3+norm"]
PROVENANCE = Provenance(
    model=ModelProvenance(revision=None),
    corpus=CorpusProvenance(
        source="d\u00e9j\u00e0 vu",
        name="words",
        fingerprint="c",
        records=1,
        tokens=3,
        sequences=1,
        seq_len=3,
    ),
)
PLAIN = ["1", "2", "3"]


def similarities(rows: int, batch: int, length: int, *, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(-1, 1, (rows, batch, length)).astype(np.float32)


def save(
    path: Path,
    labels: Sequence[str],
    batches: Sequence[Array],
    *,
    overwrite: bool = False,
    failure: type[BaseException] | None = None,
) -> dict[str, Array]:
    """Save an archive of some batches and read it; with `failure`, raise it before packing."""
    with SimilarityArchive(path, labels, overwrite=overwrite) as archive:
        for batch in batches:
            archive.add(batch, np.arange(batch.shape[1]))
        if failure is not None:
            raise failure
        archive.save(PROVENANCE)
    return read(path)


def read(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


# --- Content ---------------------------------------------------------------------------------


def test_archive_has_one_value_per_layer_and_token_in_corpus_order(tmp_path: Path) -> None:
    first, second = similarities(4, 3, 5), similarities(4, 2, 5, seed=1)
    stored = save(tmp_path / "cos_sim_data.npz", NORMED, [first, second])
    for row, name in enumerate(("layer_1", "layer_2", "layer_3_residual", "layer_3")):
        expected = np.concatenate([first[row].ravel(), second[row].ravel()])
        assert stored[name].dtype == np.float32
        assert np.array_equal(stored[name], expected)
    assert set(stored) == {"layer_1", "layer_2", "layer_3", "layer_3_residual", "metadata"}


def test_last_layer_without_final_norm_is_stored_as_residual_too(tmp_path: Path) -> None:
    batch = similarities(3, 2, 4)
    stored = save(tmp_path / "x.npz", PLAIN, [batch])
    for row, name in enumerate(("layer_1", "layer_2", "layer_3")):
        assert np.array_equal(stored[name], batch[row].ravel())
    assert np.array_equal(stored["layer_3_residual"], batch[2].ravel())
    assert set(stored) == {"layer_1", "layer_2", "layer_3", "layer_3_residual", "metadata"}


def test_archive_of_a_model_with_one_layer(tmp_path: Path) -> None:
    batch = similarities(2, 1, 4)
    stored = save(tmp_path / "x.npz", ["1", "1+norm"], [batch])
    assert np.array_equal(stored["layer_1"], batch[1].ravel())
    assert np.array_equal(stored["layer_1_residual"], batch[0].ravel())


def test_metadata_is_the_provenance_as_json(tmp_path: Path) -> None:
    stored = save(tmp_path / "x.npz", PLAIN, [similarities(3, 2, 4)])
    metadata = json.loads(str(stored["metadata"]))
    assert metadata == to_plain(PROVENANCE)
    assert metadata["corpus"]["source"] == "d\u00e9j\u00e0 vu"
    assert metadata["corpus"]["tokens"] == 3
    assert metadata["model"] == {"revision": None}


@given(cuts=st.lists(st.integers(0, 7), max_size=4).map(sorted))
def test_archive_does_not_depend_on_the_batches(cuts: list[int]) -> None:
    whole = similarities(4, 7, 3)
    parts = [part for part in np.split(whole, cuts, axis=1) if part.shape[1]]
    with tempfile.TemporaryDirectory() as folder:
        stored = save(Path(folder) / "x.npz", NORMED, parts)
    assert np.array_equal(stored["layer_1"], whole[0].ravel())
    assert np.array_equal(stored["layer_3"], whole[3].ravel())


def test_transposed_batch_is_stored_in_the_right_order(tmp_path: Path) -> None:
    batch = similarities(3, 4, 5).transpose(0, 2, 1)
    assert not batch[0].flags.c_contiguous
    stored = save(tmp_path / "x.npz", PLAIN, [batch])
    assert np.array_equal(stored["layer_2"], np.ascontiguousarray(batch[1]).ravel())


def test_last_layer_is_stored_normed_and_residual(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids = random_ids(5, 12)
    blocks = TokenBlocks(ids.numpy().astype(np.int32), "random", "random", 5)
    with SimilarityArchive(tmp_path / "x.npz", DecoderStack(model).layer_labels) as archive:
        analyze(DecoderStack(model), blocks, batch_size=2, sink=archive.add)
        archive.save(PROVENANCE)
    stored = read(tmp_path / "x.npz")
    # The seed study used `hidden_states` of transformers, whose last entry is normed.
    with torch.no_grad():
        history = model(ids, output_hidden_states=True).hidden_states
    for layer in range(1, 5):
        similarity = torch.cosine_similarity(history[layer - 1], history[layer], dim=-1)
        # In fp32, a cosine of 32 terms has an error of some 1e-7.
        assert stored[f"layer_{layer}"] == pytest.approx(similarity.flatten().numpy(), abs=1e-6)
    assert np.abs(stored["layer_4"] - stored["layer_4_residual"]).max() > 0.01


# --- Writing ---------------------------------------------------------------------------------


def test_successful_run_leaves_only_the_archive(tmp_path: Path) -> None:
    save(tmp_path / "new/folder/x.npz", PLAIN, [similarities(3, 2, 4)])
    assert list(contents(tmp_path)) == ["new", "new/folder", "new/folder/x.npz"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_failed_run_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure):
        save(tmp_path / "new/folder/x.npz", PLAIN, [similarities(3, 2, 4)], failure=failure)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_failed_run_leaves_the_old_archive(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "x.npz"
    save(path, PLAIN, [similarities(3, 2, 4)])
    before = contents(tmp_path)
    with pytest.raises(failure):
        save(path, PLAIN, [similarities(3, 9, 4)], overwrite=True, failure=failure)
    assert contents(tmp_path) == before


def test_overwrite_replaces_the_old_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    save(path, PLAIN, [similarities(3, 2, 4)])
    stored = save(path, PLAIN, [similarities(3, 9, 4)], overwrite=True)
    assert stored["layer_1"].shape == (36,)


def test_existing_file_is_rejected_without_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_text("mine")
    for attempt in (
        lambda: check_free(path, overwrite=False),
        lambda: SimilarityArchive(path, PLAIN),
    ):
        with pytest.raises(OutputError, match=r"x\.npz exists: choose another --npz.*--overwrite"):
            attempt()
    check_free(path, overwrite=True)
    check_free(tmp_path / "y.npz", overwrite=False)
    assert contents(tmp_path) == {"x.npz": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_at_the_path_of_the_archive_is_rejected(tmp_path: Path, overwrite: bool) -> None:
    with pytest.raises(OutputError, match="is a folder, expected a file name for --npz"):
        SimilarityArchive(tmp_path, PLAIN, overwrite=overwrite)
    assert contents(tmp_path) == {}


def test_path_below_a_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file/x.npz", tmp_path / "file/below/x.npz"):
        with pytest.raises(OutputError, match=r"cannot write .*x\.npz: .*choose an --npz you can"):
            SimilarityArchive(path, PLAIN)
    assert contents(tmp_path) == {"file": b"mine"}


def test_too_few_file_handles_are_an_output_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    unused = os.open(os.devnull, os.O_RDONLY)
    os.close(unused)
    resource.setrlimit(resource.RLIMIT_NOFILE, (unused + 10, before[1]))
    try:
        with pytest.raises(OutputError, match=os.strerror(errno.EMFILE)):
            SimilarityArchive(tmp_path / "new/x.npz", [str(layer) for layer in range(1, 100)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert contents(tmp_path) == {}


#: 4 rows of 4,000 tokens take 16,000 bytes in each working file and over 64,000 in the archive.
@pytest.mark.parametrize("limit", [0, 9_000, 15_999, 16_000, 50_000, 64_000])
def test_full_disk_at_any_point_leaves_the_old_archive(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "x.npz"
    save(path, NORMED, [similarities(4, 1, 4)])
    before = contents(tmp_path)
    batches = [similarities(4, 10, 100)] * 4
    with largest_file(limit), pytest.raises(OutputError) as caught:
        save(path, NORMED, batches, overwrite=True)
    assert str(caught.value).startswith(f"cannot write {path}: {os.strerror(errno.EFBIG)}")
    assert "free some space" in str(caught.value)
    assert contents(tmp_path) == before
    with largest_file(100_000):
        assert save(path, NORMED, batches, overwrite=True)["layer_3"].shape == (4000,)
