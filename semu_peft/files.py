"""Writing a result so that a reader sees the whole file or the one before it, never half of one."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


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


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file whole, with the same bytes for the same content.

    safetensors itself writes the entries of the metadata in an order that changes from process to process.

        Examples:
            >>> import tempfile, torch
            >>> from semu_peft.files import save_tensors
            >>> folder = tempfile.mkdtemp()
            >>> first = save_tensors(f"{folder}/a.safetensors", {"core": torch.eye(2)}, {"rank": "2", "gamma": "0.9"})
            >>> second = save_tensors(f"{folder}/b.safetensors", {"core": torch.eye(2)}, {"gamma": "0.9", "rank": "2"})
            >>> first.read_bytes() == second.read_bytes()
            True

        Args:
            path: The file.
            tensors: Contiguous tensors by name, no two of which share memory.
            metadata: Texts by name; `{"format": "pt"}` is added.

        Returns:
            The file.
    """
    entries = {"format": "pt", **(metadata or {})}
    with written_whole(path) as temporary:
        save_file(dict(tensors), temporary, metadata=entries)
        _sort_metadata(temporary)
    return Path(path)


def _sort_metadata(path: Path) -> None:
    # The header is its length in eight bytes and then JSON, to which spaces may be added at the end.
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
