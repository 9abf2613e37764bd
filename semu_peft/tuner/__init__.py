"""What sits in the model: enough to load, run, merge and ship an adapter."""

from .config import SemuConfig
from .layer import Conv2d, Linear, SemuLayer
from .model import SemuModel
from .registration import register

__all__ = ["Conv2d", "Linear", "SemuConfig", "SemuLayer", "SemuModel", "register"]
