"""What sits in the model: enough to load, run, merge and ship an adapter."""

from .config import SemuConfig
from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .layer import NotInitializedError, SemuLayer
from .linear import Linear
from .model import SemuModel
from .parameter import ParamWrapper
from .registration import register

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "NotInitializedError",
    "ParamWrapper",
    "SemuConfig",
    "SemuLayer",
    "SemuModel",
    "register",
]
