"""Hypothesis strategies: rows, files, recipes, templates, replies, models, damage and command lines."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import yaml
import zstandard
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

Text = SearchStrategy[str]

_ODD = [
    *(
        "",
        " ",
        "\n",
        "\x00",
        "\x1b[2J",
        "\u2028",
        "\u202e",
        "\ud800",
        "\ufffe",
        "\U0010ffff",
        "é",
        "e\u0301",
        "\U0001f600",
    ),
    "<|im_end|>", "<|im_start|>assistant\n", "</s>", "<s>", "<|end|>", "[INST]", "<think>", "</think>", "{{ 1/0 }}",
    *(
        "\n\nHuman: hi\n\nAssistant: ho",
        "null",
        "NaN",
        "007",
        "1e999",
        "-0",
        "true",
        "{}",
        "[]",
        "=1+1",
        '"',
        "'",
        "x" * 5000,
    ),
]  # fmt: skip
texts = st.one_of(
    st.sampled_from(["What is 2 and 3?", "It is 5.", "I say 15."]), st.sampled_from(_ODD), st.text(max_size=30)
)
numbers = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**400, 1e308, -1e-320, 0.5, 1e400, -1e400]),
    st.just(float("nan")),
    st.floats(),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)

# ---- rows ----

roles = st.one_of(st.sampled_from(["user", "assistant", "system", "tool", "developer"]), texts)
_message_keys = {
    "tool_calls": st.one_of(
        values,
        st.lists(
            st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts, "arguments": values})}), max_size=2
        ),
    ),
    "reasoning_content": texts | values,
    "thinking": texts,
    "name": texts | values,
    "weight": values,
    "train": values,
    "tool_call_id": texts,
    "images": values,
}
messages = st.fixed_dictionaries({"role": roles, "content": texts | values}, optional=_message_keys)
turns = st.lists(messages, min_size=1, max_size=4)
conversations = st.one_of(
    turns,
    st.lists(
        st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]) | texts, "value": texts}), max_size=3
    ),
    st.tuples(texts, texts).map(
        lambda pair: [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    ),
)
_cells = st.one_of(texts, conversations, values)
_shapes: list[dict[str, SearchStrategy]] = [
    {"prompt": texts, "chosen": texts, "rejected": texts},
    {"prompt": _cells, "chosen": _cells, "rejected": _cells},
    {"chosen": _cells, "rejected": _cells},
    {
        "prompt": _cells,
        "responses": st.lists(_cells, max_size=4) | values,
        "scores": st.lists(scalars, max_size=4) | values,
    },
    {"prompt": _cells, "completion": _cells, "label": scalars},
    {"messages": conversations | values},
    {"conversations": conversations, "chosen": _cells, "rejected": _cells},
    {"prompt": _cells, "completion": _cells},
    {"instruction": texts, "input": texts | st.none(), "output": texts},
    {"prompt_ids": st.lists(numbers, max_size=5), "response_ids": st.lists(st.lists(numbers, max_size=5), max_size=3)},
    {"text": _cells},
    {"prompt": _cells},
]
_columns = {
    "system": _cells,
    "tools": values,
    "chat_template_kwargs": values,
    "weight": values,
    "margin": values,
    "label_probability": values,
    "images": values,
    "id": values,
    "where": values,
    "scored": values,
    "chosen": _cells,
    "scores": values,
    "label": values,
    "_row": texts,
    "_where": texts,
}


def _changed(row: dict[str, Any], columns: dict[str, Any], dropped: list[str]) -> dict[str, Any]:
    return {key: value for key, value in {**row, **columns}.items() if key not in dropped}


shaped = st.one_of([st.fixed_dictionaries(shape) for shape in _shapes])
rows = st.one_of(
    shaped,
    st.builds(
        _changed,
        shaped,
        st.dictionaries(st.sampled_from(list(_columns)), _cells, max_size=2)
        | st.fixed_dictionaries({}, optional=_columns),
        st.lists(st.sampled_from(["prompt", "chosen", "rejected", "responses", "scores"]), max_size=1),
    ),
    st.dictionaries(texts, values, max_size=3),
)
plain_rows = st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts})

# ---- damage to bytes ----


def _damage(content: bytes, kind: str, place: float, extra: bytes) -> bytes:
    at = int(place * len(content))
    if kind == "cut":
        return content[:at]
    if kind == "flip" and content:
        at = min(at, len(content) - 1)
        return content[:at] + bytes([content[at] ^ (extra or b"\x01")[0] or 1]) + content[at + 1 :]
    if kind == "insert":
        return content[:at] + extra + content[at:]
    if kind == "zero":
        return content[:at] + bytes(min(64, len(content) - at)) + content[at + 64 :]
    return content if kind == "none" else b""


Damage = Callable[[bytes], bytes]
damages: SearchStrategy[Damage] = st.builds(
    lambda kind, place, extra: lambda content: _damage(content, kind, place, extra),
    st.sampled_from(["none", "cut", "flip", "flip", "insert", "zero", "empty"]),
    st.floats(0, 1),
    st.binary(min_size=1, max_size=20)
    | st.sampled_from([b"\xff\xfe", b"[" * 5000, b'{"a":' * 3000, b"9" * 6000, b"\r", b"NaN"]),
)

# ---- files ----


def _jsonl(table: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in table).encode()


def _csv(table: Sequence[Any]) -> bytes:
    file = io.StringIO()
    columns = list(dict.fromkeys(key for row in table for key in row))
    writer = csv.DictWriter(file, columns, quoting=csv.QUOTE_MINIMAL, escapechar="\\")
    writer.writeheader()
    writer.writerows({key: row[key] for key in row} for row in table)
    return file.getvalue().encode("utf-8", "backslashreplace")


def _columnar(table: Sequence[Any], kind: str) -> bytes:
    try:
        found = pa.Table.from_pylist(list(table))
        file = io.BytesIO()
        if kind == "parquet":
            pa.parquet.write_table(found, file)
        else:
            with pa.ipc.new_stream(file, found.schema) as stream:
                stream.write_table(found)
        return file.getvalue()
    except (pa.ArrowException, OverflowError, UnicodeError, ValueError, TypeError):
        return _jsonl(table)  # rows without a common type: a file that is not what its name says


_kinds: dict[str, Callable[[Sequence[Any]], bytes]] = {
    "jsonl": _jsonl,
    "json": lambda table: json.dumps(list(table)).encode(),
    "jsonl.gz": lambda table: gzip.compress(_jsonl(table)),
    "jsonl.zst": lambda table: zstandard.compress(_jsonl(table)),
    "csv": _csv,
    "parquet": lambda table: _columnar(table, "parquet"),
    "arrow": lambda table: _columnar(table, "arrow"),
}
files = st.builds(  # a suffix and contents
    lambda kind, table, damage: (kind, damage(_kinds[kind](table))),
    st.sampled_from(list(_kinds)),
    st.lists(rows, min_size=1, max_size=6),
    damages,
)

# ---- recipes ----

_yaml_text = st.sampled_from(
    [
        *(
            "!!int abc",
            "!!float x",
            "!!bool maybe",
            "!!timestamp x",
            "!!python/object:os.system {}",
            "0b_",
            "0x_",
            "1_0",
        ),
        *(
            "9" * 5000,
            "1e400",
            ".inf",
            ".nan",
            "-.inf",
            "&a [*a]",
            "*missing",
            "[" * 3000,
            "{a: {b: [1, {c: 2}]}}",
            "'",
            '"',
        ),
        *(
            "&a [x,x]",
            "2026-01-01",
            "1:30",
            "~",
            "yes",
            "off",
            "|\n  a\n  b",
            ">-\n  x",
            "!!binary aGk=",
            "!!set {a, b}",
            "? a",
        ),
        *(
            "<<: {a: 1}",
            "\x00",
            "\t",
            "é",
            "\u2028",
            "-1",
            "0",
            "1",
            "2",
            "cosine",
            "steps",
            "auto",
            "x" * 300,
            "train[:50%]",
        ),
    ]
)
_yaml_values = st.one_of(
    _yaml_text, values.map(lambda value: yaml.safe_dump(value, default_flow_style=True, width=10**6))
)


def recipes(keys: Sequence[str]) -> Text:
    """Recipes with some of these keys, other keys, and values of any type; some are not valid YAML."""
    names = st.sampled_from(list(keys)) | st.sampled_from([*keys[:20]]).map(lambda key: key + "x") | texts
    lines = st.lists(st.tuples(names, _yaml_values), max_size=6).map(
        lambda pairs: "".join(f"{key}: {value.strip()}\n" for key, value in pairs)
    )
    return st.builds(
        lambda text, damage: damage(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogateescape"),
        lines,
        damages,
    )


# ---- templates ----

_pieces = [
    *(
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ m['role'] }}",
        "{{ m['content'] }}",
        "{{ m.content }}",
        "{{ eos_token }}",
    ),
    *(
        "{{ bos_token }}",
        "{% if add_generation_prompt %}",
        "{% endif %}",
        "<|im_start|>",
        "<|im_end|>\n",
        "{{ 1/0 }}",
        "{{ 'a'+1 }}",
    ),
    *(
        "{% include 'x' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10000000) }}",
        "{{ 'a' * 10**10 }}",
    ),
    *(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ messages[5] }}",
        "{{ x.y.z }}",
    ),
    *(
        "{{ ''.__class__.__mro__ }}",
        "{{ m | tojson }}",
        "{% set ns = namespace(a=1) %}",
        "{{ raise_exception('no') }}",
        "{# c #}",
    ),
    *(
        "{% generation %}",
        "{% endgeneration %}",
        "{{ strftime_now('%Y') }}",
        "{% break %}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ [1]*10**9 }}",
    ),
    *(
        "{{ 'x'.format(1) }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{% raw %}",
        "{{",
        "%}",
        "{{ '%*d' % (10**10, 1) }}",
        "{{ 'a'.center(10**11) }}",
    ),
    *(
        "{{ messages | map(attribute='content') | join }}",
        "{{ tools }}",
        "{{ m['content'][0:3] }}",
        "{{ m.content | upper }}",
    ),
    *(
        "{{ 'a'.rjust(2**30) }}",
        "{{ messages | batch(10**9) | list }}",
        "{{ 'aa'.replace('a', 'b' * 10000) }}",
        "{{ lipsum(10**6) }}",
    ),
]
templates = st.one_of(
    st.lists(st.sampled_from(_pieces) | texts, max_size=6).map("".join),
    st.lists(st.sampled_from(_pieces) | texts, max_size=3).map(
        lambda inner: (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
            + "".join(inner)
            + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    ),
)

# ---- server replies ----

_choice = st.fixed_dictionaries(
    {"message": st.fixed_dictionaries({"content": texts | values}) | values},
    optional={
        "finish_reason": texts | values,
        "logprobs": values
        | st.fixed_dictionaries(
            {
                "content": st.lists(
                    st.fixed_dictionaries(
                        {
                            "top_logprobs": st.lists(
                                st.fixed_dictionaries({"token": texts | values, "logprob": numbers | values}),
                                max_size=3,
                            )
                            | values
                        }
                    ),
                    max_size=2,
                )
            }
        ),
    },
)
_documents = st.one_of(
    st.fixed_dictionaries(
        {"choices": st.lists(_choice, max_size=2) | values}, optional={"usage": values, "error": values}
    ),
    st.fixed_dictionaries(
        {"error": values | st.fixed_dictionaries({"message": texts, "param": values, "code": values})}
    ),
    values,
)
replies = st.builds(  # status, headers, body
    lambda status, headers, document, damage: (status, headers, damage(json.dumps(document).encode())),
    st.sampled_from([200, 200, 200, 400, 401, 404, 413, 422, 429, 500, 503, 302]),
    st.fixed_dictionaries(
        {},
        optional={
            "content-type": st.sampled_from(
                ["text/html", "application/json; charset=idna", "x; charset=hex", "application/json"]
            ),
            "retry-after": st.sampled_from(["0", "-1", "x", "1e9", "99999", "Fri, 31 Dec 9999 23:59:59 GMT"]),
            "x-should-retry": st.sampled_from(["true", "false", "x"]),
            "content-encoding": st.sampled_from(["gzip", "br", "identity", "x"]),
            "location": st.sampled_from(["/", "http://127.0.0.1:1/", "file:///etc/passwd"]),
        },
    ),
    _documents,
    damages,
)
verdicts = st.one_of(  # judges' texts
    st.text(alphabet="[]AB=<>0123456789. \n\"{}:,'rating", max_size=40),
    st.lists(
        st.sampled_from(
            [
                "[[A>>B]]",
                "[[A=B]]",
                "[[B>A]]",
                "[[5]]",
                "[[11]]",
                "[[-1]]",
                "m",
                "M",
                "A",
                "B",
                "tie",
                "<think>",
                "</think>",
                "Rating: ",
                "9" * 5000,
                "1e999",
                "\ud800",
            ]
        ),
        max_size=4,
    ).map("".join),
    texts,
)

# ---- JSON documents with arbitrary changes ----


def changed_json(document: Any) -> SearchStrategy[Any]:
    """A JSON document with one value or key, at any depth, replaced, removed or added."""

    @st.composite
    def draw_change(draw: Any) -> Any:
        copy = json.loads(json.dumps(document))
        holder: Any = copy
        while isinstance(holder, dict | list) and holder:
            key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
            below = holder[key]
            if not isinstance(below, dict | list) or not below or draw(st.integers(0, 3)) == 0:
                kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
                if kind == "replace":
                    holder[key] = draw(values | st.just(below))
                elif kind == "remove":
                    del holder[key]
                elif isinstance(holder, dict):
                    holder[draw(texts)] = draw(values)
                else:
                    holder.insert(key, draw(values))
                break
            holder = below
        return copy

    return draw_change()
