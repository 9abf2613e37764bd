"""An adapter's two files are one thing: whole, of one save, with the adapter's own tensors and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Mlp, gpt2, llama
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, Trainer, TrainingArguments

from semu_peft import SemuConfig, hotswap_adapter, save_as_lora
from semu_peft.export.diffusers import save_adapter
from semu_peft.files import folder_written_whole, save_tensors, written_whole

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["fc1", "fc2"]


def adapter(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    given = {"target_modules": TARGETS, "r": 2, "init_weights": False, **options}
    return get_peft_model(base(), SemuConfig(**given))


def base() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Mlp().eval()


def saved(folder: Path, **options: Any) -> Path:
    adapter(**options).save_pretrained(folder)
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any], digest: bool = False) -> None:
    """Rewrite the weights; with `digest` as somebody would who controls the configuration too."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if not digest:
        change_config(folder, weights_sha256=None)


def change_config(folder: Path, **values: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **values}))


def state(model: Any) -> Any:
    return (
        [(name, type(module).__name__) for name, module in model.named_modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        sorted(getattr(model, "peft_config", {})),
    )


def assert_same(actual: Any, expected: Any) -> None:
    assert actual[0] == expected[0] and actual[2:] == expected[2:] and actual[1].keys() == expected[1].keys()
    assert all(torch.equal(actual[1][name], value) for name, value in expected[1].items())


# ---- the digest ----


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9, 0.999])
def test_a_flipped_bit_is_refused(at: float, tmp_path: Path) -> None:
    """Also where what comes of it is an adapter again."""
    path = saved(tmp_path) / WEIGHTS
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    with path.open("r+b") as file:  # as a disk does it, in place
        file.write(content)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors (must have the SHA-256|is damaged|has|holds)"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_two_files_of_two_adapters_are_refused(tmp_path: Path) -> None:
    """Of the same layers and ranks, which nothing else would tell apart."""
    one, other = saved(tmp_path / "one"), saved(tmp_path / "other", seed=1)
    download = tmp_path / "download"
    download.mkdir()
    shutil.copy(one / CONFIG, download)
    shutil.copy(other / WEIGHTS, download)
    with pytest.raises(ValueError, match="must have the SHA-256 .*the two files are not from one adapter"):
        PeftModel.from_pretrained(base(), download)


def test_a_kill_between_weights_and_configuration_leaves_the_old_adapter(tmp_path: Path) -> None:
    """PEFT replaces the weights first; the old ones are still there under their second name."""
    old, new, x = adapter(), adapter(seed=1, target_modules=["fc1"]), torch.randn(3, 6)
    old.save_pretrained(tmp_path)
    configuration = (tmp_path / CONFIG).read_bytes()
    new.save_pretrained(tmp_path / "new")
    os.replace(tmp_path / "new" / WEIGHTS, tmp_path / WEIGHTS)
    for low_cpu_mem_usage in (False, True):
        with pytest.warns(UserWarning, match="SEMU adapter is loaded as it was before"):
            loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded(x), old(x))
    swapped = adapter(seed=2)
    with pytest.warns(UserWarning, match="as it was before"):
        hotswap_adapter(swapped, str(tmp_path))
    assert torch.equal(swapped(x), old(x))
    assert (tmp_path / CONFIG).read_bytes() == configuration
    new.save_pretrained(tmp_path)  # the save is done again
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(x), new(x))
    assert len(list(tmp_path.glob(".adapter_model.*"))) == 1


def test_adapters_from_before_the_digest_load(tmp_path: Path) -> None:
    folder, x = saved(tmp_path), torch.randn(3, 6)
    expected = PeftModel.from_pretrained(base(), folder)(x)
    content = json.loads((folder / CONFIG).read_text())
    del content["weights_sha256"]
    (folder / CONFIG).write_text(json.dumps(content))
    assert torch.equal(PeftModel.from_pretrained(base(), folder)(x), expected)


def test_the_digest_is_the_files_own_and_not_kept_in_memory(tmp_path: Path) -> None:
    """What is loaded, trained on and saved again has a digest of its own."""
    loaded = PeftModel.from_pretrained(base(), saved(tmp_path / "a"), is_trainable=True)
    assert loaded.peft_config["default"].weights_sha256 is None
    for parameter in loaded.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    loaded.save_pretrained(tmp_path / "a")
    again, x = PeftModel.from_pretrained(base(), tmp_path / "a"), torch.randn(3, 6)
    assert torch.equal(again(x), loaded(x))
    (tmp_path / "bin").mkdir()
    loaded.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path / "bin")(x), loaded(x))


def test_save_adapter_writes_the_digest_too(tmp_path: Path) -> None:
    for seed in (0, 1):
        model, x = adapter(seed), torch.randn(3, 6)
        save_adapter(model, tmp_path / "a")
        assert json.loads((tmp_path / "a" / CONFIG).read_text())["weights_sha256"]
        assert torch.equal(PeftModel.from_pretrained(base(), tmp_path / "a")(x), model(x))


def test_save_adapter_writes_a_card_and_keeps_what_somebody_wrote(tmp_path: Path) -> None:
    save_adapter(adapter(0), tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "# SEMU adapter" in card and 'from_pretrained(base_model, "a")' in card and "- semu\n" in card
    (tmp_path / "a" / "README.md").write_text(card + "\nOf the third of May.\n")
    save_adapter(adapter(1), tmp_path / "a")
    assert "Of the third of May." in (tmp_path / "a" / "README.md").read_text()


# ---- what a file may hold ----

FOREIGN = {
    "base weight": {"base_model.model.fc1.base_layer.weight": torch.zeros(8, 6)},
    "base bias": {"base_model.model.fc1.base_layer.bias": torch.ones(8)},
    "other layer": {"base_model.model.head.weight": torch.zeros(4, 5)},
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", list(FOREIGN))
def test_a_file_does_not_overwrite_the_model(name: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = base()
    places = {f"base_model.model.{key}" for key in model.state_dict()}
    payload = FOREIGN[name]
    if name == "other layer":
        payload = {next(key for key in sorted(places) if "fc1" not in key): torch.full((1,), 9.0)}
    change_tensors(saved(tmp_path, target_modules=["fc1"]), lambda tensors: tensors.update(payload))
    before = state(model)
    with pytest.raises(ValueError, match="must hold its own tensors, got 'base_model.model.*The model given is left"):
        PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same(state(model), before)


def test_a_weight_that_is_the_models_own_is_passed_over(tmp_path: Path) -> None:
    """PEFT saves embeddings along where it thinks that they may have changed."""
    model = base()
    weight = model.get_submodule("fc1").weight.detach().clone()
    key = "base_model.model.fc1.base_layer.weight"
    change_tensors(saved(tmp_path), lambda tensors: tensors.update({key: weight}))
    assert isinstance(PeftModel.from_pretrained(model, tmp_path), PeftModel)


# ---- embeddings, which PEFT saves along where they were targeted or resized ----

TOKENS = torch.tensor([[33, 4, 32, 5]])  # two of them new
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "targeted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "trained in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "trained rows": {"trainable_token_indices": {"embed_tokens": [32, 33], "lm_head": [32, 33]}},
}


def resized(folder: Path, seed: int, vocabulary: int = 34) -> Any:
    """A language model from a folder, with new rows drawn at random: their numbers are in no other file."""
    if not folder.exists():
        torch.manual_seed(0)
        llama().save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(vocabulary)
    return model.eval()


def with_embeddings(tmp_path: Path, **options: Any) -> Any:
    given = {"target_modules": ["q_proj"], "r": 2, "init_weights": False, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(resized(tmp_path / "base", 5), SemuConfig(**given)).eval()
    model.save_pretrained(tmp_path / "adapter")
    return model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("case", list(EMBEDDINGS))
def test_an_adapter_on_resized_embeddings(case: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    """They come with the file, as for LoRA: the model that loads it has drawn other rows."""
    model = with_embeddings(tmp_path, **EMBEDDINGS[case])
    fresh = resized(tmp_path / "base", 9)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    with loaded.disable_adapter(), model.disable_adapter():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_second_adapter_brings_embeddings_to_where_the_first_has_them(tmp_path: Path) -> None:
    """Keys of a file name the wrappers that were there when it was saved, and not those that are there now."""
    model = with_embeddings(tmp_path)
    loaded = get_peft_model(
        resized(tmp_path / "base", 9), SemuConfig(target_modules=["embed_tokens"], modules_to_save=["lm_head"])
    )
    loaded.load_adapter(tmp_path / "adapter", "second")
    loaded.set_adapter("second")
    assert torch.equal(loaded.eval()(TOKENS).logits, model(TOKENS).logits)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt2().save_pretrained(tmp_path / "base")
    models = []
    for seed in (5, 9):
        torch.manual_seed(seed)
        models.append(GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval())
        models[-1].resize_token_embeddings(34)
    config = SemuConfig(target_modules=["c_fc"], r=2, init_weights=False)
    model = get_peft_model(models[0], config)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(models[1], tmp_path / "adapter", low_cpu_mem_usage=True)
    assert models[1].lm_head.weight is models[1].transformer.wte.weight
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_embeddings_in_half_precision_do_not_round_the_models(tmp_path: Path) -> None:
    config = SemuConfig(target_modules=["q_proj", "embed_tokens"], r=2, init_weights=False)
    get_peft_model(resized(tmp_path / "base", 5, 32).bfloat16(), config).save_pretrained(tmp_path / "a")
    for low_cpu_mem_usage in (False, True):
        fresh = resized(tmp_path / "base", 5, 32)
        weight = fresh.get_input_embeddings().weight.detach().clone()
        PeftModel.from_pretrained(fresh, tmp_path / "a", low_cpu_mem_usage=low_cpu_mem_usage)
        now = fresh.get_input_embeddings().weight
        assert now.dtype == torch.float32 and torch.equal(now, weight)


def test_a_trainer_resumes_with_resized_embeddings(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    arguments = TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True, disable_tqdm=True, **options)
    dataset: Any = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 8
    model = with_embeddings(tmp_path)
    Trainer(model, arguments, train_dataset=dataset).train()
    again = get_peft_model(resized(tmp_path / "base", 9), model.peft_config["default"])
    Trainer(again, arguments, train_dataset=dataset).train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert torch.equal(again.eval()(TOKENS).logits, model.eval()(TOKENS).logits)


REFUSED_EMBEDDINGS: dict[str, tuple[dict[str, Tensor], int, str]] = {
    "another vocabulary": ({}, 32, r"has shape \(34, 16\).*resize_token_embeddings\(34\)"),
    "not finite": ({"base_model.model.lm_head.weight": torch.full((34, 16), torch.inf)}, 34, "finite"),
    "a norm too": ({"base_model.model.model.norm.weight": torch.full((16,), 9.0)}, 34, "must hold its own tensors"),
}


@pytest.mark.parametrize("case", list(REFUSED_EMBEDDINGS))
def test_embeddings_that_do_not_fit_leave_the_model(case: str, tmp_path: Path) -> None:
    with_embeddings(tmp_path)
    tensors, vocabulary, message = REFUSED_EMBEDDINGS[case]
    change_tensors(tmp_path / "adapter", lambda found: found.update(tensors))
    model = resized(tmp_path / "base", 9, vocabulary)
    before = state(model)
    with pytest.raises(ValueError, match=f"{message}.*left as it was"):
        PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert_same(state(model), before)


def test_an_embedding_that_an_adapter_is_merged_into_is_not_overwritten(tmp_path: Path) -> None:
    with_embeddings(tmp_path)
    config = SemuConfig(target_modules=["embed_tokens"], r=2, init_weights=False)
    model = get_peft_model(resized(tmp_path / "base", 9), config)
    model.load_adapter(tmp_path / "adapter", "second")
    model.merge_adapter()
    before = state(model)
    with pytest.raises(ValueError, match="merged into it; call `unmerge_adapter` first.*left as it was"):
        set_peft_model_state_dict(model, load_file(tmp_path / "adapter" / WEIGHTS), "second")
    assert_same(state(model), before)


IMPOSSIBLE: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "NaN": ("semu_core", lambda t: t * float("nan"), "finite"),
    "infinity": ("semu_U", lambda t: t / 0.0, "finite"),
    "scaled": ("semu_V", lambda t: t * 1000, "orthonormal"),
    "the same column": ("semu_U", lambda t: t[:, :1].expand_as(t).contiguous(), "orthonormal"),
    "zeros": ("semu_U", torch.zeros_like, "orthonormal"),
    "integers": ("semu_core", lambda t: (t * 10).long(), "floating-point"),
}


@pytest.mark.parametrize("save_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", list(IMPOSSIBLE))
def test_tensors_that_no_adapter_has(name: str, save_dtype: Any, tmp_path: Path) -> None:
    """By every way in; the live model stays as it is."""
    kind, change, word = IMPOSSIBLE[name]

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: change(value) for key, value in tensors.items() if key.endswith(kind)})

    change_tensors(saved(tmp_path, save_dtype=save_dtype), spoil)
    live = adapter(seed=1)
    before = state(live)
    ways: list[Callable[[], Any]] = [
        lambda: PeftModel.from_pretrained(base(), tmp_path),
        lambda: live.load_adapter(str(tmp_path), "second"),
        lambda: hotswap_adapter(live, str(tmp_path)),
        lambda: set_peft_model_state_dict(live, load_file(tmp_path / WEIGHTS)),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=f"damaged: .*{word}.* left as it was"):
            way()
        assert_same(state(live), before)


# ---- patterns and settings out of a file ----


@pytest.mark.parametrize("pattern", [r"(\w+)+!", r"(a|b|ab)*c", r"(\w*){20}!", r".*.*.*.*.*!", r"((\w)+x?)+!"])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save"])
def test_a_pattern_cannot_hang_the_loader(field: str, pattern: str, tmp_path: Path) -> None:
    value: Any = {"rank_pattern": {pattern: 2}, "modules_to_save": [pattern]}.get(field, pattern)
    change_config(saved(tmp_path), **{field: value})
    with pytest.raises(ValueError, match=f"`{field}` must have patterns that are found in bounded time"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_usual_patterns_are_fine() -> None:
    usual = (
        r".*\.layers\.\d+\.(q|k|v)_proj", r"(.*\.)?fc\d+", r"(?:model\.)?layers\.(0|1[0-9]?)\..*(attn|mlp).*proj$",
        r"(?:.*?(?:vision|tower).*?(?:attn|mlp).*?(?:q_proj|gate).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:q_proj))",
    )  # fmt: skip
    for pattern in usual:
        assert SemuConfig(target_modules=pattern, rank_pattern={pattern: 2}).target_modules == pattern


REFUSALS: dict[str, dict[str, Any]] = {
    "modules_to_save without weights": {"modules_to_save": ["fc2"]},
    "tokens of a corrected layer": {"trainable_token_indices": {"fc1": [0]}},
    "parameter of a corrected layer": {"target_parameters": ["fc2.weight"]},
    "another core": {"core": "diagonal"},
    "a task of another model": {"task_type": "CAUSAL_LM"},
    "another rank": {"ranks": {"fc1": 1, "fc2": 1}},
    "no layer": {"target_modules": ["nothing"]},
    "no name": {"target_modules": [5]},
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_every_refusal_leaves_the_model(name: str, tmp_path: Path) -> None:
    change_config(saved(tmp_path), **REFUSALS[name])
    bare, live = base(), adapter(seed=1)
    for model, load in (
        (bare, lambda: PeftModel.from_pretrained(bare, tmp_path)),
        (live, lambda: live.load_adapter(str(tmp_path), "second")),
    ):
        before = state(model)
        with pytest.raises((ValueError, TypeError)):
            load()
        assert_same(state(model), before)


@pytest.mark.parametrize("content", ["", "[1]", '{"peft_type": "LORA"}', "{", '{"r": 2}'])
def test_a_damaged_configuration_is_named(content: str, tmp_path: Path) -> None:
    (saved(tmp_path) / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json (is damaged|must be the configuration of a SEMU)"):
        SemuConfig.from_pretrained(tmp_path)


# ---- writing ----


def test_a_lora_is_replaced_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever step of the writing is the last one, stock PEFT reads the old export, the new one or none."""
    old, new, x = adapter(target_modules=["fc1"]), adapter(seed=1), torch.randn(3, 6)
    save_as_lora(old, tmp_path / "lora")
    (tmp_path / "lora" / "notes.txt").write_text("mine")
    seen = []
    replace, rename = os.replace, Path.rename

    def look(*_: Any) -> None:
        loaded = PeftModel.from_pretrained(base(), tmp_path / "lora")
        seen.append(min((loaded(x) - model(x)).abs().max().item() for model in (old, new)))

    for owner, name, function in ((os, "replace", replace), (Path, "rename", rename)):
        monkeypatch.setattr(owner, name, lambda *given, function=function: (look(), function(*given), look()))
    save_as_lora(new, tmp_path / "lora")
    monkeypatch.undo()
    look()
    assert len(seen) > 1 and max(seen) < 1e-5
    assert torch.allclose(PeftModel.from_pretrained(base(), tmp_path / "lora")(x), new(x), atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [CONFIG, WEIGHTS, "notes.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_is_written_whole(inside: bool, tmp_path: Path) -> None:
    """A failure leaves the old files and no temporary ones, also where folders inside rule an exchange out."""
    folder = tmp_path / "pair"
    (folder / "more").mkdir(parents=True) if inside else folder.mkdir()
    for content in ("old", "new"):
        with folder_written_whole(folder, ["a", "b"]) as temporary:
            for name in ("a", "b"):
                (temporary / name).write_text(content)
        assert (folder / "a").read_text() == (folder / "b").read_text() == content
    with pytest.raises(RuntimeError), folder_written_whole(folder, ["a", "b"]) as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    assert (folder / "a").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["pair"]
    assert (folder / "more").is_dir() == inside


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        adapter().save_pretrained(tmp_path / "semu")
        save_as_lora(adapter(), tmp_path / "lora")
        save_tensors(tmp_path / "tensors.safetensors", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*.*") if path.is_file()]
    assert len(files) >= 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.txt"
    target.write_text("untouched")
    (tmp_path / "link.txt").symlink_to(target)
    with written_whole(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert target.read_text() == "untouched" and (tmp_path / "link.txt").read_text() == "new"


def test_temporary_files_of_killed_writers_are_swept(tmp_path: Path) -> None:
    old, young = (tmp_path / f".result.{letter * 32}.txt" for letter in "ab")
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (0, 0))
    with written_whole(tmp_path / "result.txt") as temporary:
        temporary.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "result.txt"]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_does_not_change_with_its_file(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    loaded, x = (
        PeftModel.from_pretrained(base(), saved(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage),
        torch.ones(1, 6),
    )
    before = loaded(x)
    saved(tmp_path, seed=1)
    assert torch.equal(loaded(x), before)


def test_loras_stay_what_they_were() -> None:
    """Nothing of this touches other methods."""
    assert get_peft_model(base(), LoraConfig(target_modules=TARGETS, r=2)).peft_config["default"].r == 2
