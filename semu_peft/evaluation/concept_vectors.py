"""Is a concept still in the vector that held it: what one neuron writes, before and after."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from semu_peft.arguments import check_count, check_kind


@dataclass(frozen=True)
class VectorChange:
    """How far a value vector is from what it was.

    Attributes:
        cosine: Between both.
        distance: `‖v − v₀‖`.
        jaccard: What the tokens that they speak for most have in common: 1 where all are the same.

    Examples:
        >>> VectorChange(1.0, 0.0, 1.0)
        VectorChange(cosine=1.000, distance=0.000, jaccard=1.000)
    """

    cosine: float
    distance: float
    jaccard: float

    def __repr__(self) -> str:
        return f"VectorChange(cosine={self.cosine:.3f}, distance={self.distance:.3f}, jaccard={self.jaccard:.3f})"


def vector_change(before: Tensor, after: Tensor, embeddings: Tensor, *, topk: int = 200) -> VectorChange:
    """Compare a vector with what it was, by itself and by the tokens that the head reads from it.

    A model may no longer say a thing and still hold it: then its vector is as it was (cosine and Jaccard 1). Made for a
    column of a down-projection, of which it is known that it holds the concept.

    Source: ConceptVectors, Hong et al. 2024, arXiv 2406.11614: the first 200 tokens of `E v`.

    Args:
        before: The vector in the original model, `(d,)`.
        after: The vector now.
        embeddings: The head's weight, `(vocabulary, d)`.
        topk: How many tokens are compared.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: The shapes do not fit.

    Examples:
        >>> import torch
        >>> vector_change(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.eye(2), topk=1).jaccard
        1.0
    """
    for name, value in (("before", before), ("after", after), ("embeddings", embeddings)):
        check_kind(name, value, Tensor, "a tensor", "Take a column of a weight.")
    check_count("topk", topk)
    if before.shape != after.shape or before.dim() != 1 or embeddings.shape[1:] != before.shape:
        raise ValueError(
            f"`before` and `after` must be vectors (d,) beside `embeddings` (vocabulary, d), got "
            f"{tuple(before.shape)}, {tuple(after.shape)} and {tuple(embeddings.shape)}. Take a column of a weight."
        )
    first, second, head = before.detach().double(), after.detach().double(), embeddings.detach().double()
    count = min(topk, len(head))
    tokens = [set((head @ each).topk(count).indices.tolist()) for each in (first, second)]
    cosine = float(first @ second / (first.norm() * second.norm()).clamp_min(1e-300))
    jaccard = len(tokens[0] & tokens[1]) / len(tokens[0] | tokens[1])
    return VectorChange(cosine, float((second - first).norm()), jaccard)
