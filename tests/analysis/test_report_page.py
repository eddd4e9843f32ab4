"""A report's page in a browser: every chart drawn, no errors or requests, hostile text shown as text, accessible."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.browser import Browser, Page

from simpo.analysis.report import write_report

HOSTILE = (
    "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">",
    '"><img src=x onerror="document.title=\'run\'"></style></script>{{7*7}} \u05e9\u05dc\u05d5\u05dd \u202eabc '
    + "x" * 200_000,
)


@pytest.fixture(scope="module")
def report(make_run, tmp_path_factory) -> Path:
    """A report on two runs with hostile texts and names."""
    folder = tmp_path_factory.mktemp("report")
    runs = [make_run(folder / name, texts=HOSTILE, pairs=40) for name in ("<b>one", "{{7*7}}")]
    return write_report(runs, folder / "report.html")


def opened(browser: Browser, report: Path, **size) -> Page:
    """Open the page and wait until all charts are drawn."""
    page = browser.open(report.as_uri(), **size)
    page.wait("+document.documentElement.dataset.drawn === document.querySelectorAll('[data-chart]').length")
    return page


@pytest.mark.parametrize("width, dark", [(1400, False), (1400, True), (380, False), (380, True)])
def test_the_page_is_drawn_without_errors_or_network(browser, report, width, dark):
    page = opened(browser, report, width=width, dark=dark)
    assert page.evaluate("document.querySelectorAll('.plot svg, .plot canvas').length") > 10
    assert page.complaints == [] and page.requests == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(15, 18, 22)" if dark else "rgb(246, 247, 249)"
    )


def test_hostile_text_is_shown_as_text(browser, report):
    page = opened(browser, report)
    assert "{{7*7}}" in page.evaluate("document.body.innerText") and "49" not in page.evaluate("document.title")
    assert page.evaluate("document.title").startswith("<b>one, {{7*7}}")
    shown = page.evaluate("document.querySelector('#list .text').textContent")
    assert shown == HOSTILE[0]
    assert page.evaluate("document.querySelectorAll('#list img, #list script, #list style').length") == 0
    assert page.evaluate("[...document.querySelectorAll('.cut')].some(one => one.textContent.startsWith('19'))")


def test_examples_can_be_filtered_and_searched(browser, report):
    page = opened(browser, report)
    listed = "document.querySelectorAll('#list article').length"
    assert page.evaluate(listed) == 10
    page.evaluate("document.getElementById('more').click()")
    assert page.evaluate(listed) == 20
    for text, expected in (("onerror", 10), ("no such text", 0)):
        page.evaluate(f"search.value = '{text}'; search.dispatchEvent(new Event('input'))")
        assert page.evaluate(listed) == expected
    page.evaluate("search.value = ''; run.value = '{{7*7}}'; run.dispatchEvent(new Event('input'))")
    assert page.evaluate("document.getElementById('found').textContent").startswith("12 examples")


def test_a_chart_shows_values_and_hides_a_series(browser, report):
    page = opened(browser, report)
    page.evaluate("document.querySelector('.values').open = true")
    page.wait("document.querySelectorAll('.values tbody tr').length > 20")
    chart = "echarts.getInstanceByDom(document.querySelector('.plot'))"
    name = page.evaluate(f"{chart}.getOption().series[0].name")
    page.evaluate(f"{chart}.dispatchAction({{type: 'legendToggleSelect', name: {name!r}}})")
    assert page.evaluate(f"{chart}.getOption().legend[0].selected[{name!r}]") is False
    page.evaluate(f"{chart}.dispatchAction({{type: 'showTip', seriesIndex: 1, dataIndex: 0}})")
    assert "optimizer step: " in page.evaluate("document.querySelector('.plot').innerText")


def test_runs_differ_in_color_and_sources_in_line_width(browser, report):
    page = opened(browser, report)
    series = page.evaluate(
        "echarts.getInstanceByDom(document.querySelector('.plot')).getOption().series"
        ".map(one => [one.name, one.color, one.lineStyle.width])"
    )
    names, colors, widths = zip(*series, strict=True)
    assert names == ("<b>one",) * 2 + ("{{7*7}}",) * 2
    assert colors[0] == colors[1] != colors[2] == colors[3] and widths[0] < widths[1]
    assert "Thin lines: training" in page.evaluate("document.querySelector('figure figcaption').textContent")


@pytest.mark.skipif(find_spec("axe_playwright_python") is None, reason="axe-core is not installed (see the Makefile)")
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_has_no_serious_accessibility_violations(browser, report, dark):
    page = opened(browser, report, dark=dark)
    script = Path(find_spec("axe_playwright_python").submodule_search_locations[0]) / "axe.min.js"
    page.send("Runtime.evaluate", expression=script.read_text(encoding="utf-8"))
    found = page.evaluate(
        "axe.run().then(r => r.violations.map(v => [v.impact, v.id, v.nodes.map(n => n.html).slice(0, 3)]))"
    )
    assert [one for one in found if one[0] in ("serious", "critical")] == []


def test_in_print_nothing_is_cut_hidden_or_dark(browser, report):
    """Printed from the dark color scheme, on a page as wide as A4 without margins."""
    page = opened(browser, report, width=1400, dark=True)
    page.send("Emulation.setDeviceMetricsOverride", width=717, height=1000, deviceScaleFactor=1, mobile=False)
    page.send("Emulation.setEmulatedMedia", media="print", features=[])
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 717
    assert page.evaluate(
        "[...document.querySelectorAll('.plot')].every(plot => [...plot.querySelectorAll('svg, canvas')].every(drawn =>"
        " drawn.getBoundingClientRect().right <= plot.getBoundingClientRect().right + 1)"
        " && plot.getBoundingClientRect().right <= plot.parentElement.getBoundingClientRect().right)"
    )
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    settings = page.evaluate("[...document.querySelectorAll('#reproduce pre')].map(one => one.checkVisibility())")
    assert len(settings) > 2 and all(settings)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark" and page.complaints == []
