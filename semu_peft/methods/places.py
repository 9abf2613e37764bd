"""Published methods whose word is a place, a layer or a start: each is one sentence of the rooms below.

Made for language models, and for any model that gives logits. Where one takes an `objective`, NPO is its default.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from semu_peft.adapter.whole_model import add_adapter, taken_back_on_error
from semu_peft.gradients import SquaredSum
from semu_peft.gradients.gather import gather
from semu_peft.localize import causal_layers, expert_affinity, expert_targets
from semu_peft.objectives import (
    NPO,
    RMU,
    AdaptiveRMU,
    CrossEntropy,
    FlatLogits,
    GradientAscent,
    InvertedHinge,
    PreserveHiddenStates,
    PrimalDual,
    RouterAnchor,
)
from semu_peft.objectives.base import LossFunction, as_objective
from semu_peft.subspace.starts import FirstStep, WeightSplit, fila_row_weights
from semu_peft.training.unlearn import UnlearnResult
from semu_peft.tuner.adapted import targets_for
from semu_peft.tuner.config import SemuConfig

from .sentence import RetainData, keep, minimise


def loku(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Any,
    *,
    classes: Collection[int] | None = None,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """LoKU: the inverted hinge, `1 + p(y) − max_{v ≠ y} p(v)`, where the weights matter to forget data.

    FILA's start, the leading part of `diag(w) W` with `w` of Fisher information, as an offset: the weights stay.

    Source: Cha et al., ICLR 2025, arXiv 2408.06621; ranks 4 to 32 of all linear layers, AdamW at 1e-4.

    Args:
        model: The model with a SEMU adapter that has no bases yet.
        forget: The forget batches.
        retain: Retain batches: for the start, and whose cross entropy is added.
        classes: All classes that are to be forgotten, if there are several.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.loku(model, forget, retain, max_steps=2, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    options: dict[str, Any] = {"statistic": SquaredSum, "progress": progress, "adapter_name": adapter_name or "default"}
    fisher = [gather(model, data, CrossEntropy(), **options) for data in (forget, retain)]
    start = WeightSplit(fila_row_weights(*fisher))
    return minimise(model, forget, InvertedHinge(classes=classes), keep(retain, CrossEntropy()), start=start, **said)


def lora_sb(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    objective: LossFunction | None = None,
    first_step: float = 1e-4,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """LoRA-SB: start with the step that Adam would take first in all weights, `−η sign(G)`, in the rank there is.

    Source: arXiv 2411.19557; without the signs: [`FirstStep`][semu_peft.subspace.starts.gradient.FirstStep].

    Args:
        model: The model with a SEMU adapter that has no bases yet.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        objective: What to minimise on the forget data; by default NPO.
        first_step: `η`, the rate of the step that the core starts from.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.lora_sb(model, forget, retain, max_steps=2, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    loss, start = objective or NPO(), FirstStep(first_step, transform="sign")
    return minimise(model, forget, loss, keep(retain, CrossEntropy()), start=start, **said)


def rmu(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    layer: int | str,
    coefficient: float | None = 6.5,
    retain_weight: float = 1200.0,
    seed: int = 0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """RMU: lead a layer's hidden states on forget data to one random direction, `‖h − c u‖² + α ‖h_r − h₀‖²`.

    Put the adapter on the layers before it.

    Source: Li et al. 2024, arXiv 2403.03218: layer 7 of Zephyr-7B; Adaptive: arXiv 2408.06223.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose hidden states are kept at the original's.
        layer: The layer whose outputs are led away, by number or name.
        coefficient: `c`; None: five times the layer's mean norm, as Adaptive RMU.
        retain_weight: `α`.
        seed: Of the direction.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), SemuConfig(target_modules=["0"]))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.rmu(model, forget, retain, max_steps=2, progress=False, layer="0").steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    away = AdaptiveRMU(layer, seed=seed) if coefficient is None else RMU(layer, coefficient, seed=seed)
    return minimise(model, forget, away, keep(retain, PreserveHiddenStates(layer), retain_weight), seed=seed, **said)


def pdu(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Any,
    *,
    limit: float,
    rate: float = 1.0,
    multiplier: float = 1.0,
    warmup: int = 0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """PDU: flatten the logits on forget data, `(max z − mean z)²`, under a limit of the retain loss.

    Source: arXiv 2506.05314. OpenUnlearning's settings: a multiplier of 100, a rate of 5 and a limit of 0.3 for TOFU,
    of 50, 1 and 1.5 (News) or 0.1 (Books) for MUSE, after 3 to 5 epochs or steps without it.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Retain batches, whose cross entropy stays under the limit.
        limit: What the retain loss may be, in nats: say, a little above what it is.
        rate: Of the multiplier.
        multiplier: What it starts at: how much the retain loss weighs.
        warmup: Steps before it moves.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.pdu(model, forget, retain, max_steps=2, progress=False, limit=1.0).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    bounded = PrimalDual(CrossEntropy(), limit, rate, multiplier, warmup)
    return minimise(model, forget, FlatLogits(), keep(retain, bounded), **said)


def sha256(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    first: int = 6,
    progress: bool = True,
    adapter_name: str = "default",
    **training: Any,
) -> UnlearnResult:
    """SHA256: ascend on the answers in the MLPs of the first blocks, where facts about subjects lie.

    The paper raises the retain weight as it goes; here it is one number, of a `Retain`.

    Source: arXiv 2504.12996; layers 0 to 5 of OLMo by causal mediation, see
    [`trace`][semu_peft.localize.tracing.trace].

    Args:
        model: The model, which is given the adapter.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        first: How many blocks.
        progress: Show progress bars.
        adapter_name: The adapter's name.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> from semu_peft import methods
        >>> from semu_peft.language import text_examples
        >>> forget = text_examples(tokenizer, ["a b c", "d e f"]).loader(2)
        >>> methods.sha256(decoder, forget, first=1, max_steps=2, progress=False).stop_reason  # of a loaded model
        'the forget data are forgotten'
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    layers = causal_layers(model, first)
    with taken_back_on_error(model, adapter_name=adapter_name):
        add_adapter(model, SemuConfig(target_modules=targets_for(model, layers)), adapter_name=adapter_name)
        return minimise(model, forget, GradientAscent(), keep(retain, CrossEntropy()), **said)


def seuf(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    objective: LossFunction | None = None,
    anchor: float = 1.0,
    progress: bool = True,
    adapter_name: str = "default",
    **training: Any,
) -> UnlearnResult:
    """SEUF: unlearn in the one expert that sees most of the forget data, and hold its router there.

    `L + α ‖g − onehot‖²`, on that expert's layers and the router of its layer.

    Source: ACL 2025, arXiv 2411.18797; GA, AdamW at 1e-4, α 1.

    Args:
        model: A mixture of experts, which is given the adapter.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        objective: What to minimise; by default gradient ascent.
        anchor: Weight of the router's anchor, `α`.
        progress: Show progress bars.
        adapter_name: The adapter's name.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1)
        >>> model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=3))
        >>> ids = torch.randint(16, (2, 6))
        >>> methods.seuf(model, [{"input_ids": ids, "labels": ids}], max_steps=2, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    expert = expert_affinity(model, forget, progress=progress)[0]
    owner, _, index = expert.rpartition(".")
    anchored = as_objective(objective or GradientAscent()) + anchor * RouterAnchor({owner: int(index)})
    with taken_back_on_error(model, adapter_name=adapter_name):
        add_adapter(model, SemuConfig(**expert_targets(model, expert, router=True)), adapter_name=adapter_name)
        return minimise(model, forget, anchored, keep(retain, CrossEntropy()), **said)
