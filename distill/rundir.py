"""The run directory: everything one run leaves behind, on a local folder or an fsspec URI.

Owns names and atomic writes. What the files mean is for the stages that write them.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from serve.errors import ConfigurationError, StorageError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RunDir:
    """One run's directory, ``<storage>/<name>``.

    Args:
        uri: A local path or an fsspec URI, such as ``s3://bucket/runs/banking77``.

    Raises:
        ConfigurationError: The URI's scheme is unknown, or its package is not installed.
    """

    def __init__(self, uri: str) -> None:
        try:
            self._fs, self._root = fsspec.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise ConfigurationError(f"storage: {uri} cannot be used: {error}") from None
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.uri = self._root if self.is_local else uri.rstrip("/")

    def create(self) -> None:
        """Make the directory, and see that it can be written.

        Raises:
            ConfigurationError: It cannot.
            StorageError: There is no room.
        """
        # Of its own, since students that are trained together are checked together.
        probe = f".writable-{uuid.uuid4().hex}"
        try:
            with self.guarded():
                self._fs.makedirs(self._root, exist_ok=True)
                self.write_text(probe, "")
                self._fs.rm(f"{self._root}/{probe}")
        except OSError as error:
            raise ConfigurationError(
                f"storage: {self.uri} cannot be written ({error.strerror or error}). Make it "
                "writable, or choose another storage."
            ) from None

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Around whatever writes to the directory: say plainly that there is no room.

        Raises:
            StorageError: In the place of the OSError that says so.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise StorageError(
                f"{error.filename or self.uri}: cannot be written ({error.strerror}). Make room "
                "and run the same command again; it goes on from what is there."
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only run that works in a local directory; a killed run's lock is gone.

        Raises:
            ConfigurationError: Another run is at work there.
        """
        if not self.is_local:
            yield
            return
        with open(f"{self._root}/.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigurationError(
                    f"{self.uri}: another run is at work here. Wait for it, stop it, or give "
                    "this run another name."
                ) from None
            yield

    def join(self, name: str) -> str:
        """The URI of something in the directory."""
        return f"{self.uri}/{name}"

    def exists(self, name: str) -> bool:
        """Whether a file or folder is there."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(f"{self._root}/{name}"))

    def read_json(self, name: str) -> Any:
        """The JSON file's value, or None where there is no such file."""
        try:
            return json.loads(self._fs.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file at once: a reader sees the old one or the new one."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def write_jsonl(self, name: str, values: Iterable[Mapping[str, Any]]) -> None:
        """Write JSON lines at once."""
        with self.writing(name) as file:
            file.writelines(json.dumps(value) + "\n" for value in values)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file at once."""
        with self.writing(name) as file:
            file.write(text)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[IO[str]]:
        """A text file to fill; a reader sees the old one, or, once it is left, the new one."""
        path = Path(self._root, name) if self.is_local else None
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=path and path.parent) as folder:
            temporary = Path(folder) / Path(name).name
            with temporary.open("w", encoding="utf-8", newline="") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if path:
                os.replace(temporary, path)
                return
            # Object stores replace whole objects, so a plain write is atomic there.
            self._fs.makedirs(f"{self._root}/{name}".rsplit("/", 1)[0], exist_ok=True)
            self._fs.put_file(str(temporary), f"{self._root}/{name}")

    @contextlib.contextmanager
    def replacing(self, name: str, seal: str) -> Iterator[Path]:
        """A local folder to fill; on leaving it takes the place of ``name``.

        What was there before goes away. A kill in the middle never leaves a half that could
        be taken for the whole: ``seal`` is a file in the folder that comes last.
        """
        path = Path(self._root, name)
        if self.is_local:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left_over in path.parent.glob(f".{path.name}-*"):
                shutil.rmtree(left_over)
        parent = path.parent if self.is_local else None
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=parent) as temporary:
            folder = Path(temporary) / path.name
            folder.mkdir()
            yield folder
            target = f"{self._root}/{name}"
            if self._fs.exists(target):
                self._fs.rm(target, recursive=True)
            if self.is_local:
                os.replace(folder, target)
                return
            files = [file for file in folder.rglob("*") if file.is_file()]
            for file in sorted(files, key=lambda file: file == folder / seal):
                self._fs.put_file(str(file), f"{target}/{file.relative_to(folder).as_posix()}")

    @contextlib.contextmanager
    def appending(self, name: str) -> Iterator[Path]:
        """A local file to append to; a remote one is written back on leaving."""
        path = f"{self._root}/{name}"
        if self.is_local:
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="raydistill-") as temporary:
            file = Path(temporary) / Path(name).name
            if self._fs.exists(path):
                self._fs.get_file(path, str(file))
            try:
                yield file
            finally:
                if file.exists():
                    self._fs.put_file(str(file), path)

    def remove(self, name: str) -> None:
        """Remove a folder and all that is in it, if it is there."""
        if self.exists(name):
            self._fs.rm(f"{self._root}/{name}", recursive=True)

    def put_files(self, folder: Path, name: str) -> None:
        """Copy a local folder's files into a folder here, in the place of those of their names."""
        for file in folder.rglob("*"):
            if file.is_file():
                target = f"{self._root}/{name}/{file.relative_to(folder).as_posix()}"
                self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                self._fs.put_file(str(file), target)
