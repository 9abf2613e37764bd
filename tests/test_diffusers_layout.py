"""A pipeline's adapters as one file that diffusers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import clip_text, run, sample_input, sd3, unet_condition
from peft import get_peft_model
from safetensors import safe_open

from semu_peft import SemuConfig, save_as_diffusers_lora
from semu_peft.diffusers_layout import DIFFUSERS_WEIGHTS_NAME


def pipeline(unet: Any, text_encoder: Any) -> Any:
    """Stable Diffusion of these two; the rest of it reads no LoRA."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(
        vae=None, text_encoder=text_encoder, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def components() -> tuple[Any, Any]:
    torch.manual_seed(3)
    return unet_condition(), clip_text()


@pytest.mark.parametrize("uniform_rank", [False, True])
def test_a_pipeline_loads_it(uniform_rank: bool, tmp_path: Path) -> None:
    """`load_lora_weights` gives the U-Net and the text encoder the outputs that they had with the SEMU adapters."""
    unet, text_encoder = components()
    unet.add_adapter(SemuConfig(target_modules=["to_q", "conv1", "conv2"], r=3, init_weights=False))
    ranks = {"0.self_attn.q_proj": 2, "1.self_attn.q_proj": 4, "1.mlp.fc1": 1}
    names = [name for name, _ in text_encoder.named_modules()]
    pattern = {next(name for name in names if name.endswith(end)): rank for end, rank in ranks.items()}
    text_encoder = get_peft_model(
        text_encoder,
        SemuConfig(target_modules=list(pattern), r=4, rank_pattern=pattern, init_weights=False),
    )
    inputs, tokens = sample_input(unet), torch.randint(32, (2, 6))
    expected = run(unet, *inputs), run(text_encoder, tokens)

    parts = {"unet": unet, "text_encoder": text_encoder}
    assert save_as_diffusers_lora(parts, tmp_path, uniform_rank=uniform_rank) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == [DIFFUSERS_WEIGHTS_NAME]
    pipe = pipeline(*components())
    before = run(pipe.unet, *inputs), run(pipe.text_encoder, tokens)
    pipe.load_lora_weights(tmp_path)
    after = run(pipe.unet, *inputs), run(pipe.text_encoder, tokens)
    for old, new, wanted in zip(before, after, expected, strict=True):
        assert not torch.allclose(old, wanted, atol=1e-3)
        torch.testing.assert_close(new, wanted, atol=1e-5, rtol=1e-5)
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe.unet, *inputs), before[0])


def test_a_transformer_loads_it(tmp_path: Path) -> None:
    """A diffusion transformer reads its part with `load_lora_adapter`."""
    torch.manual_seed(3)
    model = sd3()
    inputs = sample_input(model)
    expected_base = run(model, *inputs)
    adapted = get_peft_model(model, SemuConfig(target_modules="all-linear", r=2, init_weights=False))
    expected = run(adapted, *inputs)
    save_as_diffusers_lora({"transformer": adapted}, tmp_path)
    torch.manual_seed(3)
    stock = sd3()
    assert torch.equal(run(stock, *inputs), expected_base)
    stock.load_lora_adapter(tmp_path, prefix="transformer", use_safetensors=True)
    torch.testing.assert_close(run(stock, *inputs), expected, atol=1e-5, rtol=1e-5)


def test_the_header_tells_the_ranks(tmp_path: Path) -> None:
    """Ranks and scales stand in the file's header under the component's name; with `uniform_rank` there is one."""
    unet, _ = components()
    unet.add_adapter(SemuConfig(target_modules=["to_q", "conv_in"], r=5, init_weights=False))
    for uniform in (False, True):
        save_as_diffusers_lora({"unet": unet}, tmp_path, uniform_rank=uniform)
        with safe_open(tmp_path / DIFFUSERS_WEIGHTS_NAME, framework="pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
            ranks = {file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_A" in key}  # noqa: SIM118
        assert metadata["unet.r"] == metadata["unet.lora_alpha"] == 5
        assert ranks == {5}


@pytest.mark.parametrize("options", [{"modules_to_save": ["conv_out"]}])
def test_what_the_layout_has_no_place_for(options: dict[str, Any], tmp_path: Path) -> None:
    """Parts of an adapter that would be lost are named, and nothing is written."""
    unet, _ = components()
    model = get_peft_model(unet, SemuConfig(target_modules=["to_q"], r=2, init_weights=False, **options))
    with pytest.raises(ValueError, match="conv_out.*merge"):
        save_as_diffusers_lora({"unet": model}, tmp_path / "lora")
    with pytest.raises(ValueError, match="components"):
        save_as_diffusers_lora({}, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
