"""Writing a result so that a reader sees the whole file or the one before it, never half of one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to, and rename it to `path` once the block has succeeded.

    Missing parent folders are created. The temporary name keeps the suffix, which writers often choose the format by.
    When the block raises, the temporary file is removed and an older `path` stays as it was.

    Args:
        path: Where the finished file is to be.

    Yields:
        The path to write to, in the same folder (a rename is atomic only within a file system).
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex}{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
