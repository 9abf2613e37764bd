"""Settings by layer: a dictionary whose keys are names, name endings or regular expressions, as PEFT's patterns are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def name_matches(name: str, pattern: str) -> bool:
    """Whether the pattern is this layer's name, the end of it, or a regular expression for either."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def match_pattern(patterns: Mapping[str, T], name: str) -> T | None:
    """The value of the first pattern that matches a layer's full name, or None."""
    return next((value for pattern, value in patterns.items() if name_matches(name, pattern)), None)
