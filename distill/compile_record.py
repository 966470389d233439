"""What a compile leaves of itself beside its traces, for ``raydistill traces``.

A run has its configuration, from which everything is loaded again. A compile's program and
metric are objects of another process, so it writes down which traces are its own and what
chose among them; the scores are in the traces.
"""

from collections.abc import Sequence

from pydantic import Field

from distill.config import Section, TraceConfig
from distill.config_file import validated
from distill.rundir import RunDir
from serve.errors import ConfigurationError

FILE = "compile.json"


class CompileRecord(Section):
    """A compile's part in the choice of traces.

    Attributes:
        trace: How they were made and chosen.
        has_metric: Whether a metric chose.
        keys: Those of its traces, an example's together.
    """

    trace: TraceConfig
    has_metric: bool
    keys: Sequence[str] = Field(repr=False)


def write(directory: RunDir, record: CompileRecord) -> None:
    """Leave the record in a compile's directory."""
    directory.write_json(FILE, record.model_dump(mode="json"))


def read(directory: RunDir) -> CompileRecord:
    """The record of a compile's directory.

    Raises:
        ConfigurationError: There is none, or it is not one.
    """
    found = directory.read_json(FILE)
    if found is None:
        raise ConfigurationError(f"{directory.uri}: has no traces. Expected a run directory.")
    record: CompileRecord = validated(CompileRecord, found, directory.join(FILE))
    return record
