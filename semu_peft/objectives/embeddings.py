"""Forgetting without labels: what may become of the embeddings that a feature extractor gives to whole examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft.arguments import check_count, check_kind, check_model, check_positive
from semu_peft.model_state import device_of, eval_mode

from .base import Evaluation, Outputs
from .batches import check_batches
from .label_free import run_without_labels
from .original import reference_model
from .representation import HiddenStateObjective, find_layer, outputs_of


@dataclass(frozen=True)
class EmbeddingCode:
    """A linear autoencoder of embeddings: `μ + B Bᵀ (e − μ)`, what a few numbers can say of one.

    Attributes:
        mean: `μ`, `(d,)`.
        basis: `B`, `(d, k)`, orthonormal: the principal components.

    Examples:
        >>> import torch
        >>> code = EmbeddingCode(torch.zeros(2), torch.tensor([[1.0], [0.0]]))
        >>> code.errors(torch.tensor([[5.0, 0.0], [5.0, 2.0]]))  # 2² / 2
        tensor([0., 2.])
    """

    mean: Tensor = field(repr=False)
    basis: Tensor = field(repr=False)

    def errors(self, embeddings: Tensor) -> Tensor:
        """The mean squared error of each embedding's reconstruction, `(N,)`."""
        centred = embeddings - self.mean.to(embeddings)
        basis = self.basis.to(embeddings)
        return (centred - centred @ basis @ basis.mT).square().mean(1)


def embedding_code(model: nn.Module, batches: Iterable[Any], layer: int | str, *, rank: int = 16) -> EmbeddingCode:
    """Fit a linear autoencoder to what a layer says of some examples, by one pass over them.

    It is the best one of its size, their principal components, and needs no training: what the released code of LAF
    has variational autoencoders for, whose decoder ends in a sigmoid although embeddings are not between 0 and 1.

    Args:
        model: The model as it is, in eval mode.
        batches: The examples; labels, where there are any, are not read.
        layer: The last layer of the feature extractor, see
            [`read_embeddings`][semu_peft.objectives.embeddings.read_embeddings].
        rank: How many components; those without any spread are left out.

    Raises:
        ValueError: There is no batch, or the model has no such layer.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import embedding_code
        >>> line = torch.arange(4.0)[:, None] * torch.tensor([[3.0, 4.0]])
        >>> code = embedding_code(torch.nn.Sequential(torch.nn.Identity()), [line], "0", rank=1)
        >>> code.mean, bool(code.errors(line).max() < 1e-10)
        (tensor([4.5000, 6.0000]), True)
    """
    check_model(model)
    check_batches(batches)
    check_count("rank", rank)
    device, count, total, moment = device_of(model), 0, None, None
    with torch.no_grad(), eval_mode(model):
        for batch in batches:
            found = read_embeddings(model, send_to_device(batch, device), layer).double()
            count += len(found)
            total = found.sum(0) if total is None else total + found.sum(0)
            moment = found.mT @ found if moment is None else moment + found.mT @ found
    if total is None or moment is None:
        raise ValueError("`batches` must give at least one batch, got none. Check that it has not been used up.")
    mean = total / count
    values, vectors = torch.linalg.eigh(moment / count - torch.outer(mean, mean))
    kept = values.flip(0)[:rank] > 1e-10 * values[-1].clamp_min(0)
    return EmbeddingCode(mean.float(), vectors.flip(1)[:, :rank][:, kept].float())


@dataclass
class EmbeddingReconstruction(HiddenStateObjective):
    """`mean exp(m / (m + 1))` with `m` the error of an embedding's reconstruction: how badly a code fits embeddings.

    LAF's extractor unlearning lowers it for the retain data and their code, and raises it for the forget data and
    theirs, `−EmbeddingReconstruction(layer, code)`: each example counts from 1, where it is told exactly, to e. No
    labels are read.

    Source: Shen et al., ICLR 2024, arXiv 2404.00506; with a linear code in place of a variational autoencoder.

    Args:
        layer: The last layer of the feature extractor.
        code: Of [`embedding_code`][semu_peft.objectives.embeddings.embedding_code].

    Raises:
        TypeError: `code` is none.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import EmbeddingReconstruction
        >>> from semu_peft.objectives.embeddings import EmbeddingCode
        >>> code = EmbeddingCode(torch.zeros(2), torch.tensor([[1.0], [0.0]]))
        >>> objective = EmbeddingReconstruction("0", code)
        >>> round(objective(torch.nn.Sequential(torch.nn.Identity()), torch.tensor([[5.0, 2.0]])).item(), 4)  # e^(2/3)
        1.9477
    """

    code: EmbeddingCode
    minimum = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind("code", self.code, EmbeddingCode, "an `EmbeddingCode`", "Fit one by `embedding_code(...)`.")

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        embeddings = read_embeddings(model, batch, self.layer)
        errors = self.code.errors(embeddings)
        return Evaluation((errors / (errors + 1)).exp().mean(), (Outputs(embeddings),))

    def prepare(self, model: nn.Module, batch: Any) -> None:
        return None


@dataclass
class _EmbeddingDistance(HiddenStateObjective):
    """What keeping and repelling share: the distances `1 − cos` of a batch's embeddings from the original's."""

    reference: nn.Module | None = field(default=None, repr=False)

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Any) -> Tensor:
        with reference_model(model, self.reference) as reference:
            return read_embeddings(reference, batch, self.layer)

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        embeddings = read_embeddings(model, batch, self.layer)
        return Evaluation(self.distance_loss(1 - F.cosine_similarity(embeddings, prepared)), (Outputs(embeddings),))

    def distance_loss(self, distances: Tensor) -> Tensor:
        """The loss of the distances `(N,)`."""
        raise NotImplementedError


@dataclass
class KeepEmbeddings(_EmbeddingDistance):
    """`mean d(e, e₀)`, `d = 1 − cos`: keep the direction of retain embeddings, LAF's alignment of the retain data.

    Source: Shen et al., ICLR 2024, arXiv 2404.00506: `Σ_s log(e^{d(s)} / Σ_u e^{d(u) / τ})` over retain examples `s`
    and forget examples `u` is a sum of this and of
    [`RepelEmbeddings`][semu_peft.objectives.embeddings.RepelEmbeddings].

    Args:
        layer: The last layer of the feature extractor.
        reference: A frozen original model. By default the model itself without its adapter.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import KeepEmbeddings
        >>> frozen, model = torch.nn.Sequential(torch.nn.Identity()), torch.nn.Sequential(torch.nn.ReLU())
        >>> round(KeepEmbeddings("0", reference=frozen)(model, torch.tensor([[-3.0, 4.0]])).item(), 4)  # 1 − 4 / 5
        0.2
    """

    minimum = 0.0

    def distance_loss(self, distances: Tensor) -> Tensor:
        return distances.mean()


@dataclass
class RepelEmbeddings(_EmbeddingDistance):
    """`−log Σ exp(d(e, e₀) / τ)` over a batch of forget data: lead their embeddings away from where they were.

    The other part of LAF's alignment, see [`KeepEmbeddings`][semu_peft.objectives.embeddings.KeepEmbeddings]. It has no
    gradient at the original itself, where the cosine is at its top: something else must begin.

    Args:
        layer: The last layer of the feature extractor.
        reference: A frozen original model. By default the model itself without its adapter.
        temperature: `τ`; the authors take 5 or 20.

    Raises:
        ValueError: `temperature` is not above zero.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import RepelEmbeddings
        >>> model = torch.nn.Sequential(torch.nn.Identity())
        >>> round(RepelEmbeddings("0", reference=model)(model, torch.eye(2)).item(), 4)  # −log 2
        -0.6931
    """

    temperature: float = field(default=20.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("temperature", self.temperature)

    def distance_loss(self, distances: Tensor) -> Tensor:
        return -(distances / self.temperature).logsumexp(0)


def read_embeddings(model: nn.Module, batch: Any, layer: int | str) -> Tensor:
    """Run the model without labels and return what a layer says of each example, `(N, d)`, in float32 or better.

    Of tokens `(N, L, d)` it is the mean over those that are no padding, of an image `(N, d, H, W)` that over places.

    Args:
        model: Any model.
        batch: Inputs alone, as a tensor or a mapping, or with labels.
        layer: Its number or name, see [`find_layer`][semu_peft.objectives.representation.find_layer].

    Raises:
        ValueError: The model has no such layer or several, or did not run it.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.embeddings import read_embeddings
        >>> read_embeddings(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)), torch.zeros(2, 3, 5, 5), "0").shape
        torch.Size([2, 4])
    """
    name, module = find_layer(model, layer)
    with outputs_of(module) as caught:
        run_without_labels(model, batch)
    if not caught:
        raise ValueError(f"`layer` must be a layer that the model runs, got {name!r}, which it did not. Name another.")
    output = caught[0].to(torch.promote_types(caught[0].dtype, torch.float32))
    if output.dim() == 3:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if not isinstance(mask, Tensor) or mask.shape != output.shape[:2]:
            return output.mean(1)
        weights = mask.to(output).unsqueeze(2)
        return (output * weights).sum(1) / weights.sum(1).clamp_min(1)
    return output.flatten(2).mean(2) if output.dim() > 3 else output.flatten(1)
