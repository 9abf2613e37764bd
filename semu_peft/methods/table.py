"""The zoo as a table: what each method is in the words of the house, what it needs, and where it is from.

The documentation's zoo and the command line are views of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from . import baselines, classification, diffusion, editing, gating, geometry, language, multimodal, places, recovery

Kind = Literal["classification", "language", "diffusion", "recommender", "any"]
Need = Literal[
    "alternates",
    "logits",
    "retain",
    "ridge head",
    "score",
    "unseen",
    "keys and values",
    "MoE",
    "layers",
    "learning rate",
    "limit",
    "answer",
    "concept tokens",
    "columns",
]

_UNTRAINED = ("uce", "eco", "guard", "ksd", "neuron_adjust")


@dataclass(frozen=True)
class Method:
    """A row of the zoo.

    Attributes:
        function: What says the method's sentence.
        kind: Which models it was made for.
        equation: What it minimises or writes.
        sentence: The rooms' words it is made of.
        source: Where it is from.
        needs: What it needs beside the model and the forget data; `"retain"` stands only where it does not run without.
        use: When to take it.

    Examples:
        >>> from semu_peft.methods import METHODS
        >>> METHODS["salun"].sentence, METHODS["salun"].trains
        ('Mask of the largest forget gradients × RandomLabel', True)
    """

    function: Callable[..., Any] = field(repr=False)
    kind: Kind
    equation: str
    sentence: str
    source: str
    needs: tuple[Need, ...]
    use: str

    @property
    def name(self) -> str:
        """What it is called in `semu_peft.methods`."""
        return self.function.__name__

    @property
    def trains(self) -> bool:
        """Whether there are steps of training."""
        return self.function.__module__.rpartition(".")[-1] not in ("editing",) and self.name not in _UNTRAINED


_ROWS = (
    Method(classification.semu, "classification", "CE(random label), ΔW = U R Vᵀ", "subspace × RandomLabel",
           "SEMU, 2502.07587", (), "to compare with the paper"),
    Method(classification.delete, "classification", "KL(softmax(z₀ without y) ‖ p)", "subspace × DecoupledDistillation",
           "DELETE, 2503.23751", (), "a class, without retain data"),
    Method(classification.deep_delete, "classification", "L(W) + L(W + Δ) + w KL(p₀ ‖ p) on retain data",
           "subspace × SimulatedRelearning(DecoupledDistillation) × KLToOriginal", "this library", ("retain",),
           "where somebody will train the model on"),
    Method(classification.unseen_confidence, "classification", "KL(q ‖ p), q as sure as on unseen data",
           "subspace × UnseenConfidence", "this library", ("unseen",), "random examples"),
    Method(baselines.neg_grad_plus, "any", "β CE(R) − (1 − β) CE(F)", "GradientAscent × CrossEntropy",
           "NegGrad+, 2302.09880; GA, 2109.13398", (), "a baseline"),
    Method(classification.salun, "classification", "CE(random label) on the largest |g_F|",
           "Mask of the largest forget gradients × RandomLabel", "SalUn, 2310.12508", (), "the baseline of others"),
    Method(baselines.fine_tune, "any", "CE(R)", "CrossEntropy on retain data", "2108.11577", ("retain",),
           "a baseline"),
    Method(recovery.repair, "any", "CE(R) + w KL(p₁ ‖ p) on F, p₁ after forgetting", "CrossEntropy × KLToOriginal(now)",
           "this library", ("retain",), "after a fast method: win back what it took along"),
    Method(baselines.l1_sparse, "classification", "CE(R) + γₜ ‖θ‖₁", "CrossEntropy × SoftThreshold(Ramp)",
           "2304.04934", ("retain",), "random examples, with all retain data"),
    Method(baselines.scrub, "classification", "−KL(p₀ ‖ p) on F, then α KL(p₀ ‖ p) + γ CE on R",
           "InTurns(KLToOriginal) × InTurns(KLToOriginal + CrossEntropy)", "SCRUB, 2302.09880", ("retain",),
           "with retain data; a membership attack may show it"),
    Method(baselines.bad_teacher, "classification", "KL(untrained ‖ p) on F + KL(p₀ ‖ p) on R",
           "KLToOriginal(untrained) × KLToOriginal", "2205.08096", ("retain",), "a baseline"),
    Method(baselines.boundary_shrink, "classification", "CE(nearest wrong class)", "BoundaryShrink",
           "2303.11570", (), "a class, without retain data"),
    Method(baselines.unsir, "classification", "CE(noise that maximises the loss) + CE(R), then CE(R)",
           "error_maximizing_noise × CrossEntropy, twice", "UNSIR, 2111.08947", ("retain",),
           "a class, with labels of the forget data alone"),
    Method(baselines.dmm, "classification", "mean (z − t)²", "pair_with_logits × OracleMatching", "DMM, 2410.23232",
           ("logits",), "where retrained models or data attribution say what to answer"),
    Method(baselines.laf, "classification", "E(R) − E(F), E = Σ exp(m / (m + 1)); then Σ d(R) − log Σ exp(d(F) / τ)",
           "embedding_code × InTurns(EmbeddingReconstruction) × InTurns(RepelEmbeddings, KeepEmbeddings)",
           "LAF, 2404.00506", ("retain", "layers"), "without labels"),
    Method(classification.amun, "classification", "½ CE(x, y) + ½ CE(x′, y′)",
           "adversarial_examples × AdversarialUnlearning", "AMUN, ICML 2025", (), "random examples"),
    Method(editing.slug, "any", "ΔW = λ s u vᵀ", "pareto × rank 1 × Ascent × search_scale", "SLUG, 2407.11867",
           ("retain", "score"), "seconds, one layer, the smallest file"),
    Method(editing.ssd, "any", "θ min(λ I_D / I_F, 1)", "Fisher × dampen", "SSD, 2308.07707", ("retain",),
           "a class or a group, in seconds"),
    Method(editing.lfssd, "any", "θ min(λ I_D / I_F, 1), I = |∂ ‖z‖²|", "SquaredLogits × dampen", "LFSSD, 2402.19308",
           ("retain",), "without labels"),
    Method(editing.iau, "any", "θ + η (g_F − g_R)", "gather × influence_step", "IAU, 2507.23257", ("retain",),
           "few examples; a first try"),
    Method(editing.k_fade, "any", "W + η B⁻¹ G A⁻¹", "CoreCovariance × newton_step", "K-FADE, 2602.10568", ("retain",),
           "near a minimum; exact for regressions"),
    Method(editing.acu, "any", "(XᵀX − X_FᵀX_F + γ I)⁻¹ (XᵀY − X_FᵀY_F)", "RidgeHead.forget", "ACU, 2505.12239",
           ("ridge head",), "exact, with a certificate"),
    Method(editing.chip, "any", "ΔW = −Q Qᵀ W", "InputMoment × Projection", "CHIP, 2512.09867",
           ("retain", "layers"), "what differs from its sibling by a direction"),
    Method(editing.rocr, "language", "ΔW = E (δ I + KᵀMK)⁻¹ KᵀM", "InputMoment × RankOneWrite", "ROCR, 2506.07795",
           ("keys and values",), "one subject, redirected in seconds"),
    Method(language.npo, "language", "2/β log(1 + (p / p₀)^β)", "NPO", "2404.05868", (), "answers; the safe first try"),
    Method(language.simnpo, "language", "−2/β log σ(β (n − δ))", "SimNPO", "2410.07163", (), "without a reference"),
    Method(language.dpo, "language", "−2/β log σ(β margin)", "DPO", "2305.18290; AltPO, 2409.13474", ("alternates",),
           "where it is known what to say instead"),
    Method(language.flat, "language", "−g(P′) + f*(g(P))", "FDivergence", "FLAT, 2410.11143", ("alternates",),
           "refusals, without retain data"),
    Method(language.tpo, "language", "−2/β log σ(β mean(z₀ − z))", "TPO", "2506.03142", (), "marked tokens"),
    Method(language.undial, "language", "KL(softmax(z₀ − β 1_y) ‖ p)", "UNDIAL", "2402.10052", (),
           "stable over many steps"),
    Method(language.ceu, "language", "−log(1 − p(y))", "CEU", "CE-U, 2503.01224", (), "without a reference"),
    Method(language.wga, "language", "p^β log p, weight held", "WGA", "2502.19301", (), "answers, with retain data"),
    Method(language.satimp, "language", "p^β (1 − p)^β₂ log p, weight held", "SatImp", "2505.11953", (), "a baseline"),
    Method(language.unseen_answers, "language", "relu(tᵢ − nᵢ)²", "UnseenAnswer", "this library", ("unseen",),
           "to look as retrained, at least damage"),
    Method(geometry.repselect, "language", "W + η (G without its leading directions)",
           "LoRA × CrossEntropy, GradientAscent × RemoveLeading × one step", "RepSelect, 2606.17168",
           ("layers", "learning rate"), "against relearning, on the weights themselves"),
    Method(geometry.gu, "any", "argmin ‖Δ − Δ₀‖_M with ⟨g_r, Δ⟩ ≤ 0", "NPO × RetainSafe", "GU, 2511.17100",
           ("retain",), "beside any objective"),
    Method(geometry.npo_sam, "any", "∇L(θ + ρ ∇L / ‖∇L‖)", "NPO × SharpnessAware", "2502.05374", (),
           "against relearning and rounding"),
    Method(geometry.lat, "any", "max L(h + δ) over ‖δ‖ ≤ ρ ‖h‖", "PerturbedLatents(NPO)",
           "LAT, 2403.05030; AGT^AO, 2602.01703", ("layers",), "against pushes inside the model, and relearning"),
    Method(geometry.cir, "any", "max(0, ⟨o, o₀⟩ / ‖o₀‖²) with ΔW Q = 0, Pᵀ ΔW = 0",
           "LayerCovariance × BreakActivations × RemoveDirections",
           "CIR, 2509.11816", (), "against relearning"),
    Method(geometry.wagle, "any", "entries with the largest |(θ − g_r / μ) g_f|", "wagle_scores × Mask × NPO",
           "WAGLE, 2410.17509", ("retain",), "few entries, chosen with retain data"),
    Method(places.loku, "any", "1 + p(y) − max p(v)", "WeightSplit(FILA) × InvertedHinge", "LoKU, 2408.06621",
           ("retain",), "in the weights' own leading part"),
    Method(places.lora_sb, "any", "R₀ = −η S", "FirstStep × NPO", "LoRA-SB, 2411.19557", (), "short runs"),
    Method(places.rmu, "language", "‖h − c u‖² + α ‖h_r − h₀‖²", "RMU × PreserveHiddenStates",
           "2403.03218; adaptive, 2408.06223", ("layers",), "hazardous knowledge"),
    Method(places.pdu, "language", "(max z − mean z)² under CE(R) ≤ ε", "FlatLogits × PrimalDual", "2506.05314",
           ("retain", "limit"), "with a limit instead of a weight"),
    Method(places.sha256, "language", "log p(y) in the first blocks' MLPs", "causal_layers × GradientAscent",
           "2504.12996", (), "facts about subjects"),
    Method(places.seuf, "language", "L + α ‖g − onehot‖²", "expert_affinity × one expert × RouterAnchor",
           "SEUF, 2411.18797", ("MoE",), "mixtures of experts"),
    Method(gating.o3, "any", "(I − P Pᵀ) G (I − Q Qᵀ), open where h is near h_F", "add_request × NPO × Nearest × gated",
           "O3, 2407.10223", (), "many requests, each taken back alone; served, not handed out"),
    Method(gating.eco, "language", "e + σ ε on the names in prompts with p(F) ≥ τ", "linear_gate × EmbeddingCorruption",
           "ECO, 2406.07933", ("retain",), "nothing may be trained; served, not handed out"),
    Method(gating.guard, "language", "p(token that completes a run of the answer found) = 0",
           "linear_gate × Retrieval × ForbiddenAnswers",
           "GUARD, 2505.13312", ("retain",), "words that must not be said; paraphrases are"),
    Method(gating.ksd, "language", "abstain where |k − μ| ≤ k_max σ", "Nearest(box) × Abstention", "KSD, 2503.21730",
           ("layers", "answer"), "a skill or a subject; served, not handed out"),
    Method(gating.neuron_adjust, "language", "a ← μ_r − (a − μ_f) σ_r / σ_f where N_f ≥ N_r",
           "neuron_moments × NeuronAdjust × ActivationGate", "Neuron Adjust, 2503.21730", ("retain", "layers"),
           "a skill, without training"),
    Method(gating.uld, "language", "z − w a, a: CE(F) + λ KL(uniform ‖ a) on R",
           "truncated × CrossEntropy × UniformDistribution × LogitCombination", "ULD, 2406.08607", (),
           "no cost of utility; twice the work a token; served, not handed out"),
    Method(gating.whp, "language", "z − α relu(z₊ − z)", "CrossEntropy × LogitCombination(relu)",
           "Who's Harry Potter, 2310.02238", (), "a teacher for the model itself; served, not handed out"),
    Method(editing.needle, "language", "v + N(0, σ²)", "noise_columns", "ConceptVectors, 2406.11614", ("columns",),
           "an oracle: where it is known which neurons hold the concept"),
    Method(editing.tars, "language", "w ← −‖w‖ t / ‖t‖ where cos(w, t) ≥ τ", "concept_target × reverse_rows",
           "TARS, 2412.10257", ("layers", "concept tokens"), "a concept of one word, without data or training"),
    Method(diffusion.uce, "diffusion", "W′ = (Σ W c* cᵀ + W C)(Σ c cᵀ + C)⁻¹", "edit_concepts", "UCE, 2308.14761", (),
           "a hundred concepts in seconds"),
    Method(diffusion.esd, "diffusion", "‖ε − (ε₀(∅) − η (ε₀(c) − ε₀(∅)))‖²", "subspace × NegativeGuidance",
           "ESD, 2303.07345", (), "a concept without an anchor"),
    Method(diffusion.concept_ablation, "diffusion", "‖ε(x, c) − ε₀(x, c*)‖²", "subspace × ConditionMatching",
           "2303.13516; SEMU, 2502.07587", (), "a concept that becomes its anchor"),
    Method(multimodal.safe_eraser, "language", "−CE(F) + ½ CE(R) + ½ CE(same question, harmless image)",
           "GradientAscent + AlternateAnswer × CrossEntropy", "SafeEraser, 2502.12520", ("alternates",),
           "harmful pairs of image and question, without refusing the question"),
    Method(multimodal.siu, "language", "0.9 CE(new answers) + 0.75 KL(p₀ ‖ p) beside two names",
           "CrossEntropy + TokenSelective(KLToOriginal(without))", "SIU, 2405.12523", ("concept tokens",),
           "what one image shows, by new answers"),
    Method(multimodal.mmrecun, "recommender", "−log σ(s(negative) − s(item)) + w BPR(R)", "ReverseBPR × BPR",
           "MMRecUn, 2405.15328", (), "interactions, users or items"),
)  # fmt: skip

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})
"""All methods, by the name of their function in `semu_peft.methods`."""
