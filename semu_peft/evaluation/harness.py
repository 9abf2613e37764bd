"""EleutherAI's lm-evaluation-harness on a model at hand: its benchmarks before and after unlearning."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from semu_peft.arguments import check_count, check_model
from semu_peft.model_state import eval_mode


def harness(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    include_defaults: bool = True,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-evaluation-harness, such as `"mmlu"` or `"wmdp_bio"`, on a model with its adapter as it is.

    The model is taken as it stands, in memory: no adapter has to be saved or merged for it.

    Args:
        model: A causal language model of transformers, with any adapter or none.
        tokenizer: Its tokenizer.
        tasks: Names of tasks, or paths of their YAML files.
        include_path: Folder with tasks of your own.
        include_defaults: Whether the harness's own tasks are known as well; reading their list takes seconds.
        num_fewshot: Answered questions before each; by default as the task says.
        limit: Only so many questions a task.
        batch_size: Questions at a time.
        seed: Of all draws.

    Returns:
        By task, its metrics, such as `{"acc": 0.57, "acc_stderr": 0.02}`.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: A task is unknown.

    Examples:
        >>> from semu_peft.evaluation import harness
        >>> harness(model, tokenizer, "wmdp_bio", limit=100)["wmdp_bio"]["acc"]  # doctest: +SKIP
        0.57
    """
    check_model(model)
    check_count("limit", limit, optional=True)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError('harness needs lm-eval: run `pip install ".[lm-eval]"` in a clone of semu-peft.') from error
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    path = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=path, include_defaults=include_defaults)
    unknown = [name for name in names if not os.path.exists(name) and not manager.match_tasks([name])]
    if not names or unknown:
        raise ValueError(
            f"`tasks` must be names of lm-evaluation-harness's tasks, got {unknown or names}. `lm_eval ls tasks` lists "
            "them; your own are found with `include_path`."
        )
    with eval_mode(model), _same_generators():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = simple_evaluate(
            model=wrapped, tasks=names, task_manager=manager, num_fewshot=num_fewshot, limit=limit, random_seed=seed,
            numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed, bootstrap_iters=0,
            log_samples=False,
        )  # fmt: skip
    return {task: _numbers(values) for task, values in found["results"].items()}


@contextmanager
def _same_generators() -> Iterator[None]:
    """The harness seeds the process's generators, which are the caller's."""
    import numpy as np

    state, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        np.random.set_state(legacy)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Metrics under their own names: the harness adds the filter that it read answers with."""
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items() if not isinstance(value, bool)}
