"""How deep a class of a denoiser is forgotten: how much of it is drawn again after training on a few images of it.

    OMP_NUM_THREADS=1 python benchmarks/deep_forgetting_denoiser.py     # some 30 minutes of a CPU core

A class-conditional diffusion model of scikit-learn's digits forgets "three" by being led to draw "eight", as in
`examples/diffusion_digits`: at the weights alone, and under simulated relearning with several weights of what the
original predicts for the other classes. Three attackers, none with an image or a seed of the simulation: Adam at two
rates, one ten times slower than any that was simulated, and SGD, which was not. Beside them the model that was trained
without the class, under the same attack. Threes are split in two: the first half is for unlearning, the other for the
attackers; what is drawn is judged by a classifier.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from semu_peft import SemuConfig, initialize_semu_weights, objectives, unlearn
from semu_peft.concept.sampling import sample_denoiser
from semu_peft.evaluation import RelearningCurve, classify_samples, relearning
from semu_peft.files import written_whole
from semu_peft.objectives import Attacker, LossFunction, Retain, SimulatedRelearning

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "diffusion_digits"))
from digit_data import Images, load_images  # noqa: E402
from digit_models import Classifier, class_unet, schedule, train_class_unet, train_classifier  # noqa: E402

FORGOTTEN, ANCHOR, CLASSES = 3, 8, 10
BATCH = 32
CONFIG: dict[str, Any] = {
    "target_modules": ["time_emb_proj", "to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"],
    "explained_variance": 0.95,
    "r": 8,
}
SIMULATED = [Attacker("adam", 1e-3, steps=10), Attacker("adam", 3e-3, steps=5)]
ATTACKERS = [Attacker("adam", 1e-3, steps=50), Attacker("adam", 1e-4, steps=50), Attacker("sgd", 1e-2, steps=50)]
SHOWN = (0, 5, 10, 20, 50)
GOLD, NOTHING, ALONE = "retrained (gold)", "original (do nothing)", "matching, retain × 3"
# Whether attackers are simulated, and the weight of what the original predicts for the other classes.
WAYS = {ALONE: (False, 3.0)} | {
    f"matching, attackers, retain × {weight}": (True, float(weight)) for weight in (1, 3, 10)
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-steps", type=int, default=800, help="steps of training each model")
    parser.add_argument("--samples", type=int, default=20, help="samples a class that are judged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "deep_forgetting_denoiser.json"
    )
    return parser.parse_args()


class Subject:
    """The models before forgetting, the halves of the images, and the judge."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        train, _, _ = load_images(None, 8, args.seed)
        torch.manual_seed(args.seed)
        self.judge = train_classifier(Classifier(1, CLASSES), *train, args.train_steps // 3, args.seed)
        self.original = self._trained(train)
        known = train.labels != FORGOTTEN
        self.gold = self._trained(Images(train.images[known], train.labels[known]))
        threes = (2 * train.images[~known] - 1).chunk(2)
        others = 2 * train.images[known] - 1, train.labels[known]
        half = len(others[0]) // 2
        self.forget = [self._batch(part) for part in threes[0].split(BATCH)]
        self.for_attackers = [(part, torch.full((len(part),), FORGOTTEN)) for part in threes[1].split(BATCH)]
        first, second = ([*zip(*(each.split(BATCH) for each in part), strict=True)] for part in (
            tuple(each[:half] for each in others), tuple(each[half:] for each in others)
        ))  # fmt: skip
        self.retain, self.others_for_attackers = first, second

    def _trained(self, images: Images) -> nn.Module:
        torch.manual_seed(self.args.seed)
        return train_class_unet(class_unet(1, 8, CLASSES), *images, CLASSES, self.args.train_steps, self.args.seed)

    def _batch(self, latents: Tensor) -> dict[str, Any]:
        roles = {"condition": FORGOTTEN, "anchor": ANCHOR}
        return {"latents": latents} | {
            role: {"class_labels": torch.full((len(latents),), label)} for role, label in roles.items()
        }

    def drawn(self, model: nn.Module, classes: Sequence[int]) -> float:
        """The share of samples in which the judge sees what they were asked for, in percent."""
        labels = torch.tensor(classes).repeat_interleave(self.args.samples)
        samples = sample_denoiser(
            model, schedule(), {"class_labels": labels}, (1, 8, 8), seeds=range(len(labels)), num_inference_steps=20,
            unconditional={"class_labels": torch.full_like(labels, CLASSES)}, guidance_scale=2.0,
        )  # fmt: skip
        return classify_samples((samples / 2 + 0.5).clamp(0, 1), labels, self.judge).accuracy


def forgotten(subject: Subject, is_deep: bool, weight: float) -> tuple[nn.Module, dict[str, Any]]:
    """The original after forgetting, and what that cost."""
    args = subject.args
    model: Any = get_peft_model(copy.deepcopy(subject.original), SemuConfig(**CONFIG))
    matching = objectives.ConditionMatching(schedule(), seed=args.seed)
    objective: LossFunction = matching
    if is_deep:
        pool = [(batch["latents"], batch["condition"]["class_labels"]) for batch in subject.forget]
        learn = objectives.DenoisingLoss(schedule(), seed=args.seed + 2)
        objective = SimulatedRelearning(
            matching, pool, subject.retain, attackers=SIMULATED, learn=learn, copies=8, seed=args.seed
        )
    retain = Retain(subject.retain, objectives.PreservePrediction(schedule(), seed=args.seed + 1), weight=weight)
    began = time.process_time()
    initialize_semu_weights(model, subject.forget, matching, progress=False)
    result = unlearn(model, subject.forget, objective, retain=retain, seed=args.seed, progress=False)
    costs = {"steps": result.steps, "trained": result.trainable_parameters, "seconds": time.process_time() - began}
    return model.merge_and_unload(), {**costs, "stop_reason": result.stop_reason}


def attacked(subject: Subject, model: nn.Module, attacker: Attacker) -> RelearningCurve:
    """What an attacker brings back; sides are the classes that are drawn."""
    others = [label for label in range(CLASSES) if label != FORGOTTEN]
    return relearning(
        model, subject.for_attackers, subject.others_for_attackers, attacker=attacker, steps=SHOWN, seed=1000,
        learn=objectives.DenoisingLoss(schedule(), seed=1000), measure=subject.drawn, forget_test=[FORGOTTEN],
        retain_test=others, progress=False,
    )  # fmt: skip


def row_of(subject: Subject, model: nn.Module, costs: dict[str, Any]) -> dict[str, Any]:
    others = [label for label in range(CLASSES) if label != FORGOTTEN]
    row: dict[str, Any] = {
        "forgotten drawn": subject.drawn(model, [FORGOTTEN]),
        "others drawn": subject.drawn(model, others),
    }
    curves = {attacker.label: attacked(subject, model, attacker) for attacker in ATTACKERS}
    row["attacks"] = {
        name: {"forget": dict(zip(curve.steps, curve.forget, strict=True)),
               "retain": dict(zip(curve.steps, curve.retain, strict=True)),
               "area": curve.area, "steps to half": curve.steps_to_half}
        for name, curve in curves.items()
    }  # fmt: skip
    return {**row, **costs}


def line_of(name: str, row: dict[str, Any]) -> str:
    """A row of the table: of each attacker the steps until half is back, the mean of the curve and its end."""
    cells = [
        f"{'never' if each['steps to half'] is None else each['steps to half']}; {each['area']:.0f}; "
        f"{list(each['forget'].values())[-1]:.0f} ({list(each['retain'].values())[-1]:.0f})"
        for each in row["attacks"].values()
    ]
    costs = f"{row['steps']}, {row['seconds']:.0f}" if "steps" in row else ""
    return f"| {name} | {row['forgotten drawn']:.0f} | {row['others drawn']:.1f} | {' | '.join(cells)} | {costs} |"


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    subject = Subject(args)
    attackers = " | ".join(attacker.label for attacker in ATTACKERS)
    table = [f"| way | threes drawn | others drawn | {attackers} | steps, seconds |", "|" + " --- |" * 7]
    print(*table, sep="\n", flush=True)
    rows: dict[str, Any] = {}
    for name in (GOLD, NOTHING, *WAYS):
        if name in WAYS:
            model, costs = forgotten(subject, *WAYS[name])
        else:
            model, costs = (subject.gold if name == GOLD else subject.original), {}
        rows[name] = row_of(subject, model, costs)
        table.append(line_of(name, rows[name]))
        print(table[-1], flush=True)
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    about = {"machine": f"{platform.machine()}, one CPU core", "torch": torch.__version__, "arguments": settings}
    with written_whole(args.output) as file:
        file.write_text(json.dumps({**about, "rows": rows, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
