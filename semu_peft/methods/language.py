"""Published methods for language models by their names: each is one sentence of the rooms below.

All take a model as it is to be trained (see [`minimise`][semu_peft.methods.sentence.minimise]), and batches of tokens
with labels. From texts, [`forget_text`][semu_peft.language.forget.forget_text] does it all in one call, with a hold on
everything else that these add only where they are told to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from semu_peft.objectives import (
    CEU,
    DPO,
    NPO,
    TPO,
    UNDIAL,
    WGA,
    CrossEntropy,
    FDivergence,
    SatImp,
    SimNPO,
    UnseenAnswer,
    sequence_nll,
)
from semu_peft.training.unlearn import UnlearnResult

from .sentence import RetainData, keep, minimise


def npo(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    beta: float = 0.1,
    reference: nn.Module | None = None,
    retain_weight: float = 1.0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """NPO: `2/β log(1 + (p(y | x) / p₀(y | x))^β)`, ascent that comes to rest where an answer is forgotten.

    `beta=0.03` is what `forget_text` takes for small steps by natural gradients.

    Source: Zhang et al. 2024, arXiv 2404.05868; there β 0.1, AdamW at 1e-5, with and without retain data.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        beta: `β`.
        reference: The original, frozen, where the model is bare.
        retain_weight: Of the retain data's term.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> from semu_peft.language import text_examples
        >>> model = get_peft_model(decoder, SemuConfig(target_modules="all-linear"))  # of a loaded model
        >>> forget = text_examples(tokenizer, ["a b c", "d e f"]).loader(2)
        >>> methods.npo(model, forget, max_steps=2, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, NPO(beta, reference), keep(retain, CrossEntropy(), retain_weight), **said)


def simnpo(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    beta: float = 4.5,
    delta: float = 0.0,
    retain_weight: float = 1.0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """SimNPO: NPO without a reference, on the mean over an answer's tokens, `−2/β log σ(β (n − δ))`.

    Source: Fan et al. 2024, arXiv 2410.07163; for TOFU β 2.5 to 4.5 and a forget term that weighs an eighth of the
    retain data's: `retain_weight=8`.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        beta: `β`.
        delta: `δ`, the margin.
        retain_weight: Of the retain data's term.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> from semu_peft.language import text_examples
        >>> model = get_peft_model(decoder, SemuConfig(target_modules="all-linear"))  # of a loaded model
        >>> forget = text_examples(tokenizer, ["a b c", "d e f"]).loader(2)
        >>> methods.simnpo(model, forget, max_steps=2, learning_rate=1e-3, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, SimNPO(beta, delta), keep(retain, CrossEntropy(), retain_weight), **said)


def dpo(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    beta: float = 0.1,
    reference: nn.Module | None = None,
    retain_weight: float = 1.0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """DPO, IdkDPO, AltPO: prefer another answer to the forgotten one, each against the original.

    With refusals for alternates it is IdkDPO, with wrong answers of the same form AltPO.

    Source: Rafailov et al. 2023, arXiv 2305.18290; AltPO: arXiv 2409.13474, five alternates a question and retain data.

    Args:
        model: The model, changed in place.
        forget: The forget batches, each with an alternate answer (`text_examples(..., alternates=...)`).
        retain: Batches whose cross entropy is added.
        beta: `β`.
        reference: The original, frozen, where the model is bare.
        retain_weight: Of the retain data's term.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> from semu_peft.language import text_examples
        >>> model = get_peft_model(decoder, SemuConfig(target_modules="all-linear"))  # of a loaded model
        >>> forget = text_examples(tokenizer, [("What?", "a b"), ("How many?", "two")], alternates="refusals").loader(2)
        >>> methods.dpo(model, forget, max_steps=2, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, DPO(beta, reference), keep(retain, CrossEntropy(), retain_weight), **said)


def flat(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    divergence: str = "tv",
    retain_weight: float = 1.0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """FLAT: the f-divergence of alternate answers from the forgotten ones, `−g(P′) + f*(g(P))`.

    Neither a reference nor retain data are needed.

    Source: Wang et al. 2024, arXiv 2410.11143.

    Args:
        model: The model, changed in place.
        forget: The forget batches, each with an alternate answer (`text_examples(..., alternates=...)`).
        retain: Batches whose cross entropy is added.
        divergence: `"tv"`, `"kl"`, `"js"` and others, see
            [`FDivergence`][semu_peft.objectives.preference.FDivergence].
        retain_weight: Of the retain data's term.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> from semu_peft.language import text_examples
        >>> model = get_peft_model(decoder, SemuConfig(target_modules="all-linear"))  # of a loaded model
        >>> forget = text_examples(tokenizer, [("What?", "a b"), ("How many?", "two")], alternates="refusals").loader(2)
        >>> methods.flat(model, forget, max_steps=2, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, FDivergence(divergence), keep(retain, CrossEntropy(), retain_weight), **said)


def tpo(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    beta: float = 0.32,
    reference: nn.Module | None = None,
    retain_weight: float = 1.0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """TPO: NPO of raw logits, `−2/β log σ(β · mean(z₀(y) − z(y)))`.

    The paper's is on unwanted tokens alone: wrap it in
    [`TokenSelective`][semu_peft.objectives.wrappers.TokenSelective] where the batches name those.

    Source: 2025, arXiv 2506.03142.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        beta: `β`.
        reference: The original, frozen, where the model is bare.
        retain_weight: Of the retain data's term.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> from semu_peft.language import text_examples
        >>> model = get_peft_model(decoder, SemuConfig(target_modules="all-linear"))  # of a loaded model
        >>> forget = text_examples(tokenizer, ["a b c", "d e f"]).loader(2)
        >>> methods.tpo(model, forget, max_steps=2, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, TPO(beta, reference), keep(retain, CrossEntropy(), retain_weight), **said)


def undial(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    beta: float = 10.0,
    reference: nn.Module | None = None,
    retain_weight: float = 1.0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """UNDIAL: distil the original's own prediction with the true token's logit lowered, `KL(softmax(z₀ − β 1_y) ‖ p)`.

    Source: Dong et al. 2024, arXiv 2402.10052; there β 3 to 10, LoRA of rank 8, 1e-4, no retain data.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        beta: `β`.
        reference: The original, frozen, where the model is bare.
        retain_weight: Of the retain data's term.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> from semu_peft.language import text_examples
        >>> model = get_peft_model(decoder, SemuConfig(target_modules="all-linear"))  # of a loaded model
        >>> forget = text_examples(tokenizer, ["a b c", "d e f"]).loader(2)
        >>> methods.undial(model, forget, max_steps=2, progress=False).stop_reason
        'the forget data are forgotten'
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, UNDIAL(beta, reference), keep(retain, CrossEntropy(), retain_weight), **said)


def ceu(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    ignore_first: int = 1,
    retain_weight: float = 1.0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """CE-U: cross entropy to the model's own prediction with the true token struck out, `−log(1 − p(y | x))`.

    Source: 2025, arXiv 2503.01224; no retain data.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        ignore_first: Tokens at an answer's beginning that stay.
        retain_weight: Of the retain data's term.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> from semu_peft.language import text_examples
        >>> model = get_peft_model(decoder, SemuConfig(target_modules="all-linear"))  # of a loaded model
        >>> forget = text_examples(tokenizer, ["a b c", "d e f"]).loader(2)
        >>> methods.ceu(model, forget, max_steps=2, progress=False).stop_reason
        'the forget data are forgotten'
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, CEU(ignore_first), keep(retain, CrossEntropy(), retain_weight), **said)


def wga(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    beta: float = 1.0,
    retain_weight: float = 1.0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """WGA: ascent whose weight on a token is its probability, `p^β log p` with the weight held fixed.

    Source: Wang et al. 2025, arXiv 2502.19301.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        beta: `β`.
        retain_weight: Of the retain data's term.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> from semu_peft.language import text_examples
        >>> model = get_peft_model(decoder, SemuConfig(target_modules="all-linear"))  # of a loaded model
        >>> forget = text_examples(tokenizer, ["a b c", "d e f"]).loader(2)
        >>> methods.wga(model, forget, max_steps=2, progress=False).stop_reason
        'the forget data are forgotten'
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, WGA(beta), keep(retain, CrossEntropy(), retain_weight), **said)


def satimp(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    beta: float = 5.0,
    beta2: float = 1.0,
    retain_weight: float = 1.0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """SatImp: ascent with the weight `p^β (1 − p)^β₂`, by saturation and importance.

    Source: Yang et al. 2025, arXiv 2505.11953; OpenUnlearning's settings for TOFU let the forget term weigh a tenth of
    the retain data's: `retain_weight=10`.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        beta: `β`.
        beta2: `β₂`.
        retain_weight: Of the retain data's term.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> from semu_peft.language import text_examples
        >>> model = get_peft_model(decoder, SemuConfig(target_modules="all-linear"))  # of a loaded model
        >>> forget = text_examples(tokenizer, ["a b c", "d e f"]).loader(2)
        >>> methods.satimp(model, forget, max_steps=2, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, SatImp(beta, beta2), keep(retain, CrossEntropy(), retain_weight), **said)


def unseen_answers(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    unseen: Iterable[Any],
    reference: nn.Module | None = None,
    retain_weight: float = 1.0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """Make each answer as unlikely as answers that nobody taught the model, and no further.

    Made for as little damage as possible: with a budget, `max_retain_kl`.

    Source: this library; [`UnseenAnswer`][semu_peft.objectives.language.UnseenAnswer] says how.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        unseen: Batches of such answers, see [`unseen_answers`][semu_peft.language.unseen.unseen_answers].
        reference: The original, frozen, where the model is bare.
        retain_weight: Of the retain data's term.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> from semu_peft.language import text_examples
        >>> model = get_peft_model(decoder, SemuConfig(target_modules="all-linear"))  # of a loaded model
        >>> forget = text_examples(tokenizer, ["a b c", "d e f"]).loader(2)
        >>> methods.unseen_answers(model, forget, unseen=forget, learning_rate=1e-3, max_steps=2, progress=False).steps
        2
    """
    original = model if reference is None else reference
    nll, of_forget = (sequence_nll(original, each, progress=progress) for each in (unseen, forget))
    objective = UnseenAnswer(nll, reference, forget_nll=of_forget)
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, objective, keep(retain, CrossEntropy(), retain_weight), **said)
