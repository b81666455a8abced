"""lm-eval on an exported folder: a real call, with a task and data that lie on this disk."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from data_kit import END, jsonl, tokenizer
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer.evaluation import suites
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.models.export import write_folder
from transformers import AutoConfig, AutoModelForCausalLM

TASK = """\
task: own_capitals
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "capitals.jsonl"
    data.write_bytes(
        jsonl(
            {"question": "Peru?", "choices": ["Lima", "Oslo"], "label": 0},
            {"question": "Norway?", "choices": ["Lima", "Oslo"], "label": 1},
        )
    )
    (folder / "capitals.yaml").write_text(TASK % data)
    monkeypatch.setenv(suites.OWN_TASKS, str(folder))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return folder


def exported(folder: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=330, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    files = {**tokenizer(None).files, "tokenizer_config.json": json.dumps(settings).encode()}
    write_folder(model, dict(model.state_dict()), files, folder)
    return folder


def test_a_task_of_ones_own_is_run_on_the_exported_folder(own_tasks: Path, tmp_path: Path) -> None:
    suites.check_suites(["own_capitals"])
    found = suites.run_suites(["own_capitals"], exported(tmp_path / "model"), "cpu")
    assert set(found) == {"own_capitals"}
    # Two choices, one of which is always likelier: none, one or both are right.
    assert found["own_capitals"]["acc"] in (0.0, 0.5, 1.0)


def test_a_task_that_lm_eval_does_not_have_is_refused_with_what_is_near(own_tasks: Path) -> None:
    with pytest.raises(InputsRefused) as refused:
        suites.check_suites(["own_capitals", "own_capital"])
    [problem] = refused.value.problems
    assert problem.field == "spec.evaluation.lmEval[1]"
    assert "own_capitals" in problem.expected


def test_without_lm_eval_the_preflight_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(suites, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    suites.check_suites([])
    with pytest.raises(InputsRefused, match="TRAINER_EXTRAS=lm-eval") as refused:
        suites.check_suites(["arc_easy"])
    assert refused.value.code == ExitCode.BAD_CONFIGURATION
