"""Which layers, experts and neurons are worth touching: each way gives one table, the best places first."""

from .examples import example_influence
from .experts import expert_affinity, expert_targets
from .layers import attribution, attribution_scores, fisher_ratio, importance, pareto, pareto_front, top_mask
from .neurons import DecodedNeurons, decode_neurons
from .table import Localization
from .tracing import causal_layers, mlp_modules, trace

__all__ = [
    "DecodedNeurons",
    "Localization",
    "attribution",
    "attribution_scores",
    "causal_layers",
    "decode_neurons",
    "example_influence",
    "expert_affinity",
    "expert_targets",
    "fisher_ratio",
    "importance",
    "mlp_modules",
    "pareto",
    "pareto_front",
    "top_mask",
    "trace",
]
