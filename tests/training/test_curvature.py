"""Running curvatures of cores against dense matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from semu_peft.gradients import CoreCovariance, TokenGradient
from semu_peft.gradients.core_rows import Rows
from semu_peft.training.curvature import CoreSlot, Curvature, KroneckerFactors, Probe, WholeMatrix

SLOTS = [
    CoreSlot("square", 0, (3, 3), True),
    CoreSlot("diagonal", 9, (2,), True),
    CoreSlot("batch", 11, (2, 2, 2), False),
]
SIZE = 19


def probe(examples: int = 5, places: int = 4) -> Probe:
    rows = {
        "square": [Rows(torch.randn(examples, places, 3), torch.randn(examples, places, 3))],
        "diagonal": [Rows(torch.randn(examples, places, 2), torch.randn(examples, places, 2)) for _ in range(2)],
    }
    return Probe(rows, torch.randn(SIZE), examples)


def dense(curvature: Curvature) -> torch.Tensor:
    return torch.stack([curvature.times(row) for row in torch.eye(SIZE)])


def example_gradients(probe: Probe) -> torch.Tensor:
    result = torch.zeros(probe.examples, SIZE)
    for left, right, _ in probe.rows["square"]:
        result[:, :9] += torch.einsum("nsi,nsj->nij", left, right).flatten(1)
    for left, right, _ in probe.rows["diagonal"]:
        result[:, 9:11] += (left * right).sum(1)
    return result


def test_the_whole_matrix_is_the_sum_of_squares_of_examples() -> None:
    curvature, first, second = WholeMatrix(SLOTS, 0.5, torch.device("cpu")), probe(), probe()
    curvature.observe([first])
    curvature.observe([second])
    parts = []
    for each in (first, second):
        gradients = example_gradients(each)
        part = gradients.T @ gradients
        part[11:, 11:] += torch.outer(each.gradient[11:], each.gradient[11:])
        parts.append(part)
    expected = (0.5 * parts[0] + parts[1]) / 1.5
    assert torch.allclose(dense(curvature), expected, rtol=1e-4, atol=1e-4)


def test_kronecker_factors_are_second_moments_of_either_side() -> None:
    curvature, only = KroneckerFactors(SLOTS, 0.8, torch.device("cpu")), probe()
    curvature.observe([only])
    left, right = (side.flatten(0, 1) for side in only.rows["square"][0][:2])
    square = torch.kron(left.T @ left, right.T @ right / len(right))
    lefts, rights = (torch.cat([rows[side].flatten(0, 1) for rows in only.rows["diagonal"]]) for side in (0, 1))
    diagonal = (lefts.T @ lefts) * (rights.T @ rights / len(rights))
    expected = torch.block_diag(square, diagonal, torch.diag(only.gradient[11:].square()))
    assert torch.allclose(dense(curvature), expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_number_at_padding_has_no_say() -> None:
    """As of an attention that had no token to look at."""
    slot, counts = CoreSlot("square", 0, (3, 3), True), torch.tensor([[True, False]])
    left, right = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    found = []
    for padding in (0.0, float("nan")):
        left[:, 1], right[:, 1] = padding, padding
        curvature = KroneckerFactors([slot], 0.8, torch.device("cpu"))
        curvature.observe([Probe({"square": [Rows(left.clone(), right.clone(), counts)]}, torch.zeros(9), 1)])
        found.append(curvature.times(torch.ones(9)))
    assert torch.equal(*found)
    factors = CoreCovariance(torch.eye(3), torch.eye(3))
    factors.add(TokenGradient(left.nan_to_num(), right, counts))
    assert torch.allclose(factors.inputs, right[0, :1].T @ right[0, :1])


def test_cores_of_one_size_are_together_what_each_is_alone() -> None:
    sizes = {"first": 3, "other": 2, "second": 3, "third": 3}
    slots, start = [], 0
    for name, size in sizes.items():
        slots.append(CoreSlot(name, start, (size, size), True))
        start += size * size
    # Of one length, of two calls, and of more rows than are looked at together.
    calls = {"first": [(5, 4)], "other": [(5, 4)], "second": [(5, 4)], "third": [(5, 4), (300, 400)]}
    rows = {
        name: [Rows(torch.randn(*shape, sizes[name]), torch.randn(*shape, sizes[name])) for shape in shapes]
        for name, shapes in calls.items()
    }
    together = KroneckerFactors(slots, 0.8, torch.device("cpu"))
    vector = torch.randn(start)
    for _ in range(2):
        together.observe([Probe(rows, vector, 5)])
    for slot in slots:
        alone = KroneckerFactors([CoreSlot(slot.name, 0, slot.shape, True)], 0.8, torch.device("cpu"))
        for _ in range(2):
            alone.observe([Probe(rows, vector, 5)])
        part = vector[slot.place]
        torch.testing.assert_close(together.times(vector)[slot.place], alone.times(part))
        torch.testing.assert_close(together.solve(vector, 0.1)[slot.place], alone.solve(part, 0.1))
        factors = [
            sum(torch.einsum("nsi,nsj->ij", each[side], each[side]) for each in rows[slot.name]) for side in (0, 1)
        ]
        factors[1] /= sum(len(each.left.flatten(0, 1)) for each in rows[slot.name])
        expected = factors[0] @ part.view(slot.shape) @ factors[1]
        torch.testing.assert_close(alone.times(part), expected.flatten(), rtol=1e-4, atol=1e-2)


def test_what_next_to_nothing_depends_on_moves_no_further_than_the_rest() -> None:
    """Its gradient falls with the root of its curvature, so that its Newton step would grow without bound."""
    slots = [CoreSlot(name, 9 * index, (3, 3), True) for index, name in enumerate(("strong", "weak", "flat"))]
    slots.append(CoreSlot("flat, without rows", 27, (2,), False))
    scales = {"strong": 1.0, "weak": 1e-2, "flat": 1e-7}  # of the gradients; curvatures are their squares
    rows = {name: [Rows(scale * torch.randn(5, 4, 3), torch.randn(5, 4, 3))] for name, scale in scales.items()}
    vector = torch.cat([torch.randn(9) * scale for scale in scales.values()] + [torch.full((2,), 1e-7)])
    together = KroneckerFactors(slots, 0.8, torch.device("cpu"))
    together.observe([Probe(rows, vector, 5)])
    step = together.solve(vector, 0.1)
    for slot in slots[:2]:
        alone = KroneckerFactors([CoreSlot(slot.name, 0, slot.shape, True)], 0.8, torch.device("cpu"))
        alone.observe([Probe(rows, vector, 5)])
        assert torch.equal(step[slot.place], alone.solve(vector[slot.place], 0.1))
    longest = step[slots[0].place].abs().max()
    assert step[slots[2].place].abs().max() < longest and step[slots[3].place].abs().max() < longest
    alone = KroneckerFactors([CoreSlot("flat", 0, (3, 3), True)], 0.8, torch.device("cpu"))
    alone.observe([Probe(rows, vector, 5)])
    assert alone.solve(vector[slots[2].place], 0.1).abs().max() > 1e4 * longest


def damped_alone(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix))


def damped_by_factors(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """The damped factors' product: each side of a Kronecker product has damping of its own."""
    sides = matrix[:9, :9].view(3, 3, 3, 3)
    left, right = sides.diagonal(dim1=1, dim2=3).sum(-1), sides.diagonal(dim1=0, dim2=2).sum(-1)
    left = left / right.trace()  # together they are the product, whichever has its scale
    square = torch.kron(damped_alone(left, damping), damped_alone(right, damping))
    return torch.block_diag(square, *(damped_alone(matrix[a:b, a:b], damping) for a, b in ((9, 11), (11, SIZE))))


@pytest.mark.parametrize("kind, damp", [(WholeMatrix, damped_alone), (KroneckerFactors, damped_by_factors)])
def test_solving_inverts_the_damped_matrix(kind: type[Curvature], damp: Callable[..., torch.Tensor]) -> None:
    curvature = kind(SLOTS, 0.8, torch.device("cpu"))
    curvature.observe([probe(40), probe(40)])
    matrix, vector = dense(curvature), torch.randn(SIZE)
    for damping in (0.1, 10.0):
        damped = damp(matrix, damping)
        expected = torch.linalg.solve(damped, vector)
        assert torch.allclose(curvature.solve(vector, damping), expected, rtol=1e-3, atol=1e-6)
    again = kind(SLOTS, 0.8, torch.device("cpu"))
    again.load_state_dict(curvature.state_dict())
    assert torch.equal(dense(again), matrix)


def test_factors_that_rounding_made_indefinite_are_solved_by_their_eigenvalues() -> None:
    curvature = KroneckerFactors([CoreSlot("square", 0, (3, 3), True)], 0.8, torch.device("cpu"))
    row = torch.tensor([[[2.0, 0.0, 0.0]]])  # all other directions have nothing but damping
    curvature.observe([Probe({"square": [Rows(row, row)]}, torch.zeros(9), 1)])
    state = curvature.state_dict()
    state["totals"]["square.left"].diagonal()[1:] = -1e-5
    curvature.load_state_dict(state)
    damping = 1e-7
    nothing, something = damping * 4 / 3, 4 + damping * 4 / 3
    solved = curvature.solve(torch.ones(9), damping).view(3, 3)
    side = torch.tensor([1 / something, 1 / nothing, 1 / nothing])
    assert torch.allclose(solved, torch.outer(side, side), rtol=1e-4)


def test_examples_are_told_apart_where_tokens_come_first() -> None:
    """As in torch's own transformers; all in one group they took the curvature between layers to be the first's."""
    slots = [CoreSlot("tokens", 0, (2, 2), True), CoreSlot("head", 4, (2, 2), True)]
    tokens, head = (Rows(torch.randn(4, places, 2), torch.randn(4, places, 2)) for places in (7, 1))
    found = []
    for given in (tokens, Rows(tokens.left.transpose(0, 1), tokens.right.transpose(0, 1))):
        curvature = WholeMatrix(slots, 0.8, torch.device("cpu"))
        curvature.observe([Probe({"tokens": [given], "head": [head]}, torch.zeros(8), 4)])
        found.append(curvature.mean)
    torch.testing.assert_close(found[1], found[0])


def test_windows_are_put_to_their_examples_and_odd_rows_together() -> None:
    slots = [CoreSlot("windows", 0, (2, 2), True)]
    left, right = torch.randn(12, 3, 2), torch.randn(12, 3, 2)
    whole = torch.einsum("nsi,nsj->nij", left, right).flatten(1)
    for rows, expected in ((12, whole.view(4, 3, 4).sum(1)), (10, whole[:10].sum(0, keepdim=True))):
        curvature = WholeMatrix(slots, 0.8, torch.device("cpu"))
        curvature.observe([Probe({"windows": [Rows(left[:rows], right[:rows])]}, torch.zeros(4), 4)])
        assert torch.allclose(curvature.mean, expected.T @ expected, rtol=1e-4, atol=1e-5)
