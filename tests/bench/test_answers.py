"""What is said about a result: peers that are better first, nothing beyond the noise, 80 columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from vembed_async_ckpt.bench import results, text
from vembed_async_ckpt.bench.advice import Assumptions
from vembed_async_ckpt.bench.answers import answer
from vembed_async_ckpt.bench.figures import Quantity, of

from .made_up import FAST, QUICKER_CALL, SLOW, result

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("bench-*.json"))


def quantity(*visits: list[float]) -> Quantity:
    return Quantity(tuple(map(tuple, visits)))


def test_a_difference_needs_a_factor_and_visits_that_do_not_overlap():
    """1.25 between the medians, and every visit's median on its side; with one visit, every sample."""
    one = quantity([10, 11], [10, 12])
    assert quantity([14, 15], [14, 16]).above(one)
    assert not quantity([12, 13], [12, 13]).above(one), "1.2 times as much"
    assert not quantity([10, 11], [20, 21]).above(one), "a visit overlaps"
    assert not one.above(quantity([14, 15], [14, 16]))
    assert quantity([14, 15]).above(quantity([10, 11]))
    assert not quantity([14, 10.5]).above(quantity([10, 11])), "samples of the only visit overlap"
    assert quantity([5, 6], [5, 6]).above(quantity([-3, 1], [-2, 2])), "what costs nothing is less"
    assert not quantity([-1, -1], [-1, -1]).above(quantity([-5, -5], [-5, -5])), "neither costs anything"


def test_a_peer_that_is_better_is_said_first():
    """By name and value; who is not told apart from ours is said to be so."""
    said = answer(
        result({"ours": FAST, "dcp": SLOW, "torch_checkpointing": QUICKER_CALL, "accelerate": FAST}), Assumptions()
    )
    assert said.sentences[0] == (
        "torch_checkpointing stops your training for less: 1.1 ms. vembed-async-ckpt stops your training for 3.3 ms "
        "(3.0 to 4.0); no clear difference: accelerate 3.3 ms; longer: DCP async_save 230 ms."
    )
    assert said.sentences[1].startswith(
        "Until it is on the disk, a save with vembed-async-ckpt costs 145 ms (130 to 160)"
    )
    assert "more: torch_checkpointing 290 ms, DCP async_save 525 ms." in said.sentences[1]


def test_nothing_is_claimed_where_nothing_is_told_apart():
    """No better, longer, more or later among engines with the same figures."""
    said = answer(result({"ours": FAST, "dcp": FAST}), Assumptions())
    text_ = " ".join(said.sentences)
    for word in ("for less", "less training", "sooner", "longer:", "more:", "later:", "less:"):
        assert word not in text_
    assert "no clear difference: DCP async_save" in text_


def test_two_better_peers_are_in_the_plural():
    """And both are named."""
    said = answer(result({"ours": SLOW, "dcp": FAST, "moonclip": QUICKER_CALL}), Assumptions())
    assert said.sentences[0].startswith("moonclip and DCP async_save stop your training for less: 1.1 ms and 3.3 ms.")
    assert said.sentences[2].startswith("DCP async_save is safe from a power cut sooner: after 0.29 s.")


def test_where_the_time_between_crashes_comes_from_is_said():
    """From the number of GPUs unless it is given."""
    of_gpus = " ".join(answer(result({"ours": FAST}), Assumptions(gpus=64)).sentences)
    assert (
        "With a crash every 33 days (64 GPUs at the rate of Llama 3's training; --gpus or --mtbf for yours)" in of_gpus
    )
    given = " ".join(answer(result({"ours": FAST}), Assumptions(given_mtbf=8 * 3600)).sentences)
    assert "With a crash every 8 hours (--mtbf) it is best to save every 91 seconds" in given
    assert "A save every 30 minutes (--interval) loses 22 hours, whichever of these engines makes it." in given
    assert "USD" not in given


def test_overhead_and_money_are_said_only_when_asked_for():
    """0.145 s of 1 % is every 14.5 s; hours times GPUs times dollars."""
    given = Assumptions(gpus=64, given_mtbf=8 * 3600, overhead=0.01, price=3.0)
    said = answer(result({"ours": FAST}), given)
    text_ = " ".join(said.sentences)
    assert "If saving may cost 1 % of the time (--overhead), vembed-async-ckpt can save every 14 seconds" in text_ or (
        "can save every 15 seconds" in text_
    )
    dollars = said.advice["ours"].hours_lost * 64 * 3
    assert f"On 64 GPUs at 3 USD an hour that is {dollars:,.0f} USD in 30 days." in text_


def test_a_busy_machine_is_said():
    """It is no figure to be published."""
    assert (
        "The machine was not quiet: other programs used 40% of it."
        in answer(result({"ours": FAST}, others=0.4), Assumptions()).sentences[-1]
    )


def test_the_table_has_ranges_bytes_and_stars():
    """A star where nobody is better beyond the noise; the bytes on disk stand beside."""
    said = answer(result({"ours": FAST, "dcp": SLOW}), Assumptions(given_mtbf=8 * 3600))
    assert said.rows == [
        ("vembed-async-ckpt", ["3.3±0.50*", "145±15*", "0.29±0.01*", "200", "0.14±0.00*", "91 s", "2.3"]),
        ("DCP async_save", ["230±25", "525±75", "0.62±0.06", "200", "0.29±0.01", "2.9 min", "4.3"]),
    ]


@pytest.mark.parametrize("file", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_told_in_80_columns(file: Path):
    """Old formats too; nothing is cut."""
    said = answer(results.read(file), Assumptions(given_mtbf=8 * 3600))
    shown = text.plain(said)
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    for title, cells in said.rows:
        assert title in shown
        assert all(cell in shown for cell in cells)


def test_a_long_title_stands_above_its_row():
    """Rather than to cut it or to be wider than 80 columns."""
    name = "my_module:AnEngineWithANameThatIsLongerThanAnyColumn"
    said = answer(result({"ours": FAST, name: SLOW}), Assumptions())
    lines = text.plain(said).splitlines()
    assert max(map(len, lines)) <= 80
    place = lines.index("AnEngineWithANameThatIsLongerThanAnyColumn")
    assert lines[place + 1].split()[0] == "230±25"


def test_markdown_has_the_sentences_and_the_table():
    """To be pasted into a report."""
    said = answer(result({"ours": FAST, "dcp": SLOW}), Assumptions())
    shown = text.markdown(said)
    for number, sentence in enumerate(said.sentences, 1):
        assert f"{number}. {sentence}\n" in shown
    assert "| engine | stops training, ms | costs in all, ms |" in shown
    assert "| DCP async_save | 230±25 | 525±75 |" in shown


def test_failures_and_what_was_left_out_are_said():
    """Below the table."""
    found = result({"ours": FAST, "dcp": SLOW})
    found["complete"] = False
    found["left_out"] = ["raw-disk"]
    found["engines"]["dcp"] |= {"installed": False, "pip": "some-package"}
    found["measures"]["cost"]["samples"].append({"engine": "dcp", "round": 2, "error": "Traceback\nOSError: on fire"})
    assert answer(found, Assumptions()).notes == [
        "DCP async_save failed: OSError: on fire",
        "DCP async_save is not installed: pip install some-package",
        "No time was left for the raw disk.",
        "The run was ended before everything was measured.",
    ]


def test_the_order_is_that_of_the_cost():
    """Cheapest first, whoever that is."""
    assert list(of(result({"dcp": SLOW, "ours": FAST})).engines) == ["ours", "dcp"]


def test_the_heading_says_what_was_saved():
    """A workload by its title and scale, equal tensors as made up, a model by its class."""
    found = result({"ours": FAST})
    assert (
        answer(found, Assumptions())
        .heading[0]
        .startswith("200 MiB in 400 tensors (made up; --model for yours), 2 CPUs")
    )
    found["state"]["model"], found["options"]["scale"] = "clip", "1/8"
    assert "(sizes of CLIP ViT-B/32 at 1/8; --model for yours)" in answer(found, Assumptions()).heading[0]
    found["state"]["model"] = "BertModel"
    assert "in 400 tensors (BertModel)," in answer(found, Assumptions()).heading[0]


def test_what_is_written_to_a_terminal_is_short():
    """Ten sentences at most without --overhead and --price."""
    everything = answer(result({"ours": FAST, "dcp": SLOW}), Assumptions())
    assert len(everything.sentences) <= 10
