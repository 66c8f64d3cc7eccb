"""The demo, as its user meets it: killed in the middle of a save, resumed, and never over somebody's run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from vembed_async_ckpt import latest, verify
from vembed_async_ckpt.demo import run
from vembed_async_ckpt.demo.corpus import Batches, Pair, digest, train_tokenizer

STEPS, SAVE_EVERY, CRASH_AT = 24, 8, 13
PATIENCE = 200  # seconds; a quiet machine needs 10, a busy one several times that
SCRIPT = f"""
import sys
from pathlib import Path
from vembed_async_ckpt.demo import run
out, resume, crash_at = sys.argv[1:]
run(Path(out), steps={STEPS}, save_every={SAVE_EVERY}, size="tiny", resume=bool(resume), crash_at=int(crash_at) or None)
"""


def start(out: Path, *, resume: bool = False, crash_at: int = 0) -> subprocess.Popen[str]:
    """The demo in a process of its own, on one thread: the runs go side by side and sum in the same order."""
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, str(out), "yes" if resume else "", str(crash_at)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; its death by anything but a normal end is a failure that shows it."""
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output


def test_killed_while_a_save_is_written_and_resumed_it_ends_with_the_weights_of_an_uninterrupted_run(tmp_path: Path):
    uninterrupted = start(tmp_path / "whole")
    out = tmp_path / "killed"
    killed = start(out, crash_at=CRASH_AT)
    said, _ = killed.communicate(timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL, said

    newest = latest(out)
    assert newest == out / f"checkpoint-{CRASH_AT}", "it was staged, so the writer finishes it without its trainer"
    verify(newest)
    AutoModel.from_pretrained(newest)
    assert AutoTokenizer.from_pretrained(newest)("json.loads(s)")["input_ids"]

    resumed = finish(start(out, resume=True))
    assert f"after step {CRASH_AT}" in resumed
    assert "vembed-ckpt verify" in resumed
    finish(uninterrupted)
    weights = [folder / f"checkpoint-{STEPS}" / "model.safetensors" for folder in (out, tmp_path / "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_out_that_holds_checkpoints_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(ValueError, match="--resume"):
        run(tmp_path, steps=10, save_every=5, size="tiny", resume=False, crash_at=None)
    assert list(tmp_path.rglob("*")) == [tmp_path / "checkpoint-7"]


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"save_every": 0}, {"size": "huge"}, {"crash_at": 11}, {"crash_at": 0}]
)
def test_options_that_make_no_sense_are_refused_before_anything_is_made(tmp_path: Path, wrong: dict):
    options = {"steps": 10, "save_every": 5, "size": "tiny", "resume": False, "crash_at": None} | wrong
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_batch_is_a_function_of_pairs_seed_and_step():
    pairs = [Pair(f"module.function_{i}(a, b)", f"Return the {i}th thing.") for i in range(10)]
    first, second = (Batches(pairs, train_tokenizer(pairs, 300), batch_size=4, length=16, seed=3) for _ in range(2))
    for step in (0, 5, 2):  # two batches make an epoch
        for one, other in zip(first[step], second[step], strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(first[0][0], first[2][0]), "the next epoch has an order of its own"
    assert digest(pairs) != digest(pairs[::-1])


@pytest.mark.parametrize("out", ["/proc/runs", "/dev/null", "/dev/null/runs"])
def test_a_directory_that_cannot_be_written_is_refused_in_one_line(out: str):
    """Before anything is trained."""
    command = [sys.executable, "-m", "vembed_async_ckpt", "demo", "--out", out, "--steps", "1000000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"vembed-ckpt demo: --out {out}: cannot be written (")
    assert len(done.stderr.splitlines()) == 1
