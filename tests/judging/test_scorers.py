"""Scorers against plain transformers, and their errors."""

from __future__ import annotations

import itertools
import json
import shutil
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
)

from simpo import SimpoError
from simpo.judging.protocol import Answers, Pair, Scorer, check_scores
from simpo.judging.registry import make_judge, make_scorer
from simpo.judging.settings import JudgeOptions
from simpo.world.pairs import make_prompts
from simpo.world.questions import judge

ROWS = [
    Answers("p", "What is 1 and 2?", ("It is 3.", "I would say 11, 1.", "", " <|end|>")),
    Answers("q", [{"role": "user", "content": "What is 3 and 4?"}], ("It is 7.",)),
    Answers("r", "What is 2 and 2?", ("It is <|end|> 4.", "It is 4.")),
]


def ids_of(tokenizer, row, response):
    """Return the conversation rendered by transformers alone, and where the answer starts."""
    messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    response = response.strip().removesuffix("<|end|>")
    whole = [*prompt, *tokenizer(response, add_special_tokens=False, split_special_tokens=True).input_ids]
    return [*whole, tokenizer.eos_token_id], len(prompt)


@torch.no_grad()
def test_a_policys_score_is_its_mean_log_probability(chat_world):
    tokenizer = AutoTokenizer.from_pretrained(chat_world / "model")
    model = AutoModelForCausalLM.from_pretrained(chat_world / "model", dtype=torch.float32).eval()
    scores = make_scorer(f"logp:{chat_world / 'model'}", JudgeOptions()).score(ROWS)
    for row, given in zip(ROWS, scores, strict=True):
        for response, score in zip(row.responses, given, strict=True):
            ids, start = ids_of(tokenizer, row, response)
            logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            answer = logps[range(start - 1, len(ids) - 1), ids[start:]]
            assert score == pytest.approx(answer.mean().item(), abs=1e-5)


@torch.no_grad()
def test_truncated_reasoning_is_scored_unchanged(chat_world, tmp_path):
    """Even though a template that supports reasoning makes it a bad row of training data."""
    folder = shutil.copytree(chat_world / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template += "{# <think> </think> #}"
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    row = Answers("p", "What is 1 and 2?", ("<think> It is 3", "It is 3."))
    (scores,) = make_scorer(f"logp:{folder}", JudgeOptions()).score([row])
    for response, score in zip(row.responses, scores, strict=True):
        ids, start = ids_of(tokenizer, row, response)
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        assert score == pytest.approx(logps[range(start - 1, len(ids) - 1), ids[start:]].mean().item(), abs=1e-5)


@pytest.fixture(scope="module")
def write_classifier(chat_world, tmp_path_factory):
    """``write_classifier(labels)``: the folder of a random sequence classifier that pads with its end-of-turn token."""

    def write(labels: int):
        folder = tmp_path_factory.mktemp("reward")
        tokenizer = AutoTokenizer.from_pretrained(chat_world / "model")
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        source = AutoModelForCausalLM.from_pretrained(chat_world / "model")
        source.config.num_labels, source.config.pad_token_id = labels, tokenizer.eos_token_id
        AutoModelForSequenceClassification.from_config(source.config).save_pretrained(folder)
        return folder

    return write


@torch.no_grad()
def test_a_reward_is_read_at_the_end_of_turn(write_classifier):
    folder = write_classifier(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    scores = make_scorer(f"reward:{folder}", JudgeOptions()).score(ROWS)
    for row, given in zip(ROWS, scores, strict=True):
        for response, score in zip(row.responses, given, strict=True):
            hidden = model.transformer(torch.tensor([ids_of(tokenizer, row, response)[0]])).last_hidden_state
            assert score == pytest.approx(model.score(hidden[0, -1]).item(), abs=1e-6)
    assert len({score for given in scores for score in given}) == 6  # the two empty answers are equal


def test_models_that_are_not_reward_models_are_rejected(chat_world, write_classifier):
    with pytest.raises(SimpoError, match=r"not a reward model: its files contain no score\.weight"):
        make_scorer(f"reward:{chat_world / 'model'}", JudgeOptions()).score(ROWS)
    with pytest.raises(SimpoError, match="3 labels"):
        make_scorer(f"reward:{write_classifier(3)}", JudgeOptions()).score(ROWS)


GATED = """
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import LLAMA_INPUTS_DOCSTRING
from transformers.utils import ModelOutput, add_start_docstrings_to_model_forward


@dataclass
class Weighed(ModelOutput):
    rewards: torch.Tensor = None
    score: torch.Tensor = None
    logits: torch.Tensor = None


class GatedReward(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.objectives = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
        self.gate = nn.Linear(config.hidden_size, config.num_labels)

    @add_start_docstrings_to_model_forward(LLAMA_INPUTS_DOCSTRING)
    def forward(self, input_ids=None, attention_mask=None):
        states = self.model(input_ids, attention_mask=attention_mask)[0]
        ends = -1
        if self.config.pad_token_id is not None:
            ends = (input_ids == self.config.pad_token_id).int().argmax(-1) - 1
        rewards = self.objectives(states[torch.arange(len(input_ids)), ends])
        starts = (input_ids == self.config.gate_token).nonzero()
        if len(starts) == 0:
            raise ValueError("there is no answer")
        weights = self.gate(states[:, starts[-1, 1]]).softmax(-1)
        score = (weights * rewards).sum(-1)
        return Weighed(rewards=rewards, score=score if self.config.weighs else None, logits=score)
"""


@pytest.fixture
def write_gated(chat_world, tmp_path):
    """``write_gated(weighs=True)``: a reward model with 19 objectives and its own code, like ArmoRM."""

    def write(**changes):
        folder = tmp_path / "gated"
        tokenizer = AutoTokenizer.from_pretrained(chat_world / "model")
        tokenizer.save_pretrained(folder)
        (folder / "code_of_gated.py").write_text(GATED)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_labels=19,
            pad_token_id=tokenizer.eos_token_id,  # answers end with this token as well
            gate_token=tokenizer.convert_tokens_to_ids("<|assistant|>"),
            architectures=["GatedReward"],
            auto_map={"AutoModelForSequenceClassification": "code_of_gated.GatedReward"},
            **changes,
        )
        config.save_pretrained(folder)
        torch.manual_seed(0)
        backbone = LlamaModel(config)
        weights = {f"model.{name}": tensor for name, tensor in backbone.state_dict().items()}
        weights |= {"objectives.weight": torch.randn(19, 16)}
        weights |= {"gate.weight": torch.randn(19, 16), "gate.bias": torch.randn(19)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder, backbone.eval(), weights

    return write


@torch.no_grad()
def test_a_model_with_several_objectives_uses_its_own_score(write_gated):
    """The interface of ArmoRM, the paper's annotator, whose code was written for transformers 4."""
    folder, backbone, weights = write_gated(weighs=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    gate = tokenizer.convert_tokens_to_ids("<|assistant|>")
    scores = make_scorer(f"reward:{folder}", JudgeOptions(trust_remote_code=True)).score(ROWS)
    for row, given in zip(ROWS, scores, strict=True):
        for response, score in zip(row.responses, given, strict=True):
            ids = ids_of(tokenizer, row, response)[0]
            states = backbone(torch.tensor([ids])).last_hidden_state[0]
            rewards = weights["objectives.weight"] @ states[-1]
            last = len(ids) - 1 - ids[::-1].index(gate)
            shares = (weights["gate.weight"] @ states[last] + weights["gate.bias"]).softmax(-1)
            assert score == pytest.approx(float(shares @ rewards), abs=1e-5)
    with pytest.raises(SimpoError, match="it needs custom code; review it, then allow it with trust_remote_code"):
        make_scorer(f"reward:{folder}", JudgeOptions()).score(ROWS)


def test_several_objectives_without_a_score_are_rejected(write_gated):
    folder, *_ = write_gated(weighs=False)
    with pytest.raises(SimpoError, match="it has 19 labels and its code returns no single score"):
        make_scorer(f"reward:{folder}", JudgeOptions(trust_remote_code=True)).score(ROWS)


def test_a_model_is_identified_by_its_weights(chat_world, tmp_path):
    shutil.copytree(chat_world / "model", tmp_path / "copy")
    first, second = (make_scorer(f"logp:{path}", JudgeOptions()) for path in (chat_world / "model", tmp_path / "copy"))
    assert first.identity == second.identity != make_scorer(f"logp:{tmp_path / 'copy'}", JudgeOptions(dtype="float64"))


def test_a_row_that_does_not_fit_the_model_is_reported(chat_world):
    scorer = make_scorer(f"logp:{chat_world / 'model'}", JudgeOptions())
    with pytest.raises(SimpoError, match="prompt x: 128 tokens with its answer; the model has room for 64"):
        scorer.score([Answers("x", "What? " * 40, ("It is 3.",))])


def test_the_exact_judge_scores_answers():
    prompts = [row["prompt"] for row in make_prompts(20, 0)]
    rows = [Answers(str(i), prompt, ("It is 7.", "7.", "")) for i, prompt in enumerate(prompts)]
    scores = make_scorer("exact", JudgeOptions()).score(rows)
    assert scores == [[judge(row.prompt, response) for response in row.responses] for row in rows]
    with pytest.raises(SimpoError, match="prompt x: "):
        make_scorer("exact", JudgeOptions()).score([Answers("x", "What is love?", ("a",))])


FUNCTIONS = """
def shortest(prompt, response): return -len(response)
def broken(prompt, response): return 1 / 0
def nothing(prompt, response): return None
def nan(prompt, response): return float("nan")
number = 7
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module ``mine`` in the working directory."""
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)
    return JudgeOptions(trust_remote_code=True)


def test_a_function_scores_answers(functions):
    scorer = make_scorer("function:mine:shortest", functions)
    assert scorer.score(ROWS) == [[-8, -18, 0, -8], [-8], [-16, -8]]
    pairs = [Pair("p", "q", ("ab", "abc")), Pair("p", "q", ("abc", "ab")), Pair("p", "q", ("ab", "cd"))]
    assert make_judge("function:mine:shortest", functions).compare(pairs) == [1.0, 0.0, 0.5]
    assert scorer.identity["judge"] == "function:mine:shortest" and len(scorer.identity["code"]) == 64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine:broken", "prompt p: ZeroDivisionError"),
        ("mine:nothing", "prompt p: TypeError"),
        ("mine:nan", r"prompt p: expected finite scores, got [\(\[]nan, nan[\)\]]"),
        ("mine:missing", "mine has no function 'missing'"),
        ("mine:number", "mine has no function 'number'"),
        ("mine", "use function:MODULE:NAME"),
        ("nowhere:f", "cannot import 'nowhere'"),
    ],
)
def test_unusable_functions_are_rejected(functions, name, message):
    with pytest.raises(SimpoError, match=message):
        make_judge(f"function:{name}", functions).compare([Pair("p", "q", ("a", "b"))])


def test_local_code_only_runs_with_permission(functions):
    with pytest.raises(SimpoError, match="--trust_remote_code"):
        make_scorer("function:mine:shortest", JudgeOptions())


@pytest.mark.parametrize("kind", [Answers, Pair])
def test_a_single_text_is_not_a_sequence_of_responses(kind):
    with pytest.raises(TypeError, match="responses"):
        kind("1", "What is 1 plus 2?", "3.", "It is 4.")


def test_an_answer_in_several_pairs_is_scored_once():
    class Lengths(Scorer):
        identity: ClassVar[dict] = {"judge": "lengths"}
        seen: ClassVar[list] = []

        def score(self, rows):
            self.seen.extend(row.responses for row in rows)
            return [[float(len(text)) for text in row.responses] for row in rows]

    judge = Lengths()
    pairs = [Pair(f"p/{i}", "p", (a, b)) for i, (a, b) in enumerate(itertools.product(("a", "aaa"), ("bb", "bb", "a")))]
    assert judge.margins([*pairs, Pair("q", "q", ("a", "aa"))]) == [-1, -1, 0, 1, 1, 2, -1]
    assert Lengths.seen == [("a", "bb", "aaa"), ("a", "aa")]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[1.0] * 4, [1.0]], "2 lists of scores for 3 prompts"),
        ([[1.0, 2.0], [1.0], [1.0, 2.0]], "prompt p: 2 scores for 4 responses"),
        ([[1.0] * 4, [float("inf")], [1.0, 2.0]], "prompt q: expected finite scores"),
    ],
)
def test_scores_are_validated(scores, message):
    with pytest.raises(SimpoError, match=f"mine: {message}"):
        check_scores(scores, ROWS, "mine")


def write_verdicts(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_judge(f"human:{path}", JudgeOptions())


def test_human_verdicts_are_read_from_a_file(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    judge = write_verdicts(
        path, *({"id": key, "winner": winner} for key, winner in zip("xyz", ("a", "b", "tie"), strict=True))
    )
    pairs = [Pair(key, "q", ("1", "2")) for key in "zyxw"]
    assert judge.compare(pairs) == [0.5, 0.0, 1.0, None]
    with pytest.raises(SimpoError, match=r"verdicts\.jsonl: no id matches a pair.* 'w'"):
        judge.compare(pairs[3:])
    with pytest.raises(SimpoError, match=r"verdicts\.jsonl:2: id 'x' occurs twice"):
        write_verdicts(path, {"id": "x", "winner": "a"}, {"id": "x", "winner": "b"})
    with pytest.raises(SimpoError, match=r"verdicts\.jsonl:1: winner: expected a, b or tie, got 'A'"):
        write_verdicts(path, {"id": "x", "winner": "A"})
    with pytest.raises(SimpoError, match=r"verdicts\.jsonl:1: winner: expected a, b or tie, got \['a'\]"):
        write_verdicts(path, {"id": "x", "winner": ["a"]})
    with pytest.raises(SimpoError, match=r"verdicts\.jsonl:1: id: expected text"):
        write_verdicts(path, {"winner": "a"})


@pytest.mark.parametrize("name", ["exakt", "human", "human:", "reward", "logp:", "function:", "api:x", ""])
def test_unknown_judges_are_rejected(name):
    with pytest.raises(SimpoError, match=r"^unknown judge .*choose one of exact, "):
        make_judge(name, JudgeOptions())


def test_a_missing_model_is_reported():
    for kind in ("reward", "logp"):
        with pytest.raises(SimpoError, match=r"\./nowhere"):
            make_scorer(f"{kind}:./nowhere", JudgeOptions())
