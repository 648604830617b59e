"""Pages that commands write, in a browser: at a desk and in a pocket they fit, and nothing in them is broken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import CHROMIUM, Browser

if CHROMIUM is None:
    # A browser is no Python package: nothing here can install it.
    pytest.skip("no Chromium is installed here", allow_module_level=True)

ROOT = Path(__file__).parents[2]
# By the name of their pictures: a page, and where its pictures begin, at a desk and in a pocket.
PAGES = {
    "report": (ROOT / "benchmarks/results/needle_report.html", "h2", "h2"),
    "explain": (ROOT / "docs/explained.html", "h2:nth-of-type(4)", "h1"),
}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    browser.send("Emulation.setScrollbarsHidden", hidden=True)
    yield browser
    browser.close()


@pytest.mark.parametrize("name", PAGES)
def test_pages_fit(tab: Browser, name: str) -> None:
    """At 1280 and at 375 pixels only tables scroll sideways, text can be read, and every plot is inside the window."""
    page, wide, narrow = PAGES[name]
    tab.asked.clear()
    for width, height, scale, shown in ((1280, 800, 1, wide), (375, 760, 2, narrow)):
        tab.size(width, height, scale)
        tab.send("Page.navigate", url="about:blank")
        tab.send("Page.navigate", url=page.as_uri())
        tab.until("location.protocol === 'file:' && document.readyState === 'complete'")
        assert tab.js("innerWidth") == width and tab.js("document.documentElement.scrollWidth") <= width
        assert tab.js("parseFloat(getComputedStyle(document.querySelector('p')).fontSize)") >= 15
        assert tab.js("[...document.querySelectorAll('svg')].every(e => e.getBoundingClientRect().right <= innerWidth)")
        # In a pocket too the first figure stands beside its name.
        figures = "[...document.querySelectorAll('td:nth-child(2)')]"
        assert tab.js(f"{figures}.every(e => e.getBoundingClientRect().right < innerWidth)")
        tab.js(f"document.querySelector('{shown}').scrollIntoView()")
        tab.keep(name if width > 375 else f"{name}-narrow", "light")
    assert tab.broken == [] and all(url.startswith(("about:", "file:", "data:")) for url in tab.asked)


def test_the_layers_of_an_explanation(tab: Browser) -> None:
    """Choosing a layer or a head changes what is marked, and how strongly."""
    tab.send("Page.navigate", url=PAGES["explain"][0].as_uri())
    tab.until("location.protocol === 'file:' && document.readyState === 'complete'")
    strengths = "[...document.querySelectorAll('span[data-m]')].map(e => +getComputedStyle(e).getPropertyValue('--s'))"
    summed = tab.js(strengths)
    tab.js("view.value = '3,1'; view.onchange()")
    one = tab.js(strengths)
    assert len(set(summed)) > 2 and set(one) == {0, 1} and 0 < sum(one) < len(one)
    tab.js("view.value = 'all'; view.onchange()")
    assert tab.js(strengths) == pytest.approx(summed, abs=0.01)
