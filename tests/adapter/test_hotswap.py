"""Swapping an adapter's weights in place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Cnn, Snapshot, llama, run, sample_input
from peft import PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from semu_peft import SemuConfig, hotswap_adapter
from semu_peft.tuner.adapted import semu_layers


def adapted(base: nn.Module, seed: int, targets: Any = "all-linear", **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    config = SemuConfig(**{"target_modules": targets, "r": 3, "init_weights": False, **options})
    return get_peft_model(copy.deepcopy(base), config).eval()


@pytest.mark.parametrize("train", [False, True])
def test_a_compiled_model_is_not_compiled_again(train: bool, tmp_path: Path) -> None:
    """One whole graph is compiled for the first adapter, and serves the second."""
    torch._dynamo.reset()
    base, x = llama(), sample_input(llama())
    model, other = adapted(base, 1), adapted(base, 2)
    expected = [run(model, *x), run(other, *x)]
    other.save_pretrained(tmp_path)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    places = {key: value.data_ptr() for key, value in model.state_dict().items()}
    outputs = []
    with torch.set_grad_enabled(train):
        outputs.append(compiled(*x, use_cache=False).logits)
        assert counter.frame_count == 1
        hotswap_adapter(compiled, str(tmp_path))
        outputs.append(compiled(*x, use_cache=False).logits)
    assert counter.frame_count == 1
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.detach(), wanted, atol=1e-6, rtol=1e-6)
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == places


def test_a_named_adapter_among_others(tmp_path: Path) -> None:
    """Only the named adapter is overwritten; it takes the saved one from a subfolder."""
    base, x = Cnn(), sample_input(Cnn())
    model, other = adapted(base, 1, Cnn.targets), adapted(base, 2, Cnn.targets)
    torch.manual_seed(3)
    model.add_adapter("second", SemuConfig(target_modules=Cnn.targets, r=3, init_weights=False))
    expected = [run(model, *x), run(other, *x)]
    other.save_pretrained(tmp_path / "folder")
    hotswap_adapter(model, str(tmp_path), adapter_name="second", subfolder="folder")
    assert torch.equal(run(model, *x), expected[0])
    model.set_adapter("second")
    assert torch.equal(run(model, *x), expected[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 2}, r"semu_.*\(.*2\).*\(.*3\).*load_adapter"),
        ({"targets": ["conv1"]}, "only the model has.*conv2"),
        ({"core": "diagonal"}, "core.*'full'.*'diagonal'"),
        ({"conv_mode": "per_channel"}, "conv_mode"),
        ({"modules_to_save": ["norm"]}, "norm"),
    ],
)
def test_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    """An adapter that does not fit changes nothing."""
    base = Cnn()
    adapted(base, 2, **{"targets": Cnn.targets, **options}).save_pretrained(tmp_path)
    model = adapted(base, 1, Cnn.targets)
    before = Snapshot.of(model)
    with pytest.raises(ValueError, match=words):
        hotswap_adapter(model, str(tmp_path))
    before.assert_same(model)


def test_refused_while_merged(tmp_path: Path) -> None:
    """The weights of a merged adapter are needed to unmerge it."""
    model = adapted(Cnn(), 1, Cnn.targets)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        hotswap_adapter(model, str(tmp_path))
    with pytest.raises(ValueError, match="'none'"):
        hotswap_adapter(model, str(tmp_path), adapter_name="none")
    assert semu_layers(model)
