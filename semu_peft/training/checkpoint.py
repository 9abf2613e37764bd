"""Checkpoints of an unlearning run: what is trained and what draws, never the frozen model."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from semu_peft.files import digest_of

from .fingerprint import Fingerprint, differences
from .sharded import trained_state, weights_file, whole_on_disk

_STATE_FILE = "unlearn_state.pt"
_RUN_FILE = "unlearn_run.json"  # written last: the fingerprint of the run and a digest of every other file
_PARTIAL, _REPLACED = ".partial", ".replaced"

Parts = Mapping[str, Sequence[Any]]
"""What a run consists of beside model and optimiser, by kind: objects with `state_dict` and `load_state_dict`."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, none of which has been loaded.

    Attributes:
        folder: Where it is.
        run: The fingerprint of the run that wrote it.
    """

    folder: Path
    run: Fingerprint


# ---- writing ----


def save_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, step: int, parts: Parts, run: Fingerprint, keep: int | None = None
) -> None:
    """Write `output_dir/checkpoint-{step}`, under another name until it is whole.

    Args:
        accelerator: It holds the model and the optimiser.
        output_dir: The folder of the run.
        step: How many steps were taken.
        parts: The rest of the run; objects without a `state_dict` have no state.
        run: The fingerprint of the run.
        keep: How many checkpoints to keep, the newest; all by default.

    Raises:
        TypeError: A `state_dict` holds something that cannot be read back without unpickling code.
    """
    folder = Path(output_dir) / f"checkpoint-{step}"
    partial = folder.with_name(folder.name + _PARTIAL)
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    with _registered_hidden(accelerator) as registered:
        _save_trained(accelerator, partial)
        states = {kind: [_state_of(member) for member in members] for kind, members in _all(parts, registered).items()}
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_states(states, partial / _STATE_FILE)
        text = json.dumps({"run": run, "files": _digests(partial)}, indent=2)
        (partial / _RUN_FILE).write_text(text, encoding="utf-8")
        _put_in_place(partial, folder)
        _sweep(folder, keep)
    accelerator.wait_for_everyone()


def _save_trained(accelerator: Accelerator, folder: Path) -> None:
    def keep_trained(models: list[nn.Module], weights: list[dict[str, Tensor]], _: str) -> None:
        weights[:] = [trained_state(accelerator.unwrap_model(model)) for model in models]

    hook = accelerator.register_save_state_pre_hook(keep_trained)
    try:
        with whole_on_disk(accelerator):
            accelerator.save_state(str(folder))
    finally:
        hook.remove()


def write_states(states: dict[str, list[Any]], path: Path) -> None:
    """Write what `state_dict` methods returned, such that it is read without unpickling code.

    Raises:
        TypeError: Something else than tensors, numbers, strings, lists and dictionaries is among it.

    Examples:
        >>> import tempfile
        >>> write_states({"rules": [{"number": 3}]}, Path(tempfile.mkdtemp(), "states.pt"))
    """
    torch.save(states, path)
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        kind = re.search(r"GLOBAL (\S+)", str(error))
        raise TypeError(
            "`state_dict` of objectives, rules, callbacks, the schedule and what is registered with the Accelerator "
            f"must be made of tensors, numbers, strings, lists and dictionaries, got {kind[1] if kind else error}. "
            "Turn NumPy's arrays into tensors and objects into their fields."
        ) from error


@contextmanager
def _registered_hidden(accelerator: Accelerator) -> Iterator[list[Any]]:
    """Give what the user has registered with the Accelerator, which itself would pickle it, and unpickle any code."""
    registered = list(accelerator._custom_objects)
    accelerator._custom_objects[:] = []
    try:
        yield registered
    finally:
        accelerator._custom_objects[:] = registered


def _all(parts: Parts, registered: list[Any]) -> Parts:
    return {**parts, "registered objects": registered}


def _put_in_place(partial: Path, folder: Path) -> None:
    # A folder cannot be renamed onto another one. Both are whole all the time, and `"latest"` knows both names.
    if folder.exists():
        replaced = folder.with_name(folder.name + _REPLACED)
        if replaced.exists():
            shutil.rmtree(replaced)
        folder.rename(replaced)
    partial.rename(folder)


def _sweep(newest: Path, keep: int | None) -> None:
    """Remove what killed writers left, and checkpoints beyond the newest `keep`."""
    found = _folders(newest.parent)
    unfinished = [path for path in found if path.suffix in (_PARTIAL, _REPLACED)]
    whole = [path for path in found if path not in unfinished and path != newest]
    for path in [*unfinished, *(whole[keep - 1 :] if keep else [])]:
        if path.suffix not in (_PARTIAL, _REPLACED):  # so that a removal that is cut short leaves no half checkpoint
            path = path.rename(path.with_name(path.name + _REPLACED))
        shutil.rmtree(path)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _RUN_FILE)
    return {path.relative_to(folder).as_posix(): digest_of(path) for path in files}


@contextmanager
def only_writer(
    accelerator: Accelerator, output_dir: str | Path | None, checkpointing_steps: int | None
) -> Iterator[None]:
    """Let one run at a time write checkpoints into a folder; a lock of the system, which ends with its process.

    Raises:
        ValueError: Another run writes there.
    """
    if output_dir is None or checkpointing_steps is None or not accelerator.is_main_process or os.name == "nt":
        yield
        return
    import fcntl  # not on Windows

    Path(output_dir).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"`output_dir` must be a folder that no other run writes to, got {str(output_dir)!r}, where one is "
                "writing checkpoints now. Wait for it, or give another folder."
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


# ---- finding ----


def find_checkpoint(given: str | Path, output_dir: str | Path | None) -> Checkpoint | None:
    """Find a checkpoint, or the newest whole one in `output_dir`; None where there is none at all yet.

    Raises:
        FileNotFoundError: The folder is no checkpoint.
        ValueError: It is damaged; or the latest is wanted, and no `output_dir` is given to look in.
    """
    if given != "latest":
        return _checked(Path(given))
    if output_dir is None:
        raise ValueError('`resume_from_checkpoint="latest"` looks in `output_dir`: set it as well.')
    problems: list[Exception] = []
    for folder in _folders(Path(output_dir)):
        try:
            found = _checked(folder)
        except (ValueError, FileNotFoundError) as error:
            if folder.suffix not in (_PARTIAL, _REPLACED):
                problems.append(error)
            continue
        if problems:
            warnings.warn(f"{problems[0]} The run goes on from {folder} instead.", stacklevel=2)
        return found
    if problems:
        raise ValueError(str(problems[0])) from problems[0]
    return None


def _folders(output_dir: Path) -> list[Path]:
    """All that is named as a checkpoint, the newest first, and at one step the finished one first."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-").removesuffix(_PARTIAL).removesuffix(_REPLACED)
        if number.isdigit() and path.is_dir():
            found.append((-int(number), path.suffix in (_PARTIAL, _REPLACED), path.suffix, path))
    return [path for *_, path in sorted(found)]


def _checked(folder: Path) -> Checkpoint:
    path = folder / _RUN_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"`resume_from_checkpoint` must be a checkpoint of `unlearn`, got {folder}, which has no {_RUN_FILE}. Give "
            'a folder `checkpoint-STEP` that is whole, or `"latest"`.'
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        run, expected = dict(content["run"]), dict(content["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(_damaged(path)) from error
    present = _digests(folder)
    wrong = sorted(name for name, digest in expected.items() if present.get(name) != digest)
    if wrong:
        raise ValueError(_damaged(folder / wrong[0]))
    foreign = sorted(name for name in present.keys() - expected.keys() if not name.startswith("."))
    if foreign:
        raise ValueError(
            f"`resume_from_checkpoint` must be a folder as `unlearn` wrote it, got {folder} with {foreign[0]!r} in it "
            "besides. Nobody knows what would read that: remove it."
        )
    return Checkpoint(folder, run)


def _damaged(path: Path) -> str:
    return f"`resume_from_checkpoint`: {path} is damaged or missing. Resume from an earlier checkpoint."


def check_run(checkpoint: Checkpoint, run: Fingerprint) -> None:
    """Check that a checkpoint is one of this very run, before anything of it is loaded.

    Raises:
        ValueError: It is of another run.
    """
    differing = differences(checkpoint.run, run)
    if differing:
        raise ValueError(
            f"`resume_from_checkpoint` must be a checkpoint of this run, got {checkpoint.folder}, which another one "
            f"wrote: {differing[0]} ({len(differing)} in all). Resume with the arguments and the data of the "
            "interrupted run, or start anew in another `output_dir`."
        )


def check_folder(output_dir: str | Path, run: Fingerprint) -> None:
    """Check that a folder to write checkpoints to holds none of another run, for which they would be taken later.

    Raises:
        ValueError: It does.
    """
    for folder in _folders(Path(output_dir)):
        try:
            differing = differences(_checked(folder).run, run)
        except (ValueError, FileNotFoundError):
            continue  # of no use to anybody
        if differing:
            raise ValueError(
                f"`output_dir` must be a folder without checkpoints of other runs, got {str(output_dir)!r} with "
                f"{folder.name}, of another run: {differing[0]} ({len(differing)} in all). Give a folder of its own, "
                "or remove the old checkpoints."
            )


# ---- loading ----


def load_states(checkpoint: Checkpoint) -> dict[str, list[Any]]:
    """Read the states of the run's parts, which are tensors, numbers, strings, lists and dictionaries.

    Raises:
        ValueError: The file holds something else.
    """
    path = checkpoint.folder / _STATE_FILE
    try:
        states: dict[str, list[Any]] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(_damaged(path)) from error
    return states


def load_checkpoint(accelerator: Accelerator, checkpoint: Checkpoint, parts: Parts) -> None:
    """Restore all that `save_checkpoint` wrote.

    Args:
        accelerator: It holds the model and the optimiser.
        checkpoint: The checkpoint.
        parts: The rest of the run, as many of each kind as were saved.

    Raises:
        ValueError: The checkpoint is of other trained parameters or of a run with other parts; nothing is changed then.
    """
    folder = checkpoint.folder
    for index, model in enumerate(accelerator._models):
        _check_weights(accelerator.unwrap_model(model), weights_file(folder, index))
    states = load_states(checkpoint)
    with _registered_hidden(accelerator) as registered:
        everything = _all(parts, registered)
        _check_parts(states, everything, folder)
        with whole_on_disk(accelerator):
            accelerator.load_state(str(folder), strict=False)
    for kind, members in everything.items():
        for member, state in zip(members, states[kind], strict=True):
            if hasattr(member, "load_state_dict"):
                member.load_state_dict(state)


def _state_of(member: Any) -> dict[str, Any]:
    return member.state_dict() if hasattr(member, "state_dict") else {}


def _check_weights(model: nn.Module, path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(_damaged(path)) from error
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    if saved != expected:
        differing = sorted(name for name in saved.keys() | expected.keys() if saved.get(name) != expected.get(name))
        raise ValueError(
            f"`resume_from_checkpoint`: {path.parent} was written for other trained parameters. They differ at "
            f"{differing[0]!r} ({len(differing)} in all): {saved.get(differing[0])} in the checkpoint, "
            f"{expected.get(differing[0])} in the model. Resume with the model and adapter of the interrupted run."
        )


def _check_parts(states: Mapping[str, Sequence[Any]], parts: Parts, folder: Path) -> None:
    for kind, members in parts.items():
        saved = len(states.get(kind, ()))
        if saved != len(members):
            raise ValueError(
                f"`resume_from_checkpoint`: {folder} is of a run with {saved} {kind}, this one has {len(members)}. "
                "Resume with the arguments of the interrupted run."
            )
