"""The copy of remote baselines: read once, checked, kept when the address fails."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from support.build_profiles import a_profile, edited
from support.commands import python
from support.paths import BASELINES
from support.remote_place import (
    ARRAYS,
    OTHER,
    PROFILE,
    ROWS,
    URL,
    Fault,
    RemotePlace,
    changed,
    hangs_up,
    local_folder,
    push,
    push_folder,
    push_profile,
    truncated,
)

from cascade.core.cache import cache_entries, clear, entries_named
from cascade.core.errors import OutputError, RecordError
from cascade.core.records import to_file
from cascade.core.run_folder import COMMITTED
from cascade.exits.fitted_heads import read_heads
from cascade.gate.baselines import read_profile
from cascade.gate.remote.copies import RECORD, copy_folder, up_to_date

Place = type[RemotePlace]


def contents() -> dict[str, bytes]:
    """Return what the copy holds, without its record."""
    folder = copy_folder(URL)
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def pushed(place: Place) -> dict[str, bytes]:
    return {name.removeprefix("store/baselines/"): data for name, data in place.files.items()}


# --- Reading ---------------------------------------------------------------------------------


def test_the_first_time_all_files_are_read(place: Place) -> None:
    found = up_to_date(URL)
    assert contents() == pushed(place)
    assert (found.refused, found.removed) == ({}, [])
    assert found.origin.url == URL
    assert found.origin.checked
    assert re.fullmatch("sha256:[0-9a-f]{64}", found.origin.revision)
    assert place.calls["get_file"] == 6
    baseline = read_profile(copy_folder(URL) / PROFILE)
    assert baseline.record() == a_profile(seed=0).record()


def test_unchanged_files_are_not_read_again(place: Place) -> None:
    first = up_to_date(URL)
    place.calls.clear()
    assert up_to_date(URL) == first
    assert place.calls == {"ls": 3}


def test_only_changed_baselines_are_read_again(place: Place) -> None:
    first = up_to_date(URL)
    place.calls.clear()
    push_profile(PROFILE, a_profile(seed=7))
    second = up_to_date(URL)
    assert place.calls["get_file"] == 3
    assert contents() == pushed(place)
    assert second.origin.revision != first.origin.revision


def test_a_place_that_names_no_versions_is_read_every_time(place: Place) -> None:
    place.stamped = False
    up_to_date(URL)
    push_profile(PROFILE, a_profile(seed=7))
    up_to_date(URL)
    assert contents() == pushed(place)
    assert place.calls["get_file"] == 12


def test_other_files_and_names_that_lead_out_of_the_folder_are_left_out(place: Place) -> None:
    expected = pushed(place)
    for name in ("README.md", "tiny/notes.txt"):
        push(name, b"{}")
    for name in ("..", ".git", "a\\b", "c\x1b", "con"):
        push_profile(f"{name}/texts.saturation.json", a_profile())
        push_profile(f"tiny/{name}.saturation.json", a_profile())
    push_profile("tiny/texts.saturation.json/deeper.saturation.json", a_profile())
    found = up_to_date(URL)
    assert found.refused == {}
    assert contents() == expected
    files = [path for path in copy_folder(URL).parent.rglob("*") if path.is_file()]
    assert len(files) == len(expected) + 1  # and the record


def test_all_kinds_of_baselines_are_read_and_checked(place: Place) -> None:
    place.files.clear()
    push_folder(BASELINES)
    assert up_to_date(URL).refused == {}
    names = {Path(name).name for name in contents()}
    assert names == {
        "embedded-held-out-confirm.budgets.json",
        "embedded.cascade.json",
        "embedded.heads.safetensors",
        "embedded.saturation.json",
        "embedded.saturation.npz",
    }


@pytest.mark.parametrize("ending", ["budgets.json", "cascade.json", "heads.safetensors"])
def test_every_kind_of_baseline_is_refused_where_its_seal_is_broken(
    place: Place, tmp_path: Path, ending: str
) -> None:
    folder = shutil.copytree(BASELINES, tmp_path / "baselines")
    (heads,) = folder.rglob("*.heads.safetensors")
    read_heads(heads).save(heads)  # the stored file is older than the hash of heads
    push_folder(folder)
    assert up_to_date(URL).refused == {}
    (path,) = (path for path in place.files if path.endswith(ending))
    data = bytearray(place.files[path])
    if ending == "heads.safetensors":
        data[-1] ^= 1
    else:
        data[data.rindex(b"1", 0, data.rindex(b'"hash"'))] = ord("2")
    place.files[path] = bytes(data)
    name = path.removeprefix("store/baselines/")
    refused = up_to_date(URL).refused
    assert list(refused) == [name]
    assert "was changed after it was written" in refused[name]


def test_a_slash_at_the_end_and_credentials_are_the_same_place(place: Place) -> None:
    up_to_date(f"{URL}/")
    place.calls.clear()
    assert up_to_date(URL).origin.url == URL
    assert place.calls["get_file"] == 0
    assert copy_folder("s3://key:secret/x@bucket/a") == copy_folder("s3://bucket/a/")
    assert copy_folder("https://host/a?ref=1") != copy_folder("https://host/a?ref=2")


def test_the_cache_lists_and_clears_copies(place: Place) -> None:
    up_to_date(URL)
    (entry,) = [entry for entry in cache_entries() if entry.kind == "baselines"]
    assert entry.name.startswith("baselines/remote-store-baselines-")
    assert entry.size > 1000
    clear(entries_named(["baselines"]))
    up_to_date(URL)
    assert contents() == pushed(place)


# --- Files that are refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (truncated, "expected .* bytes, got"),
        (hangs_up, "Connection reset by peer"),
        (changed, "was changed after it was written|is torn"),
    ],
)
def test_a_download_that_fails_is_not_taken(place: Place, fault: Fault, words: str) -> None:
    place.fault = fault
    found = up_to_date(URL)
    assert set(found.refused) == {PROFILE, OTHER}
    assert re.search(words, found.refused[PROFILE])
    assert f"{URL}/{PROFILE}" in found.refused[PROFILE]
    assert contents() == {}
    place.fault = None
    assert up_to_date(URL).refused == {}
    assert contents() == pushed(place)


@pytest.mark.parametrize("fault", [truncated, hangs_up, changed])
def test_a_download_that_fails_leaves_the_earlier_copy(place: Place, fault: Fault) -> None:
    first = up_to_date(URL)
    before = contents()
    push_profile(PROFILE, a_profile(seed=7))
    place.fault = fault
    found = up_to_date(URL)
    assert contents() == before
    assert found.origin.revision == first.origin.revision
    # What was read and is wrong is an error; what could not be read is as if it was not reached.
    if fault is changed:
        assert set(found.refused) == {PROFILE}
    else:
        assert found.refused == {}
        assert f"cannot read {URL}/{PROFILE}" in (found.origin.reason or "")


def test_a_truncated_file_whose_size_nobody_knows_is_refused_too(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = RemotePlace.info
    monkeypatch.setattr(place, "info", lambda *given: info(*given) | {"size": None})
    place.fault = truncated
    assert "is torn" in up_to_date(URL).refused[PROFILE]


def test_a_good_baseline_is_read_where_another_one_is_refused(place: Place) -> None:
    record = edited(a_profile(), lambda record: record.update(thresholds={}), sealed=False)
    push(PROFILE, json.dumps(record).encode())
    assert list(up_to_date(URL).refused) == [PROFILE]
    assert set(contents()) == {
        OTHER,
        *(OTHER.replace(".json", end) for end in (".npz", ".parquet")),
    }


def test_arrays_of_another_run_are_refused(place: Place) -> None:
    before = dict(place.files)
    push_profile(PROFILE, a_profile(seed=7))
    place.files[f"store/baselines/{ARRAYS}"] = before[f"store/baselines/{ARRAYS}"]
    assert ".npz was changed after it was written" in up_to_date(URL).refused[PROFILE]


def test_a_profile_without_arrays_is_refused_and_both_earlier_files_stay(place: Place) -> None:
    up_to_date(URL)
    before = contents()
    del place.files[f"store/baselines/{ARRAYS}"]
    found = up_to_date(URL)
    assert re.search(r"no file .*\.npz", found.refused[PROFILE])
    assert (contents(), found.removed) == (before, [])


def test_a_record_of_a_newer_release_is_left_to_its_reader(place: Place) -> None:
    record = edited(a_profile(), lambda record: record.update(schema=9), sealed=True)
    push(PROFILE, to_file(record).encode())
    assert up_to_date(URL).refused == {}
    with pytest.raises(RecordError, match="has schema 9, this release reads up to 3"):
        read_profile(copy_folder(URL) / PROFILE)


# --- The address fails -----------------------------------------------------------------------


def test_an_unreachable_address_with_a_copy_uses_it_and_says_so(place: Place) -> None:
    first = up_to_date(URL)
    before = contents()
    place.unreachable = TimeoutError("no answer in 10 seconds")
    found = up_to_date(URL)
    assert contents() == before
    assert found.origin.revision == first.origin.revision
    assert not found.origin.checked
    assert found.origin.reason == "it cannot be reached: no answer in 10 seconds"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
        (FileNotFoundError("x"), "there is no such folder or file, or you may not read it"),
        (ValueError(""), "ValueError"),
    ],
)
def test_an_unreachable_address_without_a_copy_is_one_line(
    place: Place, error: Exception, reason: str
) -> None:
    place.unreachable = error
    with pytest.raises(RecordError) as caught:
        up_to_date(URL)
    assert str(caught.value) == (
        f"cannot read baselines from {URL}: it cannot be reached: {reason}, and the cache has no "
        "copy of them; check the address and the network, or name a local folder"
    )
    assert not copy_folder(URL).exists()


def test_an_address_without_baselines_is_an_error_and_the_copy_stays(place: Place) -> None:
    up_to_date(URL)
    before = contents()
    place.files.clear()
    with pytest.raises(RecordError, match=f"such as MODEL/CORPUS.* in {URL}, found none"):
        up_to_date(URL)
    assert contents() == before


def test_a_baseline_that_is_gone_at_the_address_is_gone_here(place: Place) -> None:
    up_to_date(URL)
    for name in (PROFILE, ARRAYS, ROWS):
        del place.files[f"store/baselines/{name}"]
    assert up_to_date(URL).removed == [PROFILE, ARRAYS, ROWS]
    assert contents() == pushed(place)
    assert up_to_date(URL).removed == []


def test_messages_have_no_credentials(place: Place) -> None:
    url = URL.replace("://", "://somebody:pass/word@")
    place.unreachable = PermissionError(f"somebody with pass/word may not read {url}?token=abcd")
    with pytest.raises(RecordError) as caught:
        up_to_date(url)
    assert "somebody" not in str(caught.value)
    assert "pass/word" not in str(caught.value)
    assert "abcd" not in str(caught.value)


def test_the_record_of_a_copy_has_no_credentials(cache: Path, tmp_path: Path) -> None:
    import fsspec

    class WithUser(RemotePlace):
        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(super()._strip_protocol(path)).rpartition("@")[2]

    fsspec.register_implementation("remote", WithUser, clobber=True)
    RemotePlace.reset()
    push_profile(PROFILE, a_profile())
    found = up_to_date(URL.replace("://", "://somebody:secret@"))
    assert found.origin.url == URL.replace("://", "://***@")
    assert up_to_date(URL).origin.revision == found.origin.revision
    for path in cache.rglob("*"):
        assert "secret" not in str(path)
        assert not path.is_file() or b"secret" not in path.read_bytes()


# --- Earlier copies, and two processes -------------------------------------------------------


@pytest.mark.parametrize("damage", ["record", "file", "file is missing", "other file"])
def test_a_half_written_copy_is_read_again(place: Place, damage: str) -> None:
    up_to_date(URL)
    folder = copy_folder(URL)
    if damage == "record":
        (folder / RECORD).write_text('{"kind": "basel')
    elif damage == "file":
        (folder / PROFILE).write_bytes((folder / PROFILE).read_bytes()[:100])
    elif damage == "file is missing":
        (folder / ARRAYS).unlink()
    else:  # as `cascade gate` would find it by its record
        shutil.copytree(folder / "tiny", folder / "stranger")
    found = up_to_date(URL)
    assert contents() == pushed(place)
    assert found.refused == {}


def test_a_switch_that_was_interrupted_is_finished_without_the_address(place: Place) -> None:
    up_to_date(URL)
    before = contents()
    folder = copy_folder(URL)
    # As a process leaves it that is killed after the switch and before the files are moved.
    committed = folder / COMMITTED
    committed.mkdir()
    names = [PROFILE, ARRAYS, RECORD]
    (committed / "files.json").write_text(json.dumps({"all": names, "staged": names}))
    (committed / "tiny").mkdir()
    for name in names:
        shutil.move(folder / name, committed / name)
    place.unreachable = TimeoutError("no answer")
    assert up_to_date(URL).refused == {}
    assert contents() == before
    assert not committed.exists()


def test_a_damaged_copy_of_an_unreachable_address_is_refused(place: Place) -> None:
    up_to_date(URL)
    (copy_folder(URL) / ARRAYS).write_bytes(b"PK")
    place.unreachable = TimeoutError("no answer")
    found = up_to_date(URL)
    assert list(found.refused) == [PROFILE]
    assert f"{URL}/{PROFILE}" in found.refused[PROFILE]
    assert "is damaged" in found.refused[PROFILE]


def test_a_copy_that_is_up_to_date_needs_no_writable_cache(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    up_to_date(URL)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cascade.gate.remote.copies.make_folder", refuse)
    assert up_to_date(URL).refused == {}
    push_profile(PROFILE, a_profile(seed=7))
    with pytest.raises(OutputError, match="set CASCADE_CACHE to a folder that you can write to"):
        up_to_date(URL)


def test_a_full_disk_leaves_the_earlier_copy(place: Place) -> None:
    up_to_date(URL)
    before = contents()
    push_profile(PROFILE, a_profile(seed=7))

    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    place.fault = full
    with pytest.raises(OutputError, match=r"cannot write a copy of .*: No space left on device"):
        up_to_date(URL)
    assert contents() == before


def _read_slowly(started: object, results: object) -> None:
    def slow(_: str, content: bytes) -> bytes:
        started.set()  # type: ignore[attr-defined]
        time.sleep(0.3)
        return content

    RemotePlace.calls.clear()
    RemotePlace.fault = slow
    found = up_to_date(URL)
    results.put((found.origin.revision, RemotePlace.calls["get_file"]))  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the remote place is shared by forking")
def test_two_processes_at_once_read_the_files_once(place: Place) -> None:
    context = multiprocessing.get_context("fork")
    started, results = context.Event(), context.Queue()
    processes = [context.Process(target=_read_slowly, args=(started, results)) for _ in range(2)]
    processes[0].start()
    assert started.wait(60)
    processes[1].start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {revision for revision, _ in found} == {up_to_date(URL).origin.revision}
    assert sorted(downloads for _, downloads in found) == [0, 6]
    assert contents() == pushed(place)


def test_a_process_that_is_killed_while_it_reads_leaves_nothing(
    cache: Path, tmp_path: Path
) -> None:
    url = f"file://{local_folder(tmp_path / 'shared')}"
    up_to_date(url)
    before = sorted(path.name for path in copy_folder(url).rglob("*"))
    local_folder(tmp_path / "shared", seed=7)
    script = (
        "import os, cascade.gate.remote.copies as copies\n"
        "def kill(path): os._exit(9)\n"
        "copies.check_baseline = kill\n"
        f"copies.up_to_date({url!r})\n"
    )
    assert python("-c", script).status == 9
    assert read_profile(copy_folder(url) / PROFILE).record() == a_profile(seed=0).record()
    found = up_to_date(url)
    assert found.refused == {}
    assert read_profile(copy_folder(url) / PROFILE).record() == a_profile(seed=7).record()
    assert sorted(path.name for path in copy_folder(url).rglob("*")) == before


# --- Other file systems ----------------------------------------------------------------------


def test_memory_file_system(cache: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    url = "memory://shared/baselines"
    try:
        memory.put(str(local_folder(tmp_path / "one")), "/shared/baselines", recursive=True)
        first = up_to_date(url)
        assert up_to_date(url) == first
        memory.rm("/shared/baselines", recursive=True)
        memory.put(str(local_folder(tmp_path / "two", seed=7)), "/shared/baselines", recursive=True)
        assert up_to_date(url).origin.revision != first.origin.revision
        assert read_profile(copy_folder(url) / PROFILE).record() == a_profile(seed=7).record()
    finally:
        memory.store.clear()


def test_local_file_system_with_links(cache: Path, tmp_path: Path) -> None:
    one = local_folder(tmp_path / "one")
    two = local_folder(tmp_path / "two", seed=7)
    shared = tmp_path / "shared"
    (shared / "tiny").mkdir(parents=True)
    (shared / "other").symlink_to(one / "other")
    for name in (PROFILE, ARRAYS, ROWS):
        (shared / name).symlink_to(one / name)
    url = f"file://{shared}/"
    first = up_to_date(url)
    assert first.refused == {}
    # The target changes, the links do not.
    for name in (PROFILE, ARRAYS, ROWS):
        (one / name).write_bytes((two / name).read_bytes())
    assert up_to_date(url).origin.revision != first.origin.revision
    assert read_profile(copy_folder(url) / PROFILE).record() == a_profile(seed=7).record()
    assert (copy_folder(url) / OTHER).exists()
