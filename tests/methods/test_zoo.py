"""The zoo is what it says: short sentences, each in the table and in the documentation, on top of the house."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from language_batches import padded
from models import Mlp, gpt2, llama, vector_batches
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import semu_peft
from semu_peft import Retain, SemuConfig, initialize_semu_weights, methods, unlearn
from semu_peft.evaluation import predict
from semu_peft.methods import METHODS, table
from semu_peft.methods.sentence import covariance_targets, keep
from semu_peft.objectives import CrossEntropy, GradientAscent, RandomLabel, adversarial_examples

ROOM = Path(methods.__path__[0])
SENTENCES = [path for path in sorted(ROOM.glob("*.py")) if path.name not in ("__init__.py", "table.py")]
TARGETS = ["fc1", "fc2", "head"]


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", SENTENCES, ids=lambda path: path.stem)
def test_a_method_is_short_and_has_no_loop_and_no_class(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [n for n in ast.walk(tree) if isinstance(n, (ast.For, ast.AsyncFor, ast.While, ast.ClassDef))]
    for function in functions(path):
        documented = ast.get_docstring(function) is not None
        body = function.body[1:] if documented else function.body
        signature = function.body[0].lineno - function.lineno
        lines = signature + (body[-1].end_lineno or 0) - body[0].lineno + 1
        assert lines <= 25, f"{function.name}: {lines} lines"


def test_every_method_is_in_the_table_and_in_the_documentation() -> None:
    public = {
        function.name
        for path in SENTENCES if path.stem != "sentence"
        for function in functions(path) if not function.name.startswith("_")
    }  # fmt: skip
    assert set(METHODS) == public
    assert set(methods.__all__) == public | {"METHODS", "Method"}
    page = (ROOM.parents[1] / "docs" / "zoo.md").read_text(encoding="utf-8")
    for name, row in METHODS.items():
        assert getattr(methods, name) is row.function
        shown = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert len(shown) == 1, f"docs/zoo.md needs one row for `{name}`: run `python docs/zoo.py`"
        for part in (row.sentence, row.source, row.use):
            assert part in shown[0], f"{name}: {part!r} is not what docs/zoo.md says: run `python docs/zoo.py`"


def test_needs_are_what_the_functions_ask_for() -> None:
    for name, row in METHODS.items():
        parameters = inspect.signature(row.function).parameters
        required = {each for each, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
        assert ("retain" in row.needs) == ("retain" in required), name
        for need in ("score", "unseen", "limit", "answer", "columns"):
            assert (need in row.needs) == (need in required), name
        assert ("learning rate" in row.needs) == ("learning_rate" in required), name
        assert ("layers" in row.needs) == bool({"layer", "layers", "target_modules"} & required), name


def test_nothing_below_imports_methods() -> None:
    for module in pkgutil.walk_packages(semu_peft.__path__, "semu_peft."):
        if module.name.split(".")[1] in ("methods", "cli", "report"):
            continue
        path = ROOM.parent.joinpath(*module.name.split(".")[1:])
        source = (path.with_suffix(".py") if not module.ispkg else path / "__init__.py").read_text(encoding="utf-8")
        assert "semu_peft.methods import" not in source and "import methods" not in source.replace(">>> from", ""), path


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def adapted(kind: str) -> nn.Module:
    torch.manual_seed(5)
    base = Mlp()
    if kind == "bare":
        return base
    config: Any = SemuConfig(target_modules=TARGETS) if kind == "semu" else LoraConfig(r=2, target_modules=TARGETS)
    return get_peft_model(base, config)


@pytest.mark.parametrize("kind", ["bare", "lora", "semu"])
@pytest.mark.parametrize("name", ["salun", "neg_grad_plus", "gu", "wagle", "npo_sam", "amun", "fine_tune", "delete"])
def test_the_carrier_is_the_models(name: str, kind: str) -> None:
    """The same sentence trains all weights, a LoRA or SEMU's cores, and only those."""
    model, forget, retain = adapted(kind), vector_batches(2), vector_batches(2)
    settings: dict[str, Any] = {}
    if name in ("delete", "gu", "wagle", "npo_sam") and kind == "bare":
        original = adapted("bare").requires_grad_(False).eval()
        settings = {"reference": original} if name == "delete" else {"objective": methods_npo(original)}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad and p.numel()}
    result = METHODS[name].function(model, forget, retain, max_steps=2, learning_rate=1e-2, progress=False, **settings)
    assert result.steps == 2
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def decoders(kind: str) -> Any:
    """Tiny decoders, whose embedding has no inputs to take moments of; gpt2's head shares its weight."""
    torch.manual_seed(0)
    model = gpt2() if kind == "tied" else llama()
    configs = {
        "linear layers": SemuConfig(target_modules="all-linear"),
        "one of rank 0": SemuConfig(target_modules="all-linear", rank_pattern={"q_proj": 0}),
    }
    return get_peft_model(model, configs[kind], adapter_name="other") if kind in configs else model


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("bare", {"model.embed_tokens"}),
        ("tied", {"transformer.wte", "transformer.wpe", "lm_head"}),
        ("linear layers", {"model.embed_tokens", "lm_head"}),
        ("one of rank 0", {"model.embed_tokens", "lm_head", *(f"model.layers.{n}.self_attn.q_proj" for n in (0, 1))}),
    ],
)
def test_cir_finds_the_layers_of_a_decoder(kind: str, left_out: set[str]) -> None:
    """All that read inputs, of a bare model, or the adapter's."""
    model = decoders(kind)
    name = "other" if isinstance(model, PeftModel) else None
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    every = {layer for layer, module in decoders("tied" if kind == "tied" else "bare").named_modules()
             if isinstance(module, kinds)}  # fmt: skip
    options: dict[str, Any] = {"max_steps": 2, "inputs": 1, "outputs": 1, "adapter_name": name, "progress": False}
    assert methods.cir(model, [padded()], [padded(seed=9)], **options).steps == 2
    where = covariance_targets(model, name)
    assert where["adapter_name"] == name
    assert {layer for layer in every if re.fullmatch(where["targets"], layer)} == every - left_out


def test_k_fade_of_a_decoder_moves_all_but_the_embedding() -> None:
    model = decoders("bare")
    edit = methods.k_fade(model, [padded()], [padded(seed=9)], progress=False)
    assert edit.deltas.keys() == {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def test_the_benchmark_runs_every_method_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("tofu", ".", "zoo"):
        monkeypatch.syspath_prepend(str(ROOM.parents[1] / "benchmarks" / folder))
    images, texts = importlib.import_module("rows"), importlib.import_module("text_rows")
    for kind, rows, left_out in (
        ("classification", images.rows(), images.LEFT_OUT),
        ("language", texts.text_rows(), texts.LEFT_OUT),
    ):
        run = {row.name.split(",")[0].split()[0] for row in rows} | {
            name for names in left_out for name in names.split(", ")
        }
        assert {name for name, row in METHODS.items() if row.kind == kind} <= run
    both = {row.name.split(",")[0].split()[0] for row in [*images.rows(), *texts.text_rows()]}
    assert {name for name, row in METHODS.items() if row.kind == "any"} <= both | images.LEFT_OUT.keys()


def test_amun_takes_neighbours_that_were_found_before() -> None:
    """In one batch of all examples: each has the neighbour that it has by itself, and the run is the same."""
    forget, retain = vector_batches(2), vector_batches(2)
    found, given = adapted("bare"), adapted("bare")
    methods.amun(found, forget, retain, max_steps=3, learning_rate=1e-2, progress=False)
    sizes = [len(labels) for _, labels in forget]
    (pair,) = adversarial_examples(given, [tuple(torch.cat(part) for part in zip(*forget, strict=True))])
    parts = zip(*(tensor.split(sizes) for side in pair for tensor in side), strict=True)
    pairs = [(each[:2], each[2:]) for each in parts]
    methods.amun(given, pairs, retain, max_steps=3, learning_rate=1e-2, progress=False)
    torch.testing.assert_close(weights(given), weights(found), rtol=1e-5, atol=1e-6)


def methods_npo(original: nn.Module) -> Any:
    from semu_peft.objectives import NPO

    return NPO(reference=original)


def test_semu_says_what_its_parts_say() -> None:
    forget, retain = vector_batches(2), vector_batches(2)
    named, by_hand = adapted("semu"), adapted("semu")
    methods.semu(named, forget, retain, max_steps=3, progress=False)
    objective = RandomLabel(seed=0)
    initialize_semu_weights(by_hand, forget, objective, progress=False)
    unlearn(by_hand, forget, objective, retain=Retain(retain, CrossEntropy()), max_steps=3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(named).values(), weights(by_hand).values(), strict=True))


def test_salun_with_the_whole_fraction_is_random_labels() -> None:
    """Acceptance: fraction 1 gives RandomLabel's trajectory, bit for bit."""
    forget = vector_batches(3)
    masked, free = adapted("bare"), adapted("bare")
    said: Any = {"max_steps": 6, "learning_rate": 1e-2, "progress": False}
    methods.salun(masked, forget, fraction=1.0, **said)
    methods.semu(free, forget, **said)
    assert all(torch.equal(a, b) for a, b in zip(weights(masked).values(), weights(free).values(), strict=True))


def test_l1_sparse_without_a_penalty_is_fine_tuning() -> None:
    """Acceptance: with γ = 0 it is fine-tuning, bit for bit; with γ it makes exact zeros."""
    forget, retain = vector_batches(2), vector_batches(2)
    said: Any = {"max_steps": 6, "learning_rate": 1e-2, "progress": False}
    plain, none, some = adapted("bare"), adapted("bare"), adapted("bare")
    methods.fine_tune(plain, forget, retain, epochs=6, **said)
    methods.l1_sparse(none, forget, retain, alpha=0.0, **said)
    methods.l1_sparse(some, forget, retain, alpha=2.0, **said)
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(none).values(), strict=True))
    assert sum(int((value == 0).sum()) for value in weights(some).values()) > 0


def test_negative_gradient_by_hand() -> None:
    """`β CE(R) − (1 − β) CE(F)`, one plain step."""
    forget, retain = vector_batches(1), vector_batches(2)[1:]
    model, other = adapted("bare").eval(), adapted("bare").eval()
    methods.neg_grad_plus(
        model, forget, retain, beta=0.7, max_steps=1, progress=False, scheduler=constant,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )  # fmt: skip
    (0.7 * CrossEntropy()(other, retain[0]) + 0.3 * GradientAscent()(other, forget[0])).backward()
    for changed, start in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(changed, start - 0.1 * start.grad)


def constant(optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def test_iaus_released_step_is_the_sign() -> None:
    """Acceptance: `|Δ| / lr = 1` for every coordinate, and Δ ∝ g_F − g_R without it."""
    model, forget, retain = adapted("bare").eval(), vector_batches(1), vector_batches(2)[1:]
    signed = methods.iau(model, forget, retain, step_size=1e-3, update="sign", progress=False)
    before = weights(model)
    with signed.apply(model):
        moved = {name: value - before[name] for name, value in weights(model).items()}
    sizes = torch.cat([value.abs().flatten() for value in moved.values()])
    assert sizes[sizes > 0].sub(1e-3).abs().max() < 1e-6
    (CrossEntropy()(model, forget[0]) - CrossEntropy()(model, retain[0])).backward()
    with methods.iau(model, forget, retain, step_size=0.5, progress=False).apply(model):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach() - before[name], 0.5 * parameter.grad, atol=1e-6, rtol=1e-4)


def test_a_method_that_is_a_start_needs_a_fresh_adapter() -> None:
    with pytest.raises(ValueError, match="`model` must have a SEMU adapter that is not initialised"):
        methods.lora_sb(adapted("bare"), vector_batches(1), progress=False)
    model = adapted("semu")
    methods.lora_sb(model, vector_batches(1), max_steps=1, progress=False)
    with pytest.raises(ValueError, match="not initialised"):
        methods.lora_sb(model, vector_batches(1), progress=False)


@pytest.mark.parametrize("kind", ["bare", "lora", "semu"])
def test_repair_learns_the_retain_data_and_holds_what_is_forgotten(kind: str) -> None:
    model, forget, retain = adapted(kind).eval(), vector_batches(2, seed=0), vector_batches(2, seed=1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if kind == "semu":
        initialize_semu_weights(model, forget, CrossEntropy(), progress=False)
    unlearn(model, forget, GradientAscent(), max_steps=10, learning_rate=1e-2, progress=False)

    def told(model: nn.Module) -> tuple[float, Tensor]:
        with torch.no_grad():
            lost = sum(CrossEntropy()(model, batch).item() for batch in retain)
            return lost, torch.cat([model(inputs) for inputs, _ in forget]).log_softmax(-1)

    (lost, before), plain = told(model), copy.deepcopy(model)
    said: dict[str, Any] = {"max_steps": 40, "epochs": 40, "learning_rate": 1e-2, "progress": False}
    unlearn(plain, retain, CrossEntropy(), **said)
    methods.repair(model, forget, retain, hold_weight=5.0, **said)
    (repaired, held), (_, moved) = told(model), told(plain)
    assert repaired < lost
    divergence = [float(nn.functional.kl_div(now, before, log_target=True)) for now in (held, moved)]
    assert divergence[0] < 0.7 * divergence[1]


@pytest.mark.parametrize("name", ["ssd", "lfssd"])
def test_dampening_chooses_among_the_targets_alone(name: str) -> None:
    torch.manual_seed(0)
    model = Mlp()
    forget, retain = vector_batches(2, seed=0), vector_batches(2, seed=1)
    everywhere = getattr(methods, name)(model, forget, retain, share=0.3, progress=False)
    assert {place.split(".")[0] for place in everywhere.deltas} == set(TARGETS)
    edit = getattr(methods, name)(model, forget, retain, share=0.3, targets=["fc2", "head.weight"], progress=False)
    assert set(edit.deltas) <= {"fc2.weight", "fc2.bias", "head.weight"} and "head.weight" in edit.deltas
    with pytest.raises(ValueError, match="`targets`: no parameter"):
        getattr(methods, name)(model, forget, retain, share=0.3, targets=["elsewhere"], progress=False)


@pytest.mark.parametrize("name", ["slug", "chip", "rocr", "sha256"])
def test_what_puts_an_adapter_in_takes_it_out_again_on_an_error(name: str) -> None:
    model, forget, retain = adapted("bare"), vector_batches(1), vector_batches(1)
    before, shown = weights(model), repr(model)
    wrong: dict[str, Any] = {
        "slug": lambda: methods.slug(model, forget, retain, score=lambda m: 0.0, progress=False),
        "chip": lambda: methods.chip(model, forget, retain, layers=["fc1"], progress=False),
        "rocr": lambda: methods.rocr(model, {"fc1": torch.ones(5)}, {"fc1": torch.ones(10)}, progress=False),
        "sha256": lambda: methods.sha256(model, [], first=1, progress=False),
    }
    with pytest.raises(ValueError):
        wrong[name]()
    assert repr(model) == shown
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


def test_terms_stay_as_they_are_said() -> None:
    term = Retain(vector_batches(1), CrossEntropy(), 0.25)
    assert keep(term, GradientAscent()) is term
    assert keep([term], GradientAscent()) == [term]
    assert keep(None, GradientAscent()) is None
    assert keep(vector_batches(2), GradientAscent(), 3.0).weight == 3.0


def test_the_table_tells_what_trains() -> None:
    assert not table.METHODS["ssd"].trains and not table.METHODS["uce"].trains and table.METHODS["npo"].trains


def test_the_command_line_lists_the_zoo() -> None:
    from typer.testing import CliRunner

    from semu_cli.app import app

    said = CliRunner().invoke(app, ["methods", "--job", "python", "--json"]).stdout
    told = json.JSONDecoder().raw_decode(said)[0]["methods"]  # click before 8.2 puts the words of stderr behind it
    assert {each["name"]: each["source"] for each in told} == {name: row.source for name, row in METHODS.items()}


def test_matching_logits_that_are_the_models_own_leaves_it_as_it_is() -> None:
    """Acceptance of DMM: matching to `f̃ = f` leaves the weights unchanged."""
    model, forget = adapted("bare").eval(), vector_batches(1)
    before = weights(model)
    methods.dmm(model, forget, targets=model(forget[0][0]).detach(), max_steps=2, learning_rate=0.1, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_unseen_data_are_batches_and_not_the_confidences_of_the_objective() -> None:
    model, batches = Mlp(), vector_batches(1)
    unseen = predict(model, batches, progress=False)
    for given in (unseen, unseen.confidence):
        with pytest.raises(TypeError, match=r"^`unseen` must be a loader or a list of batches, got "):
            methods.unseen_confidence(model, batches, unseen=given, progress=False)
