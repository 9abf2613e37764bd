"""What tests and docstring examples share: a fixed seed, a fresh Accelerate, and a pipeline for those that need one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings in singletons, which one test must not hand to the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """What one test compiles must not count towards the next one's limit of recompilations."""
    yield
    if compiler := sys.modules.get("torch._dynamo"):
        compiler.reset()


@pytest.fixture(autouse=True)
def loaded_pipeline(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> Iterator[None]:
    """`pipe` in the examples of docstrings: a tiny Stable Diffusion with random weights stands for a loaded one."""
    examples = getattr(getattr(request.node, "dtest", None), "examples", ())
    if any("pipe" in example.source for example in examples):
        from diffusion_models import quiet, sd_pipeline

        doctest_namespace["pipe"] = quiet(sd_pipeline())
    yield
    doctest_namespace.pop("pipe", None)


@pytest.fixture(autouse=True)
def loaded_tokenizer(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> Iterator[None]:
    """`tokenizer` in the examples of docstrings, and `decoder`, a tiny language model with random weights for it."""
    examples = getattr(getattr(request.node, "dtest", None), "examples", ())
    if any(word in example.source for example in examples for word in ("tokenizer", "decoder")):
        import text_models

        doctest_namespace |= {"tokenizer": text_models.tokenizer(), "decoder": text_models.decoder()}
    yield
    for name in ("tokenizer", "decoder"):
        doctest_namespace.pop(name, None)
