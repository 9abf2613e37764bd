"""What all tests share: a fixed seed, a fresh Accelerate, and the real data for those who have it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", type=Path, default=None, help="folder with cifar10/ and tofu/, for tests on real data")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings in singletons, which one test must not hand to the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def data_folder(request: pytest.FixtureRequest) -> Path:
    """The folder given with `--data`; the test is skipped without it. Mark such tests `slow`."""
    folder: Path | None = request.config.getoption("--data")
    if folder is None:
        pytest.skip("needs real data: give its folder with --data (it holds cifar10/ and tofu/)")
    missing = [name for name in ("cifar10", "tofu") if not (folder / name).is_dir()]
    if missing:
        pytest.skip(f"--data {folder} holds no {' or '.join(missing)}")
    return folder
