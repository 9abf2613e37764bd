"""Make `PeftType.SEMU` known to PEFT, so that every PEFT entry point finds the method by its name."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from .config import SemuConfig
from .model import SemuModel
from .peft_type import NAME, add_peft_type


def register() -> None:
    """Register SEMU with PEFT. Calling it again changes nothing; no other PEFT method is touched.

    Examples:
        >>> from peft import get_peft_config
        >>> from semu_peft.tuner import register
        >>> register()  # `import semu_peft` has done so; doing it again changes nothing
        >>> get_peft_config({"peft_type": "SEMU", "target_modules": ["fc"], "task_type": None}).core
        'full'
    """
    if add_peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=SemuConfig, model_cls=SemuModel)
