"""SLTrain's correction, low rank plus a fixed sparse support: an adapter over PEFT's SHiRA, with nothing new."""

from __future__ import annotations

from typing import Any

import torch
from peft import ShiraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from semu_peft import SemuConfig, unlearn
from semu_peft.objectives import CrossEntropy
from semu_peft.training.rules import Mask

SHAPE, DENSITY = (10, 20), 0.03


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(SHAPE[1], SHAPE[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_a_fixed_support_of_six_entries_trains_beside_a_low_rank_core() -> None:
    """Acceptance: 10 × 20 at a density of .03 are 6 entries; what is off the support keeps its bits.

    SHiRA holds r (m + n) numbers at the least, 30 here; the rule `Mask` trains those 6 of them alone.
    """
    torch.manual_seed(0)
    base = Layer()
    before, bias = base.fc.weight.detach().clone(), base.fc.bias.detach().clone()
    inside = inject_adapter_in_model(ShiraConfig(r=1, target_modules=["fc"], random_seed=0), base, "sparse")
    model = get_peft_model(inside, SemuConfig(target_modules=["fc"], r=2, init_weights=False))
    name, sparse = next((n, p) for n, p in model.named_parameters() if "shira_weight" in n)
    sparse.requires_grad_(True)
    entries = round(DENSITY * SHAPE[0] * SHAPE[1])
    assert entries == 6
    mask = torch.zeros(len(sparse), dtype=torch.bool)
    mask[torch.randperm(len(sparse), generator=torch.Generator().manual_seed(1))[:entries]] = True
    low_rank = model.base_model.model.fc
    shira: Any = low_rank.base_layer
    first = low_rank.get_delta_weight("default").detach().clone()
    batches = [(torch.randn(8, SHAPE[1]), torch.arange(8))]
    unlearn(model, batches, CrossEntropy(), rules=[Mask({name: mask})], max_steps=5, learning_rate=0.05, progress=False)
    rows, columns = shira.shira_indices["sparse"][:, mask].long()
    support = torch.zeros(SHAPE, dtype=torch.bool)
    support[rows, columns] = True
    change = shira.get_delta_weight("sparse").detach().to_dense()
    assert int(support.sum()) == entries and bool((change[support] != 0).all())
    weight = before + change
    assert torch.equal(weight[~support], before[~support])
    second = low_rank.get_delta_weight("default").detach()
    assert not torch.allclose(first, second) and int(torch.linalg.matrix_rank(second)) == 2
    x = torch.randn(3, SHAPE[1])
    expected = nn.functional.linear(x, weight + second, bias)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
