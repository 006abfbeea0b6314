"""Remote baselines as commands and the plugin use them: names, refusals, notes, pushing."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.build_profiles import a_profile
from support.remote_place import (
    OTHER,
    PROFILE,
    URL,
    RemotePlace,
    changed,
    push_profile,
    truncated,
)

from cascade.core.errors import RecordError
from cascade.core.schema import from_plain, to_plain
from cascade.gate.remote.baselines import RemoteBaselines
from cascade.gate.remote.records import BaselinesCopy

Place = type[RemotePlace]


def test_an_address_is_asked_once_and_on_first_use(place: Place) -> None:
    remote = RemoteBaselines(f"{URL}/")
    assert (remote.url, remote.is_read, place.calls["ls"]) == (URL, False, 0)
    remote.read()
    assert remote.is_read
    asked = place.calls["ls"]
    assert remote.copy.origin.checked
    assert place.calls["ls"] == asked
    assert remote.name_of(remote.folder / PROFILE) == f"{URL}/{PROFILE}"
    assert remote.checked(remote.folder / PROFILE) == remote.folder / PROFILE
    assert remote.notes() == []


def test_a_worker_uses_what_its_session_read(place: Place) -> None:
    copy = RemoteBaselines(URL).copy
    place.calls.clear()
    told = from_plain(to_plain(copy), BaselinesCopy)
    worker = RemoteBaselines(URL, told)
    assert worker.is_read
    assert worker.copy == copy
    assert not place.calls


def test_a_refused_baseline_is_one_line_and_its_earlier_copy_is_not_used(place: Place) -> None:
    fetched = RemoteBaselines(URL).copy.origin.fetched
    push_profile(PROFILE, a_profile(seed=7))
    place.fault = changed
    remote = RemoteBaselines(URL)
    with pytest.raises(RecordError) as caught:
        remote.checked(remote.folder / PROFILE)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert f"{URL}/{PROFILE}" in text or f"{URL}/{PROFILE}".replace(".json", ".npz") in text
    assert text.endswith(f"; the copy of {fetched} in the cache is unharmed")
    # Another baseline of the same address is as good as ever.
    assert remote.checked(remote.folder / OTHER) == remote.folder / OTHER
    assert [note[:18] for note in remote.notes()] == ["Baseline not used:"]


def test_a_missing_baseline_names_those_that_were_refused(place: Place) -> None:
    place.fault = truncated
    remote = RemoteBaselines(URL)
    with pytest.raises(RecordError, match=f"no baseline {URL}/a/b.saturation.json; refused: "):
        remote.checked(remote.folder / "a/b.saturation.json")


def test_notes_say_what_was_not_checked_and_what_is_gone(place: Place) -> None:
    fetched = RemoteBaselines(URL).copy.origin.fetched
    place.unreachable = TimeoutError("no answer")
    remote = RemoteBaselines(URL)
    assert remote.notes() == [
        f"Baselines of {URL}: it cannot be reached: no answer; the copy of {fetched} is used"
    ]
    assert remote.copy.origin.in_words().endswith(f"(copy of {fetched}, not checked)")
    place.unreachable = None
    for name in (OTHER, OTHER.replace(".json", ".npz")):
        del place.files[f"store/baselines/{name}"]
    assert RemoteBaselines(URL).notes() == [
        f"No longer in {URL}: {OTHER}, {OTHER.replace('.json', '.npz')}"
    ]


@pytest.mark.parametrize(
    ("url", "command"),
    [
        ("hf://datasets/ORG/NAME", "hf upload ORG/NAME baselines --repo-type dataset"),
        (
            "hf://datasets/ORG/NAME@refs/pr/1/sub/folder/",
            "hf upload ORG/NAME baselines sub/folder --repo-type dataset --revision refs/pr/1",
        ),
        ("hf://ORG/NAME@v1", "hf upload ORG/NAME baselines --revision v1"),
        ("s3://key:secret@bucket/a/", "aws s3 sync baselines s3://bucket/a"),
        ("gcs://bucket/a", "gcloud storage rsync --recursive baselines gs://bucket/a"),
        ("file:///shared", None),
    ],
)
def test_the_command_that_pushes(url: str, command: str | None, cache: Path) -> None:
    remote = RemoteBaselines(url)
    assert remote.push_command == command
    words = f"push them with `{command}`" if command else "copy that folder to file:///shared"
    assert remote.push_words == words
