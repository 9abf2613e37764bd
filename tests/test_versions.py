"""What pyproject.toml promises about versions is what is run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
NOT_RUN = {
    "dev",
    "docs",
    "lm-eval",
    "neighbours",
}  # extras with tools and neighbours only, which are not installed beside the lowest versions
EXTRA = re.compile(r"semu-peft\[")


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def pins(name: str) -> dict[str, Version]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [line.split("==") for line in lines if line]
    return {canonicalize_name(package): Version(version) for package, version in found}


def lower_bounds() -> dict[str, Version | None]:
    """Of the package and its extras: each requirement's version after `>=`."""
    extras = project()["optional-dependencies"]
    lists = [project()["dependencies"], *(extras[name] for name in extras.keys() - NOT_RUN)]
    requirements = [Requirement(text) for part in lists for text in part if not EXTRA.match(text)]
    bounds: dict[str, Version | None] = {}
    for requirement in requirements:
        versions = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
        name = canonicalize_name(requirement.name)
        assert name not in bounds, f"{name} is listed twice"
        bounds[name] = versions[0] if versions else None
    return bounds


def test_lower_bounds_are_what_the_lowest_environment_has() -> None:
    bounds, lowest = lower_bounds(), pins("constraints-lowest.txt")
    assert bounds.keys() <= lowest.keys()
    tools = {"hypothesis", "pytest", "pytest-timeout", "pytest-xdist"}  # run the tests, and take no part in the package
    assert {name: bound for name, bound in bounds.items() if name not in tools} == {
        name: version for name, version in lowest.items() if name in bounds and name not in tools
    }


def test_the_lowest_environment_is_below_the_newest() -> None:
    newest, lowest = pins("constraints.txt"), pins("constraints-lowest.txt")
    for name, bound in lower_bounds().items():
        assert lowest[name] <= newest[name], name
        assert bound is None or bound <= newest[name], name


def test_python_versions() -> None:
    """The classifiers name the versions from `requires-python` on, without a gap at its beginning."""
    named = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", text) for text in project()["classifiers"]]
    versions = sorted(Version(match[1]) for match in named if match)
    assert project()["requires-python"] == f">={versions[0]}"


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt"])
def test_every_line_is_a_pin(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if not line.startswith("#"))
