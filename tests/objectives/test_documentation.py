"""The pages on objectives: every objective and hyperparameter is documented, and the example of a new one works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from tests.objectives.test_closed_forms import PAIRS, Golden, side

from simpo.objectives import OBJECTIVES, preference

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "objectives.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## )", PAGE, flags=re.MULTILINE | re.DOTALL))


def test_every_objective_has_a_section_and_a_table_row():
    assert list(SECTIONS) == list(OBJECTIVES)
    assert re.findall(r"^\| \[`(\w+)`\]\(#\1\)", PAGE, flags=re.MULTILINE) == list(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_section_is_complete(name):
    row, section = OBJECTIVES[name], SECTIONS[name]
    for part in ("**What it does.**", "**When to use it.**", "**Pitfall.**", "**Hyperparameters.**"):
        assert part in section
    assert re.search(r"arXiv (\S+?),", row.paper + ",")[1] in section
    hyperparameters = section.partition("**Hyperparameters.**")[2]
    for key, parameter in row.hyperparameters.items():
        assert f"`{key}`" in hyperparameters
        if key != "label_smoothing":
            default = str(parameter.default).lower() if isinstance(parameter.default, bool) else str(parameter.default)
            assert default.removesuffix(".0") in hyperparameters
    for key in row.aliases:
        assert f"`{key}`" in hyperparameters


def test_the_example_of_a_new_objective_works(monkeypatch):
    """Runs the page's own code: objective, golden value and recipe."""
    page = (DOCS / "adding-an-objective.md").read_text(encoding="utf-8")
    objective, closed_form, entry = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    module = dict(vars(preference))
    exec(objective, module)
    row = module["RSO"]()
    tests = {"Golden": Golden}
    exec(closed_form, tests)
    ((name, golden),) = eval("{" + entry + "}", tests).items()
    monkeypatch.setitem(OBJECTIVES, row.name, row)

    keys = yaml.safe_load(recipe)
    assert name == row.name == keys["objective"]
    assert row.resolve({key: keys[key] for key in keys if key in row.hyperparameters}) == {"beta": 0.05}
    with pytest.raises(ValueError, match=r"tau is not a hyperparameter of objective 'rso' \(it belongs to ipo\)"):
        row.resolve({"tau": 0.1})
    w, y = (side(points) for points in zip(*PAIRS, strict=True))
    for settings in ({}, *golden.settings):
        expected = [golden.loss(*pair, **settings) for pair in PAIRS]
        assert row.loss(w, y, **settings).tolist() == pytest.approx(expected, rel=1e-11, abs=0)
        expected = [golden.reward(chosen, **settings) for chosen, _ in PAIRS]
        assert row.reward(w, **settings).tolist() == pytest.approx(expected, rel=1e-11, abs=0)
    assert torch.autograd.grad(row.loss(w, y).sum(), w.logp)[0].isfinite().all()
