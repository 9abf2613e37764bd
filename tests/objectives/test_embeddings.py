"""Objectives on embeddings: LAF's equations by hand, and that they read no labels."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from language_batches import padded
from models import gpt2, vit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from semu_peft import methods
from semu_peft.objectives import CrossEntropy, EmbeddingReconstruction, KeepEmbeddings, RepelEmbeddings, embedding_code
from semu_peft.objectives.embeddings import EmbeddingCode, read_embeddings

LINE = EmbeddingCode(torch.zeros(2), torch.tensor([[1.0], [0.0]]))


class Plain(nn.Module):
    """The embeddings are the inputs times what is trained."""

    def __init__(self, scale: list[float]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.embed = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x * self.scale)


def test_laf_unlearning_of_the_extractor_by_hand() -> None:
    """Acceptance: equal errors give 0, and errors of 0 and of infinity 1 − e."""
    model, objective = Plain([1.0, 1.0]), EmbeddingReconstruction("embed", LINE)
    alike = torch.tensor([[1.0, 2.0], [5.0, -2.0]])
    assert (objective(model, alike) - objective(model, alike.flip(0))).item() == 0.0
    assert objective(model, alike).item() == pytest.approx(math.exp(2 / 3))
    told, lost = torch.tensor([[4.0, 0.0]]), torch.tensor([[4.0, 1e6]])
    assert (objective(model, told) - objective(model, lost)).item() == pytest.approx(1 - math.e)


def test_labels_are_not_read() -> None:
    """Acceptance: the gradient is the same whatever the labels are, or without them."""
    x, gradients = torch.tensor([[1.0, 2.0], [-1.0, 3.0]]), []
    for batch in (x, (x, torch.tensor([0, 1])), (x, torch.tensor([1, 0]))):
        model = Plain([1.0, 2.0])
        loss = -EmbeddingReconstruction("embed", LINE) + RepelEmbeddings("embed", Plain([1.0, 1.0]))
        loss(model, batch).backward()
        gradients.append(model.scale.grad)
    assert gradients[0].any() and torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[1], gradients[2])


def test_alignment_by_hand() -> None:
    """`mean d` of the retain data and `−log Σ e^{d / τ}` of the forget data, which are LAF's quotient together."""
    model, original = Plain([-1.0, 1.0]), Plain([1.0, 1.0])
    x = torch.tensor([[3.0, 4.0], [2.0, 0.0]])  # cosines 7 / 25 and −1
    distances = torch.tensor([18 / 25, 2.0])
    kept, repelled = KeepEmbeddings("embed", original), RepelEmbeddings("embed", original, temperature=5.0)
    torch.testing.assert_close(kept(model, x), distances.mean())
    quotient = (distances[:1].exp() / (distances / 5).exp().sum()).log().sum()  # of the first as retain data
    torch.testing.assert_close(kept(model, x[:1]) + repelled(model, x), quotient)


def test_alignment_has_no_gradient_at_the_original_whatever_the_length() -> None:
    """Acceptance: zero where the student is the teacher up to scale."""
    model, original = Plain([2.0, 2.0]), Plain([1.0, 1.0])
    for objective in (KeepEmbeddings("embed", original), RepelEmbeddings("embed", original)):
        (gradient,) = torch.autograd.grad(objective(model, torch.tensor([[3.0, 4.0], [2.0, 1.0]])), model.parameters())
        assert gradient.abs().max() < 1e-7


def test_a_code_is_the_principal_components_of_all_batches() -> None:
    """Against an SVD of all embeddings at once; directions without spread are left out."""
    torch.manual_seed(0)
    x = torch.randn(40, 3) @ torch.randn(3, 5)
    model = nn.Sequential(nn.Linear(5, 6))
    code = embedding_code(model, x.split(16), "0", rank=2)
    embeddings = model(x).detach()
    left, values, _ = torch.linalg.svd((embeddings - embeddings.mean(0)).mT, full_matrices=False)
    torch.testing.assert_close(code.basis @ code.basis.mT, left[:, :2] @ left[:, :2].mT, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(code.errors(embeddings).mean(), values[2:].square().sum() / 40 / 6, rtol=1e-4, atol=0)
    assert embedding_code(model, [x], "0").basis.shape == (6, 3)


def test_what_is_an_embedding() -> None:
    """The mean over tokens that are no padding; over places of an image; and a transformer's by its name."""
    three = {"x": torch.tensor([[[1.0], [3.0], [9.0]]]), "attention_mask": torch.tensor([[1, 1, 0]])}

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Identity()

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.embed(x)

    assert read_embeddings(Tokens(), three, "embed").tolist() == [[2.0]]
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 8, 8)
    assert read_embeddings(vit(), {"pixel_values": pixels, "labels": torch.tensor([0, 1])}, 0).shape == (2, 16)


@pytest.mark.parametrize("has_labels", [True, False])
def test_embeddings_do_not_depend_on_padding(has_labels: bool) -> None:
    torch.manual_seed(0)
    model = gpt2()
    names = ("input_ids", "attention_mask", *(["labels", "token_mask"] if has_labels else []))
    left, right = ({name: padded(side, more=2)[name] for name in names} for side in ("left", "right"))
    found, expected = (read_embeddings(model, batch, "transformer.h.1") for batch in (left, right))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def clusters(labels: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Examples around one centre a class."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.tensor(labels).repeat(40)
    centres = 3 * torch.eye(6)[:4]
    return centres[y] + 0.3 * torch.randn(len(y), 6, generator=draw), y


@pytest.mark.parametrize("is_adapter", [True, False])
def test_laf_forgets_a_class_without_labels(is_adapter: bool) -> None:
    """The forgotten class is no longer told, others are; forget and retain data have no labels at all."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    optimizer = torch.optim.Adam(base.parameters(), lr=0.02)
    batch = clusters([0, 1, 2, 3], seed=1)
    for _ in range(150):
        optimizer.zero_grad()
        CrossEntropy()(base, batch).backward()
        optimizer.step()
    forget, retain = clusters([0], seed=1), clusters([1, 2, 3], seed=1)
    assert accuracy(base, forget) == 1.0 == accuracy(base, retain)
    options: dict[str, Any] = {} if is_adapter else {"reference": copy.deepcopy(base)}
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"])) if is_adapter else base
    methods.laf(
        model, [forget[0]], [retain[0]], layer="1", rank=2, temperature=5.0, epochs=150, learning_rate=0.05,
        progress=False, **options,
    )  # fmt: skip
    assert accuracy(model, forget) <= 0.1 and accuracy(model, retain) >= 0.95


@torch.no_grad()
def accuracy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    return (model(batch[0]).argmax(1) == batch[1]).float().mean().item()


def test_arguments() -> None:
    """Each is named in its error."""
    with pytest.raises(TypeError, match="`code` must be an `EmbeddingCode`"):
        EmbeddingReconstruction("0", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`temperature` must be"):
        RepelEmbeddings("0", temperature=0.0)
    with pytest.raises(ValueError, match="`batches` must give at least one batch"):
        embedding_code(nn.Linear(2, 2), [], "0")
    with pytest.raises(ValueError, match="`layer` must be"):
        read_embeddings(nn.Sequential(nn.ReLU()), torch.zeros(1, 2), "missing")
