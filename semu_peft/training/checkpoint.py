"""Checkpoints of an unlearning run: what is trained and what draws, never the frozen model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn

_STATE_FILE = "unlearn_state.pt"

Parts = Mapping[str, Sequence[Any]]
"""What a run consists of beside model and optimiser, by kind: objects with `state_dict` and `load_state_dict`."""


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int, parts: Parts) -> None:
    """Write `output_dir/checkpoint-{step}`, under another name until it is whole.

    Args:
        accelerator: It holds the model and the optimiser.
        output_dir: The folder of the run.
        step: How many steps were taken.
        parts: The rest of the run; objects without a `state_dict` have no state.
    """
    folder = Path(output_dir) / f"checkpoint-{step}"
    partial = folder.with_suffix(".partial")
    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    _save_trained(accelerator, partial)
    states = {kind: [_state_of(member) for member in members] for kind, members in parts.items()}
    if accelerator.is_main_process:
        torch.save(states, partial / _STATE_FILE)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    accelerator.wait_for_everyone()


def _save_trained(accelerator: Accelerator, folder: Path) -> None:
    def keep_trained(models: list[nn.Module], weights: list[dict[str, Tensor]], _: str) -> None:
        weights[:] = [_trained_state(accelerator.unwrap_model(model)) for model in models]

    hook = accelerator.register_save_state_pre_hook(keep_trained)
    try:
        accelerator.save_state(str(folder))
    finally:
        hook.remove()


def load_checkpoint(accelerator: Accelerator, folder: Path, parts: Parts) -> None:
    """Restore all that `save_checkpoint` wrote.

    Args:
        accelerator: It holds the model and the optimiser.
        folder: The checkpoint.
        parts: The rest of the run, as many of each kind as were saved.

    Raises:
        ValueError: The checkpoint is of other trained parameters or of a run with other parts; nothing is changed then.
    """
    for index, model in enumerate(accelerator._models):
        _check_weights(accelerator.unwrap_model(model), folder / f"model{f'_{index}' if index else ''}.safetensors")
    states = torch.load(folder / _STATE_FILE, map_location="cpu", weights_only=True)
    _check_parts(states, parts, folder)
    accelerator.load_state(str(folder), strict=False)
    for kind, members in parts.items():
        for member, state in zip(members, states[kind], strict=True):
            if hasattr(member, "load_state_dict"):
                member.load_state_dict(state)


def _state_of(member: Any) -> dict[str, Any]:
    return member.state_dict() if hasattr(member, "state_dict") else {}


def _trained_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def _check_weights(model: nn.Module, path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    expected = {name: tuple(tensor.shape) for name, tensor in _trained_state(model).items()}
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


def find_checkpoint(given: str | Path, output_dir: str | Path | None) -> Path:
    """Find the folder of a checkpoint, or of the latest one in `output_dir`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The latest is wanted, and no `output_dir` is given to look in.
    """
    folder = Path(given)
    if given == "latest":
        if output_dir is None:
            raise ValueError('`resume_from_checkpoint="latest"` looks in `output_dir`: set it as well.')
        found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
        if not found:
            raise FileNotFoundError(f"No checkpoint in {output_dir}: expected a folder `checkpoint-STEP`.")
        folder = max(found, key=lambda path: int(path.name.split("-")[-1]))
    if not (folder / _STATE_FILE).is_file():
        raise FileNotFoundError(
            f"`resume_from_checkpoint`: {folder} is not a checkpoint of `unlearn` (it has no {_STATE_FILE})."
        )
    return folder
