"""SEMU: make trained models forget, as a PEFT adapter. Importing this package registers the method with PEFT."""

from . import gates, localize
from .adapter.hotswap import hotswap_adapter
from .adapter.rerank import RerankReport, prune, rerank
from .adapter.scale import set_scale
from .adapter.search_scale import ScaleSearch, search_scale
from .concept import unlearn_concept
from .export.diffusers import save_as_diffusers_lora
from .export.from_lora import from_lora
from .export.lora import save_as_lora, to_lora
from .gradients import CoreCovariance, FactoredFisher, GradientSum, InputMoment, Sketch, SquaredSum
from .gradients.gather import Gathered, gather
from .language import forget_text
from .objectives import Retain
from .subspace import (
    RankBudget,
    RetainRule,
    SubspaceProfile,
    initialize_semu_weights,
    starts,
)
from .training.callbacks import Callback, EarlyStopping
from .training.natural import NaturalGradient
from .training.requests import add_request
from .training.rules import ClipGradientNorm, Mask, NormCap, RemoveLeading, RetainSafe, Rule
from .training.unlearn import UnlearnResult, unlearn
from .tuner import (
    NotInitializedError,
    SemuConfig,
    SemuLayer,
    SemuModel,
    register,
)
from .tuner.model_card import update_model_card

register()

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "ClipGradientNorm",
    "CoreCovariance",
    "EarlyStopping",
    "FactoredFisher",
    "Gathered",
    "GradientSum",
    "InputMoment",
    "Mask",
    "NaturalGradient",
    "NormCap",
    "NotInitializedError",
    "RankBudget",
    "RemoveLeading",
    "RerankReport",
    "Retain",
    "RetainRule",
    "RetainSafe",
    "Rule",
    "ScaleSearch",
    "SemuConfig",
    "SemuLayer",
    "SemuModel",
    "Sketch",
    "SquaredSum",
    "SubspaceProfile",
    "UnlearnResult",
    "add_request",
    "forget_text",
    "from_lora",
    "gates",
    "gather",
    "hotswap_adapter",
    "initialize_semu_weights",
    "localize",
    "objectives",
    "prune",
    "rerank",
    "save_as_diffusers_lora",
    "save_as_lora",
    "search_scale",
    "set_scale",
    "starts",
    "to_lora",
    "unlearn",
    "unlearn_concept",
    "update_model_card",
]
