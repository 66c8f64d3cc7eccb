"""The page: everything in it, nothing from elsewhere, axes that the data needs."""

from __future__ import annotations

import re
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vembed_async_ckpt.bench import results
from vembed_async_ckpt.bench.advice import Assumptions
from vembed_async_ckpt.bench.answers import answer
from vembed_async_ckpt.bench.drawing import Axis, Curve, Row, curves, dots
from vembed_async_ckpt.bench.page import page

from .made_up import FAST, QUICKER_CALL, SLOW, result

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("bench-*.json"))
SVG = "{http://www.w3.org/2000/svg}"


def test_the_page_has_what_is_said_and_every_sample():
    """Sentences, table, four plots and the curves, what each leaves out; titles are computed from the figures."""
    found = result({"ours": FAST, "dcp": SLOW, "torch_checkpointing": QUICKER_CALL})
    said = answer(found, Assumptions(given_mtbf=8 * 3600))
    html = page(found, said)
    assert [sentence for sentence in said.sentences if escape(sentence) not in html] == []
    for title, cells in said.rows:
        assert escape(title) in html
        assert all(f"<td>{escape(cell)}</td>" in html for cell in cells)
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert headings == [
        "vembed-async-ckpt stops training for 3.3 ms; better: torch_checkpointing 1.1 ms",
        "vembed-async-ckpt costs training in all 145 ms; no other is better, beyond the noise",
        "vembed-async-ckpt is safe from a power cut after 0.29 s; no other is better, beyond the noise",
        "vembed-async-ckpt is loaded back in 0.14 s; no other is better, beyond the noise",
        "With vembed-async-ckpt it is best to save every 91 seconds",
        "How it was measured",
        "What each engine leaves out",
    ]
    assert len(re.findall("<svg", html)) == 5


@pytest.mark.parametrize("file", COMMITTED, ids=lambda path: path.stem)
def test_nothing_is_fetched_and_every_plot_is_well_formed(file: Path):
    """Of every committed result: no script, no link, no picture from elsewhere."""
    found = results.read(file)
    html = page(found, answer(found, Assumptions()))
    HTMLParser().feed(html)
    assert re.findall(r"(?:src|href|url)\s*[=(]", html) == []
    assert "<script" not in html
    assert set(re.findall(r"https?://[^\s\"']+", html)) <= {"http://www.w3.org/2000/svg"}
    for svg in re.findall("<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)


def test_an_engine_cannot_put_markup_into_the_page():
    """A name or what an engine says of itself is text."""
    name = "mine:Mine"
    found = result({"ours": FAST, name: SLOW})
    found["engines"][name]["lacks"] = "<script>alert(1)</script>"
    html = page(found, answer(found, Assumptions()))
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_an_axis_is_logarithmic_only_where_the_data_needs_it():
    """From a factor of 20 on, and never with values of zero or less."""
    assert not Axis([10, 100], 0, 1).logarithmic
    assert Axis([3, 240], 0, 1).logarithmic
    assert not Axis([-3, 240], 0, 1).logarithmic
    for values in ([10, 100], [3, 240], [-30, 240], [0.001, 0.0012], [5.0]):
        axis = Axis(values, 100, 600)
        assert 2 <= len(axis.ticks()) <= 9
        assert all(100 <= axis(value) <= 600 for value in [*values, *axis.ticks()])


def test_every_sample_is_a_ring_and_the_median_a_dot_with_its_label():
    """In the row of its engine, from left to right by its value."""
    rows = [Row("one", [1.0, 3.0, 2.0], 2.0, "2 ms", ours=True), Row("two", [9.0], 9.0, "9 ms", ours=False)]
    svg = ElementTree.fromstring(dots(rows, "ms"))
    circles = svg.findall(f"{SVG}circle")
    rings = [circle for circle in circles if circle.get("fill") == "none"]
    assert (len(rings), len(circles) - len(rings)) == (4, 2)
    first, third, second = (float(ring.get("cx", 0)) for ring in rings[:3])
    assert first < second < third
    texts = [text.text for text in svg.findall(f"{SVG}text")]
    assert {"one", "two", "2 ms", "9 ms", "ms"} <= set(texts)


def test_names_of_curves_do_not_overlap():
    """Each stands at a height of its own, beside its curve."""
    drawn = [
        Curve(f"engine {n}", lambda x, n=n: (n + 1) / x + x / 100, 0.1, (100 * (n + 1)) ** 0.5, ours=n == 0)  # type: ignore[misc]
        for n in range(14)
    ]
    svg = ElementTree.fromstring(curves(drawn, [(0.1, "a"), (1, "b"), (10, "c"), (1000, "d")], "hours", "every"))
    heights = [float(t.get("y", 0)) for t in svg.findall(f"{SVG}text") if (t.text or "").startswith("engine")]
    assert len(heights) == 14
    assert min(b - a for a, b in pairwise(heights)) >= 14
