"""No published system that this library has looked at is silently missing: each is here by a name, or says why not."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"

HERE = {
    # classifiers
    "SEMU": "methods.semu", "DELETE": "methods.delete", "SSD": "methods.ssd", "LFSSD": "methods.lfssd",
    "SLUG": "methods.slug", "SalUn": "methods.salun", "l1-sparse": "methods.l1_sparse", "LAF": "methods.laf",
    "CUPID": "training.rules.RoutedGradient", "IAU": "methods.iau", "DMM": "methods.dmm",
    "TRAK": "localize.example_influence", "KLOM": "evaluation.klom",
    "worst-case sets": "evaluation.worst_case_forget_set",
    "ACU": "methods.acu", "AMUN": "methods.amun", "NegGrad+": "methods.neg_grad_plus",
    "fine-tuning": "methods.fine_tune",
    "SCRUB": "methods.scrub", "bad teacher": "methods.bad_teacher", "boundary shrink": "methods.boundary_shrink",
    "UNSIR": "methods.unsir",
    # language models
    "GradAscent": "methods.neg_grad_plus", "GradDiff": "methods.neg_grad_plus", "NPO": "methods.npo",
    "SimNPO": "methods.simnpo", "DPO": "methods.dpo", "AltPO": "methods.dpo", "IdkDPO": "methods.dpo",
    "IdkNLL": "objectives.AlternateAnswer", "RMU": "methods.rmu", "adaptive RMU": "objectives.AdaptiveRMU",
    "UNDIAL": "methods.undial", "CE-U": "methods.ceu", "WGA": "methods.wga", "SatImp": "methods.satimp",
    "PDU": "methods.pdu", "FLAT": "methods.flat", "TPO": "methods.tpo", "AGT^AO": "methods.lat", "LAT": "methods.lat",
    "NPO+SAM": "methods.npo_sam", "LoKU": "methods.loku", "VILA": "gradients.FactoredFisher",
    "ReGLU": "subspace.starts.FeatureDifference", "RepSelect": "methods.repselect", "CIR": "methods.cir",
    "GU": "methods.gu", "WAGLE": "methods.wagle", "K-FADE": "methods.k_fade", "SHA256": "methods.sha256",
    "ROCR": "methods.rocr", "SEUF": "methods.seuf", "decoding neurons": "localize.decode_neurons",
    "DP2Unlearning": "training.rules.PrivateGradient", "bounded PEFT": "training.rules.NormCap",
    "task vector": "adapter.search_scale.search_scale", "orthogonal LoRA": "subspace.retain.apart_from",
    "O3": "methods.o3", "ECO": "methods.eco", "GUARD": "methods.guard", "ULD": "methods.uld", "WHP": "methods.whp",
    "Neuron Adjust": "methods.neuron_adjust", "KSD": "methods.ksd",
    "TARS": "methods.tars",
    # carriers
    "LoRA-SB": "methods.lora_sb", "SoRA": "training.rules.SoftThreshold", "CoDyRA": "training.rules.SoftThreshold",
    "ALLoRA": "training.rules.RowScale", "KaSA": "subspace.starts.WeightSplit", "LoLDU": "subspace.starts.WeightSplit",
    "RandLoRA": "training.unlearn.unlearn", "GaLore": "training.optimizers.make_optimizer",
    "LoRAM": "export.pruned.embed", "SLTrain": "training.rules.Mask",
    # images and text, recommenders, measures
    "SIU": "methods.siu", "SafeEraser": "methods.safe_eraser", "SARR": "evaluation.count_refusals",
    "CHIP": "methods.chip", "ForgetMe": "evaluation.entangled.entangled", "MMRecUn": "methods.mmrecun",
    "ConceptVectors": "evaluation.vector_change", "Needle": "methods.needle",
    "logit lens attacks": "evaluation.lens_attack", "MUSE": "evaluation.muse",
    "UnlearnCanvas": "evaluation.unlearn_canvas", "UCE": "methods.uce", "ESD": "methods.esd",
    "concept ablation": "methods.concept_ablation",
}  # fmt: skip

NOT_HERE = {
    "UnlearnRec", "SelfCF", "SAUCE", "UnLOK-VQA", "FIUBench", "MMUBench", "Concept poisoning", "Deep Unlearning",
    "DAMP",
    "NSRU", "UUE", "ERUF", "Recover-to-Forget", "LUNE", "BID-LoRA", "SAGE", "LACUNA", "Forget Narrowly", "ATWU", "RULE",
    "ALTER", "AILS-NTUA", "ZJUKLAB", "TREW", "RWKU", "RESTOR", "Sleek", "ORT", "UnUnlearning", "Fira",
}  # fmt: skip


@pytest.mark.parametrize("name", HERE)
def test_what_is_here_is_where_it_is_said_to_be(name: str) -> None:
    module, _, found = f"semu_peft.{HERE[name]}".rpartition(".")
    assert hasattr(importlib.import_module(module), found), f"{name}: semu_peft.{HERE[name]} is not there"


def test_what_is_not_here_says_why() -> None:
    """One entry in the documentation's list for each, and none more."""
    told = PAGE.read_text(encoding="utf-8").split("## Not here, and why")[1].split("\n## ")[0]
    named = {" ".join(name.split()) for name in re.findall(r"\*\*([^*]+)\*\*", told)}
    assert named == NOT_HERE
    for entry in told.strip().split("\n- ")[1:]:
        assert len(entry.split(":", 1)[1].split()) >= 4, f"{entry[:40]} gives no reason"


def test_nothing_is_both_here_and_not() -> None:
    assert not {name.lower() for name in HERE} & {name.lower() for name in NOT_HERE}


def test_every_method_of_a_paper_is_in_the_list() -> None:
    """What comes into the table comes into the list, unless it is this library's own."""
    from semu_peft.methods import METHODS

    own = {name for name, row in METHODS.items() if row.source == "this library"}
    assert set(METHODS) - own <= {place.removeprefix("methods.") for place in HERE.values()}
