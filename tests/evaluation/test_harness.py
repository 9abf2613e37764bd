"""lm-evaluation-harness on a model at hand, with a task that needs no network."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from answer_models import decoder, word_tokenizer
from models import Snapshot

from semu_peft.evaluation import harness, score_answers

QUESTIONS = [
    {"question": "where lives Ada", "choices": ["in Rome", "in Oslo", "the Paris"], "answer": 0},
    {"question": "who wrote it", "choices": ["Ada", "Bob", "Eve"], "answer": 2},
    {"question": "what", "choices": ["Rome", "Oslo", "Paris"], "answer": 1},
]
TASK = """\
task: small_facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.json}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} :"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_an_offline_task_is_run_on_the_model_in_memory(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "small_facts.yaml").write_text(TASK.format(folder=tmp_path))
    model, tokenizer = decoder().train(), word_tokenizer()
    before, state, numbers = Snapshot.of(model), random.getstate(), torch.get_rng_state()
    options = {"include_path": tmp_path, "include_defaults": False, "batch_size": 2}
    found = harness(model, tokenizer, "small_facts", **options)
    before.assert_same(model)
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), numbers)

    hits = 0
    for row in QUESTIONS:
        pairs = [(row["question"], choice) for choice in row["choices"]]
        scores = score_answers(model, tokenizer, pairs, template="{question} : {answer}", progress=False).without_eos()
        sums = torch.stack([part.sum() for part in scores.log_probs])
        hits += int(sums.argmax()) == row["answer"]
    assert found["small_facts"]["acc"] == pytest.approx(hits / 3)


def test_an_unknown_task_is_told(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="`tasks` must be names .* got \\['no_such_task'\\]"):
        harness(decoder(), word_tokenizer(), ["no_such_task"], include_path=tmp_path, include_defaults=False)
