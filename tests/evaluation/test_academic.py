"""Reading lm-eval's results, and differences between two models."""

from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from simpo import SimpoError
from simpo.evaluation.academic import AcademicSettings, differences, read_scores, score_metrics
from simpo.evaluation.runner import evaluate
from simpo.models.settings import ModelArguments
from simpo.runs.results import read_results
from simpo.statistics import mean_interval


def output(right, perplexity=12.0):
    """Return what ``simple_evaluate`` returns for one task with single answers, one of its two filters, and a group."""
    n = len(right)
    error = float(np.std(right, ddof=1) / n**0.5)
    strict = [{"doc_id": i, "filter": "strict", "exact_match": float(x)} for i, x in enumerate(right)]
    flexible = [{"doc_id": i, "filter": "flexible", "exact_match": 1.0} for i in range(n)]
    return {
        "results": {
            "mmlu": {"alias": "mmlu", "acc,none": 0.4, "acc_stderr,none": 0.01},
            "truth": {"alias": "truth", "acc,none": float(np.mean(right)), "acc_stderr,none": error},
            "gsm8k": {
                "alias": "gsm8k",
                "exact_match,strict": float(np.mean(right)),
                "exact_match_stderr,strict": error,
                "exact_match,flexible": 1.0,
                "exact_match_stderr,flexible": 0.0,
            },
            "wiki": {"alias": "wiki", "word_perplexity,none": perplexity, "word_perplexity_stderr,none": "N/A"},
        },
        "samples": {
            "truth": [{"doc_id": i, "filter": "none", "acc": bool(x)} for i, x in enumerate(right)],
            "gsm8k": strict + flexible,
            "wiki": [{"doc_id": 0, "filter": "none", "word_perplexity": [1.0, 2.0]}],
        },
        "n-samples": {"truth": {"original": n, "effective": n}},
    }


BEFORE = [1, 1, 0, 1, 0, 0, 1, 1]
AFTER = [1, 0, 0, 1, 1, 0, 1, 0]


def test_results_have_one_metric_per_task_metric_and_filter():
    scores = read_scores(output(BEFORE))
    assert set(scores) == {
        "mmlu/acc",
        "truth/acc",
        "gsm8k/exact_match:strict",
        "gsm8k/exact_match:flexible",
        "wiki/word_perplexity",
    }
    assert scores["truth/acc"].items == {str(i): float(x) for i, x in enumerate(BEFORE)}
    assert scores["truth/acc"].n == 8 and scores["mmlu/acc"].items == {}
    assert scores["wiki/word_perplexity"].error is None
    metrics = {metric.name: metric for metric in score_metrics(scores, "after")}
    # Wilson's bound for the number of trials with this standard error: 0.4 * 0.6 / 0.01**2 = 2400.
    expected = binomtest(960, 2400).proportion_ci(method="wilson").low
    assert metrics["academic/mmlu/acc"].low == pytest.approx(expected, abs=1e-6)
    assert metrics["academic/wiki/word_perplexity"].low is None


def test_differences_are_paired_if_items_are_known():
    found = {metric.name: metric for metric in differences(read_scores(output(BEFORE)), read_scores(output(AFTER, 10)))}
    paired = mean_interval(np.array(AFTER) - np.array(BEFORE))
    same = found["academic/truth/acc/difference"]
    assert (same.value, same.low, same.high) == pytest.approx((paired.value, paired.low, paired.high))
    assert same.method.startswith("paired")
    strict = found["academic/gsm8k/exact_match:strict/difference"]
    assert (strict.low, strict.high) == pytest.approx((paired.low, paired.high))
    group = found["academic/mmlu/acc/difference"]
    assert group.value == 0 and group.high == pytest.approx(1.96 * 0.01 * math.sqrt(2))
    assert group.method.startswith("unpaired")
    unknown = found["academic/wiki/word_perplexity/difference"]
    assert unknown.value == -2 and unknown.low is None


def test_a_metric_that_is_not_a_mean_has_no_items():
    given = output(BEFORE)
    given["results"]["truth"]["acc,none"] = 0.123
    assert read_scores(given)["truth/acc"].items == {}


_INSTALLED = importlib.util.find_spec("lm_eval") is not None

_TASK = """
task: even
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: ["yes", "no"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow
@pytest.mark.skipif(not _INSTALLED, reason="lm-eval is not installed")
def test_lm_eval_runs_a_custom_task(chat_world, tmp_path):
    rows = [json.dumps({"question": f"Is {number} even?", "label": number % 2}) for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/even.yaml").write_text(_TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
    model, folder = str(chat_world / "model"), tmp_path / "out"
    tasks = {"tasks": "even", "task_folder": str(tmp_path / "tasks"), "batch_size": "2"}
    tasks["loading"] = ModelArguments("", trust_remote_code=True)
    results = read_results(evaluate(AcademicSettings(model=model, against=model, output_dir=folder, **tasks)))
    names = [(metric.name, metric.stage) for metric in results.metrics]
    assert names[:2] == [("academic/even/acc", "before"), ("academic/even/acc", "after")]
    assert (results.metrics[0].n, results.metrics[2].value) == (6, 0) and "paired" in results.metrics[2].method
    with pytest.raises(SimpoError, match=r"^tasks: .*odd"):
        evaluate(AcademicSettings(model=model, tasks="odd", output_dir=tmp_path / "other"))


@pytest.mark.parametrize("given", [{"task_folder": "tasks"}, {"tasks": "gsm8k,own.yaml"}])
def test_task_files_can_contain_code_and_need_permission(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("task: own\nprocess_docs: !function code.run\n")
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(SimpoError, match="--trust_remote_code"):
        evaluate(AcademicSettings(model="x", output_dir=tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(_INSTALLED, reason="lm-eval is installed")
def test_a_missing_lm_eval_is_reported_with_what_to_install(tmp_path):
    with pytest.raises(SimpoError, match=r"pip install 'simpo\[academic\]'"):
        evaluate(AcademicSettings(model="x", output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
