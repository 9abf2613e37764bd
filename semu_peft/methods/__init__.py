"""Published methods by their names: short compositions of what the other rooms hold, without a loop or a class."""

from .baselines import bad_teacher, boundary_shrink, dmm, fine_tune, l1_sparse, laf, neg_grad_plus, scrub, unsir
from .classification import amun, deep_delete, delete, salun, semu, unseen_confidence
from .diffusion import concept_ablation, esd, uce
from .editing import acu, chip, iau, k_fade, lfssd, needle, rocr, slug, ssd, tars
from .gating import eco, guard, ksd, neuron_adjust, o3, uld, whp
from .geometry import cir, gu, lat, npo_sam, repselect, wagle
from .language import ceu, dpo, flat, npo, satimp, simnpo, tpo, undial, unseen_answers, wga
from .multimodal import mmrecun, safe_eraser, siu
from .places import loku, lora_sb, pdu, rmu, seuf, sha256
from .recovery import repair
from .table import METHODS, Method

__all__ = [
    "METHODS",
    "Method",
    "acu",
    "amun",
    "bad_teacher",
    "boundary_shrink",
    "ceu",
    "chip",
    "cir",
    "concept_ablation",
    "deep_delete",
    "delete",
    "dmm",
    "dpo",
    "eco",
    "esd",
    "fine_tune",
    "flat",
    "gu",
    "guard",
    "iau",
    "k_fade",
    "ksd",
    "l1_sparse",
    "laf",
    "lat",
    "lfssd",
    "loku",
    "lora_sb",
    "mmrecun",
    "needle",
    "neg_grad_plus",
    "neuron_adjust",
    "npo",
    "npo_sam",
    "o3",
    "pdu",
    "repair",
    "repselect",
    "rmu",
    "rocr",
    "safe_eraser",
    "salun",
    "satimp",
    "scrub",
    "semu",
    "seuf",
    "sha256",
    "simnpo",
    "siu",
    "slug",
    "ssd",
    "tars",
    "tpo",
    "uce",
    "uld",
    "undial",
    "unseen_answers",
    "unseen_confidence",
    "unsir",
    "wagle",
    "wga",
    "whp",
]
