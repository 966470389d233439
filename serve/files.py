"""Files of a student directory, wherever it is: a local folder or an fsspec URI.

Owns reading and fetching. What the files mean is for ``student`` and the engines.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


@contextlib.contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """A folder's local path: itself, or a copy of a remote one for as long as needed."""
    fs, path = fsspec.url_to_fs(uri)
    if isinstance(fs, LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="raydistill-") as temporary:
        target = Path(temporary) / Path(path).name
        fs.get(f"{path}/", f"{target}/", recursive=True)
        yield target


def absolute(uri: str) -> str:
    """The same folder as other processes know it: a local one by its absolute path."""
    fs, path = fsspec.url_to_fs(uri)
    return str(path) if isinstance(fs, LocalFileSystem) else uri


def read_text(uri: str) -> str:
    """The text of one file, in UTF-8."""
    fs, path = fsspec.url_to_fs(uri)
    # Another process may have written it since this filesystem last looked.
    fs.invalidate_cache()
    return bytes(fs.cat_file(path)).decode("utf-8")
