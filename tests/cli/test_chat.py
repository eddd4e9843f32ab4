"""``simpo chat`` with piped input, against transformers' own ``generate``."""

import io
import os
import re
import shutil
import signal
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.cli import main
from simpo.cli import models as chat

TEXTS = ["Which color is grass?", "Grass is green.", "What does a dog do?"] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_chat_model):
    """A tiny chat model with 128 positions."""
    folder = tmp_path_factory.mktemp("model")
    write_chat_model(folder, TEXTS, 128)
    return folder


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """``talk(*lines, **options)``: the exit code and what was printed on both streams."""

    def run(*lines, model=folder, **options):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        given = {"temperature": 0, "max_new_tokens": 12} | options
        code = main(["chat", str(model), *(f"--{key}={value}" for key, value in given.items())])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def expected(folder):
    """``expected(*turns, system=None)``: greedy answers, each given all earlier turns."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def answers(*turns, system=None):
        messages = [{"role": "system", "content": system}] if system else []
        found = []
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            ids = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
            found.append(tokenizer.decode(ids, skip_special_tokens=True))
            messages.append({"role": "assistant", "content": found[-1]})
        return found

    return answers


def shown(text):
    return chat.printable(text.replace("\t", "    "))


def test_every_answer_sees_the_earlier_turns(talk, expected):
    turns = ("Which color is grass?", "What does a dog do?")
    code, out, _ = talk(*turns)
    first, second = expected(*turns)
    assert code == 0
    assert shown(first) in out and shown(second) in out.partition(shown(first))[2]
    assert expected(turns[1])[0] != second
    assert "[stopped at max_new_tokens 12]" in out


def test_two_models_answer_every_message_with_the_same_seed(talk, folder, tmp_path, write_chat_model):
    twin, other = tmp_path / "twin", tmp_path / "other"
    shutil.copytree(folder, twin)
    write_chat_model(other, TEXTS, 128, seed=1)
    for second, equal in ((twin, True), (other, False)):
        code, out, _ = talk(
            "Which color is grass?", "/reset", "What does a dog do?", second_model=second, temperature=1
        )
        assert code == 0 and out.count("[new conversation]") == 1
        _, *answers = re.split(rf"\[(?:{re.escape(str(folder))}|{re.escape(str(second))})\]\n", out)
        assert len(answers) == 4
        answers[1] = answers[1].replace("[new conversation]\n", "")
        assert (answers[0] == answers[1] and answers[2] == answers[3]) is equal


def test_reset_forgets_the_conversation(talk, expected):
    _, out, _ = talk("Which color is grass?", "/reset", "What does a dog do?")
    assert shown(expected("What does a dog do?")[0]) in out.partition("[new conversation]")[2]


def test_exit_and_empty_lines(talk):
    code, out, _ = talk("", "  ", "/exit", "Which color is grass?")
    assert code == 0 and out.count("\n") == 1


def test_the_system_message_comes_first_and_stays(talk, expected):
    _, out, _ = talk("What does a dog do?", "/reset", "What does a dog do?", system="Bark.")
    answer = shown(expected("What does a dog do?", system="Bark.")[0])
    assert out.count(answer) == 2 and answer != shown(expected("What does a dog do?")[0])


def test_a_full_context_is_reported(talk):
    code, out, _ = talk(*["Which color is grass?"] * 8, "/reset", "What does a dog do?")
    assert code == 0
    full = out.index("[the model's context of 128 tokens is full; /reset starts a new conversation]")
    assert out.index("[stopped at max_new_tokens 12]") < full
    assert "[stopped at max_new_tokens 12]" in out.partition("[new conversation]")[2]


def test_a_model_cannot_control_the_terminal(talk, monkeypatch):
    decode = "simpo.generation.responses.ResponseText.decode"
    monkeypatch.setattr(decode, lambda self, prompt, ids: "\x1b[2Jred\tone\r"[: len(ids)])
    _, out, _ = talk("Which color is grass?")
    assert "\\x1b[2Jred    one\\r\n" in out and "\x1b" not in out and "\r" not in out


def test_ctrl_c_stops_the_answer_but_not_the_chat(talk, monkeypatch):
    pieces = []

    def show(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat, "_print_piece", show)
    assert threading.current_thread() is threading.main_thread()
    code, out, _ = talk("Which color is grass?", "What does a dog do?")
    assert code == 0
    assert out.count("[stopped]") == 1 and out.count("[stopped at max_new_tokens 12]") == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_truncated_reasoning_stays_in_the_conversation(talk, folder, monkeypatch):
    decode = "simpo.generation.responses.ResponseText.decode"
    monkeypatch.setattr(decode, lambda self, prompt, ids: "<think>\nGrass"[: len(ids)])
    template = AutoTokenizer.from_pretrained(folder).chat_template + "{# <think> </think> #}"
    code, out, _ = talk("Which color is grass?", "Go on.", chat_template=template)
    assert code == 0 and out.count("[stopped at max_new_tokens 12]") == 2


def test_mistakes_give_a_one_line_error(talk, folder, tmp_path):
    for options, said in (
        ({"chat_template": "none"}, "no chat template; set chat_template"),
        ({"temperature": -1}, "temperature: must be"),
        ({"max_new_tokens": 128}, "context of 128"),
        ({"model": "./nowhere"}, "./nowhere"),
        ({"chat_template": "{{ raise_exception('users only') }}"}, "users only"),
    ):
        code, _, error = talk("Hi", **options)
        assert code == 2 and error.count("\n") == 1 and said in error, error
