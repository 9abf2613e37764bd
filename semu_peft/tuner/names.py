"""Names and patterns of layers, as a configuration gives them: checked before anything is looked for with them."""

from __future__ import annotations

import re
from typing import Any

_MOST_REPETITIONS = 4  # without a bound, in one pattern: with n letters in a name the search takes n to that power


def check_names(argument: str, value: Any, *, pattern: bool = True) -> None:
    """Check that a setting is a list of names, None, or a regular expression where that is allowed.

    Raises:
        TypeError: It is something else.
        ValueError: It is no regular expression.

    Examples:
        >>> check_names("target_modules", ["q_proj", "v_proj"])
        >>> check_names("target_modules", [5])
        Traceback (most recent call last):
        TypeError: `target_modules` must be a list of names, a regular expression or None, got [5]. Names are strings.
    """
    if isinstance(value, str) and pattern:
        check_pattern(argument, value)
        return
    if value is None or (isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value)):
        return
    kinds = "a list of names, a regular expression or None" if pattern else "a list of names or None"
    mend = f"Write `[{value!r}]` for one." if isinstance(value, str) else "Names are strings."
    raise TypeError(f"`{argument}` must be {kinds}, got {value!r}. {mend}")


def check_pattern(argument: str, pattern: str) -> None:
    """Check that a text is a regular expression that is searched for in bounded time, whatever layers are called.

    Patterns also come out of files. Python's search goes back and forth: time doubles with each letter where a
    repetition is inside another one, and grows as a power of the length where many follow each other.

    Raises:
        ValueError: It is none, or may take that long.

    Examples:
        >>> check_pattern("target_modules", r".*\\.layers\\.\\d+\\.(q|k|v)_proj")
        >>> check_pattern("target_modules", r"(\\w+)+!")
        Traceback (most recent call last):
        ValueError: `target_modules` must have patterns that are found in bounded time, got '(\\\\w+)+!' ...
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"`{argument}` must have names or regular expressions, got {pattern!r} ({error}). Put a backslash before "
            "signs that stand for themselves."
        ) from error
    if _repetitions(pattern) > _MOST_REPETITIONS:
        raise ValueError(
            f"`{argument}` must have patterns that are found in bounded time, got {pattern!r} with a repetition of "
            f"what varies itself, or more than {_MOST_REPETITIONS} in a row. Give the names as a list."
        )


_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:P<\w+>|[:=!>]|<[=!])|[*+?][?+]?|\{\d*,?\d*\}[?+]?|.", re.DOTALL
)


def _repetitions(pattern: str) -> int:
    """How many repetitions without a bound follow each other at most, on one way through; nested ones are too many."""
    # Of each group that is open: the count of the branches before, that of this branch, and whether anything varies.
    groups: list[list[int]] = [[0, 0, 0]]
    closed: list[int] | None = None  # the group that has just ended
    for match in _TOKEN.finditer(pattern):
        token = match[0]
        ended, closed = closed, None
        if token.startswith("("):
            groups.append([0, 0, 0])
        elif token == ")" and len(groups) > 1:
            before, here, varies = groups.pop()
            closed = [max(before, here), varies]
            groups[-1][1] += closed[0]
            groups[-1][2] |= varies
        elif token == "|":
            groups[-1] = [max(groups[-1][:2]), 0, 1]
        elif _repeats(token):
            if ended is not None and ended[1]:
                return _MOST_REPETITIONS + 1
            groups[-1][1] += 1
            groups[-1][2] = 1
        elif token[0] in "?{" and token != "{":
            groups[-1][2] = 1
    return max(groups[0][:2])


def _repeats(token: str) -> bool:
    if token[0] in "*+":
        return True
    counts = re.fullmatch(r"\{(\d*)(,?)(\d*)\}[?+]?", token)
    if not counts or not (counts[1] or counts[3]):
        return False
    return bool(counts[2] and not counts[3]) or int(counts[3] or counts[1]) > 1
