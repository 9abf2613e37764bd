"""What sits in the model: enough to load, run, merge and ship an adapter."""

from .config import SemuConfig
from .conv import Conv2d
from .layer import SemuLayer
from .linear import Linear
from .model import SemuModel
from .registration import register

__all__ = ["Conv2d", "Linear", "SemuConfig", "SemuLayer", "SemuModel", "register"]
