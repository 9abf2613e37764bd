"""Forget a digit with transformers' Trainer in the place of `unlearn`: everything the Trainer does keeps working.

    python examples/transformers_trainer.py --output_dir runs/trainer
    accelerate launch examples/transformers_trainer.py --output_dir runs/trainer --bf16

All options are those of `TrainingArguments`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from semu_peft import Retain, SemuConfig, initialize_semu_weights, objectives
from semu_peft.training.trainer import UnlearnTrainer

FORGOTTEN = 3


def digits(chosen: Tensor, images: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    return [{"pixel_values": images[index], "labels": labels[index]} for index in chosen.nonzero().flatten()]


def accuracy(predictions: Any) -> dict[str, float]:
    return {"accuracy": 100 * float(np.mean(predictions.predictions.argmax(-1) == predictions.label_ids))}


def main() -> None:
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(
        num_train_epochs=20, per_device_train_batch_size=32, learning_rate=1e-2, weight_decay=0.0, report_to="none",
        logging_steps=10, save_strategy="no",
    )  # fmt: skip
    (args,) = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(source.target)
    forget, retain = digits(labels == FORGOTTEN, images, labels), digits(labels != FORGOTTEN, images, labels)

    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    training = TrainingArguments(
        args.output_dir, num_train_epochs=30, per_device_train_batch_size=64, learning_rate=2e-3, report_to="none",
        save_strategy="no", seed=args.seed, use_cpu=args.use_cpu, logging_steps=100,
    )  # fmt: skip
    Trainer(model, training, train_dataset=forget + retain).train()

    objective = objectives.DecoupledDistillation()
    adapted = get_peft_model(model, SemuConfig(target_modules="all-linear"))
    initialize_semu_weights(adapted, DataLoader(forget, batch_size=32), objective)
    held = Retain(DataLoader(retain, batch_size=64, shuffle=True), objectives.KLToOriginal())
    trainer = UnlearnTrainer(
        adapted, args, train_dataset=forget, eval_dataset={"forget": forget, "retain": retain}, objective=objective,
        retain=held, compute_metrics=accuracy,
    )  # fmt: skip
    for stage in ("knows all", "unlearned"):
        if stage == "unlearned":
            trainer.train()
        found = trainer.evaluate()
        forgotten, kept = found["eval_forget_accuracy"], found["eval_retain_accuracy"]
        print(f"{stage}: {forgotten:.1f}% of the {FORGOTTEN}s, {kept:.1f}% of the rest")
    trainer.save_model()  # the adapter: safetensors and adapter_config.json
    adapted.merge_and_unload().save_pretrained(f"{args.output_dir}/merged")


if __name__ == "__main__":
    main()
