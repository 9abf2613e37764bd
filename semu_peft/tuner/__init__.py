"""What sits in the model: enough to load, run, merge and ship an adapter."""

from .config import SemuConfig
from .conv import Conv1d, Conv2d, Conv3d
from .layer import SemuLayer
from .linear import Linear
from .model import SemuModel
from .registration import register

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Linear", "SemuConfig", "SemuLayer", "SemuModel", "register"]
