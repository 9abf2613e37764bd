"""Rows of a table made by several processes: one alone cannot keep a GPU busy with networks as small as these."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, NamedTuple

MARGIN = 1.2  # times the longest of the last rows: with less time left, none is begun


class Made(NamedTuple):
    """A row, or why there is none.

    Attributes:
        task: Which one it is.
        row: What the function gave, or None.
        error: The end of its traceback, or empty.
        seconds: How long it took.
    """

    task: Any
    row: Any
    error: str
    seconds: float


def side_by_side(
    make: Callable[[Any], Any],
    tasks: Iterable[Any],
    workers: int,
    seconds: float | None = None,
    kind: Callable[[Any], Any] = lambda task: None,
) -> Iterator[Made]:
    """Give each row when it is made; they are begun in the order of `tasks`, and none that has no time left.

    A row that fails is given with its error, and the others go on.

    Args:
        make: A function of a module, `task -> row`.
        tasks: What it is called with; they go to other processes, so they are plain. One at a time is asked for, when a
            process is free: where the next ones depend on rows that are still being made, None stands for to wait.
        workers: How many processes; with 1 it is this one.
        seconds: Begin nothing that, by the longest of the last rows of its kind, would not be done within so many
            seconds from now.
        kind: Of a task; by default all are alike. One that was not met yet may be as short as the shortest of all.
    """
    started, following = time.perf_counter(), iter(tasks)
    lasted: dict[Any, deque[float]] = defaultdict(lambda: deque(maxlen=2 * workers))  # the first read the data as well

    def next_task() -> Any:
        for task in following:
            if task is None or seconds is None:
                return task
            alike = lasted.get(kind(task))
            expected = max(alike) if alike else min(map(min, lasted.values()), default=0.0)
            if time.perf_counter() - started + MARGIN * expected < seconds:
                return task
        return None

    if workers == 1:
        while (task := next_task()) is not None:
            made = _made(make, task)
            lasted[kind(task)].append(made.seconds)
            yield made
        return
    running: dict[Future[Made], Any] = {}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        is_broken = False
        while True:
            while not is_broken and len(running) < workers and (task := next_task()) is not None:
                running[pool.submit(_made, make, task)] = task
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                error = future.exception()  # of the process: those of a row are caught where they come
                is_broken = is_broken or error is not None
                made = future.result() if error is None else Made(task, None, repr(error), 0.0)
                lasted[kind(task)].append(made.seconds)
                yield made


def _made(make: Callable[[Any], Any], task: Any) -> Made:
    started = time.perf_counter()
    try:
        row, error = make(task), ""
    except Exception:
        row, error = None, traceback.format_exc()[-1500:]
    return Made(task, row, error, time.perf_counter() - started)
