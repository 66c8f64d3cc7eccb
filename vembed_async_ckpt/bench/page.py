"""A result as one page of HTML that needs nothing else: sentences, table, plots, machine, and what each engine leaves out."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from ..ettr import hours_lost
from . import drawing, words
from .advice import lost_per_save
from .answers import LEGEND, Answers
from .catalog import title_of
from .drawing import Curve, Row
from .figures import Figures

PLOTS = (
    ("blocked", "stops training for", 1e3, "ms", "training stops for, milliseconds"),
    ("lost", "costs training in all", 1e3, "ms", "training lost for one save, milliseconds"),
    ("durable", "is safe from a power cut after", 1.0, "s", "from the call to safe on the disk, seconds"),
    ("loaded", "is loaded back in", 1.0, "s", "loading it back, seconds"),
)
TICKS = (
    *((1.0, "1 s"), (10.0, "10 s"), (60.0, "1 min"), (600.0, "10 min"), (3600.0, "1 h"), (21600.0, "6 h")),
    *((86400.0, "1 day"), (604800.0, "1 week")),
)
STYLE = """
body{font:16px/1.5 system-ui,'DejaVu Sans',sans-serif;color:#1b1f24;max-width:800px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0} h2{font-size:1.1rem;margin:2.2rem 0 .3rem} ol{padding-left:1.4rem} li{margin:.4rem 0}
.note{color:#5b646d;font-size:.88rem} table{border-collapse:collapse;width:100%}
td,th{padding:.3rem .5rem;text-align:right;border-bottom:1px solid #e4e7ea;font-weight:normal;vertical-align:top}
th:first-child,.facts td{text-align:left} thead th{color:#5b646d;font-size:.85rem} .ours *{color:#0b6e4f;font-weight:bold}
td{white-space:nowrap} .facts td{white-space:normal}
svg{max-width:100%;height:auto} pre{overflow:auto;background:#f6f7f8;padding:.8rem;font-size:.75rem}
"""


def page(result: dict[str, Any], answers: Answers) -> str:
    """The whole page."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>What saving costs a training</title><style>{STYLE}</style>",
        f"<h1>What saving costs a training</h1><p class=note>{'<br>'.join(map(escape, answers.heading))}</p>",
        f"<ol>{''.join(f'<li>{escape(sentence)}</li>' for sentence in answers.sentences)}</ol>",
        _table(answers),
        "".join(f"<p class=note>{escape(note)}</p>" for note in answers.notes),
        *(_plot(answers, *plot) for plot in PLOTS),
        _intervals(answers),
        _facts(result, answers),
        _lacks(result),
        f"<details><summary>Every sample</summary><pre>{escape(_samples(answers))}</pre></details></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _table(answers: Answers) -> str:
    heads = "".join(f"<th>{escape(' '.join(head))}</th>" for head in answers.columns)
    rows = ""
    for name, (title, cells) in zip(answers.measured.engines, answers.rows, strict=True):
        mark = " class=ours" if name == "ours" else ""
        rows += f"<tr{mark}><th>{escape(title)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    return f"<table><thead><tr><th>engine</th>{heads}</tr></thead>{rows}</table><p class=note>{escape(LEGEND)}</p>"


def finding(engines: dict[str, Figures], key: str, verb: str, scale: float, unit: str) -> str:
    """What a plot shows, in one line: who is better than the reference beyond the noise, or that nobody is."""
    reference = (
        "ours" if "ours" in engines and key in engines["ours"] else next(n for n in engines if key in engines[n])
    )
    mine = engines[reference][key]
    own = f"{title_of(reference)} {verb} {words.digits(mine.median * scale)} {unit}"
    peers = {name: each[key] for name, each in engines.items() if key in each and name != reference}
    better = sorted((name for name in peers if mine.above(peers[name])), key=lambda name: peers[name].median)
    if better:
        values = [f"{title_of(name)} {words.digits(peers[name].median * scale)} {unit}" for name in better]
        return f"{own}; better: {', '.join(values)}"
    if any(peer.above(mine) for peer in peers.values()):
        return f"{own}; no other is better, beyond the noise"
    return f"{own}; no clear difference to the others" if peers else own


def _plot(answers: Answers, key: str, verb: str, scale: float, unit: str, axis: str) -> str:
    engines = answers.measured.engines
    rows = [
        Row(
            title_of(name),
            [value * scale for value in each[key].samples],
            each[key].median * scale,
            f"{words.digits(each[key].median * scale)} {unit}",
            name == "ours",
        )
        for name, each in sorted(engines.items(), key=lambda item: item[1].median(key) or 0.0)
        if key in each
    ]
    if not rows:
        return ""
    title = finding(engines, key, verb, scale, unit)
    note = "Each ring is one save, the full dot the median." if key != "loaded" else "Each ring is one load."
    return f"<h2>{escape(title)}</h2>{drawing.dots(rows, axis)}<p class=note>{note}</p>"


def _intervals(answers: Answers) -> str:
    """Hours lost in 30 days by the interval between two saves."""
    if not answers.advice:
        return ""
    given = answers.given
    drawn = []
    for name, advice in answers.advice.items():
        figures = answers.measured.engines[name]
        lost = max(lost_per_save(figures) or 0.0, 0.0)
        durable = figures.median("beside") or figures.median("durable") or 0.0
        load = figures.median("loaded") or 0.0

        def value(interval: float, lost: float = lost, durable: float = durable, load: float = load) -> float:
            cost = {"lost": lost, "durable": durable, "mtbf": given.mtbf, "restart": given.restart, "load": load}
            return hours_lost(interval, **cost)

        drawn.append(Curve(title_of(name), value, max(lost, durable, 1e-3), advice.interval, name == "ours"))
    best = [curve.best for curve in drawn]
    ticks = [tick for tick in TICKS if min(best) / 80 <= tick[0] <= max(best) * 40]
    reference = next((curve for curve in drawn if curve.ours), drawn[0])
    title = f"With {reference.title} it is best to save every {words.duration(reference.best)}"
    note = (
        f"Hours of 30 days lost to saving and to work that is done again after crashes, one every {words.duration(given.mtbf)} "
        f"({given.source}), and to loading; the restarts themselves ({words.duration(given.restart)} each) are not counted. "
        "A dot is the best interval of an engine."
    )
    plot = drawing.curves(drawn, ticks, "hours lost in 30 days", "a save every ...")
    return f"<h2>{escape(title)}</h2>{plot}<p class=note>{escape(note)}</p>"


def _facts(result: dict[str, Any], answers: Answers) -> str:
    machine, options = result["machine"], result["options"]
    rounds = (
        f"{answers.measured.used} of {answers.measured.rounds} rounds count, {options['saves']} saves in each visit"
    )
    facts = {
        "machine": f"{machine['cpus']} x {machine['cpu']}, {machine['gpu'] or 'no GPU'}, "
        f"{words.size(machine['memory_bytes'])} of memory, Linux {machine['kernel']}, {machine['file_system']}",
        "load": f"{machine['load']:.2f} at the start; other programs used {answers.measured.others:.0%} of the machine",
        "run": f"{machine['date']}, {rounds}",
        "versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version),
    }
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return f"<h2>How it was measured</h2><table class=facts>{rows}</table>"


def _lacks(result: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(title_of(name))}</th><td>{escape(each['configuration'])}</td>"
        f"<td>{escape(each['lacks']) or 'nothing that is known'}</td></tr>"
        for name, each in result["engines"].items()
    )
    head = (
        "<thead><tr><th>engine</th><td>configured</td><td>leaves out when it says that it is written</td></tr></thead>"
    )
    return f"<h2>What each engine leaves out</h2><table class=facts>{head}{rows}</table>"


def _samples(answers: Answers) -> str:
    found = {
        title_of(name): {
            key: [[round(value, 6) for value in visit] for visit in q.visits] for key, q in each.quantities.items()
        }
        for name, each in answers.measured.engines.items()
    }
    return json.dumps(found, indent=1)
