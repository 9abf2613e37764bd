"""Membership inference: can an attacker who sees the model's confidence tell that it once trained on an example?"""

from __future__ import annotations

import torch
from torch import Tensor


def membership_inference(
    member: Tensor,
    non_member: Tensor,
    forget: Tensor,
    *,
    seed: int = 0,
    max_examples: int | None = 2000,
) -> float:
    """Share of the forget examples that a confidence attack takes for examples the model was never trained on.

    The attack of SalUn (Fan et al., ICLR 2024, arXiv 2310.12508), which SEMU (arXiv 2502.07587) reports too: a support
    vector classifier with `C=3`, `gamma="auto"` and an RBF kernel sees one number per example, the probability the
    model gives to the true class. It is fitted on equally many members (retain-train) and non-members (test) and then
    asked about the forget examples. The number has a meaning only beside that of a model retrained without the forget
    set: where the model confides equally in members and non-members the classifier is guessing, and both very low and
    very high shares come out by chance.

    Args:
        member: Confidence in the true class on retained training examples, `(N,)`, floating point, in [0, 1].
        non_member: Confidence in the true class on examples that no model was trained on (test), `(M,)`.
        forget: Confidence in the true class on the forget set, `(F,)`.
        seed: Seeds the draw of the examples that the attack is fitted on. Nothing else is random.
        max_examples: Most examples per side to fit on. Fitting costs the square of their number: 2000 per side take
            about 2 s on one CPU core, 5000 about 10 s. `None` uses `min(N, M)` per side, as the papers do.

    Returns:
        The share in percent, 0 to 100.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: A tensor is empty, not one-dimensional or holds a value outside [0, 1], or `max_examples` < 1.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import membership_inference
        >>> member, non_member = torch.linspace(0.8, 1.0, 20), torch.linspace(0.1, 0.6, 20)
        >>> membership_inference(member, non_member, forget=torch.tensor([0.2, 0.3, 0.4, 0.95]))
        75.0
    """
    try:
        import numpy as np
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError(
            "membership_inference needs scikit-learn: run `pip install semu-peft[evaluation]`."
        ) from error

    for name, confidence in (("member", member), ("non_member", non_member), ("forget", forget)):
        _check_confidence(name, confidence)
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"`max_examples` must be at least 1, or None for no limit, got {max_examples}.")

    count = min(len(member), len(non_member))
    if max_examples is not None:
        count = min(count, max_examples)
    generator = torch.Generator().manual_seed(seed)
    drawn = [_draw(confidence, count, generator) for confidence in (member, non_member)]

    attack = SVC(C=3, gamma="auto", kernel="rbf")
    attack.fit(torch.cat(drawn).unsqueeze(1).numpy(), np.repeat([1, 0], count))
    # Confidence saturates at 0 and 1, so a forget set repeats values; asking about each one once is exact and faster.
    values, repeats = np.unique(forget.detach().cpu().double().numpy(), return_counts=True)
    called_non_member = attack.predict(values[:, None]) == 0
    return float(100 * repeats[called_non_member].sum() / repeats.sum())


def _draw(confidence: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of the `(N,)` values without replacement, as float64 on the CPU."""
    order = torch.randperm(len(confidence), generator=generator)
    return confidence.detach().cpu().double()[order[:count]]


def _check_confidence(name: str, confidence: Tensor) -> None:
    """Raise ValueError unless `confidence` is a non-empty vector of probabilities."""
    mend = "Give the model's probability of the true class for each example, as in `predict(...).confidence`."
    if confidence.dim() != 1 or len(confidence) == 0:
        raise ValueError(f"`{name}` must be a non-empty vector, got shape {tuple(confidence.shape)}. {mend}")
    outside = ~((confidence >= 0) & (confidence <= 1))  # written so that NaN counts as outside
    if outside.any():
        raise ValueError(
            f"`{name}` must be probabilities, got {int(outside.sum())} of {len(confidence)} values outside [0, 1] or "
            f"NaN. {mend}"
        )
