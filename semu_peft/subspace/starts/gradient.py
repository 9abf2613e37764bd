"""Starts along the forget gradient: at zero, at the first step down it, or up it at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from semu_peft.arguments import check_number
from semu_peft.gradients.statistics import GradientSum, MatrixSum
from semu_peft.linalg.factorize import SingularFactors
from semu_peft.tuner.layer import SemuLayer

from ..base_weight import whole_weight
from .base import LayerStart, as_core


@dataclass(frozen=True)
class Zero:
    """The forget gradient's directions and a core of zeros: SEMU's own start.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, initialize_semu_weights, objectives
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> _ = initialize_semu_weights(model, batches, objectives.CrossEntropy(), start=Zero(), progress=False)
        >>> bool(model.base_model.model[0].semu_core["default"].any())
        False
    """

    def __call__(self, layer: SemuLayer, directions: SingularFactors, adapter_name: str) -> LayerStart:
        return LayerStart(directions.left, directions.right)


@dataclass(frozen=True)
class FirstStep:
    """The step that full fine-tuning would take first, as well as the rank allows: what LoRA-SB starts from.

    With `U S Vᵀ` the leading singular triplets of the gradient `G`, or of `sign(G)`, the core is `−η S`, so that `ΔW`
    is the best approximation of `−η G` of that rank: `‖−η G − U R Vᵀ‖² = η² Σ_{i > r} s_i²`. The model changes at
    once, by the correction alone: switched off, it is the original. Give an objective to be minimised.

    Source: LoRA-SB, Ponkshe et al., arXiv 2411.19557, section 3. Their code divides the mean loss by the batch size
    once more, and estimates with dropout on.

    Args:
        learning_rate: `η ≥ 0`. The paper's is its learning rate over the number of warm-up steps.
        transform: `"none"` for the first step of SGD, `"sign"` for that of Adam (exact sums only, no sketch).

    Raises:
        ValueError: `learning_rate` is negative or not finite, or `transform` is another word.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, initialize_semu_weights, objectives
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), SemuConfig(target_modules=["0"], r=2))
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> start = FirstStep(1e-3, transform="sign")
        >>> _ = initialize_semu_weights(model, batches, objectives.GradientAscent(), start=start, progress=False)
        >>> bool(model.base_model.model[0].semu_core["default"].any())
        True
    """

    learning_rate: float
    transform: Literal["none", "sign"] = "none"

    def __post_init__(self) -> None:
        check_number("learning_rate", self.learning_rate, low=0.0)
        if self.transform not in ("none", "sign"):
            raise ValueError(
                f"`transform` must be 'none' or 'sign', got {self.transform!r}. Use 'sign' for Adam's step."
            )

    def prepare(self, total: MatrixSum) -> MatrixSum:
        """The summed gradient as it is to be factorised."""
        if self.transform == "none":
            return total
        if not isinstance(total, GradientSum):
            raise ValueError(
                f"`transform='sign'` needs the gradient itself, got a {type(total).__name__}. Sum it exactly: "
                "`statistic=GradientSum`."
            )
        signs = total.copy()
        signs.total.sign_()
        return signs

    def __call__(self, layer: SemuLayer, directions: SingularFactors, adapter_name: str) -> LayerStart:
        values = directions.singular_values[..., : directions.rank]
        core = as_core(-self.learning_rate * values, layer, adapter_name)
        return LayerStart(directions.left, directions.right, core=core)


@dataclass(frozen=True)
class Ascent:
    """One step up the gradient of what is to be forgotten, and no training: SLUG, with `r=1` at one layer.

    With `U S Vᵀ` the leading singular triplets of the gradient `G` the core is `+λ S`. By default `λ = ‖W‖ / (10 ‖G‖)`,
    a tenth of the weight's norm, from where [`search_scale`][semu_peft.adapter.search_scale.search_scale] looks for the
    best multiple. Give the loss that rises as the data are forgotten, such as
    [`CrossEntropy`][semu_peft.objectives.classification.CrossEntropy]. One singular pair holds nearly all of a layer's
    gradient; `localize.pareto` shortlists layers.

    Source: SLUG, Cai et al., ICML 2025, arXiv 2407.11867. The sign is the one that forgets: the paper's `θ − λ ∇L`, and
    its code, descend in places.

    Args:
        scale: `λ`; by default as above.

    Raises:
        ValueError: `scale` is not finite.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, initialize_semu_weights, objectives
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), SemuConfig(target_modules=["0"], r=1))
        >>> batches, loss = [(torch.randn(8, 4), torch.randint(3, (8,)))], objectives.CrossEntropy()
        >>> before = loss(model, batches[0])
        >>> _ = initialize_semu_weights(model, batches, loss, start=Ascent(), progress=False)
        >>> bool(loss(model, batches[0]) > before)
        True
    """

    scale: float | None = None

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_number("scale", self.scale)

    def __call__(self, layer: SemuLayer, directions: SingularFactors, adapter_name: str) -> LayerStart:
        scale = self.scale
        if scale is None:
            weight = float(torch.linalg.vector_norm(whole_weight(layer).detach().double()))
            gradient = math.sqrt(float(directions.energy.sum()))
            scale = weight / (10 * gradient) if gradient > 0 else 0.0
        values = directions.singular_values[..., : directions.rank]
        return LayerStart(directions.left, directions.right, core=as_core(scale * values, layer, adapter_name))
