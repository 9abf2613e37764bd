"""Writing a result so that a reader sees the whole of it or what was there before, never half and never a mix."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .arguments import check_path

_ABANDONED = 3600.0  # seconds after which a temporary file is one that a killed writer has left
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}\.partial")
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to, and rename it to `path` once the block has succeeded.

    Missing parent folders are created. The temporary name keeps the suffix, which writers often choose the format by.
    When the block raises, the temporary file is removed and an older `path` stays as it was. A symbolic link is
    replaced, and what it points to left alone. What killed writers have left is swept.

    Args:
        path: Where the finished file is to be.

    Yields:
        The path to write to, in the same folder (a rename is atomic only within a file system).

    Examples:
        >>> import tempfile
        >>> from semu_peft.files import written_whole
        >>> path = Path(tempfile.mkdtemp(), "result.txt")
        >>> with written_whole(path) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> path.read_text()
        'whole'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent, f".{target.stem}.*{target.suffix}")
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex}{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: str | os.PathLike[str], names: Collection[str]) -> Iterator[Path]:
    """Give a temporary folder to write files to that belong together, and put them into `path` as one.

    Where the system can exchange two folders, a reader sees all old files or all new ones. Elsewhere, and where `path`
    has folders inside, the first of `names` is removed before the others are replaced and comes last: what reads it
    finds nothing for that moment, and never a mix.

    Args:
        path: The folder; other files in it stay.
        names: The files' names, first the one that readers look for first.

    Yields:
        The folder to write to.

    Examples:
        >>> import tempfile
        >>> from semu_peft.files import folder_written_whole
        >>> folder = Path(tempfile.mkdtemp(), "pair")
        >>> with folder_written_whole(folder, ["a.txt", "b.txt"]) as temporary:
        ...     _ = [(temporary / name).write_text(name) for name in ("a.txt", "b.txt")]
        >>> sorted(file.name for file in folder.iterdir())
        ['a.txt', 'b.txt']
    """
    check_path("path", path)
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_dir():
        raise ValueError(f"`path` must be a folder, got {str(path)!r}, which is a file. Give another path.")
    _sweep(target.parent, f".{target.name}.*.partial")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    temporary.mkdir()
    try:
        yield temporary
        if not target.exists():
            temporary.rename(target)
        elif not _exchanged(target, temporary):
            _replace_one_by_one(target, temporary, list(names))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def final_name(folder: Path) -> str:
    """The name of a folder, or of a temporary one of `folder_written_whole` the name that it will have.

    Examples:
        >>> import tempfile
        >>> from semu_peft.files import final_name, folder_written_whole
        >>> with folder_written_whole(Path(tempfile.mkdtemp(), "no-cats"), ["a.txt"]) as temporary:
        ...     final_name(temporary)
        'no-cats'
    """
    name = folder.name
    while (found := _TEMPORARY.fullmatch(name)) is not None:
        name = found[1]
    return name


def _exchanged(target: Path, temporary: Path) -> bool:
    """Try to let two folders change places, after all else in the first one was linked into the second."""
    others = [file for file in target.iterdir() if not (temporary / file.name).exists()]
    if target == Path.cwd() or any(file.is_dir() and not file.is_symlink() for file in others):
        return False
    try:
        for file in others:
            os.link(file, temporary / file.name, follow_symlinks=False)
        shutil.copymode(target, temporary)
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError, NotImplementedError):
        return False
    here = -100  # AT_FDCWD
    code: int = rename(here, os.fsencode(temporary), here, os.fsencode(target), _EXCHANGE)
    return code == 0


def _replace_one_by_one(target: Path, temporary: Path, names: list[str]) -> None:
    (target / names[0]).unlink(missing_ok=True)
    for name in reversed(names):
        if (temporary / name).exists():
            os.replace(temporary / name, target / name)


def _sweep(folder: Path, pattern: str) -> None:
    before = time.time() - _ABANDONED
    for path in folder.glob(pattern):
        try:
            if path.lstat().st_mtime < before and len(path.name.split(".")[-2]) == 32:  # ours have a UUID there
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:
            continue  # another writer was faster


def digest_of(path: str | Path) -> str:
    """A file's SHA-256, as `sha256sum` prints it.

    Examples:
        >>> import tempfile
        >>> from semu_peft.files import digest_of
        >>> path = Path(tempfile.mkdtemp(), "empty")
        >>> _ = path.write_bytes(b"")
        >>> digest_of(path)[:12]
        'e3b0c44298fc'
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file whole, with the same bytes for the same content.

    safetensors itself writes the entries of the metadata in an order that changes from process to process.

    Args:
        path: The file.
        tensors: Contiguous tensors by name, no two of which share memory.
        metadata: Texts by name; `{"format": "pt"}` is added.

    Returns:
        The file.

    Examples:
        >>> import tempfile, torch
        >>> from semu_peft.files import save_tensors
        >>> folder = tempfile.mkdtemp()
        >>> first = save_tensors(f"{folder}/a.safetensors", {"core": torch.eye(2)}, {"rank": "2", "gamma": "0.9"})
        >>> second = save_tensors(f"{folder}/b.safetensors", {"core": torch.eye(2)}, {"gamma": "0.9", "rank": "2"})
        >>> first.read_bytes() == second.read_bytes()
        True
    """
    entries = {"format": "pt", **(metadata or {})}
    with written_whole(path) as temporary:
        save_file(dict(tensors), temporary, metadata=entries)
        follow_umask(temporary)
        _sort_metadata(temporary)
    return Path(path)


def follow_umask(*files: Path) -> None:
    """Let who may read other files that are written beside these read them: safetensors thinks of the owner alone.

    Examples:
        >>> import tempfile
        >>> from semu_peft.files import follow_umask
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "weights").touch(0o600), (folder / "config").touch()
        (None, None)
        >>> follow_umask(folder / "weights")
        >>> (folder / "weights").stat().st_mode == (folder / "config").stat().st_mode
        True
    """
    for file in files:
        probe = file.with_name(f".{file.stem}.{uuid.uuid4().hex}{file.suffix}")
        probe.touch()  # as reading the umask means to set it, for all threads
        file.chmod(probe.stat().st_mode)
        probe.unlink()


def load_tensors(path: str | Path, made_by: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file into memory of its own, which does not change when the file does.

    Args:
        path: The file, an argument of that name.
        made_by: The function that writes such files, for errors.

    Returns:
        The tensors by name, and the texts of the metadata.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged.

    Examples:
        >>> import tempfile, torch
        >>> from semu_peft.files import load_tensors, save_tensors
        >>> path = save_tensors(f"{tempfile.mkdtemp()}/a.safetensors", {"core": torch.eye(2)}, {"rank": "2"})
        >>> tensors, metadata = load_tensors(path, "save_tensors")
        >>> tensors["core"].shape, metadata["rank"]
        (torch.Size([2, 2]), '2')
    """
    check_path("path", path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path`: there is no file {path}; expected one that `{made_by}` wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}). Expected one that `{made_by}` wrote: save it again."
        ) from error


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
