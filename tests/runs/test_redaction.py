"""No secret is stored, and nothing else is removed."""

from __future__ import annotations

import pytest
import yaml

from simpo.runs.log import REDACTED, is_secret, mask_secrets, redact, redact_arguments, redact_yaml

HF = "hf_" + "aB3" * 11 + "x"
SK = "sk-proj-" + "Zz9_" * 6
SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "key",
    [
        "hub_token",
        "token",
        "api_key",
        "password",
        "secret",
        "push_to_hub_token",
        "OPENAI_API_KEY",
        "hub-token",
        "client_secret",
        "db_password",
    ],
)
def test_secret_keys_are_redacted(key):
    assert is_secret(key)
    assert redact({key: SECRET, "x": {key: 12345}}) == {key: REDACTED, "x": {key: REDACTED}}
    assert redact({key: [SECRET]}) == {key: REDACTED}


@pytest.mark.parametrize(
    "key",
    [
        "eos_token",
        "pad_token",
        "bos_token",
        "image_token",
        "max_tokens",
        "tokenizer_name",
        "tokens",
        "keys",
        "monkey",
        "loss_per_token",
        "secretary",
    ],
)
def test_harmless_keys_are_kept(key):
    assert not is_secret(key)
    assert redact({key: "<|im_end|>"}) == {key: "<|im_end|>"}


def test_keys_without_a_value_are_kept():
    mapping = {"hub_token": None, "token": True, "password": False, "learning_rate": 1e-6, "layers": (1, 2)}
    assert redact(mapping) == mapping | {"layers": [1, 2]}


@pytest.mark.parametrize("token", [HF, SK])
def test_tokens_are_masked_anywhere(token):
    assert mask_secrets(f"see https://user:{token}@host/{token}.") == f"see https://user:{REDACTED}@host/{REDACTED}."
    assert redact({"note": f"x {token}", "deep": [{"a": [token]}]}) == {
        "note": f"x {REDACTED}",
        "deep": [{"a": [REDACTED]}],
    }
    assert redact_arguments(["--note", f"x={token}", token]) == ["--note", f"x={REDACTED}", REDACTED]
    assert redact_yaml(f"# {token}\nnote: {token}\n") == f"# {REDACTED}\nnote: {REDACTED}\n"


def test_words_that_resemble_tokens_are_kept():
    for text in ("hf_internal_testing/tiny", "task-force-of-more-than-twenty", "sk-short", "ahf_" + "a" * 30):
        assert mask_secrets(text) == text


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--hub_token", SECRET, "--beta", "2"], ["--hub_token", REDACTED, "--beta", "2"]),
        (["recipe.yaml", f"--hub-token={SECRET}, x"], ["recipe.yaml", f"--hub-token={REDACTED}"]),
        (["--eos_token", "<eos>"], ["--eos_token", "<eos>"]),
        (["--token", SECRET, SECRET], ["--token", REDACTED, REDACTED]),
        (['--options={"api_key": "s3cr3t", "n": 1}'], [f'--options={{"api_key": {REDACTED}, "n": 1}}']),
        ([], []),
    ],
)
def test_command_lines_are_redacted(given, kept):
    assert redact_arguments(given) == kept


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("hub_token: s3cr3t  # mine\nbeta: 2.0\n", f"hub_token: {REDACTED}  # mine\nbeta: 2.0\n"),
        ("'api_key' : \"s3cr3t and more\"\n", f"'api_key' : {REDACTED}\n"),
        ("token: |\n  s3cr3t\n  more\nbeta: 2\n", f"token: {REDACTED}\nbeta: 2\n"),
        ("token:\n  s3cr3t\nbeta: 2\n", f"token: {REDACTED}\nbeta: 2\n"),
        ("# mine\ntoken:\n- s3cr3t\nbeta: 2\n", f"token: {REDACTED}\nbeta: 2\n"),  # rewritten without the comment
        ('token: "s3cr3t\n  s3cr3t"\nbeta: 2\n', f"token: {REDACTED}\nbeta: 2\n"),
        ("a: &a |\n  s3cr3t\n  s3cr3t\nb: {token: *a}\n", f"a: {REDACTED}\nb:\n  token: {REDACTED}\n"),
        ("a: {password: s3cr3t, b: 1}\n", f"a: {{password: {REDACTED}, b: 1}}\n"),
        ("- token: [s3cr3t, more]\n- x\n", f"- token: {REDACTED}\n- x\n"),
        (
            "# hub_token: s3cr3t\nbeta: 2 # --hub_token=s3cr3t\n",
            f"# hub_token: {REDACTED}\nbeta: 2 # --hub_token={REDACTED}\n",
        ),
        ("a: &a s3cr3t\ntoken: *a\n", f"a: {REDACTED}\ntoken: {REDACTED}\n"),
        ("a: &a [*a]\ntoken: s3cr3t\n", "# not stored because the document contains itself\n"),
        ("hub_token:\nlearning_rate: 1e-6\n", None),
        ("hub_token: null\ntoken: true\neos_token: <eos>\n", None),
        ("# a comment\nlimit: .nan\n", None),
        ("a: [1,\n", None),
        ("", None),
    ],
)
def test_yaml_keeps_everything_but_secrets(given, kept):
    found = redact_yaml(given)
    assert found == (given if kept is None else kept)
    assert "s3cr3t" not in found


def test_broken_yaml_is_redacted_line_by_line():
    assert redact_yaml("a: [\nhub_token: s3cr3t\n") == f"a: [\nhub_token: {REDACTED}\n"


def test_redacted_yaml_is_still_yaml():
    text = f"hub_token: {SECRET}\nlist:\n- password: 'x y'\n  beta: 2.5\n"
    assert yaml.safe_load(redact_yaml(text)) == {"hub_token": REDACTED, "list": [{"password": REDACTED, "beta": 2.5}]}


def test_long_words_are_redacted_quickly():
    redact_yaml("x: " + "a" * 300_000)
