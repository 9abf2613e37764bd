"""The real data, for those who have it; what all tests share stands in the repository's root."""

from __future__ import annotations

from pathlib import Path

import pytest

collect_ignore = ["training/distributed_program.py"]  # a program, which runs when the search for examples imports it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", type=Path, default=None, help="folder with cifar10/ and tofu/, for tests on real data")


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
