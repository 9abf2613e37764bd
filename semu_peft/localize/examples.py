"""Which examples an answer comes from: how much each one that a model was trained on adds to its logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from semu_peft.arguments import check_count, check_model, check_positive, check_switch
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.batches import check_batches
from semu_peft.objectives.examples import single_examples
from semu_peft.objectives.tokens import call_model

_LARGEST = 8192  # numbers: the curvature is a matrix of as many rows, in float64
_BLOCK = 2**16  # rows of the random projection that are drawn at a time


def example_influence(
    model: nn.Module,
    train: Iterable[Any],
    forget: Iterable[Any],
    queries: Iterable[Any],
    *,
    output: Literal["categorical", "gaussian"] = "categorical",
    damping: float = 1e-3,
    projection: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """How much each forget example adds to every logit of the queries: `τ_i(x) = f(x) − f₋ᵢ(x)`, without retraining.

    The model is taken for linear in what is trained (`J = ∂f/∂θ`) and the loss for its Gauss–Newton quadratic,
    `H = Σ Jᵀ S J + λ I` over all training examples, with `S` the curvature of the loss in the logits and `r` its
    gradient there. To take example `i` out moves `θ` by `H₋ᵢ⁻¹ Jᵢᵀ rᵢ`, so that

        τ_i(x) = −J(x) H⁻¹ Jᵢᵀ (I − Sᵢ Jᵢ H⁻¹ Jᵢᵀ)⁻¹ rᵢ,

    which for a ridge regression is retraining itself, for one example. What
    [`without_influence`][semu_peft.objectives.matching.without_influence] adds up for several leaves out how they
    stand in for each other.

    Source: TRAK, Park et al. 2023, arXiv 2303.14186, whose features are random projections of the gradients; here of
    every logit instead of one margin, with the loss's curvature and the leave-one-out factor. Trained cores are few
    enough to need no projection. Average over models that were trained from other seeds, as TRAK does, by calling it
    for each.

    Args:
        model: A classifier with one label an example; what is trainable in it is what the examples have influence on.
        train: All training batches, the forget examples among them.
        forget: Batches of those that are asked about.
        queries: Batches whose logits are explained; labels are not read, but must be there.
        output: `"categorical"` for cross entropy, `"gaussian"` for squared error from the one-hot label.
        damping: `λ`: the weight decay of the training times its number of examples, or a small number.
        projection: Project gradients at random to so many numbers, where more are trained than can be solved for.
        seed: Of the projection.
        progress: Show a progress bar.

    Returns:
        `(forget examples, queries, classes)`, float32, as `without_influence` takes it.

    Raises:
        ValueError: Nothing is trainable or too much, an example has several labels, or there is no example.

    Examples:
        >>> from semu_peft.localize import example_influence
        >>> model, data = nn.Linear(4, 3), [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> forget = [(data[0][0][:2], data[0][1][:2])]
        >>> example_influence(model, data, forget, data, progress=False).shape
        torch.Size([2, 8, 3])
    """
    check_model(model)
    for name, batches in (("train", train), ("forget", forget), ("queries", queries)):
        check_batches(batches, name)
    if output not in ("categorical", "gaussian"):
        raise ValueError(f"`output` must be 'categorical' or 'gaussian', got {output!r}. Take the first for classes.")
    check_positive("damping", damping)
    check_count("projection", projection, optional=True)
    check_switch("progress", progress)
    reader = _Reader(model, output, projection, seed)
    with eval_mode(model):
        hessian = damping * torch.eye(reader.size, dtype=torch.float64, device=reader.device)
        for one in reader.examples(train, "Curvature", progress):
            hessian += one.jacobian.mT @ one.curvature @ one.jacobian
        factor = torch.linalg.cholesky(hessian)
        asked = [one.jacobian for one in reader.examples(queries, "Queries", progress)]
        found = []
        for one in reader.examples(forget, "Influence", progress):
            solved = torch.cholesky_solve(one.jacobian.mT, factor)
            own = torch.eye(len(one.residual)).to(solved) - one.curvature @ one.jacobian @ solved
            found.append(solved @ torch.linalg.solve(own, one.residual))
    if not asked or not found:
        raise ValueError("`forget` and `queries` must hold an example each, got none. Check that neither is used up.")
    return -torch.einsum("ncp,fp->fnc", torch.stack(asked), torch.stack(found)).float()


class _One(NamedTuple):
    """An example as the linear model sees it."""

    jacobian: Tensor
    residual: Tensor
    curvature: Tensor


class _Reader:
    """Reads examples one by one."""

    def __init__(self, model: nn.Module, output: str, projection: int | None, seed: int) -> None:
        self.model, self.output, self.projection, self.seed = model, output, projection, seed
        self.device = device_of(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad and p.numel()]
        numbers = sum(p.numel() for p in self.parameters)
        self.size = projection or numbers
        if not numbers:
            raise ValueError("`model` has no trainable parameter. Set `requires_grad` of what the examples have made.")
        if self.size > _LARGEST:
            raise ValueError(
                f"`projection` must be at most {_LARGEST} where {numbers} numbers are trained, got {projection}. Take "
                "2048, or ask about an adapter's cores."
            )

    def examples(self, batches: Iterable[Any], told: str, progress: bool) -> Iterator[_One]:
        for batch in tqdm(batches, desc=told, disable=not progress, leave=False):
            for example in single_examples(send_to_device(batch, self.device)):
                yield self._read(example)

    def _read(self, example: Any) -> _One:
        with torch.enable_grad():
            logits, labels = call_model(self.model, example)
            if len(logits) != 1:
                raise ValueError(
                    f"`train`, `forget` and `queries` must have one label an example, got {len(logits)}. Influence is "
                    "on the logits of whole examples; of tokens there are too many."
                )
            rows = [self._row(logit) for logit in logits[0]]
        values = logits[0].detach().double()
        truth = F.one_hot(labels[0], len(values)).to(values)
        if self.output == "gaussian":
            return _One(torch.stack(rows), values - truth, torch.eye(len(values)).to(values))
        chances = values.softmax(0)
        return _One(torch.stack(rows), chances - truth, chances.diag() - torch.outer(chances, chances))

    def _row(self, logit: Tensor) -> Tensor:
        """`∂f_c/∂θ`, `(p,)`, projected."""
        gradients = torch.autograd.grad(logit, self.parameters, retain_graph=True, allow_unused=True)
        pairs = zip(self.parameters, gradients, strict=True)
        flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for p, g in pairs])
        if self.projection is None:
            return flat
        total = flat.new_zeros(self.projection)
        for number, part in enumerate(flat.split(_BLOCK)):
            generator = torch.Generator().manual_seed(self.seed + number)
            drawn = torch.randn(len(part), self.projection, generator=generator, dtype=torch.float64)
            total += part @ drawn.to(part)
        return total / self.projection**0.5
