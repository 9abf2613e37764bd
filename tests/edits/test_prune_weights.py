"""Pruning before unlearning: torch's own choice of weights, and zeros that stay through an adapter's merge."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Cnn, Mlp, image_batches
from peft import get_peft_model
from torch import nn
from torch.nn.utils import prune

from semu_peft import SemuConfig, initialize_semu_weights, unlearn
from semu_peft.edits import prune_weights
from semu_peft.objectives import GradientAscent

QUIET = {"progress": False}


@pytest.mark.parametrize("share", [0.3, 0.95, 1.0])
def test_it_prunes_what_torch_prunes(share: float) -> None:
    model = Cnn()
    other = copy.deepcopy(model)
    layers = [(module, "weight") for module in other.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    total = sum(layer.weight.numel() for layer, _ in layers)
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=int(share * total))
    prune_weights(model, share).apply(model)
    for name in ("conv1", "conv2", "head"):
        assert torch.equal(getattr(model, name).weight, getattr(other, name).weight)


def test_ties_are_broken_the_same_way_each_time() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.ones_(model[0].weight)
    edit = prune_weights(model, 0.3)
    assert edit.deltas["0.weight"].places.tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]


def test_a_weight_that_layers_share_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    model[1].weight = model[0].weight
    prune_weights(model, 0.5).apply(model)
    assert int((model[0].weight == 0).sum() + (model[2].weight == 0).sum()) == 10


def test_the_zeros_of_a_pruned_base_are_in_what_is_shipped() -> None:
    model, batches = Cnn(), image_batches()
    pruned = prune_weights(model, 0.8)
    pruned.apply(model)
    zeros = {name: getattr(model, name).weight == 0 for name in Cnn.targets}
    adapted = get_peft_model(model, SemuConfig(target_modules=Cnn.targets))
    initialize_semu_weights(adapted, batches, GradientAscent(), **QUIET)  # type: ignore[arg-type]
    unlearn(adapted, batches, GradientAscent(), max_steps=2, **QUIET)  # type: ignore[arg-type]
    merged = adapted.merge_and_unload()
    assert not all(bool((getattr(merged, name).weight[mask] == 0).all()) for name, mask in zeros.items())
    pruned.apply(merged)
    for name, mask in zeros.items():
        weight = getattr(merged, name).weight
        assert (weight[mask] == 0).all() and (weight[~mask] != 0).any()


def test_a_parametrised_layer_is_corrected_and_merges_once_its_zeros_are_stored() -> None:
    """What `torch.nn.utils.prune` leaves: a weight computed for each pass."""
    model, batches = Cnn(), image_batches()
    prune.l1_unstructured(model.head, "weight", amount=0.5)
    adapted = get_peft_model(model, SemuConfig(target_modules=["head"], r=1, init_weights=False))
    with pytest.raises(ValueError, match=r"prune\.remove"):
        adapted.merge_and_unload()
    with pytest.raises(ValueError, match="`targets`"):
        prune_weights(adapted, 0.5, targets=["head"])
    head = adapted.base_model.model.head
    x = batches[0][0]
    expected = adapted.eval()(x)
    prune.remove(head.base_layer, "weight")
    assert torch.allclose(adapted.merge_and_unload()(x), expected, atol=1e-5)


def test_mistakes_name_their_argument() -> None:
    for arguments in (
        {"share": 0.0},
        {"share": 2},
        {"share": 0.5, "targets": "fc1"},
        {"share": 0.5, "targets": ["no"]},
    ):
        with pytest.raises((ValueError, TypeError), match=f"`{list(arguments)[-1]}`"):
            prune_weights(Mlp(), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`targets`"):
        prune_weights(nn.LayerNorm(3), 0.5)
