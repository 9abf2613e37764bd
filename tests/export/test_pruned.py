"""LoRAM: what was trained on a pruned layer is, on the full one, the same where it was trained and 0 elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from semu_peft import SemuConfig
from semu_peft.export.pruned import Kept, embed

ROWS, COLUMNS, SHAPE = [6, 0, 3, 4, 1], [1, 2, 5, 8], (7, 9)
CONFIGS = {
    "lora": LoraConfig(target_modules=["fc"], r=2, init_lora_weights=False),
    "semu": SemuConfig(target_modules=["fc"], r=2, init_weights=False),
}


def adapted(shape: tuple[int, int], kind: str) -> Any:
    torch.manual_seed(0)
    return get_peft_model(Layer(shape), CONFIGS[kind])


class Layer(nn.Module):
    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.fc = nn.Linear(shape[1], shape[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def change(model: Any) -> Tensor:
    return model.base_model.model.fc.get_delta_weight("default").detach()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("rows", "columns"), [(ROWS, COLUMNS), (None, COLUMNS), (ROWS, None)])
def test_the_change_is_the_trained_one_where_kept_and_zero_elsewhere(
    kind: str, rows: list[int] | None, columns: list[int] | None
) -> None:
    kept = Kept(SHAPE, rows, columns)
    places = torch.tensor(kept.places(0))[:, None], torch.tensor(kept.places(1))[None]
    pruned, full = adapted((len(kept.places(0)), len(kept.places(1))), kind), adapted(SHAPE, kind)
    state = embed(get_peft_model_state_dict(pruned), {"fc": kept})
    set_peft_model_state_dict(full, state)
    found, trained = change(full), change(pruned)
    assert trained.abs().max() > 0
    torch.testing.assert_close(found[places], trained, atol=1e-7, rtol=1e-6)  # the same sums, in another order at most
    found[places] = 0.0
    assert torch.equal(found, torch.zeros(SHAPE))
    for key, basis in state.items():
        if key.endswith(("semu_U", "semu_V")):
            torch.testing.assert_close(basis.mT @ basis, torch.eye(2), atol=1e-6, rtol=0)


def test_layers_that_were_not_pruned_stay_and_mistakes_are_told() -> None:
    state = get_peft_model_state_dict(adapted((5, 4), "lora"))
    assert all(torch.equal(value, state[key]) for key, value in embed(state, {}).items())
    with pytest.raises(ValueError, match="`kept` must name linear layers"):
        embed(state, {"head": Kept(SHAPE)})
    for rows in (ROWS[:4], [0, 1, 2, 3, 7], [0, 0, 1, 2, 3]):
        with pytest.raises(ValueError, match="`kept`: the rows of 'fc' must be 5 different ones from 0 to 6"):
            embed(state, {"fc": Kept(SHAPE, rows, COLUMNS)})
    with pytest.raises(TypeError, match="`kept`"):
        embed(state, {"fc": ROWS})  # type: ignore[dict-item]
