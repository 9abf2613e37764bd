"""What sits in the model: enough to load, run, merge and ship an adapter."""

from .config import SemuConfig
from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .hotswap import hotswap_adapter
from .layer import SemuLayer
from .linear import Linear
from .model import SemuModel
from .parameter import ParamWrapper
from .registration import register
from .scale import set_scale

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "ParamWrapper",
    "SemuConfig",
    "SemuLayer",
    "SemuModel",
    "hotswap_adapter",
    "register",
    "set_scale",
]
