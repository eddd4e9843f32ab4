"""Published results."""

from __future__ import annotations

import pytest

from simpo.evaluation.runner import published_rows, published_table


def test_results_are_those_of_the_paper_and_its_repository():
    headings, rows = published_rows("alpaca_eval")
    assert headings == ["setting", "method", "model", "LC win rate", "win rate", "length"]
    found = {(row[0], row[1]): row[3:] for row in rows}
    assert found["Llama3-Instruct", "SimPO"][:2] == ["44.7", "40.5"]
    assert found["Gemma-2-IT", "SimPO"] == ["72.4", "65.9", "1833"]
    arena = {(row[0], row[1]): row[3] for row in published_rows("arena_hard")[1]}
    assert (arena["Llama3-Instruct", "SimPO"], arena["Gemma-2-IT", "SimPO"]) == ("33.8", "59.1")
    assert len(found) == len(arena) == 52 + 4
    assert found["Mistral-Base", "SimPO with gamma = 0"] == ["16.8", "14.3", ""]
    assert found["Mistral-Base", "SimPO without length normalization"] == ["", "13.2", ""]  # not legible
    assert all(0 <= float(cell) <= 100 for row in rows for cell in row[3:5] if cell)


def test_mt_bench_results_are_those_of_the_papers_tables():
    headings, rows = published_rows("mt_bench")
    assert headings[3:] == ["judge GPT-4 Turbo", "judge GPT-4"]
    found = {(row[0], row[1]): row[3:] for row in rows}
    assert len(found) == 4 * 10 + 4
    assert found["Llama3-Instruct", "SimPO"] == found["Llama3-Instruct", "DPO"] == ["7.0", "8.0"]
    assert found["Mistral-Instruct", "SimPO with gamma = 0"] == ["6.6", ""]
    assert all(1 <= float(cell) <= 10 for row in rows for cell in row[3:] if cell)


def test_rewardbench_is_the_mean_of_its_subsets():
    headings, rows = published_rows("rewardbench")
    assert headings[3:] == ["score", "Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties"]
    for row in rows:
        score, *subsets = map(float, row[3:])
        assert score == pytest.approx(sum(subsets) / 6, abs=0.1)  # of rounded values
    assert published_table("rewardbench").row_count == len(rows) == 3


def test_a_benchmark_without_published_results_has_no_table():
    assert published_rows("compare")[1] == [] and published_table("compare") is None
    assert published_table("mt_bench").row_count == 4 * 3
    assert published_table("arena_hard").row_count == 6 * 3 - 1
