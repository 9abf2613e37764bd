"""The report's first lines: what moved, what it cost and what is missing, in the report's own numbers and no others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from semu_peft import UnlearnResult
from semu_peft.evaluation import ForgettingComparison, ForgettingMetrics, LanguageMetrics
from semu_peft.evaluation.attack_report import AttackReport, Compared, NotRun
from semu_peft.report import audit
from semu_peft.report.document import Table, Text
from semu_peft.report.headline import headline


def told(metrics: Any = None, **given: Any) -> str:
    first = headline(audit("Forget it.", metrics=metrics, **given).contents)[0]
    assert isinstance(first, Text) and first.lead and first.text.count("not tested: ") == 1
    return first.text.partition("; not tested: ")[0]


def table(metrics: Any) -> Table:
    found = headline(audit(metrics=metrics).contents)[1]
    assert isinstance(found, Table)
    return found


def row(forget: float, retain: float) -> dict[str, float]:
    return {"forget accuracy": forget, "retain accuracy": retain}


def random_tenth(unlearning: float, retain: float = 99.0) -> ForgettingMetrics:
    return ForgettingMetrics(unlearning, retain, 90.0, 50.0, 20, 1000)


def test_the_request_the_sentence_and_the_table_come_first() -> None:
    report = audit("Forget the cats.", metrics={"original": row(99, 98), "unlearned": row(1, 97.5)})
    lines = [line for line in report.to_markdown().splitlines() if line]
    assert lines[3:9] == [
        "Forget the cats.",
        "**Forgotten: the forget accuracy went from 99 to 1; its cost: the retain accuracy went from 98 to 97.5; not "
        "tested: a model retrained without the data, several seeds, membership inference and 8 more.**",
        "**In short**",
        "| what | original | unlearned |",
        "| --- | --- | --- |",
        "| forgotten: forget accuracy | 99 | 1 |",
    ]
    page = report.to_html()
    assert page.index("Forget the cats.") < page.index('<p class="lead">Forgotten: ') < page.index("In short")
    assert page.index("In short") < page.index("<li>2 models were measured")


@pytest.mark.parametrize(
    ("before", "after", "gold", "grade"),
    [
        (100.0, 0.0, None, "Forgotten: "),
        (100.0, 10.0, None, "Forgotten: "),
        (100.0, 11.0, None, "Forgotten in part: "),
        (100.0, 89.0, None, "Forgotten in part: "),
        (100.0, 90.0, None, "Hardly forgotten: "),
        (100.0, 100.0, None, "Hardly forgotten: "),
        (100.0, 0.0, 50.0, "Forgotten: "),  # a model that never knew guesses half of it
        (100.0, 56.0, 50.0, "Forgotten in part: "),
        (50.0, 40.0, 50.0, "The forget accuracy went"),  # there was nothing to forget by this
        (0.0, 0.0, None, "The forget accuracy stayed"),
    ],
)
def test_forgotten_is_said_of_the_way_to_a_model_that_never_knew(
    before: float, after: float, gold: float | None, grade: str
) -> None:
    rows = {"original": row(before, 98), "unlearned": row(after, 98)}
    assert told(rows if gold is None else {**rows, "reference": row(gold, 98)}).startswith(grade)


def test_what_a_retrained_model_knows_too_is_not_called_hardly_forgotten() -> None:
    rows = {"original": random_tenth(0.0), "SEMU": random_tenth(5.0), "retrained": random_tenth(5.2, 99.5)}
    assert told(ForgettingComparison(rows, "retrained")) == (
        "Forgotten: the unlearning accuracy went from 0 to 5, where a model that never knew has 5.2; its cost: the "
        "retain accuracy stayed at 99, where a model that never knew has 99.5"
    )
    found = table(ForgettingComparison(rows, "retrained"))
    assert found.columns == ("what", "original", "SEMU", "retrained (reference)")
    assert found.rows[0] == ("forgotten: unlearning accuracy (high where it is forgotten)", "0", "5", "5.2")


@pytest.mark.parametrize("name", ["original", "do nothing"])
def test_the_original_as_reference_is_no_model_that_never_knew(name: str) -> None:
    comparison = ForgettingComparison({name: random_tenth(0.0), "SEMU": random_tenth(99.0)}, name)
    assert told(comparison) == (
        "Forgotten: the unlearning accuracy went from 0 to 99; its cost: the retain accuracy stayed at 99"
    )
    assert "a model retrained without the data, beside" in audit("Forget.", metrics=comparison).to_markdown()


def test_a_loss_is_forgotten_where_it_rises() -> None:
    def rows(after: float) -> dict[str, Any]:
        return {"original": {"forget loss": 1.0}, "unlearned": {"forget loss": after}}

    assert told(rows(0.5)).startswith("Hardly forgotten: ") and told(rows(20.0)).startswith("Forgotten: ")


def test_what_moved_by_less_than_is_shown_stayed() -> None:
    rows = {"original": {"retain loss": 1.11501}, "unlearned": {"retain loss": 1.11504}}
    assert told(rows).endswith("its cost: the retain loss stayed at 1.115")
    rows["unlearned"]["retain loss"] = 1.116
    assert told(rows).endswith("its cost: the retain loss went from 1.115 to 1.116")


def test_answers_of_a_language_model() -> None:
    rows = {
        "original": LanguageMetrics(probability=0.9, utility={"retain probability": 0.8, "retain rouge": 0.7}),
        "unlearned": LanguageMetrics(probability=0.3, utility={"retain probability": 0.8, "retain rouge": 0.6}),
    }
    assert told(rows) == (
        "Forgotten in part: the probability of the forgotten answers went from 0.9 to 0.3; its cost: the retain "
        "probability stayed at 0.8"
    )
    assert [cells[0] for cells in table(rows).rows] == [
        "forgotten: probability of the forgotten answers", "kept: retain probability"
    ]  # fmt: skip


def test_nothing_is_said_that_was_not_measured() -> None:
    nothing = "hether it was forgotten was not measured; what it cost of what was to be kept was not measured"
    assert told().endswith(nothing) and len(headline(audit().contents)) == 1
    assert told({"speed": 3.0}).endswith(nothing)
    assert told({"forget accuracy": 1.5}) == (
        "The forget accuracy is 1.5, and what it was before is not known; what it cost of what was to be kept was not "
        "measured"
    )
    strange = {"original": {"forget accuracy": float("nan")}, "unlearned": {"forget accuracy": 2.0}}
    assert told(strange).startswith("The forget accuracy went from nan to 2;")
    steps = [{"damage": 0.0, "answer_probability": 0.9}, {"damage": 0.012, "answer_probability": 0.1}]
    alone = UnlearnResult(steps, 1, 8, 4, 0.1, True, "done")
    assert told(training=alone).endswith(
        "; its cost: a damage of 0.012 nats on the other answers to what was forgotten, as the run recorded; what it "
        "cost of other data was not measured"
    )
    run = UnlearnResult([{**step, "retain_loss": 0.5} for step in steps], 1, 8, 4, 0.1, True, "done")
    assert told(training=run).endswith("; its cost: a damage of 0.012 nats on what was to be kept, as the run recorded")
    of_itself = replace(run, damage_on="what the model says of its own accord")
    assert told(training=of_itself).endswith(
        "0.012 nats on what the model says of its own accord, as the run recorded; what it cost of other data was not "
        "measured"
    )
    kept = [each["test"] for each in audit(training=of_itself).contents["not_tested"]]
    assert "what the model keeps" in kept
    denoiser = UnlearnResult([{"loss": 1.0, "retain_loss": 0.3, "damage": 0.012}], 1, 8, 4, 0.1, True, "done")
    assert told(training=denoiser).endswith("a damage of 0.012 on what was to be kept, as the run recorded")
    assert "damage" not in told(training={"first": run, "second": run}), "which of both is the model's is not said"


def test_of_several_models_the_first_is_told_by_its_name() -> None:
    rows = {"original": row(100, 99), "SEMU": row(0, 98), "LoRA": row(50, 97)}
    assert "the forget accuracy of 'SEMU', the first of 2, went from 100 to 0" in told(rows)
    assert table(rows).columns == ("what", "original", "SEMU", "LoRA")
    assert len(table({**rows, "a": row(1, 1), "reference": row(2, 2)}).columns) == 4, "a phone has no room for more"


def test_intervals_over_seeds_stand_in_the_table() -> None:
    rows = {"original": row(100, 99), "unlearned": [row(1, 98), row(3, 98)]}
    assert table(rows).rows[0][2] == "2 (-10.71 to 14.71)"


@pytest.mark.parametrize(
    ("not_run", "short"),
    [
        ("membership with shadow models: LiRA and RMIA", "membership with shadow models (LiRA and RMIA)"),
        ("membership: LiRA", "membership (LiRA)"),
        ("quantisation: 8 bits", "quantisation (8 bits)"),
        ("quantisation: 8 bits, of the reference", "quantisation (8 bits) of the reference"),
        ("linear probes, of the reference", "linear probes of the reference"),
        ("relearning: SGD 0.01, 20 examples, 50 steps", "relearning (SGD 0.01, 20 examples, 50 steps)"),
        ("relearning from related data", "relearning from related data"),
        ("inputs: flipped", "inputs (flipped)"),
        ("stripping, quantisation, relearning", "stripping, quantisation, relearning"),
    ],
)
def test_an_attack_that_was_not_run_is_not_called_as_its_whole_kind(not_run: str, short: str) -> None:
    """Others of the kind may well have been: membership by confidence, rounding to 4 bits, the model itself."""
    metrics = {"original": [random_tenth(0.0)] * 2, "retrained": [random_tenth(5.0)] * 2}
    tried = [Compared(name, 1.0) for name in ("relearning", "quantisation", "probes", "inputs", "stripping")]
    report = AttackReport("classification", tuple(tried), (NotRun(not_run, "no time"),), 1.0, True)
    first = headline(audit(metrics=metrics, attacks=report).contents)[0]
    assert isinstance(first, Text) and first.text.partition("; not tested: ")[2] == f"{short}."


def test_what_is_missing_is_what_such_a_model_could_be_tested_for() -> None:
    class TinyForImageClassification(nn.Linear):
        pass

    report = audit(metrics={"forget accuracy": 1.0}, model=TinyForImageClassification(2, 2))
    missing = [each["test"] for each in report.contents["not_tested"]]
    assert "membership inference" in missing and not any("prompts" in each for each in missing)
