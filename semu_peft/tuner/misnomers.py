"""Words and orders of arguments that people bring from other methods, answered with what they are called here."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def explaining(words: Mapping[str, str]) -> Callable[[type[T]], type[T]]:
    """A class decorator: a keyword that the class does not have, but another method has, is refused with its mend.

    Args:
        words: What to say of each foreign keyword, as a sentence.
    """

    def decorate(cls: type[T]) -> type[T]:
        original: Any = cls.__init__

        @functools.wraps(original)
        def __init__(self: T, *args: Any, **kwargs: Any) -> None:
            foreign = next((name for name in kwargs if name in words), None)
            if foreign is not None:  # in Python's own words, by which PEFT knows it when it reads a newer file
                raise TypeError(f"{cls.__name__} got an unexpected keyword argument {foreign!r}. {words[foreign]}")
            original(self, *args, **kwargs)

        setattr(cls, "__init__", __init__)  # noqa: B010 - mypy takes no assignment to it
        return cls

    return decorate


def check_order(call: str, subject: object) -> None:
    """Check that the first argument of a function is no path, which PEFT's `save_as_lora(path, model)` has there.

    Args:
        call: How the function is called, for the error: `"save_as_lora(model, path)"`.
        subject: The first argument.

    Raises:
        TypeError: It is a path.

    Examples:
        >>> from semu_peft.tuner.misnomers import check_order
        >>> try:
        ...     check_order("save_as_lora(model, path)", "folder")
        ... except TypeError as error:
        ...     print(error)
        `model` must be a model, got the path 'folder'. The order here is `save_as_lora(model, path)`.
    """
    if isinstance(subject, (str, os.PathLike)):
        name = call[call.index("(") + 1 :].partition(",")[0].rstrip(")")
        kind = "a pipeline" if name == "pipe" else "a model"
        raise TypeError(f"`{name}` must be {kind}, got the path {os.fspath(subject)!r}. The order here is `{call}`.")
