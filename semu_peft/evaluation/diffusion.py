"""Forgetting in generators: what a classifier recognises in their samples, and how far these are from real images.

Images are tensors `(N, channels, height, width)` in [0, 1]. The classifier and the feature extractor are yours: any
module that takes such images, so put the scaling that it expects into it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.batches import as_labels

from .classification import Predictions, predict

Generate = Callable[[Sequence[str], Sequence[int]], Tensor]
"""`(prompts, seeds) -> images`, one image for each pair."""


@dataclass(frozen=True)
class ErasureMetrics:
    """How well a generator forgot, in percent where nothing else is said.

    Attributes:
        forget_accuracy: Samples of forgotten classes that the classifier still recognises as these; low is good.
        retain_accuracy: Samples of the other classes that it recognises as what was asked for.
        frechet_distance: Distance of the retained classes' samples to the real images, where these were given.
        kernel_distance: Their kernel distance to the real images, where these were given.

    Examples:
        >>> from semu_peft.evaluation import ErasureMetrics
        >>> ErasureMetrics(forget_accuracy=1.5, retain_accuracy=98.0)
        ErasureMetrics(forget_accuracy=1.5, retain_accuracy=98.0, frechet_distance=None, kernel_distance=None)
    """

    forget_accuracy: float
    retain_accuracy: float
    frechet_distance: float | None = None
    kernel_distance: float | None = None


@dataclass(frozen=True)
class UnlearnCanvasMetrics:
    """UnlearnCanvas's three accuracies, in percent; all are better the higher.

    Attributes:
        unlearning_accuracy: UA, images of the forgotten concept in which it is *not* recognised.
        in_domain_retain_accuracy: IRA, images of the domain's other concepts that are recognised.
        cross_domain_retain_accuracy: CRA, images whose concept of another domain is recognised.

    Examples:
        >>> from semu_peft.evaluation import UnlearnCanvasMetrics
        >>> metrics = UnlearnCanvasMetrics(98.0, 96.0, 97.0)
        >>> metrics.unlearning_accuracy
        98.0
    """

    unlearning_accuracy: float
    in_domain_retain_accuracy: float
    cross_domain_retain_accuracy: float


@dataclass(frozen=True)
class LabelledPrompt:
    """A prompt and what its image should show: a class index for each domain, `{"style": 3, "object": 5}`.

    Examples:
        >>> from semu_peft.evaluation import LabelledPrompt
        >>> LabelledPrompt("a cat in Van Gogh's style", {"style": 3, "object": 5}).labels["object"]
        5
    """

    text: str
    labels: Mapping[str, int]


def classify_samples(images: Tensor, labels: Tensor, classifier: nn.Module, *, batch_size: int = 256) -> Predictions:
    """Classify generated samples, to compare what is seen in them with what was asked for.

    Args:
        images: Samples `(N, channels, height, width)` in [0, 1].
        labels: The class that each was asked for, `(N,)`.
        classifier: Images to logits.
        batch_size: Images at a time.

    Raises:
        ValueError: Images and labels are not equally many, there are none, or an image is not finite or not in [0, 1].
            Pictures that are black all over, as a safety checker gives them, are counted with a warning.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import classify_samples
        >>> classifier = torch.nn.Flatten()  # two pixels, which are the logits of two classes
        >>> images = torch.tensor([[0.1, 0.9], [0.8, 0.3]]).view(2, 1, 1, 2)
        >>> classify_samples(images, torch.tensor([1, 1]), classifier)
        Predictions(2 examples, 2 classes, accuracy 50.00%)
    """
    labels = as_labels(labels)
    if len(images) != len(labels):
        raise ValueError(
            f"`labels` must be one per image, got {len(labels)} for {len(images)} images. Give the class that each "
            "image was asked for."
        )
    _check_pictures(images)
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    return predict(classifier, batches, name="images", progress=False)


def evaluate_erasure(
    images: Tensor,
    labels: Tensor,
    classifier: nn.Module,
    forgotten: int | Sequence[int],
    *,
    real: Tensor | None = None,
    features: nn.Module | None = None,
    batch_size: int = 256,
) -> ErasureMetrics:
    """Judge samples of all classes: the forgotten ones should not be recognised, the others as before.

    Compare with the samples of the original model at equal seeds.

    Args:
        images: Samples.
        labels: The class that each was asked for, `(N,)`.
        classifier: Images to logits.
        forgotten: The forgotten class or classes.
        real: Real images of the retained classes, for the distances.
        features: Images to features `(N, d)`, for the distances.
        batch_size: Images at a time.

    Raises:
        ImportError: Distances are asked for and torchmetrics is not installed.
        ValueError: Labels and images do not fit, one of the two groups is empty, or `real` and `features` are not given
            together.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import evaluate_erasure
        >>> classifier = torch.nn.Flatten()  # two pixels, which are the logits of two classes
        >>> images = torch.tensor([[0.1, 0.9], [0.2, 0.7], [0.3, 0.8]]).view(3, 1, 1, 2)
        >>> metrics = evaluate_erasure(images, torch.tensor([0, 0, 1]), classifier, forgotten=0)
        >>> metrics.forget_accuracy, metrics.retain_accuracy
        (0.0, 100.0)
    """
    classes = torch.as_tensor(forgotten).reshape(-1).cpu()
    gone = torch.isin(as_labels(labels).cpu(), classes)
    if not gone.any() or gone.all():
        raise ValueError(
            f"`labels` must be of the forgotten classes {classes.tolist()} and of others, got {int(gone.sum())} of "
            f"{len(labels)} that are. Sample both."
        )
    if (real is None) != (features is None):
        raise ValueError("`real` and `features` must be given together, got one of them. Give both or neither.")
    recognised = classify_samples(images, labels, classifier, batch_size=batch_size)
    hits = recognised.predicted == recognised.labels
    frechet = kernel = None
    if real is not None and features is not None:
        frechet = frechet_distance(images[gone.logical_not()], real, features, batch_size=batch_size)
        kernel = kernel_distance(images[gone.logical_not()], real, features, batch_size=batch_size)
    return ErasureMetrics(_percent(hits[gone]), _percent(hits[~gone]), frechet, kernel)


def unlearn_canvas(
    generate: Generate,
    prompts: Sequence[LabelledPrompt],
    classifiers: Mapping[str, nn.Module],
    forgotten: tuple[str, int],
    *,
    seeds: Sequence[int] = (188, 288, 588, 688, 888),
    batch_size: int = 16,
) -> UnlearnCanvasMetrics:
    """UnlearnCanvas's protocol: every prompt with every seed, judged by one classifier per domain.

    Source: Zhang et al., *UnlearnCanvas*, NeurIPS 2024, arXiv 2402.11846, with the seeds of its released scripts. As in
    these, the cross-domain accuracy is over all prompts, those of the forgotten concept included.

    Args:
        generate: `(prompts, seeds) -> images`, for example a pipeline in
            [`sample_pipeline`][semu_peft.concept.sampling.sample_pipeline].
        prompts: Prompts with their class in each domain.
        classifiers: Images to logits, by domain.
        forgotten: The domain and the class index that was unlearned.
        seeds: Seeds for each prompt.
        batch_size: Images at a time.

    Raises:
        ValueError: A prompt lacks a label, a domain has no classifier, or a group of prompts is empty.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import LabelledPrompt, unlearn_canvas
        >>> prompts = [LabelledPrompt(f"a cat in style {style}", {"style": style, "object": 1}) for style in (0, 1)]
        >>> def generate(prompts, seeds):  # two pixels, which are the logits of two classes; it always draws class 1
        ...     return torch.tensor([0.0, 1.0]).expand(len(prompts), 1, 1, 2)
        >>> classifiers = {"style": torch.nn.Flatten(), "object": torch.nn.Flatten()}
        >>> unlearn_canvas(generate, prompts, classifiers, forgotten=("style", 0)).unlearning_accuracy
        100.0
    """
    domain, concept = forgotten
    if domain not in classifiers or len(classifiers) < 2:
        raise ValueError(f"`classifiers` must have {domain!r} and another domain, got {sorted(classifiers)}.")
    for prompt in prompts:
        if set(prompt.labels) != set(classifiers):
            raise ValueError(
                f"`prompts` must be labelled for the domains {sorted(classifiers)}, got {prompt.text!r} labelled for "
                f"{sorted(prompt.labels)}. Give it a class index for each domain."
            )
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    hits: dict[str, list[Tensor]] = {name: [] for name in classifiers}
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        images = generate([prompt.text for prompt, _ in part], [seed for _, seed in part])
        for name, classifier in classifiers.items():
            labels = torch.tensor([prompt.labels[name] for prompt, _ in part])
            found = classify_samples(images, labels, classifier)
            hits[name].append(found.predicted == found.labels)
    gone = torch.tensor([prompt.labels[domain] == concept for prompt, _ in pairs], dtype=torch.bool)
    if not gone.any() or gone.all():
        raise ValueError(f"`prompts` must ask for {domain} {concept} and for others of that domain, got one kind only.")
    by_domain = {name: torch.cat(parts) for name, parts in hits.items()}
    across = torch.cat([found for name, found in by_domain.items() if name != domain])
    return UnlearnCanvasMetrics(
        100 - _percent(by_domain[domain][gone]), _percent(by_domain[domain][~gone]), _percent(across)
    )


def frechet_distance(images: Tensor, real: Tensor, features: nn.Module, *, batch_size: int = 256) -> float:
    """Fréchet distance of two sets of images in the given features; with Inception features it is the FID.

    Source: Heusel et al. 2017, arXiv 1706.08500, computed by torchmetrics. It needs more images than features, and
    equally many of them wherever numbers are compared.

    Args:
        images: Samples `(N, channels, height, width)` in [0, 1].
        real: Real images of that form.
        features: Images to features `(N, d)`.
        batch_size: Images at a time.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: A set has fewer than two images, or the features are not `(N, d)`.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import frechet_distance
        >>> real = torch.rand(50, 1, 1, 2) / 2
        >>> samples = real + 0.5  # moved by 0.5 in both features, and spread as before
        >>> round(frechet_distance(samples, real, torch.nn.Flatten()), 3)
        0.5
    """
    fid = _torchmetrics().image.fid.FrechetInceptionDistance
    extractor = _Features(features, images, real)
    metric = fid(feature=extractor, normalize=True).to(extractor.device)
    return float(_updated(metric, images, real, batch_size, extractor.device).compute())


def kernel_distance(
    images: Tensor,
    real: Tensor,
    features: nn.Module,
    *,
    subsets: int = 50,
    subset_size: int = 100,
    batch_size: int = 256,
    seed: int = 0,
) -> float:
    """Kernel distance (squared MMD, cubic kernel), unbiased for small sets; with Inception features it is the KID.

    Source: Bińkowski et al. 2018, arXiv 1801.01401, computed by torchmetrics, the mean over random subsets.

    Args:
        images: Samples `(N, channels, height, width)` in [0, 1].
        real: Real images of that form.
        features: Images to features `(N, d)`.
        subsets: How many random subsets to take.
        subset_size: Images in each.
        batch_size: Images at a time.
        seed: Seed of the subsets.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: A set has fewer than two images, or the features are not `(N, d)`.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import kernel_distance
        >>> real, near, far = torch.rand(30, 1, 1, 2) / 2, torch.rand(30, 1, 1, 2) / 2, torch.rand(30, 1, 1, 2)
        >>> features = torch.nn.Flatten()
        >>> kernel_distance(near, real, features) < kernel_distance(far, real, features)
        True
    """
    kid = _torchmetrics().image.kid.KernelInceptionDistance
    extractor = _Features(features, images, real)
    size = min(subset_size, len(images), len(real))
    metric = kid(feature=extractor, subsets=subsets, subset_size=size, normalize=True).to(extractor.device)
    metric = _updated(metric, images, real, batch_size, extractor.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean, _ = metric.compute()
    return float(mean)


@torch.no_grad()
def clip_score(
    images: Tensor, prompts: Sequence[str], model: nn.Module, processor: Any, *, batch_size: int = 32
) -> float:
    """CLIP score: 100 × the cosine between image and prompt, at least 0, averaged.

    Source: Hessel et al. 2021, arXiv 2104.08718 (there times 2.5).

    Args:
        images: Images with three channels.
        prompts: One prompt per image.
        model: A transformers `CLIPModel`.
        processor: Its `CLIPProcessor`.
        batch_size: Images at a time.

    Raises:
        ValueError: There are not as many prompts as images, or none.

    Examples:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from transformers import BatchFeature
        >>> from semu_peft.evaluation import clip_score
        >>> class Clip(torch.nn.Module):  # stands for a `CLIPModel`: one image fits its prompt, the other does not
        ...     def forward(self, embeds):
        ...         return SimpleNamespace(image_embeds=embeds, text_embeds=torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        >>> def processor(**inputs):  # stands for its `CLIPProcessor`
        ...     return BatchFeature({"embeds": torch.eye(2)})
        >>> clip_score(torch.rand(2, 3, 8, 8), ["a cat", "a cat"], Clip(), processor)
        50.0
    """
    if len(images) != len(prompts) or not len(images):
        raise ValueError(
            f"`prompts` must be one per image, and at least one, got {len(prompts)} for {len(images)} images."
        )
    _check_pictures(images)
    device, scores = device_of(model), []
    for start in range(0, len(images), batch_size):
        pictures = (images[start : start + batch_size].clamp(0, 1) * 255).round().byte()
        arrays = [picture.permute(1, 2, 0).cpu().numpy() for picture in pictures]
        inputs = processor(
            text=list(prompts[start : start + batch_size]), images=arrays, return_tensors="pt", padding=True,
            truncation=True,
        )  # fmt: skip
        with eval_mode(model):
            output = model(**inputs.to(device))
        scores.append(nn.functional.cosine_similarity(output.image_embeds, output.text_embeds).clamp(min=0).cpu())
    return 100 * float(torch.cat(scores).mean())


def _check_pictures(images: Tensor, name: str = "images") -> None:
    """Pictures that no model drew: of an overflow, of another range, or a safety checker's in place of what it drew."""
    if not images.isfinite().all():
        broken = int(images.flatten(1).isfinite().all(1).logical_not().sum())
        raise ValueError(
            f"`{name}` must be finite, got {broken} of {len(images)} that are not. A VAE in float16 may overflow: "
            "decode in float32 or bfloat16."
        )
    # A little beyond 0 and 1 is what resizing leaves.
    if len(images) and (not images.is_floating_point() or images.max() > 2 or images.min() < -0.5):
        mend = "Write `images / 2 + 0.5`." if images.max() <= 2 else "Divide by 255."
        raise ValueError(
            f"`{name}` must be floats in [0, 1], got {images.dtype} from {images.min():g} to {images.max():g}. {mend}"
        )
    black = int((images.flatten(1) == 0).all(1).sum()) if images.shape[1] == 3 and name == "images" else 0
    if black:
        warnings.warn(
            f"{black} of {len(images)} images are black all over. If they are a safety checker's, they say nothing "
            "about the model: sample with `pipe.safety_checker = None`.",
            stacklevel=4,
        )


class _Features(nn.Module):
    """A feature extractor as torchmetrics takes it: with its width told, flat, and in eval mode."""

    def __init__(self, features: nn.Module, images: Tensor, real: Tensor) -> None:
        super().__init__()
        if min(len(images), len(real)) < 2:
            raise ValueError(f"`images` and `real` must hold two images or more, got {len(images)} and {len(real)}.")
        _check_pictures(images)
        _check_pictures(real, "real")
        self.features = features
        self.device = device_of(features)
        shape = self(images[:1].to(self.device)).shape
        if len(shape) != 2:
            raise ValueError(
                f"`features` must map images to (N, d), got {tuple(shape)} for one image. Flatten or pool them."
            )
        self.num_features = int(shape[1])

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad(), eval_mode(self.features):
            return self.features(images).float()


def _updated(metric: Any, images: Tensor, real: Tensor, batch_size: int, device: torch.device) -> Any:
    for batches, is_real in ((real, True), (images, False)):
        for batch in batches.split(batch_size):
            metric.update(batch.to(device), real=is_real)
    return metric


def _torchmetrics() -> Any:
    try:
        import torchmetrics.image.fid
        import torchmetrics.image.kid
    except ImportError as error:
        raise ImportError(
            'Distances need torchmetrics: run `pip install ".[diffusion]"` in a clone of semu-peft.'
        ) from error
    return torchmetrics


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.double().mean())
