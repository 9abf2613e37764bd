"""Requests one after the other: apart by construction, each alone, taken back alone, and behind one gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CLASSES, Cnn, Mlp, Snapshot, run
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor

from semu_peft import SemuConfig, Sketch, add_request, gates, gather, initialize_semu_weights, objectives
from semu_peft.tuner.adapted import semu_layers

QUIET: dict[str, Any] = {"progress": False}


def request(seed: int, shape: tuple[int, ...] = (6,)) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, *shape, generator=draw), torch.randint(CLASSES, (16,), generator=draw))]


def with_requests(model: Any, count: int = 3, shape: tuple[int, ...] = (6,), **options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = SemuConfig(**{"target_modules": model.targets, "r": 2, **options})
    wrapped = get_peft_model(model.eval(), config, adapter_name="r0")
    for place in range(count):
        add_request(
            wrapped, f"r{place}", request(place, shape), objectives.GradientAscent(), learning_rate=0.05, max_steps=4,
            optimizer=torch.optim.SGD, **QUIET,
        )  # fmt: skip
    return wrapped


def overlaps(model: PeftModel, names: list[str]) -> float:
    found = [0.0]
    for layer in semu_layers(model, names[0]).values():
        for tensors in (layer.semu_U, layer.semu_V):
            for first, second in ((a, b) for a in names for b in names if a < b):
                product = tensors[first].double().mT @ tensors[second].double()
                found.append(float(product.abs().max()) if product.numel() else 0.0)
    return max(found)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "cnn, per channel"])
def test_directions_are_orthogonal_on_both_sides_and_stay_so(kind: str) -> None:
    """`‖U_oldᵀ U‖` and `‖V_oldᵀ V‖` ≤ 1e-6 after training, for every pair; each has directions left."""
    options = {"conv_mode": "per_channel"} if "per" in kind else {}
    model = with_requests(*((Mlp(), 3, (6,)) if kind == "mlp" else (Cnn(), 2, (3, 8, 8))), **options)
    names = list(model.peft_config)
    assert overlaps(model, names) <= 1e-6
    for name in names:
        ranks = model.peft_config[name].ranks
        assert sum(ranks.values()) > 0 and any(
            layer.semu_core[name].any() for layer in semu_layers(model, name).values()
        )
        for layer in semu_layers(model, name).values():
            for tensors in (layer.semu_U, layer.semu_V):
                gram = tensors[name].mT @ tensors[name]
                torch.testing.assert_close(gram, torch.eye(gram.shape[-1]).expand_as(gram), atol=1e-5, rtol=0)


@pytest.mark.parametrize("statistic", [None, Sketch.of_size(12)])
def test_it_is_the_gradient_outside_the_others(statistic: Any) -> None:
    """Against the dense formula: the directions of `(I − P Pᵀ) G (I − Q Qᵀ)`, also of a rank that was asked for."""
    torch.manual_seed(0)
    model = get_peft_model(Mlp().eval(), SemuConfig(target_modules=["fc1"], r=2), adapter_name="a")
    initialize_semu_weights(model, request(0), objectives.CrossEntropy(), adapter_name="a", **QUIET)
    options: dict[str, Any] = {"explained_variance": 1.0} if statistic is None else {"rank_pattern": {"fc1": 3}}
    model.add_adapter("b", SemuConfig(target_modules=["fc1"], **options))
    model.set_adapter("b")
    summed = gather(model, request(1), objectives.CrossEntropy(), adapter_name="b", **QUIET)["fc1"].total.double()
    more = {} if statistic is None else {"statistic": statistic}
    initialize_semu_weights(
        model, request(1), objectives.CrossEntropy(), orthogonal_to=["a"], adapter_name="b", **more, **QUIET
    )
    layer = semu_layers(model, "b")["fc1"]
    left, right = layer.semu_U["a"].double(), layer.semu_V["a"].double()
    rest = summed - left @ (left.mT @ summed)
    rest = rest - (rest @ right) @ right.mT
    directions = torch.linalg.svd(rest)[0][:, : layer.r["b"]]
    cosines = torch.linalg.svdvals(directions.mT @ layer.semu_U["b"].double())
    assert layer.r["b"] == (4 if statistic is None else 3) and cosines.min() > 0.999


def test_each_request_is_trained_with_the_others_off_and_can_be_taken_back() -> None:
    """The first two are bit for bit the same whether a third comes; deleting one leaves the others."""
    two, three = with_requests(Mlp(), 2), with_requests(Mlp(), 3)
    state = two.state_dict()
    assert all(torch.equal(three.state_dict()[key], value) for key, value in state.items())
    x = torch.randn(4, 6)
    three.set_adapter("r2")
    expected = run(three, x)
    three.delete_adapter("r0")
    three.set_adapter("r2")
    assert torch.equal(run(three, x), expected)


def test_the_whole_sentence() -> None:
    """O3: in one batch only the example near a request changes, and as that request's adapter says."""
    torch.manual_seed(0)
    config = SemuConfig(target_modules=["fc1", "head"], r=2)
    model, near = get_peft_model(Mlp().eval(), config, adapter_name="a"), {"a": 0, "b": 1}
    gate = gates.Nearest(layer="fc1", metric="box", side="input")
    for name, place in near.items():
        forget = [(0.1 * torch.randn(16, 6) + 5 * torch.eye(6)[place], torch.zeros(16, dtype=torch.int64))]
        add_request(model, name, forget, objectives.DecoupledDistillation(), max_steps=5, **QUIET)
        gate.add(name, model, forget)
    served, x = gates.gated(model, gate), torch.stack([5 * torch.eye(6)[0], torch.ones(6), 5 * torch.eye(6)[1]])
    result = run(served, x)
    with model.disable_adapter():
        bare = run(model, x)
    assert torch.equal(result[1], bare[1])
    for row, name in ((0, "a"), (2, "b")):
        model.set_adapter(name)
        torch.testing.assert_close(result[row], run(model, x)[row])
        assert (result[row] - bare[row]).abs().max() > 1e-3
    unseen = get_peft_model(Mlp(), LoraConfig(target_modules=["fc1"]))
    with pytest.raises(ValueError, match="must be adapters of the model"):
        gates.gated(unseen, gate)


def test_in_a_model_without_wrapper() -> None:
    torch.manual_seed(0)
    model = Mlp().eval()
    inject_adapter_in_model(SemuConfig(target_modules=["fc1"], r=2), model, adapter_name="a")
    for place, name in enumerate(("a", "b")):
        add_request(model, name, request(place), objectives.GradientAscent(), max_steps=2, **QUIET)
    layer = semu_layers(model, "b")["fc1"]
    assert float((layer.semu_U["a"].mT @ layer.semu_U["b"]).abs().max()) <= 1e-6
    assert layer.active_adapters == ["b"]


def test_mistakes_leave_the_model_as_it_was() -> None:
    model = with_requests(Mlp(), 1)
    before = Snapshot.of(model)

    def broken(model: Any, batch: Any) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        add_request(model, "r1", request(1), broken, **QUIET)
    assert list(model.peft_config) == ["r0"]
    before.assert_same(model)
    with pytest.raises(ValueError, match="`name` must be new, got 'r0'"):
        add_request(model, "r0", request(0), objectives.GradientAscent(), **QUIET)
    with pytest.raises(ValueError, match="`model` must have a SEMU adapter"):
        add_request(Mlp(), "a", request(0), objectives.GradientAscent(), **QUIET)
    for given, kind, message in (
        ("r0", TypeError, "`orthogonal_to` must be a list"),
        (["r1"], ValueError, "r1"),
        (["none"], ValueError, "none"),
    ):
        if "r1" not in model.peft_config:
            model.add_adapter("r1", SemuConfig(target_modules=["fc1"]))
        with pytest.raises(kind, match=message):
            initialize_semu_weights(
                model, request(1), objectives.CrossEntropy(), orthogonal_to=given, adapter_name="r1", **QUIET
            )


@pytest.mark.parametrize("kind", ["wrapped", "injected", "bare"])
def test_a_request_that_failed_can_be_made_again(kind: str) -> None:
    """Its own error is told, and neither its adapter nor a configuration that says it was forgotten stays."""
    model: Any = Mlp().eval()
    config = SemuConfig(target_modules=Mlp.targets)
    if kind == "wrapped":
        model = get_peft_model(model, config, adapter_name="r0")
    if kind == "injected":
        inject_adapter_in_model(config, model, adapter_name="r0")
    before = model.state_dict()

    class Interrupted:
        def on_step_end(self, context: Any) -> None:
            raise KeyboardInterrupt

    for name in ("r0", "r1"):
        arguments: Any = (model, name, request(int(name[1])), objectives.GradientAscent())
        options: dict[str, Any] = {"config": config if kind == "bare" else None, "max_steps": 2, **QUIET}
        with pytest.raises(KeyboardInterrupt):
            add_request(*arguments, callbacks=Interrupted(), **options)
        if name == "r0":
            assert {key: value.shape for key, value in model.state_dict().items()} == {
                key: value.shape for key, value in before.items()
            }
        assert add_request(*arguments, **options).steps == 2
    assert set(semu_layers(model, "r1")["fc1"].semu_core) == {"r0", "r1"}


def test_a_request_that_was_forgotten_under_another_name_is_told() -> None:
    model, one = with_requests(Mlp(), 0), [tuple(each[:1] for each in request(0)[0])]
    for name in ("r0", "again"):
        arguments: Any = (model, name, one, objectives.GradientAscent())
        if name == "r0":
            add_request(*arguments, max_steps=1, **QUIET)
            continue
        with pytest.raises(ValueError, match="No direction of the forget gradient is left at any target layer"):
            add_request(*arguments, **QUIET)
    assert list(model.peft_config) == ["r0"]
