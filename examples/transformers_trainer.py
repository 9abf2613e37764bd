"""Forget a digit with transformers' Trainer in the place of `unlearn`: everything the Trainer does keeps working.

    python examples/transformers_trainer.py --output_dir runs/trainer
    accelerate launch examples/transformers_trainer.py --output_dir runs/trainer --bf16

All options are those of `TrainingArguments`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from semu_peft import SemuConfig, initialize_semu_weights, objectives

FORGOTTEN = 3


class ObjectiveTrainer(Trainer):
    """A Trainer that minimises an objective of `semu_peft.objectives`, or any `(model, batch) -> scalar loss`.

    `compute_loss_func` of the Trainer would do for an objective that reads the model's output alone; one that asks the
    original model as well, such as decoupled distillation, needs the model itself.
    """

    def __init__(self, *args: Any, objective: Callable[[nn.Module, Any], Tensor], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self.model_accepts_loss_kwargs = False  # so that accumulated batches are averaged, not summed

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        model.eval()  # as in `unlearn`: dropout is off and norm statistics stay
        loss = self.objective(model, inputs)
        return (loss, {}) if return_outputs else loss


def digits(chosen: Tensor, images: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    return [{"pixel_values": images[index], "labels": labels[index]} for index in chosen.nonzero().flatten()]


@torch.no_grad()
def accuracy(model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    batch = next(iter(DataLoader(data, batch_size=len(data))))
    device = next(model.parameters()).device
    logits = model.eval()(pixel_values=batch["pixel_values"].to(device)).logits
    return 100 * (logits.argmax(-1).cpu() == batch["labels"]).float().mean().item()


def main() -> None:
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(
        num_train_epochs=10, per_device_train_batch_size=32, learning_rate=1e-2, weight_decay=0.0, report_to="none",
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
    print(f"knows all: {accuracy(model, forget):.1f}% of the {FORGOTTEN}s, {accuracy(model, retain):.1f}% of the rest")

    objective = objectives.DecoupledDistillation()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapted = get_peft_model(model, SemuConfig(target_modules=layers))
    initialize_semu_weights(adapted, DataLoader(forget, batch_size=32), objective)
    trainer = ObjectiveTrainer(adapted, args, train_dataset=forget, objective=objective)
    trainer.train()
    print(
        f"unlearned: {accuracy(adapted, forget):.1f}% of the {FORGOTTEN}s, {accuracy(adapted, retain):.1f}% of the rest"
    )
    trainer.save_model()  # the adapter: safetensors and adapter_config.json
    adapted.merge_and_unload().save_pretrained(f"{args.output_dir}/merged")


if __name__ == "__main__":
    main()
