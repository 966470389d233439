"""One line of a trace store: a trace as JSON, and a checksum of it.

Pure. The checksum is the line's last field, so that a line is plain JSON to every other
tool.
"""

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from distill.tracing.trace import Trace

_CHECKSUM = re.compile(rb', "crc32": "([0-9a-f]{8})"\}$')


def encode(record: Mapping[str, Any]) -> bytes:
    """The line of a trace's JSON form, with its end."""
    # As ASCII: a reply may hold half of a surrogate pair, which UTF-8 cannot.
    body = json.dumps(record).encode()
    return b'%s, "crc32": "%08x"}\n' % (body[:-1], zlib.crc32(body))


def decode(line: bytes) -> Trace:
    """The trace of a line.

    Raises:
        ValueError: The line is not as it was written, or was written by a later version.
    """
    line = line.rstrip(b"\n")
    checksum = _CHECKSUM.search(line)
    if not checksum:
        raise ValueError("it does not end in its checksum")
    line = line[: checksum.start()] + b"}"
    if zlib.crc32(line) != int(checksum[1], 16):
        raise ValueError("its checksum is another")
    try:
        return Trace.from_json(json.loads(line))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
