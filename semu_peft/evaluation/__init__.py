"""Did the model forget, what did it keep, and what did that cost.

Functions take models and loaders and return plain dataclasses. A metric that fits a classifier of its own needs
the extra `evaluation`; importing this package does not.
"""

from .attack_report import AttackReport, NotRun
from .attacks import attack
from .classification import Predictions, evaluate_forgetting, predict
from .comparison import ForgettingComparison, ForgettingMetrics
from .concept_vectors import VectorChange, vector_change
from .diffusion import (
    ErasureMetrics,
    LabelledPrompt,
    UnlearnCanvasMetrics,
    classify_samples,
    clip_score,
    evaluate_erasure,
    frechet_distance,
    kernel_distance,
    unlearn_canvas,
)
from .drift import Drift, fluency, neutral_kl, ngram_entropy
from .entangled import Entangled, entangled
from .generation import Rouge, generate_answers, rouge_l
from .harness import harness
from .klom import Klom, klom
from .language import LanguageMetrics, evaluate_language
from .language_membership import (
    Separation,
    min_k,
    privacy_leakage,
    separation,
    text_membership,
    zlib_score,
)
from .membership import MembershipInference, attack_membership, membership_inference
from .memorisation import (
    exact_memorisation,
    extraction_strength,
    forget_quality,
    model_utility,
    truth_ratio,
)
from .muse import knowledge_memorisation, verbatim_memorisation
from .perturbation import InputAttack, Stripping, flipped_inputs, noisy_inputs, stripping
from .probing import LensAttack, Probes, lens_attack, linear_probes, logit_lens
from .prompt_search import PromptSearch, search_prompt
from .quantization import LayerRounding, QuantizationAttack, quantization, round_to_nearest
from .ranking import RankingMetrics, evaluate_ranking
from .refusals import Refusals, count_refusals
from .relearning import RelearningCurve, relearning, usual_attackers
from .seeds import SeedAttack, seed_attack
from .shadow_membership import ShadowMembership, lira_scores, rmia_scores, score_attack
from .text_attacks import PromptAttacks, TextRelearning, prompt_attacks, relearn_text, rounded_weights
from .token_scores import TokenScores, score_answers, score_texts
from .worst_case import worst_case_forget_set

__all__ = [
    "LensAttack",
    "lens_attack",
    "Entangled",
    "Refusals",
    "VectorChange",
    "count_refusals",
    "entangled",
    "vector_change",
    "RankingMetrics",
    "evaluate_ranking",
    "AttackReport",
    "Drift",
    "ErasureMetrics",
    "ForgettingComparison",
    "ForgettingMetrics",
    "InputAttack",
    "Klom",
    "LabelledPrompt",
    "LanguageMetrics",
    "LayerRounding",
    "MembershipInference",
    "NotRun",
    "Predictions",
    "Probes",
    "PromptAttacks",
    "PromptSearch",
    "QuantizationAttack",
    "RelearningCurve",
    "Rouge",
    "SeedAttack",
    "Separation",
    "ShadowMembership",
    "Stripping",
    "TextRelearning",
    "TokenScores",
    "UnlearnCanvasMetrics",
    "attack",
    "attack_membership",
    "classify_samples",
    "clip_score",
    "evaluate_erasure",
    "evaluate_forgetting",
    "evaluate_language",
    "exact_memorisation",
    "extraction_strength",
    "flipped_inputs",
    "fluency",
    "forget_quality",
    "frechet_distance",
    "generate_answers",
    "harness",
    "kernel_distance",
    "klom",
    "knowledge_memorisation",
    "linear_probes",
    "lira_scores",
    "logit_lens",
    "membership_inference",
    "min_k",
    "model_utility",
    "neutral_kl",
    "ngram_entropy",
    "noisy_inputs",
    "predict",
    "privacy_leakage",
    "prompt_attacks",
    "quantization",
    "relearn_text",
    "relearning",
    "rmia_scores",
    "rouge_l",
    "round_to_nearest",
    "rounded_weights",
    "score_answers",
    "score_attack",
    "score_texts",
    "search_prompt",
    "seed_attack",
    "separation",
    "stripping",
    "text_membership",
    "truth_ratio",
    "unlearn_canvas",
    "worst_case_forget_set",
    "usual_attackers",
    "verbatim_memorisation",
    "zlib_score",
]
