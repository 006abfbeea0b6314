"""The remote folder of baselines: its files, their versions, and reading them through fsspec."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.core.errors import OutputError, UsageError, first_line, os_reason
from cascade.core.names import file_name
from cascade.core.urls import redacted, without_secrets

#: The ends of the names of files that baselines consist of.
ENDINGS = (
    ".saturation.json",
    ".saturation.npz",
    ".saturation.parquet",
    ".budgets.json",
    ".cascade.json",
    ".heads.safetensors",
)

#: What file systems say of a version of a file, under the names that they use.
_VERSION_KEYS = (
    *("ETag", "etag", "checksum", "md5", "md5Hash", "md5_hash", "content_md5", "Content-MD5"),
    *("Digest", "crc32c", "sha256", "oid", "blob_id", "xet_hash", "generation", "version_id"),
    *("VersionId", "mtime", "LastModified", "last_modified", "Last-Modified", "updated"),
    "modified",
)

#: Protocol -> the package that reads it.
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    **dict.fromkeys(("oci", "ocilake"), "ocifs"),
    "hf": "huggingface_hub",
    "oss": "ossfs",
    "smb": "smbprotocol",
    "webdav": "webdav4",
}

#: Errors of the disk that the copy is written to.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class UnreachableError(Exception):
    """The remote folder or a file of it cannot be read; the message is the reason."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a remote folder of baselines.

    Attributes:
        name: Its path below the folder, "<model>/<file>".
        path: Its path as the file system names it.
        size: In bytes; None if the file system does not say.
        stamp: What the file system says of this version; None if it says nothing. Equal stamps
            mean equal content.
    """

    name: str
    path: str
    size: int | None
    stamp: str | None


class RemoteFolder:
    """A remote folder of baselines.

    Args:
        url: Its address, with credentials if it has some.

    Raises:
        UsageError: No installed package reads such an address; names the package.
        UnreachableError: It cannot be opened.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url
        _check_backends(url)
        try:
            self._filesystem, self._root = url_to_fs(url)
        except Exception as error:  # backends raise any error
            raise self._unreachable(error) from error

    def files(self) -> list[RemoteFile]:
        """Return the files of baselines, by name, as they are now.

        Raises:
            UnreachableError: The folder cannot be listed.
        """
        try:
            # Lists of an earlier session in this process may be out of date.
            self._filesystem.invalidate_cache()
            found = [
                self._file(f"{model}/{name}", entry)
                for model, folder in self._listed(self._root)
                if self._is_folder(folder)
                for name, entry in self._listed(str(folder["name"]))
                if name.endswith(ENDINGS) and not self._is_folder(entry)
            ]
        except Exception as error:  # backends raise any error
            raise self._unreachable(error) from error
        return sorted(found, key=lambda file: file.name)

    def download(self, file: RemoteFile, target: Path) -> None:
        """Write a file to a local path.

        Args:
            file: One of `files`.
            target: Where it is written; its folder exists.

        Raises:
            UnreachableError: The file cannot be read, or only a part of it.
            OutputError: The local disk is full or read-only.
        """
        try:
            self._filesystem.get_file(file.path, str(target))
            size = target.stat().st_size
        except Exception as error:  # backends raise any error
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise OutputError(
                    f"cannot write a copy of {redacted(self.url)}: {os_reason(error)}; free some "
                    "space, or set CASCADE_CACHE to another folder"
                ) from error
            raise self._unreachable(error) from error
        if file.size is not None and size != file.size:
            raise UnreachableError(f"expected {file.size:,} bytes, got {size:,}")

    def _listed(self, path: str) -> list[tuple[str, dict[str, Any]]]:
        """Return the entries of a folder with their own names; only names that are valid here."""
        entries = self._filesystem.ls(path, detail=True)
        named = [(str(entry["name"]).rstrip("/").rpartition("/")[2], entry) for entry in entries]
        return [(name, entry) for name, entry in named if _is_safe(name)]

    def _is_folder(self, entry: Mapping[str, Any]) -> bool:
        if entry.get("islink"):
            return bool(self._filesystem.isdir(entry["name"]))
        return entry.get("type") == "directory"

    def _file(self, name: str, entry: Mapping[str, Any]) -> RemoteFile:
        path = str(entry["name"])
        # Lists of an HTTP server have names alone, and a link in a list is not its target.
        if _stamp(entry) is None or entry.get("islink"):
            entry = self._filesystem.info(path)
        if _stamp(entry) is None:
            with contextlib.suppress(NotImplementedError):
                entry = {**entry, "modified": self._filesystem.modified(path)}
        size = entry.get("size")
        return RemoteFile(name, path, size if isinstance(size, int) else None, _stamp(entry))

    def _unreachable(self, error: Exception) -> UnreachableError:
        if isinstance(error, FileNotFoundError):
            reason = "there is no such folder or file, or you may not read it"
        elif isinstance(error, OSError) and error.strerror and type(error).__module__ == "builtins":
            reason = os_reason(error)
        else:
            reason = first_line(error)
        return UnreachableError(without_secrets(reason, self.url).rstrip("."))


def _is_safe(name: str) -> bool:
    """Return whether a name can be that of a model or of a baseline's file, here too."""
    return file_name(name) == unicodedata.normalize("NFC", name).lower()


def _stamp(entry: Mapping[str, Any]) -> str | None:
    known = {name: str(entry[name]) for name in _VERSION_KEYS if entry.get(name) is not None}
    if not known:
        return None
    return json.dumps(known | {"size": entry.get("size")}, sort_keys=True, allow_nan=False)


def _check_backends(url: str) -> None:
    """Raise unless a package reads every protocol of an address such as "zip::s3://...".

    Raises:
        UsageError: None does; names the package.
    """
    from fsspec import get_filesystem_class

    for protocol in filter(None, map(_protocol, url.split("::"))):
        cannot = f"cannot read {redacted(url)}: "
        try:
            get_filesystem_class(protocol)
        except ImportError as error:
            package = _PACKAGES.get(protocol)
            install = f"install it with `pip install {package}`" if package else first_line(error)
            raise UsageError(
                f"{cannot}the package that reads {protocol}:// is missing; {install}"
            ) from error
        except ValueError as error:
            raise UsageError(
                f"{cannot}fsspec does not know {protocol}://; install the package that adds it to "
                "fsspec, or use hf://, s3://, gs://, https:// or file://"
            ) from error


def _protocol(link: str) -> str | None:
    """Return the protocol of one link of a chain; None for a part that names none."""
    found = re.match(r"([A-Za-z][\w+.-]*)(://|$)", link)
    return None if found is None else found[1]


def is_offline(url: str) -> bool:
    """Return whether the user forbids to reach an address: `HF_HUB_OFFLINE` forbids the hub."""
    if not any(_protocol(link) == "hf" for link in url.split("::")):
        return False
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
