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
from models import llama
from peft import get_peft_model
from safetensors.torch import load_file

from semu_peft import SemuConfig

PROGRAM = Path(__file__).parent / "distributed_program.py"
ROOT = PROGRAM.parent.parent


def free_port() -> str:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return str(connection.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "accumulation", "precision", "tolerance"),
    [("ddp", "2", "no", 1e-6), ("ddp", "1", "bf16", 1e-2), ("fsdp2", "2", "no", 1e-6)],
)
def test_two_processes_are_one(
    mode: str, accumulation: str, precision: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch` on two processes: losses and cores of the single process, within float tolerance."""
    torch.manual_seed(0)
    base = llama()
    torch.manual_seed(1)
    adapted = get_peft_model(base, SemuConfig(target_modules="all-linear", r=3, init_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    arguments = [str(tmp_path), "single", accumulation, precision]
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *arguments])
    runpy.run_path(str(PROGRAM))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()

    arguments[1] = mode
    launch = [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port(),
    ]  # fmt: skip  # `--multi_gpu` is Accelerate's name for a launcher of several processes; the program asks for CPUs
    path = os.pathsep.join([str(ROOT), str(PROGRAM.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, str(PROGRAM), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]

    single, several = (
        load_file(tmp_path / f"{name}-{accumulation}-{precision}.safetensors") for name in ("single", mode)
    )
    start = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert single.keys() == several.keys()
    for name, wanted in single.items():
        torch.testing.assert_close(several[name], wanted, atol=tolerance, rtol=tolerance)
        if name != "losses":
            moved = (wanted - start[f"base_model.model.{name}.semu_core"]).abs().max()
            assert moved > 20 * tolerance or precision == "bf16"
