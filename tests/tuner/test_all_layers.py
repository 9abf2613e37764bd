"""The words in `target_modules`: which layers they mean, which they pass over, and what is said of those."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import llama, vit
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, ResNetConfig, ResNetForImageClassification
from transformers.models.bamba.configuration_bamba import BambaConfig
from transformers.models.bamba.modeling_bamba import BambaForCausalLM
from transformers.models.jamba.configuration_jamba import JambaConfig
from transformers.models.jamba.modeling_jamba import JambaForCausalLM

from semu_peft import SemuConfig, initialize_semu_weights, unlearn
from semu_peft.tuner.adapted import semu_layers


class Attending(nn.Module):
    """PyTorch's own attention between layers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1)
        self.up = nn.ConvTranspose1d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.conv(self.tokens(x).mT).mT)
        return self.head(self.up(x.mT).mean(-1))


LINEAR = {"encoder.layers.0.linear1", "encoder.layers.0.linear2", "head"}
ATTENTION = {f"encoder.layers.0.self_attn.{name}" for name in ("in_proj_weight", "out_proj.weight")}


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@pytest.mark.parametrize("word", ["all-linear", "all-layers", "All-Layers"])
def test_what_the_words_mean(word: str, tmp_path: Path) -> None:
    """Linear layers; or convolutions and attentions too. What cannot be corrected is named in a warning, and the
    adapter that is saved names its layers."""
    torch.manual_seed(0)
    model = Attending().eval()
    with pytest.warns(UserWarning, match="all-layers|passes over 1 layers.*up .ConvTranspose1d") as caught:
        adapted = get_peft_model(model, SemuConfig(target_modules=word, exclude_modules=["linear1"]))
    assert len(caught) == 1
    everything = LINEAR if word == "all-linear" else LINEAR | ATTENTION | {"conv"}
    assert set(semu_layers(adapted)) == everything - {"encoder.layers.0.linear1"}
    batch = torch.arange(12).view(3, 4) % 9
    initialize_semu_weights(adapted, [batch], squared, progress=False)
    before = squared(adapted, batch).item()
    unlearn(adapted, [batch], squared, progress=False)
    assert squared(adapted, batch).item() < before
    adapted.save_pretrained(tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(Attending().eval(), tmp_path)
    torch.testing.assert_close(loaded(batch), adapted(batch))


def test_networks_of_convolutions() -> None:
    """Where there is no linear layer at all the convolutions are meant, and where they are most of the network it is
    said that they are left out."""
    convolutions = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.warns(UserWarning, match="no linear layer"):
        assert set(semu_layers(get_peft_model(convolutions, SemuConfig(target_modules="all-linear")))) == {"0"}
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    with pytest.warns(UserWarning, match="leaves .* convolutions.*corrects 1 layers.*all-layers"):
        model = get_peft_model(ResNetForImageClassification(config), SemuConfig(target_modules="all-linear"))
    assert set(semu_layers(model)) == {"classifier.1"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(ResNetForImageClassification(config), SemuConfig(target_modules="all-layers"))
    assert len(semu_layers(model)) == 1 + sum(isinstance(module, nn.Conv2d) for module in model.modules())


@pytest.mark.parametrize("word", ["all-linear", "all-layers"])
def test_it_means_what_peft_means(word: str) -> None:
    """The output layer of a language model and a classifier's head by its task are left out, as for LoRA; under other
    adapters their layers are taken once."""
    for base, options in ((llama, {}), (vit, {"task_type": "SEQ_CLS"})):
        lora = get_peft_model(base(), LoraConfig(target_modules="all-linear", **options))
        model = get_peft_model(base(), SemuConfig(target_modules=word, **options))
        convolutions = {name for name, module in base().named_modules() if isinstance(module, nn.Conv2d)}
        expected = set(lora.base_model.targeted_module_names) | (convolutions if word == "all-layers" else set())
        assert set(semu_layers(model)) == expected
        over = inject_adapter_in_model(LoraConfig(target_modules="all-linear", **options), base(), "lora")
        assert set(semu_layers(get_peft_model(over, SemuConfig(target_modules=word, **options)))) == expected
        model.add_adapter("second", SemuConfig(target_modules=word, **options))
        assert set(semu_layers(model, "second")) == expected


def test_nothing_to_correct() -> None:
    with pytest.raises(ValueError, match="`target_modules='all-layers'` finds no layer.*'0 .ConvTranspose1d.'"):
        get_peft_model(nn.Sequential(nn.ConvTranspose1d(2, 2, 1)), SemuConfig(target_modules="all-layers"))


def test_a_name_that_ends_like_one_passed_over() -> None:
    """PEFT matches names by their endings: a layer at the root does not bring one in that is passed over."""
    model = nn.ModuleDict({"up": nn.Linear(2, 2), "inside": nn.ModuleDict({"up": nn.ConvTranspose1d(2, 2, 1)})})
    with pytest.warns(UserWarning, match=r"inside.up"):
        assert set(semu_layers(get_peft_model(model, SemuConfig(target_modules="all-layers")))) == {"up"}


SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip
HYBRIDS: dict[str, tuple[Any, set[str], set[str]]] = {  # which layers of a mixer may be corrected, and which not
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)),
        {"in_proj"}, {"out_proj", "x_proj", "dt_proj", "conv1d"},
    ),
    "bamba": (
        lambda: BambaForCausalLM(BambaConfig(
            **SMALL, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, attn_layer_indices=[],
        )),
        {"in_proj"}, {"out_proj", "conv1d"},
    ),
    "jamba": (
        lambda: JambaForCausalLM(JambaConfig(
            **SMALL, num_experts=2, attn_layer_offset=1, attn_layer_period=2, mamba_d_state=4, mamba_dt_rank=4,
            use_mamba_kernels=False,
        )),
        {"in_proj", "x_proj", "out_proj"}, {"conv1d"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRIDS)
def test_state_space_mixers(name: str) -> None:
    """Weights that a fused kernel reads past a correction are refused by name, and passed over by the words."""
    if transformers.__version__.startswith("4.") and name in ("bamba", "jamba"):
        pytest.skip("its kernels read more weights before transformers 5, and more are refused")
    make, called, read = HYBRIDS[name]
    for layer in read:
        with pytest.raises(TypeError, match=f"{layer}.*fused kernels"):
            get_peft_model(make(), SemuConfig(target_modules=[layer]))
    for layer in called:
        assert semu_layers(get_peft_model(make(), SemuConfig(target_modules=[layer])))
    with pytest.warns(UserWarning, match="passes over"):
        model = get_peft_model(make(), SemuConfig(target_modules="all-layers"))
    found = {layer.rpartition(".")[2] for layer in semu_layers(model) if ".mixer." in layer or ".mamba." in layer}
    assert called <= found and not read & found
