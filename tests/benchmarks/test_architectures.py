"""The generated page of architectures, and a sample of its rows recomputed."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks import architectures

SAMPLE = {
    "qwen3": "packed",
    "qwen3_5_text": "cached",
    "falcon_h1": "cached",
    "lfm2_moe": "cached",
    "recurrent_gemma": "padded",
    "cpmant": "rejected",
    "fuyu": "not built",
}
_CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
requires_the_tested_version = pytest.mark.skipif(
    f"transformers=={transformers.__version__}" not in _CONSTRAINTS.read_text().splitlines(),
    reason="the page is generated with the tested version of transformers",
)


@requires_the_tested_version
@pytest.mark.parametrize(("name", "path"), SAMPLE.items())
def test_the_page_agrees_with_a_recomputed_row(name, path):
    found = architectures.examine(name)
    row = architectures.published_rows()[name]
    assert found.path == path
    assert row.startswith(f"| `{name}` | {path} |")
    if path in ("packed", "cached", "padded"):
        assert found.logprobs <= 1e-4
        assert found.gradients <= 1e-4


@requires_the_tested_version
def test_the_page_lists_every_architecture_within_tolerance():
    rows = architectures.published_rows()
    assert set(rows) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for row in rows.values():
        _, path, logprobs, gradients, note = (cell.strip() for cell in row[2:-2].split(" | "))
        if path in ("packed", "cached", "padded"):
            assert float(logprobs) <= 1e-4, row
            assert float(gradients) <= 1e-3, row
        assert path == "packed" or note, row


@requires_the_tested_version
def test_named_rows_are_written_into_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(architectures, "PAGE", tmp_path / "models.md")
    architectures.main(["qwen3", "--write"])
    architectures.main(["fuyu", "--write"])
    assert list(architectures.published_rows()) == ["fuyu", "qwen3"]
    assert "1 packed, 0 cached, 0 padded, 0 rejected, 1 not built." in architectures.PAGE.read_text()
    assert capsys.readouterr().out.splitlines() == [
        line for line in reversed(architectures.PAGE.read_text().splitlines()) if line.startswith("| `")
    ]


def test_an_unknown_architecture_is_reported(capsys):
    with pytest.raises(SystemExit):
        architectures.main(["lama"])
    assert "lama" in capsys.readouterr().err
