"""Optimisers that take names or evaluate the loss themselves, and the choice of what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Mlp, Snapshot, vector_batches
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from training_runs import QUIET, Interrupted, Schedule, assert_same_state, loader, semu, train, trained_state

from semu_peft import Retain, SemuConfig, initialize_semu_weights
from semu_peft.objectives import CrossEntropy, RandomLabel, UniformDistribution


def lbfgs(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=4)


def constant(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def test_named_parameters() -> None:
    """A factory whose argument is called `named_parameters` gets pairs, and trains as one that gets parameters."""
    names: list[str] = []

    def by_name(named_parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        names.extend(name for name, _ in named_parameters)
        return torch.optim.SGD([parameter for _, parameter in named_parameters], lr=0.1)

    model, twin = semu(), semu()
    train(model, vector_batches(), CrossEntropy(), optimizer=by_name, **QUIET)
    train(twin, vector_batches(), CrossEntropy(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **QUIET)
    assert names == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert_same_state(trained_state(model), trained_state(twin))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_lbfgs_takes_the_steps_of_a_bare_loop(accumulation: int) -> None:
    """Same cores as a closure written by hand over the mean of the step's batches, retain data included."""
    model, twin = semu(), semu().eval()
    batches, retain = vector_batches(3), vector_batches(3, seed=4)
    result = train(
        model, batches, CrossEntropy(), retain=Retain(retain, UniformDistribution(), 0.5), optimizer=lbfgs,
        scheduler=constant, gradient_accumulation_steps=accumulation, epochs=1, **QUIET,
    )  # fmt: skip
    optimizer = lbfgs([parameter for parameter in twin.parameters() if parameter.requires_grad])
    first: list[float] = []
    for start in range(0, 3, accumulation):
        chosen = slice(start, start + accumulation)

        def closure(chosen: slice = chosen) -> Tensor:
            optimizer.zero_grad()
            pairs = zip(batches[chosen], retain[chosen], strict=True)
            losses = [CrossEntropy()(twin, a) + 0.5 * UniformDistribution()(twin, b) for a, b in pairs]
            loss = torch.stack(losses).mean()
            loss.backward()
            return loss

        first.append(closure().item())
        optimizer.step(closure)
    assert [entry["loss"] for entry in result.history] == pytest.approx(first, abs=1e-5)
    for name, tensor in trained_state(model).items():
        torch.testing.assert_close(tensor, trained_state(twin)[name], atol=1e-4, rtol=1e-4)


def test_every_evaluation_of_a_step_draws_the_same() -> None:
    """Random labels are drawn once a step, however often L-BFGS evaluates it; the next step draws anew."""
    draws: list[list[int]] = []

    class Watched(RandomLabel):
        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            state = self.generator.get_state()
            draws[-1].append(int(torch.randint(2**30, (1,), generator=self.generator)))
            self.generator.set_state(state)
            return super().__call__(model, batch)

    class NewStep:
        def on_train_begin(self, context: Any) -> None:
            draws.append([])

        def on_step_end(self, context: Any) -> None:
            draws.append([])

    train(semu(), vector_batches(), Watched(), optimizer=lbfgs, callbacks=NewStep(), epochs=1, **QUIET)
    steps = [step for step in draws if step]
    assert len(steps) == 3 and all(len(step) > 1 and len(set(step)) == 1 for step in steps)
    assert len({step[0] for step in steps}) == 3


def test_lbfgs_resumes_exactly(tmp_path: Path) -> None:
    def run(model: nn.Module, dies_after: float = float("inf"), **options: Any) -> Any:
        schedule = type("Dying", (Schedule,), {"dies_after": dies_after})
        return train(
            model, loader(), RandomLabel(seed=3), optimizer=lbfgs, scheduler=schedule, epochs=2, output_dir=tmp_path,
            **QUIET, **options,
        )  # fmt: skip

    whole, resumed = semu(), semu()
    expected = run(whole)
    with pytest.raises(Interrupted):
        run(semu(), dies_after=3, checkpointing_steps=3)
    assert run(resumed, resume_from_checkpoint="latest").history == expected.history
    assert_same_state(trained_state(resumed), trained_state(whole))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_step_that_fails_between_evaluations_is_taken_back(error: type[BaseException]) -> None:
    """The weights are then those of the last good step, not of L-BFGS's last trial."""
    calls: list[int] = []

    def fails(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if error is KeyboardInterrupt and len(calls) == 3:
            raise error
        return CrossEntropy()(model, batch) * (float("nan") if len(calls) == 3 else 1.0)

    model = semu()
    before = trained_state(model)
    with pytest.raises(error, match="nan at step 0" if error is ValueError else None):
        train(model, vector_batches(1), fails, optimizer=lbfgs, **QUIET)
    assert_same_state(trained_state(model), before)


# ---- one adapter among others ----


def two_adapters() -> nn.Module:
    torch.manual_seed(11)
    model = get_peft_model(Mlp(), SemuConfig(target_modules=Mlp.targets), adapter_name="first")
    model.add_adapter("second", SemuConfig(target_modules=Mlp.targets, r=2))
    for name, seed in (("first", 0), ("second", 5)):
        model.set_adapter(name)
        initialize_semu_weights(model, vector_batches(seed=seed), CrossEntropy(), adapter_name=name, progress=False)
        train(model, vector_batches(seed=seed), CrossEntropy(), epochs=1, **QUIET)
    model.base_model.set_adapter(["first", "second"])
    return model


@pytest.mark.parametrize("chosen", ["first", "second"])
def test_one_adapter_is_trained_and_the_others_take_part(chosen: str) -> None:
    """Only its cores change; the other is active in the loss, and every flag comes back."""
    model = two_adapters().requires_grad_(False)
    before, start = Snapshot.of(model), CrossEntropy()(model.eval(), vector_batches()[0]).item()
    result = train(model, vector_batches(1), CrossEntropy(), adapter_name=chosen, **QUIET)
    now = Snapshot.of(model)
    changed = {name for name, tensor in now.state.items() if not torch.equal(tensor, before.state[name])}
    assert changed and all(name.endswith(f"semu_core.{chosen}.semu_core") for name in changed)
    assert now.flags == before.flags and result.trainable_parameters > 0
    assert result.history[0]["loss"] == pytest.approx(start, rel=1e-5)


def test_an_adapter_that_is_not_active_is_not_trained() -> None:
    model = two_adapters()
    model.set_adapter("first")
    before = Snapshot.of(model)
    with pytest.raises(ValueError, match="'second' is not active"):
        train(model, vector_batches(), CrossEntropy(), adapter_name="second", **QUIET)
    before.assert_same(model)


def test_flags_come_back_after_a_failure() -> None:
    model = two_adapters()
    before = Snapshot.of(model)
    with pytest.raises(ZeroDivisionError):
        train(model, vector_batches(), lambda m, b: 1 / 0, adapter_name="first", **QUIET)
    before.assert_same(model)


def test_an_adapter_with_whole_modules() -> None:
    """`modules_to_save` and other methods' parameters belong to their adapter."""
    model = get_peft_model(Mlp(), LoraConfig(target_modules=["fc1"], modules_to_save=["fc2"], r=1))
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    before = Snapshot.of(model)
    train(model, vector_batches(), CrossEntropy(), adapter_name="default", **QUIET)
    state = model.state_dict()
    changed = {name for name, tensor in before.state.items() if not torch.equal(tensor, state[name])}
    assert changed == expected and Snapshot.of(model).flags == before.flags


def test_a_loss_that_has_risen_and_layers_without_gradient_are_told() -> None:
    model = semu()
    with pytest.warns(UserWarning, match=r"The loss ended at .* above its start.*NaturalGradient\(\)"):
        train(model, vector_batches(), CrossEntropy(), learning_rate=30.0, **QUIET)

    class Unused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    batches = [(torch.randn(4, 8), torch.randint(5, (4,)))]
    with pytest.warns(UserWarning, match=r"\['unused.weight', 'unused.bias'\] \(2 in all\) had no gradient"):
        train(Unused(), batches, CrossEntropy(), epochs=1, **QUIET)
