"""Several processes on the CPU end with the cores of one process that sees the same examples."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import is_deepspeed_available
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from models import llama
from peft import get_peft_model
from safetensors.torch import load_file

from semu_peft import SemuConfig

PROGRAM = Path(__file__).parent / "distributed_program.py"
ROOT = PROGRAM.parents[2]
ZERO = ROOT / "examples" / "deepspeed"


def free_port() -> str:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return str(connection.getsockname()[1])


def run(folder: Path, mode: str, *options: str) -> None:
    """Run the program on two processes, or with `"single"` in this one."""
    arguments = [str(folder), mode, *options]
    if mode == "single":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(PROGRAM), *arguments])
            runpy.run_path(str(PROGRAM))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    else:
        launch = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", free_port()]
        if mode.startswith("zero"):
            launch += ["--use_deepspeed", "--deepspeed_config_file", str(ZERO / f"{mode}.json")]
        else:  # Accelerate's name for a launcher of several processes; the program asks for CPUs
            launch += ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = {
            **os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, str(PROGRAM), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]


def train(folder: Path, mode: str, *options: str) -> dict[str, torch.Tensor]:
    """Run the program, and return losses and cores."""
    run(folder, mode, *options)
    return load_file(folder / f"{mode}-{options[0]}-{options[1]}.safetensors")


def save_adapter(folder: Path) -> None:
    """What the program begins with."""
    torch.manual_seed(0)
    base = llama()
    torch.manual_seed(1)
    adapted = get_peft_model(base, SemuConfig(target_modules="all-linear", r=3, init_weights=False))
    adapted.save_pretrained(folder / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "accumulation", "precision", "clip", "optimizer", "tolerance"),
    [
        ("ddp", "2", "no", "0.01", "adamw", 1e-6),
        ("ddp", "1", "bf16", "0.01", "adamw", 1e-2),
        ("ddp", "2", "no", "0", "natural", 1e-5),
        ("fsdp2", "2", "no", "0.01", "adamw", 1e-6),
        ("fsdp2", "2", "no", "0", "natural", 1e-5),
        ("fsdp2-root", "2", "no", "0", "natural", 1e-5),
        ("fsdp2-layers", "2", "no", "0", "natural", 1e-5),
        ("fsdp2", "2", "no", "0", "budget", 1e-5),
        ("ddp", "2", "no", "0", "resumed", 1e-5),
        ("ddp", "2", "no", "0", "adamw-resumed", 1e-6),
        ("wrapped", "2", "no", "0", "adamw-resumed", 1e-6),
        ("fsdp2", "2", "no", "0", "resumed", 1e-5),
        ("fsdp2-root", "2", "no", "0", "adamw-resumed", 1e-6),
        ("zero2", "1", "no", "0", "adamw", 1e-6),
        ("zero3", "1", "no", "0", "adamw", 1e-6),
    ],
)
def test_two_processes_are_one(
    mode: str, accumulation: str, precision: str, clip: str, optimizer: str, tolerance: float, tmp_path: Path
) -> None:
    """`accelerate launch` on two processes: losses and cores of the single process, within float tolerance."""
    if mode.startswith("zero") and not is_deepspeed_available():
        pytest.skip("needs DeepSpeed")
    save_adapter(tmp_path)
    single = train(tmp_path, "single", accumulation, precision, clip, optimizer)
    several = train(tmp_path, mode, accumulation, precision, clip, optimizer)
    start = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert single.keys() == several.keys()
    for name, wanted in single.items():
        torch.testing.assert_close(several[name], wanted, atol=tolerance, rtol=tolerance)
        if name != "losses":
            moved = (wanted - start[f"base_model.model.{name}.semu_core.semu_core"]).abs().max()
            assert moved > 5 * tolerance


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_shards_in_their_places(tmp_path: Path) -> None:
    """FSDP2's root would keep what it gathered, and hide the shards from whoever asks for the parameters."""
    save_adapter(tmp_path)
    run(tmp_path, "fsdp2-root", "1", "no", "0", "fails")
    assert load_file(tmp_path / "fails")["whole"]


@pytest.mark.slow
def test_batches_that_one_process_has_more_of_are_refused_by_both(tmp_path: Path) -> None:
    """Where each step is agreed on; else one would wait for the other for ever."""
    save_adapter(tmp_path)
    run(tmp_path, "ddp", "1", "no", "0", "uneven")
    assert all(load_file(tmp_path / rank)["refused"] for rank in ("0", "1"))


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_settings(stage: int) -> None:
    """The shipped settings are what Accelerate reads as this ZeRO stage, with everything else left to the run."""
    settings = HfDeepSpeedConfig(str(ZERO / f"zero{stage}.json"))
    assert settings.get_value("zero_optimization.stage") == stage
    assert settings.is_zero2() == (stage == 2) and settings.is_zero3() == (stage == 3)
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16.enabled"):
        assert settings.get_value(name) == "auto"
