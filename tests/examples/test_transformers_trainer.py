"""The Trainer example: the program as a user runs it, and its Trainer beside `unlearn`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VIT, vit
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from semu_peft import SemuConfig, objectives, unlearn
from semu_peft.tuner.adapted import semu_layers

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
from transformers_trainer import ObjectiveTrainer  # noqa: E402


class InOrder(ObjectiveTrainer):
    """The Trainer shuffles; `unlearn` below does not."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def adapted() -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(vit(), SemuConfig(target_modules=[VIT["query"], VIT["up"]], r=3, init_weights=False))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_ends_where_unlearn_does(accumulation: int, tmp_path: Path) -> None:
    """Optimiser, schedule, accumulation and modes given alike, the cores are the same."""
    draw = torch.Generator().manual_seed(1)
    data = [
        {"pixel_values": torch.randn(3, 8, 8, generator=draw), "labels": torch.tensor(index % 4)} for index in range(16)
    ]
    objective = objectives.DecoupledDistillation()
    first, second = adapted(), adapted()
    unlearn(
        first, DataLoader(data, batch_size=4), objective, epochs=3, learning_rate=1e-2,
        gradient_accumulation_steps=accumulation, progress=False,
    )  # fmt: skip
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.0,
        max_grad_norm=0.0, gradient_accumulation_steps=accumulation, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, optim="adamw_torch",
    )  # fmt: skip
    trainer = InOrder(second, arguments, train_dataset=data, objective=objective)
    trainer.train()
    start = semu_layers(adapted())
    for name, layer in semu_layers(second).items():
        wanted = semu_layers(first)[name].semu_core["default"]
        assert (wanted - start[name].semu_core["default"]).abs().max() > 1e-3
        torch.testing.assert_close(layer.semu_core["default"], wanted, atol=1e-6, rtol=1e-5)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_program(tmp_path: Path) -> None:
    """It forgets the digit, keeps the others, and writes the adapter and the merged model."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "transformers_trainer.py"), "--output_dir", str(tmp_path), "--use_cpu",
         "--disable_tqdm", "true"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("unlearned"))
    forgotten, kept = (float(word.rstrip("%")) for word in line.split() if word.endswith("%"))
    assert forgotten < 5 and kept > 90
    assert (tmp_path / "adapter_config.json").is_file() and (tmp_path / "merged" / "config.json").is_file()
