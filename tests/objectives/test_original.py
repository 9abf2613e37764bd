"""The reference: the model without its adapter, in modules of its own, while the model itself stays as it is."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, dispatch_model
from models import CLASSES, Cnn, Mlp, Snapshot, gpt2, llama, run, sample_input, vector_batches
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from semu_peft import SemuConfig, unlearn
from semu_peft.model_state import eval_mode
from semu_peft.objectives import DecoupledDistillation, GradientAscent, KLToOriginal, UnseenConfidence
from semu_peft.objectives.original import original, remember_start, without_adapter
from semu_peft.tuner.adapted import semu_layers

ADAPTERS: dict[str, Any] = {
    "semu": SemuConfig(target_modules=["fc1", "head"], r=3, init_weights=False),
    "lora": LoraConfig(target_modules=["fc1"], modules_to_save=["head"], init_lora_weights=False),
    "oft": OFTConfig(target_modules=["fc2"], oft_block_size=2, init_weights=False),
    "ia3": IA3Config(target_modules=["fc1"], feedforward_modules=[], init_ia3_weights=False),
}
every_adapter = pytest.mark.parametrize("kind", ADAPTERS)


def wrapped(kind: str = "semu") -> tuple[nn.Module, nn.Module]:
    """A model with an adapter that does something, and its original."""
    torch.manual_seed(5)
    base = Mlp().eval()
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(ADAPTERS[kind])).eval()
    if kind == "lora":
        model.base_model.model.head.modules_to_save["default"].weight.data.add_(1.0)
    return model, base


def adapted(base: nn.Module, targets: Any = "all-linear", **options: Any) -> Any:
    """A copy of the base with SEMU that changes its outputs."""
    torch.manual_seed(6)
    model = get_peft_model(
        copy.deepcopy(base), SemuConfig(**{"target_modules": targets, "r": 2, "init_weights": False, **options})
    )
    for layer in semu_layers(model).values():
        layer.semu_core["default"].data.mul_(5)
    return model.eval()


def assert_reference(model: nn.Module, base: nn.Module, *x: Any, exact: bool = True) -> None:
    """In the block the reference gives the base's output and the model its own; afterwards the model is as before."""
    before, expected, bare = Snapshot.of(model), run(model, *x), run(base, *x)
    assert not torch.allclose(expected, bare, atol=1e-4)
    with original(model) as reference:
        assert reference is not model
        assert torch.equal(run(model, *x), expected)
        found = run(reference, *x)
    assert torch.equal(found, bare) if exact else torch.allclose(found, bare, atol=1e-5)
    before.assert_same(model)
    assert torch.equal(run(model, *x), expected)


# ---- what it gives, and what it leaves alone ----


@every_adapter
@pytest.mark.parametrize("fails", [False, True])
def test_it_is_the_original_beside_the_model(kind: str, fails: bool) -> None:
    """The output is the original's to the last bit while the model goes on with its adapter; flags are as before."""
    model, base = wrapped(kind)
    x = vector_batches(1)[0][0]
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    before, expected = Snapshot.of(model), run(model, x)
    try:
        with original(model) as reference:
            assert torch.equal(run(reference, x), run(base, x)) and torch.equal(run(model, x), expected)
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    before.assert_same(model)
    assert torch.equal(run(model, x), expected)


def test_tensors_are_shared_and_modes_are_not() -> None:
    """No weight is copied, and what is done to the reference's modules does not reach the model's."""
    model, _ = wrapped()
    with original(model) as reference:
        assert [id(p) for p in reference.parameters()] == [id(p) for p in model.parameters()]
        assert [id(b) for b in reference.buffers()] == [id(b) for b in model.buffers()]
        reference.train()
        reference.base_model.model.fc1.register_forward_pre_hook(lambda module, args: 1 / 0)
        assert not any(layer.training for name, layer in model.named_modules() if "semu_" not in name)
        run(model, *sample_input(Mlp()))


def test_what_the_user_switched_off_stays_off() -> None:
    """Around a model whose adapter is off, nothing changes; and afterwards it is on as before."""
    model, base = wrapped()
    x = vector_batches(1)[0][0]
    with model.disable_adapter():
        with original(model) as reference:
            assert torch.equal(run(reference, x), run(base, x))
        assert torch.equal(run(model, x), run(base, x))
    assert not torch.equal(run(model, x), run(base, x))


def test_a_thread_that_serves_gets_the_models_answers() -> None:
    """While objectives look at the original in one thread, every answer served from another has the adapter in it."""
    model, _ = wrapped()
    batch = vector_batches(1)[0]
    expected, done, answers = run(model, batch[0]), threading.Event(), []

    def serve() -> None:
        while not done.is_set():
            with torch.no_grad():
                answers.append(torch.equal(model(batch[0]), expected))

    thread = threading.Thread(target=serve)
    thread.start()
    objective = DecoupledDistillation() + UnseenConfidence(confidences=torch.rand(9))
    for _ in range(100):
        objective(model, batch).backward()
    done.set()
    thread.join()
    assert len(answers) > 20 and all(answers)


def test_two_references_in_one_sum() -> None:
    """Each term of a sum finds the original, and the gradient is that with frozen copies as references."""
    model, base = wrapped()
    batch, unseen = vector_batches(1)[0], torch.rand(9)
    gradients = []
    for reference in (None, base):
        objective = DecoupledDistillation(reference=reference) + UnseenConfidence(unseen, reference=reference)
        model.zero_grad()
        objective(model, batch).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


# ---- which adapter ----


@pytest.mark.parametrize("name", ["style", "default"])
def test_a_style_lora_stays_on(name: str) -> None:
    """SEMU over a LoRA: the LoRA stays in the reference, also where both have one name."""
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=2)
    styled = inject_adapter_in_model(lora, llama(), name).eval()
    config = SemuConfig(target_modules=["q_proj", "down_proj"], r=3, init_weights=False)
    model = get_peft_model(copy.deepcopy(styled).requires_grad_(False), config).eval()
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"semu_core"}
    x = sample_input(llama())
    bare = run(styled, *x)
    assert not torch.allclose(bare, run(llama(), *x), atol=1e-4) and not torch.allclose(run(model, *x), bare, atol=1e-4)
    for trains in (True, False):
        for part in semu_layers(model).values():
            part.semu_core.requires_grad_(trains)
        for adapter_name in (None, "default"):
            with original(model, adapter_name) as reference:
                assert torch.equal(run(reference, *x), bare)


def test_an_earlier_erasure_stays_on() -> None:
    """With two adapters active, the one that is trained is left out, or the one that is named."""
    torch.manual_seed(3)
    model, base = wrapped()
    x = vector_batches(1)[0][0]
    earlier = run(model, x)
    model.add_adapter("second", SemuConfig(target_modules=["fc1", "fc2"], r=2, init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    for layer in semu_layers(model).values():
        if "default" in layer.semu_core:
            layer.semu_core["default"].requires_grad_(False)
    with original(model) as reference:
        torch.testing.assert_close(run(reference, x), earlier)
    with original(model, "default") as reference:
        without_default = run(reference, x)
    with original(model, "second") as reference, original(reference, "default") as bare:
        assert torch.equal(run(bare, x), run(base, x))
    model.base_model.set_adapter("second")
    torch.testing.assert_close(without_default, run(model, x))


def test_a_name_that_is_none() -> None:
    """The error lists the names that there are."""
    model, _ = wrapped()
    with pytest.raises(ValueError, match=r"`adapter_name`.*\['default'\].*'forget'"), original(model, "forget"):
        pass
    with pytest.raises(ValueError, match="Mlp has no PEFT adapter.*`reference`"), original(Mlp()):
        pass


def test_merged_adapters() -> None:
    """One that is merged cannot be left out; another one that is merged is part of the reference."""
    model, base = wrapped()
    x = vector_batches(1)[0][0]
    first = run(model, x)
    model.add_adapter("second", SemuConfig(target_modules=["fc1", "head"], r=2, init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter(["default"])
    weights = {name: p.clone() for name, p in model.named_parameters()}
    for merged in ("default", None):
        with pytest.raises(ValueError, match="unmerge_adapter"), original(model, merged):
            pass
    with original(model, "second") as reference:
        torch.testing.assert_close(run(reference, x), first)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    model.unmerge_adapter()
    with original(model) as reference:
        torch.testing.assert_close(run(reference, x), run(base, x))


def test_what_is_trained_beside_the_adapter() -> None:
    """Whole modules and token rows that are trained with an adapter are left out with it."""
    base = gpt2()
    model = adapted(base, ["c_attn"], trainable_token_indices={"wte": [1, 2, 3]}, modules_to_save=["ln_f"])
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name or "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter))
    ids = torch.tensor([[1, 2, 3, 9]])
    assert_reference(model, base, ids)


def test_without_adapter_is_its_own_original() -> None:
    """It can be kept, follows the weights, and objectives take it as the reference of itself."""
    model, base = wrapped()
    batch = vector_batches(1)[0]
    kept = without_adapter(model, "default")
    assert without_adapter(kept) is kept
    for adapter_name in (None, "default"):
        with original(kept, adapter_name) as same:
            assert same is kept
    for candidate in (model, base):
        (candidate.get_base_model() if candidate is model else candidate).fc2.weight.data.mul_(2)
    assert torch.equal(run(kept, batch[0]), run(base, batch[0]))
    expected = DecoupledDistillation(reference=base)(base, batch)
    torch.testing.assert_close(DecoupledDistillation()(kept, batch), expected)


# ---- what stands between a model and its forward pass ----


@pytest.mark.parametrize("way", ["cpu", "some", "after"])
def test_offloaded_weights(way: str) -> None:
    """Weights that are moved in for each module's pass are moved into the reference's own modules."""
    base = llama()
    x = sample_input(base)
    if way == "cpu":
        model = adapted(cpu_offload(copy.deepcopy(base), execution_device="cpu"))
    elif way == "some":
        places = {"model": "cpu", "lm_head": "cpu"}
        model = adapted(dispatch_model(copy.deepcopy(base), places, main_device="cpu", force_hooks=True))
    else:
        model = dispatch_model(adapted(base), {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert any("_hf_hook" in vars(module) for module in model.modules())
    expected = run(model, *x)
    with original(model) as reference:
        assert reference is not model
        assert torch.equal(run(reference, *x), run(base, *x)) and torch.equal(run(model, *x), expected)
    assert torch.equal(run(model, *x), expected)
    if way == "cpu":
        assert any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("way", ["whole", "inside", "in_place"])
def test_compiled_models(way: str) -> None:
    """`torch.compile(model)`, of a part of it, and `model.compile()`: the reference pass runs eagerly."""
    model, base = wrapped()
    x = vector_batches(1)[0][0]
    passes: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        passes.append(len(inputs))
        return graph.forward

    inner: Any = model.get_base_model()
    if way == "whole":
        model = torch.compile(model, backend=backend)
    elif way == "inside":
        inner.head = torch.compile(inner.head, backend=backend)
    else:
        model.compile(backend=backend)
    expected, count = run(model, x), len(passes)
    assert count
    with original(model) as reference:
        assert torch.equal(run(reference, x), run(base, x))
        assert len(passes) == count
        assert torch.equal(run(model, x), expected)
    assert len(passes) == count


@pytest.mark.parametrize("compiled", [False, True])
def test_mixed_precision(compiled: bool) -> None:
    """What Accelerate puts around a model's forward is around the reference's too."""
    model, base = wrapped()
    x = vector_batches(1)[0][0]
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(
        torch.compile(model, backend="eager") if compiled else model
    )
    with torch.autocast("cpu", torch.bfloat16):
        bare = run(base, x)
    assert bare.dtype == torch.bfloat16
    expected = run(prepared, x)
    with original(prepared) as reference:
        found = run(reference, x)
    assert found.dtype == torch.float32 and torch.equal(found, bare.float())
    assert not torch.equal(found, expected) and torch.equal(run(prepared, x), expected)


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_that_calls_its_own_modules(fails: bool) -> None:
    """Where a closure stands in for a forward, the adapter is switched off in place, and on again afterwards."""
    model, base = wrapped()
    x = vector_batches(1)[0][0]
    inner: Any = model.get_base_model()
    plain = inner.forward
    inner.forward = lambda x: plain(x) * 2
    before, expected = Snapshot.of(model), run(model, x)
    try:
        with original(model) as reference:
            assert torch.equal(run(reference, x), run(base, x) * 2)
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    before.assert_same(model)
    assert torch.equal(run(model, x), expected)
    with pytest.raises(ValueError, match=r"`with original\(model\) as reference:`"):
        without_adapter(model)


class Diary(nn.Module):
    """A module whose own method is its hook, and which knows its layer by a list."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, CLASSES)
        self.calls = 0
        self.aliases = [self.inner]
        self.register_forward_pre_hook(type(self).count)
        self.inner.register_forward_hook(self.note)

    def count(self, args: Any) -> None:
        self.calls += 1

    def note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        assert module is self.inner or module is getattr(self.inner, "base_layer", None)
        assert self.aliases[0] in (module, self.inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.aliases[0](x)


def test_methods_as_hooks_and_modules_in_lists() -> None:
    """A hook that is a method is the counterpart's method, and a list of modules holds counterparts."""
    base = Diary().eval()
    model = get_peft_model(Diary().eval(), SemuConfig(target_modules=["inner"], r=2, init_weights=False)).eval()
    model.get_base_model().load_state_dict(
        {name.replace("inner.", "inner.base_layer."): tensor for name, tensor in base.state_dict().items()},
        strict=False,
    )
    inner: Any = model.get_base_model()
    inner.aliases = [inner.inner]
    x = torch.randn(3, 6)
    with original(model) as reference:
        assert torch.equal(run(reference, x), run(base, x))
        assert reference.get_base_model().calls == 1 and inner.calls == 0


# ---- kinds of layers ----


def test_layers_that_occur_twice_and_plain_convolutions() -> None:
    """A layer at two places is one layer in the reference, and batch statistics are the model's."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    base = Twice()
    model = inject_adapter_in_model(SemuConfig(target_modules=["first"], r=2, init_weights=False), copy.deepcopy(base))
    model.second = model.first
    assert_reference(model.eval(), base, torch.randn(3, 6))
    cnn = Cnn().eval()
    assert_reference(adapted(cnn, ["conv1", "conv2"]), cnn, *sample_input(cnn))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_modules_that_are_made_by_others() -> None:
    """Scripted and traced modules are shared; graph modules and parametrised ones have counterparts."""

    class Various(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(6, 6)
            self.scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
            self.graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.normed(self.graph(self.scripted(self.plain(x))))

    base, x = Various().eval(), torch.randn(3, 6)
    bare = run(base, x)
    model = get_peft_model(base, SemuConfig(target_modules=["plain"], r=2, init_weights=False)).eval()
    expected = run(model, x)
    with original(model) as reference:
        assert reference is not model
        assert torch.equal(run(reference, x), bare) and torch.equal(run(model, x), expected)
    assert not torch.allclose(expected, bare)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_tied_embeddings() -> None:
    """A head that computes with the embedding's adapter computes without it in the reference."""
    torch.manual_seed(4)
    base = gpt2()
    model = adapted(base, ["wte"], ensure_weight_tying=True)
    assert_reference(model, base, *sample_input(base))


def test_fused_experts() -> None:
    """Parameters that are corrected in the forward pass of the module around them."""
    torch.manual_seed(3)
    config = MixtralConfig(
        hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, num_experts_per_tok=2, num_local_experts=3,
    )  # fmt: skip
    base = MixtralForCausalLM(config).eval()
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted(base, ["q_proj"], target_parameters=names)
    assert_reference(model, base, torch.tensor([[1, 2, 3, 4]]))


def test_attention_of_torch() -> None:
    """`nn.MultiheadAttention` and the encoder around it, whose fused kernels read weights past layers."""
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).eval()
    model = adapted(base, ["self_attn", "linear1"])
    assert_reference(model, base, torch.randn(3, 5, 8), exact=False)


@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt")
def test_quantised_layers() -> None:
    """Layers of bitsandbytes, whose weights carry a state of their own."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(6)
    base = nn.Sequential(
        bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu"),
        nn.Tanh(),
        bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu"),
    )
    model = get_peft_model(base, SemuConfig(target_modules=["0", "2"], r=2, init_weights=False)).eval()
    x = torch.randn(3, 64)
    with model.disable_adapter():
        bare = run(model, x)
    expected = run(model, x)
    with original(model) as reference:
        assert torch.equal(run(reference, x), bare) and torch.equal(run(model, x), expected)


def test_recomputed_activations() -> None:
    """In eval mode with gradient checkpointing the reference has no dropout either."""
    torch.manual_seed(2)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, resid_pdrop=0.5, attn_pdrop=0.5)
    base = GPT2LMHeadModel(config).eval()
    model = adapted(base, ["c_attn"])
    model.get_base_model().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    ids = sample_input(base)[0]
    bare = run(base, ids)
    with eval_mode(model), original(model) as reference:
        for no_gradient in (True, False):
            with torch.set_grad_enabled(not no_gradient):
                torch.testing.assert_close(reference(ids).logits, bare)


# ---- several processes ----


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(process_group: None) -> None:
    """The reference is the model inside the wrapper, without it."""
    model, base = wrapped()
    x = vector_batches(1)[0][0]
    parallel = DistributedDataParallel(model)
    expected = run(parallel, x)
    with original(parallel) as reference:
        assert not isinstance(reference, DistributedDataParallel)
        assert torch.equal(run(reference, x), run(base, x)) and torch.equal(run(parallel, x), expected)


def test_fully_sharded(process_group: None) -> None:
    """FSDP's hooks hold the modules, so there the switch is made in place, and undone."""
    model, base = wrapped()
    x = vector_batches(1)[0][0]
    expected = run(model, x)
    sharded: Any = model
    fully_shard(sharded.get_base_model().fc1)
    fully_shard(sharded)
    with original(sharded) as reference:
        assert reference is sharded
        torch.testing.assert_close(run(reference, x), run(base, x))
    torch.testing.assert_close(run(sharded, x), expected)
    with pytest.raises(ValueError, match="sharded"):
        without_adapter(sharded)


# ---- PEFT methods whose start splits the weight ----


def corda(base: Any) -> LoraConfig:
    config = LoraConfig(
        target_modules=["fc1", "fc2"], r=2, lora_alpha=4, init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
    )  # fmt: skip
    for layer in (base.fc1, base.fc2):  # what PEFT's `preprocess_corda` leaves, for inputs that are all alike
        left, values, right = torch.linalg.svd(layer.weight.data)
        layer.eigens = SimpleNamespace(U_WC=left[:, :2], S_WC=values[:2].clone(), V_WC=right[:2].mT)
    return config


def lora_ga(base: nn.Module) -> LoraConfig:
    config = LoraConfig(
        target_modules=["fc1", "fc2"], r=2, lora_alpha=4, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )
    x, y = vector_batches(1, size=64)[0]
    preprocess_loraga(base, config, lambda: nn.functional.cross_entropy(base(x), y).backward())
    base.zero_grad()
    return config


def started(start: str) -> Callable[[nn.Module], LoraConfig]:
    return lambda base: LoraConfig(target_modules=["fc1", "fc2"], r=2, lora_alpha=4, init_lora_weights=start)


SPLITS: dict[str, Callable[[nn.Module], LoraConfig]] = {
    "pissa": started("pissa"),
    "pissa_niter": started("pissa_niter_4"),
    "olora": started("olora"),
    "corda": corda,
    "lora_ga": lora_ga,
}


def split(kind: str) -> tuple[nn.Module, nn.Module]:
    """A model whose adapter's start was taken out of its weights, and the model that it was."""
    torch.manual_seed(8)
    base = Mlp().eval()
    model = copy.deepcopy(base)
    return get_peft_model(model, SPLITS[kind](model)).eval(), base


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for batch in vector_batches(3):
        optimizer.zero_grad()
        DecoupledDistillation()(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("in_place", [False, True])
def test_starts_that_split_the_weight(kind: str, in_place: bool) -> None:
    """After training, the reference is still the model before the adapter; switching the adapter off is not."""
    model, base = split(kind)
    x = vector_batches(1)[0][0]
    if in_place:
        inner: Any = model.get_base_model()
        plain = inner.forward
        inner.forward = lambda x: plain(x)
    train(model)
    before, expected, bare = Snapshot.of(model), run(model, x), run(base, x)
    assert not torch.allclose(expected, bare, atol=1e-2)
    with model.disable_adapter():
        assert not torch.allclose(run(model, x), bare, atol=1e-2)
    with original(model) as reference:
        torch.testing.assert_close(run(reference, x), bare, atol=1e-5, rtol=0)
    before.assert_same(model)
    assert torch.equal(run(model, x), expected)


def test_the_start_can_be_remembered_before_weights_are_loaded() -> None:
    """`remember_start` holds the start of an adapter whose trained values are loaded afterwards."""
    model, base = split("pissa")
    x = vector_batches(1)[0][0]
    trained, _ = split("pissa")
    train(trained)
    remember_start(model)
    model.load_state_dict(trained.state_dict())
    assert torch.equal(run(model, x), run(trained, x))
    with original(model) as reference:
        torch.testing.assert_close(run(reference, x), run(base, x), atol=1e-5, rtol=0)
    assert not any("start" in name for name in model.state_dict())
    remember_start(Mlp())
    with pytest.raises(ValueError, match="`adapter_name`"):
        remember_start(model, "other")


def test_a_run_without_a_reference_leaves_one_for_the_next() -> None:
    """`unlearn` remembers the start also where its own objective asks for no original."""
    model, base = split("olora")
    x = vector_batches(1)[0][0]
    unlearn(model, vector_batches(2), GradientAscent(), learning_rate=0.1, epochs=2, progress=False)
    assert not torch.allclose(run(model, x), run(base, x), atol=1e-2)
    with original(model) as reference:
        torch.testing.assert_close(run(reference, x), run(base, x), atol=1e-5, rtol=0)


def test_a_start_that_is_not_at_hand() -> None:
    """On offloaded values there is nothing to remember, and the reference is refused with what to give instead."""
    model = split("pissa")[0].to("meta")
    remember_start(model)
    with pytest.raises(ValueError, match="offloaded or sharded.*`reference`"), original(model):
        pass


def test_an_adapter_over_a_split_one_leaves_it_at_its_values() -> None:
    """Taking SEMU away leaves a trained PiSSA as it is."""
    styled, _ = split("pissa")
    train(styled)
    model = get_peft_model(
        copy.deepcopy(styled), SemuConfig(target_modules=["fc1", "head"], r=2, init_weights=False), "erasure"
    ).eval()
    assert_reference(model, styled, vector_batches(1)[0][0])


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers")
def test_dora_on_layers_of_two_kinds_is_one_adapter() -> None:
    """DoRA's convolutions have one attribute more than its linear layers, and are left out with them."""
    base = Cnn().eval()
    config = LoraConfig(target_modules=["conv1", "head"], r=2, init_lora_weights=False, use_dora=True)
    model = get_peft_model(copy.deepcopy(base), config, adapter_name="first")
    model.add_adapter("second", config)
    x = sample_input(base)[0]
    for name in ("first", "second"):
        model.set_adapter(name)
        assert_reference(model.eval(), base, x)


def test_biases_that_are_trained_with_the_adapter() -> None:
    """Biases of the base model that an adapter trains are at their start in the reference."""
    torch.manual_seed(5)
    base = Mlp().eval()
    config = SemuConfig(target_modules=["fc1", "head"], r=2, init_weights=False, bias="all")
    model = get_peft_model(copy.deepcopy(base), config).eval()
    train(model)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("fc2.bias")}
    assert not torch.equal(*biases.values(), base.fc2.bias)
    assert_reference(model, base, vector_batches(1)[0][0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a model is moved by unlearn where there is a GPU")
def test_a_reference_on_the_cpu_follows_a_model_that_is_moved() -> None:
    model = Mlp()
    reference = copy.deepcopy(model)
    unlearn(model, vector_batches(), KLToOriginal(reference=reference), max_steps=1, learning_rate=1e-3, progress=False)
    assert {parameter.device.type for parameter in [*model.parameters(), *reference.parameters()]} == {"cuda"}


def test_a_reference_with_hooks_of_its_own_is_left_where_it_is() -> None:
    model = Mlp().eval()
    reference = cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    batch = next(iter(vector_batches()))
    assert KLToOriginal(reference=reference)(model, batch).item() == pytest.approx(0, abs=1e-6)
    assert all(parameter.is_meta for parameter in reference.parameters())
