"""The program as a whole: its version, what it lists first, what it does not load, and what it keeps quiet."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from semu_cli import app


def said(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_version_and_what_one_begins_with() -> None:
    assert said("--version").strip() == f"semu {version('semu-peft')}"
    shown = said("--help")
    verbs = shown[shown.index("Commands") :]
    assert verbs.index("unlearn") < verbs.index("evaluate") < verbs.index("methods")


@pytest.mark.parametrize("verb", ["unlearn images", "unlearn text", "unlearn concept", "evaluate", "attack", "audit"])
def test_flags_are_whole_in_a_narrow_terminal(verb: str) -> None:
    shown = CliRunner().invoke(app, [*verb.split(), "--help"], env={"COLUMNS": "80"}).output
    assert "…" not in shown and {"--no-progress", "--batch-size"} <= set(shown.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "--adapter", "absent"],
        ["compare", "absent", "absent"],
        ["merge", "--model", "absent", "--adapter", "absent", "--output-dir", "out"],
        ["export", "--model", "absent", "--adapter", "absent", "--output-dir", "out"],
        ["evaluate", "--model", "absent", "--adapter", "absent", "--forget", "photos"],
        ["audit", "--model", "absent", "--adapter", "absent", "--forget", "photos", "--output-dir", "out"],
    ],
)
def test_a_missing_adapter_is_said_before_anything_is_loaded(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no folder absent" in said(*arguments, code=2)
    Path("absent").mkdir()
    assert "no adapter_config.json in absent" in said(*arguments, code=2)


def test_an_adapter_that_changes_nothing_is_told(tmp_path: Path) -> None:
    import torch
    from models import Mlp
    from peft import get_peft_model

    from semu_peft import SemuConfig, initialize_semu_weights, objectives

    model = get_peft_model(Mlp(), SemuConfig(target_modules="all-linear"))
    inputs = next(layer.in_features for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    batch = (torch.randn(4, inputs), torch.zeros(4, dtype=torch.long))
    initialize_semu_weights(model, [batch], objectives.CrossEntropy(), progress=False)
    model.save_pretrained(tmp_path)
    assert "It changes nothing" in said("inspect", "--adapter", str(tmp_path))
    compared = said("compare", str(tmp_path), str(tmp_path))
    assert f"Nothing to compare: {tmp_path} changes nothing in any layer that both correct." in compared
    assert "+0.000" not in compared and "cosine" not in compared


def test_methods_of_the_command_line_do_not_wait_for_torch() -> None:
    program = (
        "import sys, logging; sys.argv = ['semu', 'methods', '--job', 'text']; from semu_cli import main\n"
        "try: main()\nfinally:\n"
        "    assert not {'torch', 'peft', 'semu_peft'} & set(sys.modules)\n"
        # bitsandbytes says of a kernel that is missing, to whoever imports PEFT
        "    assert not logging.getLogger('bitsandbytes.backends.cpu.ops').isEnabledFor(logging.WARNING)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0 and "simnpo" in done.stdout, done.stderr


def test_weights_are_read_without_bars_and_downloads_with_them() -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    from semu_cli.bases import silently

    were_shown = not are_progress_bars_disabled()
    try:
        enable_progress_bars()
        silently()
        assert not logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    finally:
        logging.enable_progress_bar()
        if not were_shown:
            disable_progress_bars()
