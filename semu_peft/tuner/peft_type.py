"""`PeftType.SEMU`, a member of PEFT's enumeration."""

from __future__ import annotations

from peft import PeftType

NAME = "SEMU"


def add_peft_type() -> PeftType:
    """Add the member `SEMU` to PEFT's enumeration, which offers no hook of its own for methods from outside."""
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    setattr(PeftType, NAME, member)  # before the maps: afterwards the enumeration refuses the assignment
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    return member
