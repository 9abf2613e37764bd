"""Make `PeftType.SEMU` known to PEFT, so that every PEFT entry point finds the method by its name."""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from .config import SemuConfig
from .model import SemuModel

NAME = "SEMU"


def _add_peft_type() -> PeftType:
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


def register() -> None:
    """Register SEMU with PEFT. Calling it again changes nothing; no other PEFT method is touched."""
    member = _add_peft_type()
    if member not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=SemuConfig, model_cls=SemuModel)
