"""Rules on several processes see the gradients of all, and leave every process with the cores of a single one.

Also where FSDP has given each a part of them; the program checks that a rule that needs them whole says so.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).parent / "rules_program.py"
ROOT = PROGRAM.parents[2]


def launch(folder: Path, processes: int) -> None:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        port = str(connection.getsockname()[1])
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    start = torchrun if processes > 1 else []
    done = subprocess.run([sys.executable, *start, str(PROGRAM), str(folder)], env=environment, capture_output=True, text=True)  # fmt: skip  # noqa: E501
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_end_as_one(tmp_path: Path) -> None:
    launch(tmp_path, 1)
    launch(tmp_path, 2)
    expected, *found = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    for key, value in expected.items():
        assert torch.equal(found[0][key], found[1][key])
        torch.testing.assert_close(found[0][key], value, rtol=1e-3, atol=1e-4)
