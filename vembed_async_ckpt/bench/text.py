"""Answers as text of at most 80 columns, and as Markdown."""

from __future__ import annotations

import textwrap

from .answers import LEGEND, Answers

WIDTH = 80


def plain(answers: Answers) -> str:
    """For a terminal or a log."""
    lines = [line for text in answers.heading for line in textwrap.wrap(text, WIDTH)] + [""]
    for number, sentence in enumerate(answers.sentences, 1):
        lines += textwrap.wrap(sentence, WIDTH, initial_indent=f"{number:2} ", subsequent_indent="   ")
    lines += ["", *table(answers), ""] if answers.rows else [""]
    for note in answers.notes:
        lines += textwrap.wrap(note, WIDTH)
    return "\n".join(lines).rstrip() + "\n"


def table(answers: Answers) -> list[str]:
    """A head of three lines, a row for each engine, the legend. Titles stand above their rows where they leave too little room."""
    cells = [row for _, row in answers.rows]
    widths = [
        max(len(text) for text in [*head, *(row[place] for row in cells)]) for place, head in enumerate(answers.columns)
    ]
    first = max(len("engine"), *(len(title) for title, _ in answers.rows))
    gap = 2 if first + sum(widths) + 2 * len(widths) <= WIDTH else 1
    above = first + sum(widths) + gap * len(widths) > WIDTH
    if above:
        first = WIDTH - sum(widths) - gap * len(widths)

    def line(title: str, row: list[str]) -> str:
        return (
            title.ljust(first) + "".join(" " * gap + cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        ).rstrip()

    lines = [line("engine" if place == 2 else "", [head[place] for head in answers.columns]) for place in range(3)]
    lines.append("-" * (first + sum(widths) + gap * len(widths)))
    for title, row in answers.rows:
        lines += [title, line("", row)] if above and len(title) > first else [line(title, row)]
    return [*lines, *textwrap.wrap(LEGEND, WIDTH)]


def markdown(answers: Answers) -> str:
    """The sentences as a list, the table as one."""
    lines = [*answers.heading, ""]
    lines += [f"{number}. {sentence}" for number, sentence in enumerate(answers.sentences, 1)]
    if answers.rows:
        heads = [
            " ".join(head[:-1]) + f", {head[-1]}" if head[-1] != "every" else " ".join(head) for head in answers.columns
        ]
        lines += ["", "| engine | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
        lines += [f"| {title} | " + " | ".join(row) + " |" for title, row in answers.rows]
        lines += ["", LEGEND.replace("*", "\\*")]
    lines += ["", *answers.notes] if answers.notes else []
    return "\n".join(lines).rstrip() + "\n"
