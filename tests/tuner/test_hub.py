"""To the Hub and back, over HTTP: the real client of `huggingface_hub` against a small hub on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, running_hub
from huggingface_hub import ModelCard

COMMON = """
import sys, torch, semu_peft
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from semu_peft import SemuConfig, hotswap_adapter
sys.path.insert(0, sys.argv[1])
from models import llama, run
torch.manual_seed(0)
base = llama()
tokens = torch.tensor([[1, 2, 3, 4]])
def adapted(seed, model):
    torch.manual_seed(seed)
    config = SemuConfig(target_modules="all-linear", r=3, init_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)
"""

PUSH = (
    COMMON
    + """
from huggingface_hub import HfApi
from transformers import LlamaForCausalLM
base.push_to_hub("me/base")
base = LlamaForCausalLM.from_pretrained("me/base")
model = adapted(1, base)
outputs = {"one": run(model, tokens)}
model.push_to_hub("me/forget", tags=["semu"])
semu_peft.update_model_card("me/forget", description="Forgets ships.", metrics={"unlearning accuracy": 99.0})
model.push_to_hub("me/forget", commit_message="again")
model = adapted(2, model.unload())
outputs["two"] = run(model, tokens)
HfApi().create_branch("me/forget", branch="second")
model.push_to_hub("me/forget", revision="second")
model.save_pretrained(sys.argv[2] + "/folder")
HfApi().create_repo("me/folders")
HfApi().upload_folder(repo_id="me/folders", folder_path=sys.argv[2] + "/folder", path_in_repo="deep/two")
torch.save(outputs, sys.argv[2] + "/expected.pt")
"""
)

LOAD = (
    COMMON
    + """
from transformers import LlamaForCausalLM
def fresh():
    return LlamaForCausalLM.from_pretrained("me/base")
outputs = {
    "one": run(PeftModel.from_pretrained(fresh(), "me/forget"), tokens),
    "two": run(PeftModel.from_pretrained(fresh(), "me/forget", revision="second"), tokens),
    "two, subfolder": run(PeftModel.from_pretrained(fresh(), "me/folders", subfolder="deep/two"), tokens),
    "one, auto": run(AutoPeftModelForCausalLM.from_pretrained("me/forget"), tokens),
}
model = fresh()
model.load_adapter("me/forget")
outputs["one, transformers"] = run(model, tokens)
model = PeftModel.from_pretrained(fresh(), "me/forget")
hotswap_adapter(model, "me/forget", revision="second")
outputs["two, hot-swapped"] = run(model, tokens)
torch.save(outputs, sys.argv[2] + "/loaded.pt")
"""
)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def run_program(program: str, hub: Hub, folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(folder / "cache"),
        "HF_TOKEN": "hf_anything",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
    }
    tests = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", program, tests, str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:] + "\n".join(hub.requests[-20:])


@pytest.mark.slow
def test_push_and_load(hub: Hub, tmp_path: Path) -> None:
    """Adapters pushed to a branch or a folder are loaded by name, revision and subfolder, by every entry point."""
    import torch

    run_program(PUSH, hub, tmp_path)
    pushed = hub.files("me/forget")
    assert pushed is not None and {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(pushed)
    assert pushed != hub.files("me/forget", "second")
    assert any("lfs/objects/batch" in request for request in hub.requests)
    card = ModelCard(pushed["README.md"].decode())
    assert {"semu", "machine-unlearning"} <= set(card.data.tags), "the later push has kept what was said"
    assert card.data.library_name == "peft" and card.data.base_model == "me/base"
    assert [(each.metric_name, each.metric_value) for each in card.data.eval_results] == [("unlearning accuracy", 99.0)]
    assert "Forgets ships." in card.text and 'from_pretrained(base_model, "me/forget")' in card.text
    assert "More Information Needed" not in card.text
    folder = hub.files("me/folders")
    assert folder is not None
    saved = folder["deep/two/README.md"].decode()
    assert "machine-unlearning" in saved and "base_model: me/base" in saved and "PeftModel.from_pretrained" in saved
    run_program(LOAD, hub, tmp_path)
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    for name, output in torch.load(tmp_path / "loaded.pt", weights_only=True).items():
        assert torch.equal(output, expected[name.split(",")[0]]), name
