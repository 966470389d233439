"""The trace store: an append-only, durable record of traces.

A store is a folder (local, or any fsspec URI) of segments, JSON lines each. Every writer
has segments of its own, so writers never meet; a trace is durable when ``append`` returns.
A torn last line, which a killed writer leaves, is dropped; damage anywhere else is an error.
"""

import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from distill.tracing.trace import Trace
from serve.errors import TraceStoreError

logger = logging.getLogger(__name__)


class TraceStore:
    """Reads a store: ``TraceStore(uri).scan()``; ``writer()`` appends to it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._fs, self._path = fsspec.url_to_fs(uri)

    def writer(self) -> "SegmentWriter":
        """A writer with segments of its own."""
        return SegmentWriter(self._fs, self._path)

    def scan(self) -> Iterator[Trace]:
        """Every durable trace, in no particular order.

        Raises:
            TraceStoreError: A segment is damaged elsewhere than in a torn last line.
        """
        self._fs.invalidate_cache()
        for segment in sorted(self._fs.glob(f"{self._path}/*.jsonl")):
            yield from self._scan_segment(segment)

    def latest(self, keys: Iterable[str]) -> dict[str, Trace]:
        """The traces of these keys; of several with one key, a finished one wins."""
        wanted = set(keys)
        found: dict[str, Trace] = {}
        for trace in self.scan():
            if trace.key in wanted and (trace.key not in found or trace.failure is None):
                found[trace.key] = trace
        return found

    def _scan_segment(self, segment: str) -> Iterator[Trace]:
        *lines, tail = self._fs.cat_file(segment).split(b"\n")
        if tail:
            logger.warning("%s: dropped a torn last record of %d bytes.", segment, len(tail))
        for number, line in enumerate(lines, 1):
            try:
                yield Trace.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise TraceStoreError(
                    f"{segment}, line {number}: is damaged ({type(error).__name__}: {error}). "
                    "Restore the file, or remove that line to trace its example anew."
                ) from error


class SegmentWriter:
    """Appends traces durably. One writer belongs to one thread at a time."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self._fs = fs
        self._prefix = f"{path}/{uuid.uuid4().hex}"
        self._parts = 0
        self._local = isinstance(fs, LocalFileSystem)
        fs.makedirs(path, exist_ok=True)

    def append(self, traces: Iterable[Mapping[str, Any]]) -> None:
        """Write JSON forms of traces; they are durable when this returns."""
        # As ASCII: a reply may hold half of a surrogate pair, which UTF-8 cannot.
        data = "".join(json.dumps(trace) + "\n" for trace in traces).encode()
        if self._local:
            self._append_local(data)
        else:
            # Object stores cannot append: each batch is a segment of its own.
            self._fs.pipe_file(f"{self._prefix}-{self._parts:06d}.jsonl", data)
            self._parts += 1

    def _append_local(self, data: bytes) -> None:
        name = f"{self._prefix}-{self._parts:06d}.jsonl"
        try:
            with open(name, "ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            # What was half written must stay the last line of its segment.
            self._parts += 1
            raise
