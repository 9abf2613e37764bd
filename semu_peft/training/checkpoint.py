"""Checkpoints of an unlearning run: what is trained and what draws, never the frozen model."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from semu_peft.objectives.base import Objective

_STATE_FILE = "unlearn_state.pt"


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # batches of this epoch already seen
    retain_epoch: int = 0
    retain_batch: int = 0
    examples: int = 0
    best_metric: float = -math.inf
    epochs_without_gain: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def _trainable_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    state: Progress,
    schedule: LRScheduler,
    objectives: list[Objective],
) -> None:
    """Write `output_dir/checkpoint-{step}`, under another name until it is whole."""
    folder = output_dir / f"checkpoint-{state.step}"
    partial = folder.with_suffix(".partial")

    def keep_trainable(models: list[nn.Module], weights: list[dict[str, Tensor]], _: str) -> None:
        weights[:] = [_trainable_state(accelerator.unwrap_model(model)) for model in models]

    if accelerator.is_main_process and partial.exists():
        shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    hook = accelerator.register_save_state_pre_hook(keep_trainable)
    try:
        accelerator.save_state(str(partial))
    finally:
        hook.remove()
    if accelerator.is_main_process:
        torch.save(
            {
                "progress": vars(state),
                "scheduler": schedule.state_dict(),
                "objectives": [objective.state_dict() for objective in objectives],
            },
            partial / _STATE_FILE,
        )
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    accelerator.wait_for_everyone()


def load_checkpoint(
    accelerator: Accelerator, folder: Path, schedule: LRScheduler, objectives: list[Objective]
) -> Progress:
    """Restore all that `save_checkpoint` wrote and return where the run stood.

    Raises:
        ValueError: The checkpoint is of other trained parameters; nothing is changed then.
    """
    for index, model in enumerate(accelerator._models):
        _check_weights(accelerator.unwrap_model(model), folder / f"model{f'_{index}' if index else ''}.safetensors")
    accelerator.load_state(str(folder), strict=False)
    saved = torch.load(folder / _STATE_FILE, map_location="cpu", weights_only=True)
    schedule.load_state_dict(saved["scheduler"])
    for objective, objective_state in zip(objectives, saved["objectives"], strict=True):
        objective.load_state_dict(objective_state)
    return Progress(**saved["progress"])


def _check_weights(model: nn.Module, path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    expected = {name: tuple(tensor.shape) for name, tensor in _trainable_state(model).items()}
    if saved != expected:
        differing = sorted(name for name in saved.keys() | expected.keys() if saved.get(name) != expected.get(name))
        raise ValueError(
            f"`resume_from_checkpoint`: {path.parent} was written for other trained parameters. They differ at "
            f"{differing[0]!r} ({len(differing)} in all): {saved.get(differing[0])} in the checkpoint, "
            f"{expected.get(differing[0])} in the model. Resume with the model and adapter of the interrupted run."
        )


def find_checkpoint(wanted: str | Path, output_dir: str | Path | None) -> Path:
    """The folder of a checkpoint, or of the latest one in `output_dir`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The latest is wanted, and no `output_dir` is given to look in.
    """
    folder = Path(wanted)
    if wanted == "latest":
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
