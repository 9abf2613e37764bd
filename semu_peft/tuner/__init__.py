"""What sits in the model: enough to load, run, merge and ship an adapter."""

from .config import SemuConfig
from .conv import Conv2d
from .hotswap import hotswap_adapter
from .layer import SemuLayer
from .linear import Linear
from .model import SemuModel
from .registration import register
from .scale import set_scale

__all__ = ["Conv2d", "Linear", "SemuConfig", "SemuLayer", "SemuModel", "hotswap_adapter", "register", "set_scale"]
