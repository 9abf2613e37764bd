"""Forgetting in classifiers: UA, RA, TA and MIA, as SalUn (arXiv 2310.12508) and SEMU (arXiv 2502.07587) report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_device, check_model, check_number
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.batches import check_batches
from semu_peft.objectives.tokens import call_model

from .auc import share_interval
from .comparison import ForgettingMetrics
from .membership import MembershipInference, attack_membership


class DivergedError(ValueError):
    """A model gives NaN where it should give logits.

    Examples:
        >>> from semu_peft.evaluation.classification import DivergedError
        >>> issubclass(DivergedError, ValueError)
        True
    """


@dataclass(frozen=True, eq=False, repr=False)
class Predictions:
    """What a classifier said about N examples, on the CPU, in the order the loader gave them.

    Attributes:
        labels: True classes, `(N,)`, int64.
        predicted: Classes with the largest logit, `(N,)`, int64.
        confidence: Probability of the true class, `(N,)`, float32.
        num_classes: Number of logits the model has, where known.
        log_odds: Of the true class against all others, `(N,)`, float32, where known. Confidences round to 0 and 1 where
            these still differ.

    Raises:
        ValueError: They are not vectors of one length.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import Predictions
        >>> labels, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 2])
        >>> predictions = Predictions(labels, predicted, torch.tensor([0.9, 0.2, 0.8, 0.7]), num_classes=3)
        >>> predictions
        Predictions(4 examples, 3 classes, accuracy 75.00%)
        >>> predictions.confusion().tolist()
        [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    """

    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    num_classes: int | None = None
    log_odds: Tensor | None = None

    def __post_init__(self) -> None:
        given = (self.labels, self.predicted, self.confidence, self.log_odds)
        shapes = [tuple(tensor.shape) for tensor in given if tensor is not None]
        if len(set(shapes)) != 1 or len(shapes[0]) != 1:
            raise ValueError(
                f"`labels`, `predicted` and `confidence` must be three vectors of one length (N,), got {shapes}. "
                "Give one entry of each per example."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        classes = "" if self.num_classes is None else f"{self.num_classes} classes, "
        return f"Predictions({len(self)} examples, {classes}accuracy {self.accuracy:.2f}%)"

    @property
    def accuracy(self) -> float:
        """Share of examples whose true class has the largest logit, in percent (NaN without examples)."""
        return 100 * int((self.predicted == self.labels).sum()) / len(self) if len(self) else float("nan")

    def confusion(self, num_classes: int | None = None) -> Tensor:
        """Count how often each true class was predicted as each class.

        Args:
            num_classes: Number of classes C; by default the model's, or else the largest class seen plus one.

        Returns:
            Counts `(C, C)`, int64: row = true class, column = predicted class.

        Raises:
            ValueError: A class is C or larger.
        """
        largest = int(torch.cat([self.labels, self.predicted, torch.zeros(1, dtype=torch.int64)]).max())
        classes = num_classes or self.num_classes or largest + 1
        if largest >= classes:
            raise ValueError(f"`num_classes` must be at least {largest + 1}, as class {largest} occurs, got {classes}.")
        return torch.bincount(self.labels * classes + self.predicted, minlength=classes**2).view(classes, classes)


def predict(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    name: str = "loader",
) -> Predictions:
    """Classify every example of a loader, in eval mode and without gradients.

    Each module's training flag is afterwards what it was. In a distributed run every process classifies what its own
    loader yields; give each the whole loader, or use one process.

    Args:
        model: Classifier whose output is logits `(batch, C)`: a tensor, a tuple that starts with it or an object with
            `.logits`. Logits of tokens `(batch, L, C)` count one entry a real token, see
            [`call_model`][semu_peft.objectives.tokens.call_model].
        loader: Batches `(inputs, labels)`, or dictionaries with a `labels` key whose other entries are the model's
            keyword arguments. Labels are int64 class indices `(batch,)`, or `(batch, L)` of tokens.
        device: Where batches are sent; by default the device of the model's first parameter.
        progress: Show a progress bar.
        name: What to call the loader in the progress bar and in errors.

    Returns:
        One entry per example; the softmax is taken in float32 whatever the model's dtype.

    Raises:
        TypeError: The loader gives no batches, or a batch or the model's output has an unknown form.
        ValueError: The loader is empty, or its labels or the model's logits are malformed or NaN.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import predict
        >>> model = torch.nn.Identity()  # its inputs are the logits
        >>> loader = [(torch.eye(3), torch.tensor([0, 1, 1])), (torch.eye(3)[:1], torch.tensor([0]))]
        >>> predictions = predict(model, loader, progress=False)
        >>> predictions.predicted.tolist(), predictions.accuracy
        ([0, 1, 2, 0], 75.0)
    """
    check_batches(loader, name)
    if device is None:
        device = device_of(model)
    batches: Iterable[Any] = loader
    if progress:
        from tqdm.auto import tqdm

        batches = tqdm(loader, desc=name, unit="batch", leave=False)

    labels, predicted, confidence, log_odds = [], [], [], []
    num_classes: int | None = None
    with torch.no_grad(), eval_mode(model):
        for batch in batches:
            logits, batch_labels = call_model(model, send_to_device(batch, device))
            _check_classes(logits.shape[1], num_classes, name)
            num_classes = logits.shape[1]
            batch_labels = batch_labels.to(logits.device)
            probability = logits.float().softmax(dim=1)
            # Labels are checked once at the end, so that a GPU is not waited for at every batch; until then the clamp
            # keeps an out-of-range label from failing as a device-side assertion that names nothing.
            looked_up = batch_labels.clamp(0, num_classes - 1).unsqueeze(1)
            confidence.append(probability.gather(1, looked_up).squeeze(1))
            others = logits.float().scatter(1, looked_up, float("-inf")).logsumexp(1)
            log_odds.append(logits.float().gather(1, looked_up).squeeze(1) - others)
            predicted.append(logits.argmax(dim=1))
            labels.append(batch_labels)
    if num_classes is None or not sum(len(part) for part in labels):
        raise ValueError(
            f"`{name}` must give at least one example, got none. Check the subset it reads, and that it is not an "
            "iterator that has already been used up."
        )
    predictions = Predictions(
        labels=torch.cat(labels).cpu().long(),
        predicted=torch.cat(predicted).cpu(),
        confidence=torch.cat(confidence).cpu(),
        num_classes=num_classes,
        log_odds=torch.cat(log_odds).cpu(),
    )
    _check_values(predictions, num_classes, name)
    return predictions


def evaluate_forgetting(
    model: nn.Module,
    forget: Iterable[Any] | Predictions,
    retain: Iterable[Any] | Predictions,
    test: Iterable[Any] | Predictions,
    *,
    forgotten_test: Iterable[Any] | Predictions | None = None,
    seed: int = 0,
    progress: bool = True,
    device: torch.device | str | None = None,
    max_attack_examples: int | None = 2000,
    trainable_parameters: int | None = None,
    seconds: float | None = None,
    adapter_bytes: int | None = None,
) -> ForgettingMetrics:
    """Measure what a classifier forgot and what it kept (UA, RA, TA, MIA), all in percent.

    The protocol of SalUn (Fan et al., ICLR 2024, arXiv 2310.12508) and SEMU (arXiv 2502.07587). Give the loaders the
    evaluation transform (no random augmentation), for the training images too. Read the result next to that of a model
    retrained without the forget set *and* that of the model before unlearning, in a
    [`~semu_peft.evaluation.ForgettingComparison`].

    Args:
        model: The unlearned classifier (see [`predict`] for what it may return).
        forget: Training examples to forget. UA = 100 - accuracy.
        retain: Training examples to keep. RA = accuracy; also the attack's members.
        test: Test examples; for class forgetting those of the remaining classes. TA = accuracy; also the attack's
            non-members.
        forgotten_test: For class forgetting, the test examples of the forgotten class.
        seed: Seeds the draw of the membership attack's training examples, and of its interval.
        progress: Show a progress bar per loader.
        device: Where batches are sent; by default the device of the model's first parameter.
        max_attack_examples: Most examples per side that the attack is fitted on; `None` as in the papers (slow).
        trainable_parameters: Number of parameters that were trained. By default those that require gradients now,
            which is 0 for an adapter loaded for inference and for a merged model: say it yourself there.
        seconds: Time that the unlearning took, to be kept with the metrics.
        adapter_bytes: Size of the saved adapter, to be kept with the metrics.

    Each of the four loaders may also be the [`Predictions`] already made on it.

    Returns:
        The metrics.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: A batch or the model's output has an unknown form.
        ValueError: A loader is empty, or its labels or the model's logits are malformed or NaN.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import evaluate_forgetting
        >>> model = torch.nn.Identity()  # its inputs are the logits, so it is sure of every one-hot input
        >>> known, unknown = 9 * torch.eye(3), torch.zeros(3, 3)
        >>> forget, retain, test = ([(inputs, torch.arange(3))] for inputs in (unknown, known, known))
        >>> metrics = evaluate_forgetting(model, forget, retain, test, progress=False)
        >>> round(metrics.unlearning_accuracy, 1), metrics.retain_accuracy, metrics.test_accuracy
        (66.7, 100.0, 100.0)
    """

    check_model(model)
    check_count("max_attack_examples", max_attack_examples, optional=True)
    for name, value in (("trainable_parameters", trainable_parameters), ("adapter_bytes", adapter_bytes)):
        check_count(name, value, least=0, optional=True)
    check_count("seed", seed, least=0)
    if seconds is not None:
        check_number("seconds", seconds, low=0)
    check_device("device", device)

    def predicted(name: str, source: Iterable[Any] | Predictions) -> Predictions:
        check_batches(() if isinstance(source, Predictions) else source, name)
        if isinstance(source, (list, tuple)) and any(batch is None for batch in source):
            raise TypeError(f"`{name}` must give batches, got None among them. Leave those out.")
        if not isinstance(source, Predictions):
            return predict(model, source, device=device, progress=progress, name=name)
        if not len(source):
            raise ValueError(f"`{name}` must hold at least one prediction, got none. Predict on its loader first.")
        return source

    on_forget, on_retain, on_test = predicted("forget", forget), predicted("retain", retain), predicted("test", test)
    attack = attack_predictions(on_retain, on_test, on_forget, seed=seed, max_examples=max_attack_examples)
    trainable_now, total_parameters = _count_parameters(model)
    on_forgotten = None if forgotten_test is None else predicted("forgotten_test", forgotten_test)
    low, high = _accuracy_interval(on_forget)
    return ForgettingMetrics(
        unlearning_accuracy=100 - on_forget.accuracy,
        retain_accuracy=on_retain.accuracy,
        test_accuracy=on_test.accuracy,
        membership_inference=attack.share,
        membership_interval=attack.interval,
        membership_threshold=attack.threshold_share,
        trainable_parameters=trainable_now if trainable_parameters is None else trainable_parameters,
        total_parameters=total_parameters,
        forgotten_test_accuracy=None if on_forgotten is None else on_forgotten.accuracy,
        unlearning_accuracy_interval=(100 - high, 100 - low),
        retain_accuracy_interval=_accuracy_interval(on_retain),
        test_accuracy_interval=_accuracy_interval(on_test),
        forgotten_test_accuracy_interval=None if on_forgotten is None else _accuracy_interval(on_forgotten),
        seconds=seconds,
        adapter_bytes=adapter_bytes,
    )


def _accuracy_interval(said: Predictions) -> tuple[float, float]:
    low, high = share_interval(said.accuracy / 100, len(said))
    return 100 * low, 100 * high


def attack_predictions(
    member: Predictions, non_member: Predictions, forget: Predictions, **settings: Any
) -> MembershipInference:
    """The membership attack on predictions, whose threshold sees log-odds where they are known.

    Args:
        member: Of retained training examples.
        non_member: Of examples that no model was trained on.
        forget: Of the forget set.
        settings: Further arguments of [`attack_membership`][semu_peft.evaluation.membership.attack_membership].

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.classification import Predictions, attack_predictions
        >>> seen, odds = (torch.zeros(20), torch.zeros(20), torch.ones(20), 2), torch.linspace(30.0, 31.0, 20)
        >>> sure, unsure = Predictions(*seen, odds), Predictions(*seen, odds - 8)
        >>> attack_predictions(sure, unsure, unsure).threshold_share  # their confidences all round to 1
        100.0
    """
    odds = (member.log_odds, non_member.log_odds, forget.log_odds)
    known = odds[0] is not None and odds[1] is not None and odds[2] is not None
    return attack_membership(
        member.confidence, non_member.confidence, forget.confidence,
        scores=cast(tuple[Tensor, Tensor, Tensor], odds) if known else None, **settings,
    )  # fmt: skip


def _count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters require gradients and how many there are; a shared one counts once."""
    if isinstance(model, PeftModel):  # its own count also sees through 4-bit and ZeRO-3 storage
        return model.get_nb_trainable_parameters()
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in parameters)


def _check_classes(classes: int, before: int | None, name: str) -> None:
    """Raise ValueError unless the model has as many classes as it had before."""
    if before is not None and classes != before:
        raise ValueError(
            f"`model` must give as many logits for every batch of `{name}`, got {before} classes at first and "
            f"{classes} later. Check that its head does not depend on the batch."
        )


def _check_values(predictions: Predictions, num_classes: int, name: str) -> None:
    """Raise ValueError if a label is no class, DivergedError if a confidence is NaN."""
    lowest, highest = int(predictions.labels.min()), int(predictions.labels.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"The labels of `{name}` must be from 0 to {num_classes - 1}, as the model has {num_classes} classes, got "
            f"{lowest} to {highest}. Renumber the labels or use the matching head."
        )
    broken = int(predictions.confidence.isnan().sum())
    if broken:
        raise DivergedError(
            f"The model's logits on `{name}` must be finite, got NaN or +inf for {broken} of {len(predictions)} "
            "examples. The model has probably diverged: lower the learning rate, or evaluate in float32."
        )
