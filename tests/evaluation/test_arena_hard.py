"""Arena-Hard: verdicts, scores against Bradley-Terry, interval coverage by simulation, style control, files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from simpo import SimpoError
from simpo.evaluation.answers import Answer, Question, read_answers, write_rows
from simpo.evaluation.arena_hard import (
    ArenaHard,
    ArenaPrompt,
    Judgment,
    attach_baselines,
    battles,
    bootstrap_score,
    category_metrics,
    read_questions,
    read_verdict,
    score_over_prompts,
    style_controlled_score,
    style_differences,
    style_of,
)


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        ("My verdict: [[A>>B]].", "A>>B", "A>>B"),
        ("[[A>B]] and again [[A>B]]", "A>B", "A>B"),
        ("[[A>B]], no: [[B>A]]", None, "B>A"),  # conflicting
        ("[A=B]", None, "A=B"),
        ("[[a>b]]", None, "A>B"),
        ("[[B<<A]]", None, "A>>B"),
        ("[[A<B]]", None, "B>A"),
        ("[[A>>>B]]", None, None),
        ("[[B=A]]", None, "A=B"),
        ("A is better", None, None),
        ("", None, None),
    ],
)
def test_verdicts_are_read_from_text(text, old, new):
    assert (read_verdict(text, "v0.1"), read_verdict(text, "v2")) == (old, new)


def test_battles_count_from_the_models_side():
    """In the first game, the baseline is shown first."""
    assert battles("B>A", "A>B", "v0.1") == [1, 1]
    assert battles("A>>B", "B>>A", "v0.1") == [0] * 6
    assert battles("A=B", "A>>B", "v2") == [0.5, 1, 1, 1]
    assert battles(None, "A>B", "v0.1") == [1] and battles(None, "A>B", "v2") == []
    assert battles("A>B", None, "v0.1") == [0] and battles(None, None, "v0.1") == []


def simulated_battles(rng, prompts, lean):
    """Simulate weighted battles for prompts that favor the model by ``lean`` on average, each to a different degree."""
    won = rng.uniform(size=(prompts, 2)) < expit(rng.normal(lean, 1.0, size=(prompts, 1)))
    strong = rng.uniform(size=(prompts, 2)) < 0.4
    return [
        [float(game) for game, three in zip(*pair, strict=True) for _ in range(3 if three else 1)]
        for pair in zip(won, strong, strict=True)
    ]


def test_the_mean_equals_bradley_terry():
    """Several models against one baseline; strengths from unpenalized logistic regression."""
    rng = np.random.default_rng(0)
    boards = [simulated_battles(rng, 60, lean) for lean in (-1.0, 0.2, 2.0)]
    worths = [np.concatenate(board) for board in boards]
    models = np.repeat(np.arange(3), [len(found) for found in worths])
    x = np.column_stack([np.eye(3)[models], -np.ones(len(models))])  # the last one is the baseline
    y = np.concatenate(worths)

    def loss(strengths):
        z = x @ strengths
        return (np.logaddexp(0, z) - y * z).sum(), x.T @ (expit(z) - y)

    fitted = minimize(loss, np.zeros(4), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    for board, strength in zip(boards, fitted[:3] - fitted[3], strict=True):
        assert bootstrap_score(board, "v0.1").value == pytest.approx(100 * expit(strength), abs=1e-4)
        assert score_over_prompts(board).value / 100 == pytest.approx(expit(strength), abs=1e-6)


def test_bootstrap_intervals_are_percentiles_of_resampled_means():
    board = simulated_battles(np.random.default_rng(1), 40, 0.3)
    worths = np.concatenate(board)
    means = worths[np.random.default_rng(7).integers(len(worths), size=(100, len(worths)))].mean(axis=1)
    old, new = bootstrap_score(board, "v0.1", seed=7), bootstrap_score(board, "v2", seed=7)
    assert (old.low, old.high) == pytest.approx(tuple(100 * np.percentile(means, [2.5, 97.5])))
    assert (new.low, new.high) == pytest.approx(tuple(100 * np.percentile(means, [5, 95])))
    assert (old.value, new.value) == pytest.approx((100 * worths.mean(), 100 * means.mean()))


def test_only_the_interval_over_prompts_has_its_coverage():
    """Resampling prompts covers 95%; resampling battles cannot, because the battles of a prompt are correlated."""
    rng = np.random.default_rng(2)
    truth = 100 * expit(np.random.default_rng(3).normal(0.4, 1.0, size=1_000_000)).mean()
    boards = [simulated_battles(rng, 120, 0.4) for _ in range(1000)]
    over_prompts = [score_over_prompts(board) for board in boards]
    assert 930 <= sum(found.low <= truth <= found.high for found in over_prompts) <= 970
    over_battles = [bootstrap_score(board, "v0.1", seed=run) for run, board in enumerate(boards[:300])]
    assert sum(found.low <= truth <= found.high for found in over_battles) < 0.85 * 300


def test_independent_battles_are_covered():
    rng = np.random.default_rng(4)
    boards = (rng.uniform(size=(1000, 300)) < 0.6).astype(float)
    covered = 0
    for run, board in enumerate(boards):
        found = bootstrap_score(board[:, None], "v0.1", seed=run)
        covered += found.low <= 60 <= found.high
    assert 920 <= covered <= 970


def test_style_is_counted_outside_code():
    text = "# Title\n\n- one\n* two\n 3. three\n**bold** and __also__ *not*\n```\n# no\n- no\n```\n## More"
    assert style_of(text) == (len(text), 2, 3, 2)  # headers, lists, bold
    assert style_of("plain", 3) == (3, 0, 0, 0)


def test_style_differences_match_their_formula():
    found = style_differences([(30, 3, 0, 6), (0, 0, 0, 0)], [(10, 0, 0, 1), (0, 0, 0, 0)])
    density = [(3 / 31, 0.0), (0.0, 0.0), (6 / 31, 1 / 11)]
    assert found[0] == pytest.approx([20 / 40, *((a - b) / (a + b + 1) for a, b in density)])
    assert found[1] == pytest.approx(np.zeros(4))


def test_style_control_recovers_the_strength_without_style_effects():
    rng = np.random.default_rng(5)
    features = rng.normal([0.3, 0.0, 0.1, -0.2], [0.5, 0.2, 0.3, 0.4], size=(800, 4))
    strength, effects = 0.7, np.array([1.2, 0.0, -0.5, 0.8])
    worths = expit(strength + features @ effects)
    assert style_controlled_score(worths, features) == pytest.approx(100 * expit(strength), abs=1e-6)
    same = np.zeros((3, 4))  # explains nothing
    assert style_controlled_score(np.array([1.0, 0.0, 1.0]), same) == pytest.approx(200 / 3)
    # nor does a constant feature, even if its mean is not exactly equal to its value due to rounding
    alone = style_controlled_score(worths, features[:, :3])
    features[:, 3] = 0.1
    assert style_controlled_score(worths, features) == pytest.approx(alone)


def test_there_is_no_controlled_score_if_style_explains_everything():
    rng = np.random.default_rng(6)
    features = rng.normal(size=(50, 4))
    assert np.isnan(style_controlled_score((features[:, 0] > 0.1).astype(float), features))
    assert np.isnan(style_controlled_score(np.ones(50), features))


def asked(key, category, prompt="P"):
    return Question(key, (prompt,), f"q:{key}", category)


def read(path, questions):
    return read_answers(path, "uid", ArenaHard.parse_answer, {question.key: question.where for question in questions})


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_both_file_formats_are_read(tmp_path):
    new = lines(tmp_path / "new.jsonl", [{"uid": "a", "category": "math", "prompt": "P"}])
    old = lines(
        tmp_path / "old.jsonl", [{"question_id": "a", "category": "arena-hard-v0.1", "turns": [{"content": "P"}]}]
    )
    (question,) = read_questions(new, "v2")
    assert (question.key, question.category, question.turns) == ("a", "math", ("P",))
    (other,) = read_questions(old, "v0.1")
    assert (other.key, other.category, other.turns) == ("a", "arena-hard-v0.1", ("P",))
    write_rows(tmp_path / "answers.jsonl", [ArenaHard.answer_row(question, Answer("mine", ("text",)))])
    assert read(tmp_path / "answers.jsonl", [question]) == [Answer("mine", ("text",))]
    row = {"question_id": "a", "model_id": "mine", "choices": [{"turns": [{"content": "text", "token_len": 7}]}]}
    assert read(lines(tmp_path / "old-answers.jsonl", [row]), [question]) == [Answer("mine", ("text",), 7)]
    with pytest.raises(SimpoError, match=r"answers.jsonl:1: .*messages"):
        read(lines(tmp_path / "answers.jsonl", [{"uid": "a", "model": "m", "messages": []}]), [question])
    for file, version, right in ((old, "v2", r"v0\.1"), (new, "v0.1", "v2")):
        with pytest.raises(SimpoError, match=f"is not in {version}; use --version {right}"):
            read_questions(file, version)


@pytest.mark.parametrize("turns", [[], ["P"], [{"text": "P"}], [{"content": None}]])
def test_questions_not_from_the_benchmark_are_rejected(tmp_path, turns):
    row = {"question_id": "a", "category": "arena-hard-v0.1", "turns": turns}
    with pytest.raises(SimpoError, match=r"questions.jsonl:1: turns: "):
        read_questions(lines(tmp_path / "questions.jsonl", [row]), "v0.1")


@pytest.mark.parametrize(
    "row",
    [
        {"uid": "a", "model": "m", "messages": [{"content": None}]},
        {"uid": "a", "model": "m", "messages": [{"content": {"answer": None, "think": "x"}}]},
        {"uid": "a", "model_id": "m", "choices": [{"turns": [{"content": None, "token_len": 0}]}]},
    ],
)
def test_a_missing_answer_is_not_text(tmp_path, row):
    with pytest.raises(SimpoError, match=r"answers.jsonl:1: answer: .*None"):
        read(lines(tmp_path / "answers.jsonl", [row]), [asked("a", "math")])


def test_a_baseline_other_than_the_categorys_is_reported(tmp_path):
    questions = [asked("a", "math"), asked("b", "creative_writing")]
    files = {}
    for model in ("o3-mini-2025-01-31", "gemini-2.0-flash-001"):
        files[model] = tmp_path / f"{model}.jsonl"
        write_rows(files[model], [ArenaHard.answer_row(one, Answer(model, (one.key,))) for one in questions])
    o3, gemini, notes = *files.values(), []
    found = attach_baselines(questions, [o3], notes.append)
    assert [one.baseline.model for one in found] == ["o3-mini-2025-01-31"] * 2
    assert len(notes) == 1 and "creative_writing is o3-mini-2025-01-31" in notes[0]
    found = attach_baselines(questions, [gemini, o3], notes.append)
    expected = [("o3-mini-2025-01-31", "a"), ("gemini-2.0-flash-001", "b")]
    assert [(one.baseline.model, one.baseline.text) for one in found] == expected and len(notes) == 1
    with pytest.raises(SimpoError, match=r"^baseline: .*gemini-2.0-flash-001"):
        attach_baselines(questions, [o3, o3], notes.append)


def test_metrics_by_category_and_what_is_excluded():
    base = Answer("base", ("text",))
    questions = [replace(asked(str(i), "math" if i < 3 else "coding"), reference=base) for i in range(5)]
    verdicts = [("B>A", "A>B"), ("A=B", "A=B"), (None, "A>B"), ("A>>B", "B>>A"), ("A>B", "A>B")]
    judgments = [
        Judgment(question, Answer("mine", ("text" * 2,)), ("", ""), found)
        for question, found in zip(questions, verdicts, strict=True)
    ]
    notes = []
    metrics = {metric.name: metric for metric in category_metrics(judgments, "v0.1", notes.append)}
    assert metrics["arena_hard/math/score"].value == pytest.approx(100 * (1 + 1 + 0.5 + 0.5 + 1) / 5)
    assert metrics["arena_hard/coding/score"].value == pytest.approx(100 * 1 / 8)
    assert metrics["arena_hard/math/games_without_verdict"].value == 1 and len(notes) == 1
    newer = {metric.name: metric for metric in category_metrics(judgments, "v2", notes.append)}
    assert newer["arena_hard/math/score_over_prompts"].value == pytest.approx(75)
    (nothing, missing) = category_metrics(judgments[2:3], "v2", notes.append)
    assert (nothing.value, nothing.n, missing.value) == (None, 0, 1)
    assert newer["arena_hard/math/score"].n == 2 and newer["arena_hard/math/avg_length"].value == 8


def test_both_versions_have_their_prompts(tmp_path):
    shipped = ArenaPrompt(None)
    plain = shipped.request(asked("a", "math", "Q"), "one", "two", "v0.1")
    assert [message["role"] for message in plain.messages] == ["system", "user"] and plain.temperature == 0
    text = plain.messages[1]["content"]
    assert text.index("Q") < text.index("one") < text.index("two")
    written = shipped.request(asked("a", "creative_writing", "Q"), "one", "two", "v2")
    assert written.messages[0] != plain.messages[0] and written.max_tokens > plain.max_tokens
    file = tmp_path / "judge.yaml"
    file.write_text("system_prompt: Judge.\nprompt_template:\n- '{question_1}|{answer_1}|{answer_2}'\n")
    assert ArenaPrompt(file).request(asked("a", "math", "Q"), "a", "b", "v0.1").messages[1]["content"] == "Q|a|b"
    for text, said in (("a: [", "not YAML"), ("a: b", "needs system_prompt"), ("text", "needs system_prompt")):
        file.write_text(text)
        with pytest.raises(SimpoError, match=said):
            ArenaPrompt(file)
    whole = "system_prompt: x\nprompt_template: '{QUESTION} {ANSWER_A} {ANSWER_B}'\nsystem_prompts: "
    for given in ("[math]", "{math: 3}"):
        file.write_text(whole + given)
        with pytest.raises(SimpoError, match="system_prompts: expected one text per category"):
            ArenaPrompt(file)
    file.write_text("system_prompt: x\nprompt_template: '{QUESTION} {ANSWER_A}'")
    with pytest.raises(SimpoError, match=r"{ANSWER_B}"):
        ArenaPrompt(file)
