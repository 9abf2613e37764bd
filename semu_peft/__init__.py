"""SEMU: make trained models forget, as a PEFT adapter. Importing this package registers the method with PEFT."""

from . import objectives
from .concept import unlearn_concept
from .export import RerankReport, rerank, save_as_lora, to_lora
from .export_diffusers import save_as_diffusers_lora
from .from_lora import from_lora
from .subspace import RankBudget, RetainSubspace, SubspaceProfile, initialize_semu_weights
from .tuner import SemuConfig, SemuLayer, SemuModel, hotswap_adapter, register, set_scale
from .unlearn import UnlearnResult, unlearn

register()

__version__ = "0.1.0"
__all__ = [
    "RankBudget",
    "RerankReport",
    "RetainSubspace",
    "SemuConfig",
    "SemuLayer",
    "SemuModel",
    "SubspaceProfile",
    "UnlearnResult",
    "from_lora",
    "hotswap_adapter",
    "initialize_semu_weights",
    "objectives",
    "rerank",
    "save_as_diffusers_lora",
    "save_as_lora",
    "set_scale",
    "to_lora",
    "unlearn",
    "unlearn_concept",
]
