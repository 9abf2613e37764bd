"""Forgetting in every PEFT method that trains: the loop, the reference, a rule, and the file."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import CLASSES
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from semu_peft import unlearn
from semu_peft.objectives import CrossEntropy, DecoupledDistillation
from semu_peft.objectives.original import original
from semu_peft.training.rules import AllocateRanks, ClipGradientNorm, Mask

TARGETS = ["fc1", "fc2"]

# Of each method the name of its configuration in PEFT, and what it needs besides the layers.
CARRIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4}),
    "lora, gaussian": ("LoraConfig", {"r": 4, "init_lora_weights": "gaussian"}),
    "lora, orthogonal": ("LoraConfig", {"r": 4, "init_lora_weights": "orthogonal"}),
    "pissa": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}),
    "pissa_niter": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa_niter_4"}),
    "olora": ("LoraConfig", {"r": 4, "init_lora_weights": "olora"}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "rslora": ("LoraConfig", {"r": 4, "use_rslora": True}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 12, "tinit": 1, "tfinal": 2}),
    "adamss": ("AdamssConfig", {"r": 4}),
    "beft": ("BeftConfig", {}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "c3a": ("C3AConfig", {"block_size": 4, "init_weights": True}),
    "deft": ("DeftConfig", {"r": 4}),
    "delora": ("DeloraConfig", {"r": 4}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 40, "init_weights": True}),
    "frod": ("FrodConfig", {}),
    "glora": ("GloraConfig", {"r": 4}),
    "gralora": ("GraloraConfig", {"r": 4}),
    "hira": ("HiraConfig", {"r": 4}),
    "hra": ("HRAConfig", {"r": 4}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "lily": ("LilyConfig", {"r": 4}),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["norm"]}),
    "loha": ("LoHaConfig", {"r": 4}),
    "lokr": ("LoKrConfig", {"r": 4}),
    "miss": ("MissConfig", {"r": 4}),
    "oft": ("OFTConfig", {"oft_block_size": 4}),
    "osf": ("OSFConfig", {}),
    "peanut": ("PeanutConfig", {"r": 4}),
    "psoft": ("PsoftConfig", {"r": 4}),
    "pvera": ("PveraConfig", {"r": 4}),
    "randlora": ("RandLoraConfig", {"r": 4}),
    "road": ("RoadConfig", {"group_size": 4}),
    "shira": ("ShiraConfig", {"r": 2}),
    "supertuning": ("SupertuningConfig", {"r": 4}),
    "tinylora": ("TinyLoraConfig", {"r": 2}),
    "unilora": ("UniLoraConfig", {"r": 4}),
    "vblora": ("VBLoRAConfig", {"r": 4, "num_vectors": 8, "vector_length": 4}),
    "vera": ("VeraConfig", {"r": 4}),
    "waveft": ("WaveFTConfig", {"n_frequency": 40}),
}


class Normed(nn.Module):
    """Linear layers of one shape, with a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.fc2 = nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc2(self.norm(torch.tanh(self.fc1(x))))))


def config_of(kind: str) -> Any:
    name, options = CARRIERS[kind]
    return getattr(peft, name)(**{"target_modules": TARGETS, **options})


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(12, 16, generator=generator), torch.zeros(12).long()) for _ in range(2)]


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    model = Normed().eval()
    model.head.bias.data[0] = 4.0  # sure of the class to forget
    return model


def test_there_are_as_many_as_are_said_to_train() -> None:
    assert len(CARRIERS) >= 37


@pytest.mark.parametrize("kind", CARRIERS)
def test_it_forgets_keeps_its_reference_and_is_saved(kind: str, base: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), config_of(kind))
    data = batches()
    x = data[0][0]
    rules = [ClipGradientNorm(1.0), *([AllocateRanks()] if kind == "adalora" else [])]
    result = unlearn(
        model, data, DecoupledDistillation(), rules=rules, max_steps=12, learning_rate=0.05, progress=False
    )  # fmt: skip
    losses = [entry["loss"] for entry in result.history]
    assert losses[-1] < losses[0], losses
    with torch.no_grad():
        with original(model) as reference:
            assert torch.allclose(reference(x), base(x), atol=1e-5)
        after = model.eval()(x)
        assert not torch.allclose(after, base(x), atol=1e-3)
    if kind in ("pissa", "pissa_niter", "olora"):
        return  # their start changes the base weight, so that the file alone is not enough
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(x), after, atol=1e-4)


def test_randlora_is_of_full_rank_and_starts_at_the_original() -> None:
    """Acceptance: of a weight of 8 × 12 at r = 3 three frozen bases, a change of rank 8, and no bit at the start."""
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 8), torch.randn(4, 12)
    expected, before = layer(x), layer.weight.detach().clone()
    model = get_peft_model(nn.Sequential(layer), peft.RandLoraConfig(r=3, target_modules=["0"]))
    assert torch.equal(model(x), expected)
    scales = model.base_model.model[0].randlora_lambda["default"]
    assert scales.shape == (3, 3)
    unlearn(model, [(x, torch.arange(4))], CrossEntropy(), max_steps=2, learning_rate=1e-2, progress=False)
    change = model.merge_and_unload()[0].weight - before
    assert torch.linalg.matrix_rank(change) == 8


# ---- starts that are not the original ----


@pytest.mark.parametrize(
    ("config", "mend"),
    [
        (peft.FourierFTConfig(target_modules=TARGETS, n_frequency=40), "init_weights=True"),
        (peft.C3AConfig(target_modules=TARGETS, block_size=4), "init_weights=True"),
        (peft.UniLoraConfig(target_modules=TARGETS, r=4), "init_theta_d_bound"),
    ],
)
def test_a_start_away_from_the_original_is_told(config: Any, mend: str, base: nn.Module) -> None:
    model = get_peft_model(copy.deepcopy(base), config)
    data = batches()
    with torch.no_grad():
        assert not torch.allclose(model.eval()(data[0][0]), base(data[0][0]), atol=1e-3)
    with pytest.warns(UserWarning, match=f"did not start at the original model.*{mend}"):
        unlearn(model, data, DecoupledDistillation(), max_steps=1, learning_rate=1e-3, progress=False)


@pytest.mark.parametrize("kind", ["lora", "fourierft", "c3a", "pissa"])
def test_the_others_are_not(kind: str, base: nn.Module) -> None:
    model = get_peft_model(copy.deepcopy(base), config_of(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        unlearn(model, batches(), DecoupledDistillation(), max_steps=4, learning_rate=1e-3, progress=False)


# ---- AdaLoRA ----


def adalora(base: nn.Module, **options: Any) -> Any:
    schedule = {"init_r": 4, "target_r": 1, "total_step": 20, "tinit": 2, "tfinal": 5, "deltaT": 1}
    return get_peft_model(copy.deepcopy(base), peft.AdaLoraConfig(target_modules=TARGETS, **{**schedule, **options}))


def budget(model: nn.Module) -> int:
    """How many singular values are not zero."""
    values = [p for name, p in model.named_parameters() if "lora_E" in name]
    return sum(int((value != 0).sum()) for value in values)


def test_adaloras_budget_falls_to_its_target(base: nn.Module) -> None:
    class Budgets:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_step_end(self, context: Any) -> None:
            self.seen.append(budget(context.model))

    arguments: Any = {"max_steps": 20, "epochs": 10, "learning_rate": 0.02, "progress": False}
    untouched = adalora(base)
    unlearn(untouched, batches(), DecoupledDistillation(), **arguments)
    assert budget(untouched) == 8  # nobody calls `update_and_allocate`
    model, looks_on = adalora(base), Budgets()
    result = unlearn(
        model, batches(), DecoupledDistillation(), rules=AllocateRanks(), callbacks=looks_on, **arguments
    )  # fmt: skip
    assert looks_on.seen[1] == 8 and looks_on.seen[-1] == 2 and len(set(looks_on.seen)) > 3
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_ranks_of_something_else_are_refused(base: nn.Module) -> None:
    for model, rule in (
        (get_peft_model(copy.deepcopy(base), config_of("lora")), AllocateRanks()),
        (adalora(base), AllocateRanks(adapter_name="other")),
    ):
        with pytest.raises(ValueError, match="AllocateRanks needs an AdaLoRA adapter"):
            unlearn(model, batches(), CrossEntropy(), rules=rule, max_steps=1, progress=False)


def test_a_mask_holds_what_it_hides_in_any_method(base: nn.Module) -> None:
    for kind in ("oft", "vera", "randlora", "shira"):
        model = get_peft_model(copy.deepcopy(base), config_of(kind))
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        masks = {name: torch.rand(p.shape) < 0.5 for name, p in before.items()}
        unlearn(
            model, batches(), DecoupledDistillation(), rules=Mask(masks), max_steps=4, progress=False,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
        )  # fmt: skip
        now = dict(model.named_parameters())
        assert all(torch.equal(now[name][~mask], before[name][~mask]) for name, mask in masks.items())
        assert any(not torch.equal(now[name], before[name]) for name in masks)
