"""Two processes that share the work find the bases of one process that does it alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from initialize_in_processes import STATISTICS, UNGROUPED, batches, config, network, tensors_of
from peft import get_peft_model
from safetensors.torch import load_file

from semu_peft import CoreCovariance, SquaredSum, SubspaceProfile, gather, initialize_semu_weights, objectives
from semu_peft.tuner.adapted import semu_layers

WORKER = Path(__file__).with_name("initialize_in_processes.py")


def run_two(wrapper: str, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    logs = [folder / f"{rank}.log" for rank in range(2)]
    workers = []
    for rank, log in enumerate(logs):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(WORKER), wrapper, str(folder), str(rank)]
        with log.open("w") as file:
            workers.append(
                subprocess.Popen(command, env=os.environ if wrapper == "torch" else own, stdout=file, stderr=file)
            )
    try:
        codes = [worker.wait(timeout=150) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)


@pytest.mark.parametrize("wrapper", ["plain", "torch", "ddp", "fsdp2"])
def test_two_processes_find_the_bases_of_one(wrapper: str, tmp_path: Path) -> None:
    """Sums are taken over processes: exact and sketched, in DDP's wrapper, known to torch alone, and sharded."""
    run_two(wrapper, tmp_path)
    for kind, statistic in STATISTICS.items():
        model = get_peft_model(network(), config(wrapper))
        alone = initialize_semu_weights(
            model, batches(), objectives.CrossEntropy(), statistic=statistic, progress=False
        )
        assert alone.layers["hidden.0"].estimated == (kind == "sketch")
        first, second = (SubspaceProfile.load(tmp_path / f"{kind}-{rank}.safetensors") for rank in range(2))
        assert first.batches == second.batches == alone.batches and first.ranks == second.ranks == alone.ranks
        for name, layer in alone.layers.items():
            one, two = first.layers[name].directions, second.layers[name].directions
            assert torch.equal(one.left, two.left) and torch.equal(one.right, two.right)
            values, expected = one.singular_values[: layer.rank], layer.singular_values[: layer.rank]
            torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-3)
            for mine, other in ((one.left, layer.directions.left), (one.right, layer.directions.right)):
                assert torch.linalg.svdvals(mine.T @ other).min() > 0.999
    # The core covariances are taken in the bases of the last initialisation, which have the processes' signs.
    for name, layer in semu_layers(model).items():
        directions = first.layers[name].directions.leading(first.ranks[name])
        layer.set_basis("default", directions.left, directions.right)
    for kind, statistic in (("fisher", SquaredSum), ("covariance", CoreCovariance.of_adapter(model))):
        expected = tensors_of(
            gather(
                model, batches(), objectives.CrossEntropy(), targets=UNGROUPED, statistic=statistic, progress=False,
                adapter_name="default",
            )
        )  # fmt: skip
        for rank in range(2):
            found = load_file(tmp_path / f"{kind}-{rank}.safetensors")
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, atol=1e-6 * float(tensor.abs().max()), rtol=1e-3)
