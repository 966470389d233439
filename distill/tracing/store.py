"""The trace store: an append-only, durable record of traces.

A store is a folder (local, or any fsspec URI) of segments, JSON lines each. Every writer
has segments of its own, so writers never meet; a trace is durable when ``append`` returns.
Each line ends in a checksum of the rest. A torn last line, which a killed writer leaves, is
dropped; damage anywhere else is an error. How a line is written is ``records``.
"""

import contextlib
import errno
import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from distill.tracing.records import decode, encode
from distill.tracing.trace import Trace
from serve.errors import TraceStoreError

logger = logging.getLogger(__name__)

MAX_OPEN_FILES = 100


@dataclass(frozen=True, slots=True)
class Position:
    """Where a record lies."""

    segment: str
    offset: int


class TraceStore:
    """Reads a store: ``TraceStore(uri).scan()``; ``writer()`` appends to it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._fs, self._path = fsspec.url_to_fs(uri)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._origin = self._path

    def writer(self) -> "SegmentWriter":
        """A writer with segments of its own."""
        return SegmentWriter(self._fs, self._path, self._local)

    @contextlib.contextmanager
    def beacon(self) -> Iterator[str]:
        """A name that ``sees`` finds in this store, from wherever it can be reached.

        Raises:
            TraceStoreError: The store cannot be written.
        """
        name = f".beacon-{uuid.uuid4().hex}"
        try:
            self._fs.makedirs(self._path, exist_ok=True)
            self._fs.pipe_file(f"{self._path}/{name}", b"-")
        except OSError as error:
            raise _unwritable(self._path, error) from error
        try:
            yield name
        finally:
            with contextlib.suppress(OSError):
                self._fs.rm_file(f"{self._path}/{name}")

    def sees(self, beacon: str) -> bool:
        """Whether this process has the store before it that the beacon was put into."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(f"{self._path}/{beacon}"))

    def scan(self) -> Iterator[Trace]:
        """Every durable trace, in no particular order, one at a time.

        Raises:
            TraceStoreError: A segment is damaged elsewhere than in a torn last line.
        """
        with self._fetched() as store:
            for _, trace in store._scan():
                yield trace

    def read(
        self,
        keys: Iterable[str],
        metric: str | None = None,
        seen: Callable[[Trace], None] | None = None,
    ) -> Iterator[Trace]:
        """The traces of these keys, in their order.

        Of several records with one key a finished one counts, and of these one with a score by
        the metric; of failures a final one. Holds where the records lie, not the records.

        Args:
            keys: Of the traces.
            metric: What names it.
            seen: Is handed every record with these keys before the first trace is there.

        Raises:
            TraceStoreError: As ``scan``.
        """
        places: dict[str, tuple[int, Position] | None] = dict.fromkeys(keys)
        with self._fetched() as store, contextlib.ExitStack() as stack:
            for position, trace in store._scan():
                if trace.key not in places:
                    continue
                if seen:
                    seen(trace)
                known, rank = places[trace.key], _rank(trace, metric)
                if known is None or rank >= known[0]:
                    places[trace.key] = rank, position
            files: dict[str, IO[bytes]] = {}
            for _, position in filter(None, places.values()):
                if position.segment not in files and len(files) == MAX_OPEN_FILES:
                    stack.close()
                    files.clear()
                if position.segment not in files:
                    files[position.segment] = stack.enter_context(open(position.segment, "rb"))
                file = files[position.segment]
                file.seek(position.offset)
                yield decode(file.readline())

    def latest(self, keys: Iterable[str]) -> dict[str, Trace]:
        """The traces of these keys, by key, all at once."""
        return {trace.key: trace for trace in self.read(keys)}

    def _scan(self) -> Iterator[tuple[Position, Trace]]:
        for segment in self._segments():
            yield from self._scan_segment(segment)

    def _segments(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            # Not glob(), to which a folder that cannot be listed is an empty one.
            names = self._fs.ls(self._path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _unreadable(self._path, error) from error
        return sorted(name for name in names if name.endswith(".jsonl"))

    def _scan_segment(self, segment: str) -> Iterator[tuple[Position, Trace]]:
        offset = 0
        for number, line in enumerate(self._lines(segment), 1):
            if not line.endswith(b"\n"):
                name = self._named(segment)
                logger.warning("%s: dropped a torn last record (%d B).", name, len(line))
                return
            try:
                trace = decode(line)
            except ValueError as error:
                name = self._named(segment)
                raise TraceStoreError(
                    f"{name}, line {number}: is damaged ({error}). Restore the file, or "
                    f"remove that line (sed -i {number}d FILE) to trace its example anew."
                ) from error
            yield Position(segment, offset), trace
            offset += len(line)

    def _lines(self, segment: str) -> Iterator[bytes]:
        try:
            with self._fs.open(segment, "rb") as file:
                yield from file
        except OSError as error:
            raise _unreadable(self._named(segment), error) from error

    def _named(self, segment: str) -> str:
        """What a person knows a segment by, of which this may be a copy."""
        return f"{self._origin}/{_base(segment)}"

    @contextlib.contextmanager
    def _fetched(self) -> Iterator["TraceStore"]:
        """The store as a local one: itself, or a copy of a remote one for as long as needed."""
        if self._local:
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="raydistill-") as folder:
            segments = self._segments()
            copies = [str(Path(folder) / _base(segment)) for segment in segments]
            try:
                # At once: an object store is slow to answer, and has many segments.
                self._fs.get(segments, copies)
            except OSError as error:
                raise _unreadable(self.uri, error) from error
            copy = TraceStore(folder)
            copy._origin = self.uri.rstrip("/")
            yield copy


class SegmentWriter:
    """Appends traces durably. One writer belongs to one thread at a time."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, local: bool) -> None:
        self._fs, self._path, self._local = fs, path, local
        self._prefix = f"{path}/{uuid.uuid4().hex}"
        self._parts = 0
        try:
            fs.makedirs(path, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error

    def append(self, traces: Iterable[Mapping[str, Any]]) -> None:
        """Write JSON forms of traces; they are durable when this returns.

        Raises:
            TraceStoreError: They cannot be written; what was written before is not touched.
        """
        data = b"".join(encode(trace) for trace in traces)
        name = f"{self._prefix}-{self._parts:06d}.jsonl"
        try:
            if self._local:
                _append(name, data)
            else:
                # Object stores cannot append: each batch is a segment of its own.
                self._fs.pipe_file(name, data)
                self._parts += 1
        except OSError as error:
            # What was half written must stay the last line of its segment.
            self._parts += 1
            raise _unwritable(self._path, error) from error


def _append(name: str, data: bytes) -> None:
    is_new = not os.path.exists(name)
    with open(name, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        # The file's name is the folder's to keep.
        folder = os.open(os.path.dirname(name), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _base(segment: str) -> str:
    return segment.rsplit("/", 1)[-1]


def _rank(trace: Trace, metric: str | None) -> int:
    """How good a record is among those with its key."""
    if trace.failure is not None:
        return int(trace.failure.is_final)
    return 3 if trace.score is not None and trace.score.metric == metric else 2


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "Make it a folder"),
}


def _unreadable(path: str, error: OSError) -> TraceStoreError:
    return TraceStoreError(
        f"{path}: the trace store cannot be read ({error.strerror or error}). Make it readable, or "
        "move it away to trace anew what it holds, and run the same command again."
    )


def _unwritable(path: str, error: OSError) -> TraceStoreError:
    remedy = _REMEDIES.get(error.errno or 0, "Make it writable, or use another storage")
    return TraceStoreError(
        f"{path}: the trace store cannot be written ({error.strerror or error}). {remedy}, and "
        "run the same command again; what was traced is kept."
    )
