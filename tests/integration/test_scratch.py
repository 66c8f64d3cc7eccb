"""Files are prepared in the temporary directory, and beside the checkpoints where that cannot be used: no save fails for it."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, PlanError, WriteError, load
from vembed_async_ckpt._capture.scratch import Scratch, in_scratch
from vembed_async_ckpt._disk import deletion
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt._format import names

WORDS = "".join(f"{n}\n" for n in range(9))
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


class Processor:
    """Writes a file; in a directory that `refuses` names it writes half of it and fails."""

    def __init__(self, refuses: str = "", error: Exception | None = None) -> None:
        self.refuses, self.error = refuses, error
        self.directories: list[str] = []

    def save_pretrained(self, directory: str) -> None:
        self.directories.append(directory)
        for n in range(2):
            Path(directory, f"words-{n}.txt").write_text(WORDS)
            if self.error is not None and self.refuses in directory:
                raise self.error


class Foreign(torch.nn.Linear):
    """Has a `save_pretrained` that pickles, which is done again at every save."""

    def __init__(self, features: int = 4) -> None:
        super().__init__(features, features)

    def save_pretrained(self, directory: str) -> None:
        torch.save(self.state_dict(), os.path.join(directory, "pytorch_model.bin"))


@contextlib.contextmanager
def one_warning(*said: str) -> Iterator[None]:
    """Exactly one warning of preparing files elsewhere, which says all of this."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    messages = [str(warning.message) for warning in found if "are prepared in" in str(warning.message)]
    assert len(messages) == 1, messages
    assert all(part in messages[0] for part in said), messages
    assert all(warning.filename == __file__ for warning in found if str(warning.message) in messages)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory, where nothing may be left."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def no_directory(temporary: Path) -> str:
    temporary.rmdir()
    return "No such file or directory"


def a_file(temporary: Path) -> str:
    temporary.rmdir()
    temporary.touch()
    return "Not a directory"


def save_four(root: Path, **options: Any) -> None:
    """Saves that render a processor twice, a model twice and its pickle four times."""
    model, processor = Foreign(), Processor()
    with AsyncCheckpointer(root, **options) as checkpointer:
        for n in range(4):
            with torch.no_grad():
                model.weight += 1
            if n == 2:
                model, processor = Foreign(), Processor()
            path = checkpointer.save(n, model=model, processor=processor).result(60).path
            state = torch.load(path / "pytorch_model.bin", weights_only=True)
            assert torch.equal(state["weight"], model.weight)
            assert (path / "words-1.txt").read_text() == WORDS


@pytest.mark.parametrize("spoil", [no_directory, a_file])
def test_a_temporary_directory_that_is_none(root: Path, temporary: Path, spoil: Callable[[Path], str]) -> None:
    """All that renders files does so in the work directory, and says so once."""
    why = spoil(temporary)
    with one_warning(str(temporary), str(root / names.WORK), why, "TMPDIR"):
        save_four(root)


@as_root
@pytest.mark.parametrize("options", ["ro", "size=4k", "size=64k", "nr_inodes=1"])
def test_a_temporary_directory_on_a_disk_that_takes_nothing(root: Path, temporary: Path, options: str) -> None:
    """Read-only, full, filling up on the way, or without a name to spare."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(temporary)], check=True, timeout=60)
    try:
        with contextlib.suppress(OSError):
            (temporary / "other").write_bytes(bytes(60 << 10))
        with one_warning(str(temporary), str(root / names.WORK)):
            save_four(root)
        with one_warning(str(temporary), str(root / names.WORK)):
            save_tokenizer(root)
        assert {entry.name for entry in temporary.iterdir()} <= {"other"}
    finally:
        subprocess.run(["umount", "-l", str(temporary)], check=True, timeout=60)


def save_tokenizer(root: Path) -> None:
    """Its file of 300 kB is written by Rust."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"word{n}": n for n in range(15_000)}
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="word0")))
    fast.save_pretrained(root.parent / "expected")
    with AsyncCheckpointer(root) as checkpointer:
        path = checkpointer.save(9, model=torch.nn.Linear(2, 2), processor=fast).result(60).path
    for file in (root.parent / "expected").iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/x"),
        OSError(errno.EROFS, os.strerror(errno.EROFS), "/x"),
        Exception("No space left on device (os error 28)"),
    ],
    ids=["full", "quota", "read-only", "full, from Rust"],
)
def test_a_disk_that_fills_up_while_files_are_rendered(root: Path, temporary: Path, error: Exception) -> None:
    """Rendered again from the beginning, elsewhere, and from then on there at once."""
    processor = Processor(str(temporary), error)
    with one_warning(str(temporary), str(root / names.WORK)), AsyncCheckpointer(root) as checkpointer:
        for n in range(2):
            processor.note = n  # so that it is rendered again
            path = checkpointer.save(n, processor=processor, model=torch.nn.Linear(2, 2)).result(60).path
            assert [(path / f"words-{i}.txt").read_text() for i in range(2)] == [WORDS, WORDS]
    assert len(processor.directories) == 3
    assert list(temporary.iterdir()) == []


def test_an_error_about_the_disk_behind_another_error(root: Path, temporary: Path) -> None:
    """transformers and others raise their own from it."""
    error = RuntimeError("could not save")
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with one_warning(str(temporary)), Scratch(str(make_work(root))).in_use():
        assert in_scratch(lambda directory: fail_in(temporary, directory, error))


def fail_in(place: Path, directory: str, error: Exception) -> bool:
    if str(place) in directory:
        raise error
    return True


def make_work(root: Path) -> Path:
    (root / names.WORK).mkdir(parents=True)
    return root


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_error_of_what_is_rendered_is_the_users(root: Path, temporary: Path, elsewhere: bool) -> None:
    """Not tried again; what was written until then is removed, wherever it was."""
    if elsewhere:
        temporary.rmdir()
    processor = Processor("", ValueError("no such template"))
    with warnings.catch_warnings(), AsyncCheckpointer(root) as checkpointer:
        warnings.simplefilter("ignore")
        with pytest.raises(PlanError, match="no such template"):
            checkpointer.save(1, processor=processor, model=torch.nn.Linear(2, 2))
        assert os.listdir(root / names.WORK) == [names.LOCK]
    assert len(processor.directories) == 1
    assert elsewhere or list(temporary.iterdir()) == []


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_no_disk_has_room(root: Path, temporary: Path, on_error: Any) -> None:
    """The error names both; what is to be done with it, `on_error` says, as with every disk that is full. Later saves work."""
    model = torch.nn.Linear(2, 2)
    processor = Processor("", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    said = rf"{temporary} cannot be used \(No space.*{root / names.WORK} cannot be used \(No space"
    with AsyncCheckpointer(root, on_error=on_error) as checkpointer:
        with one_warning():
            if on_error == "raise":
                with pytest.raises(WriteError, match=said):
                    checkpointer.save(1, model=model, processor=processor)
            else:
                with pytest.raises(WriteError, match=said):
                    checkpointer.save(1, model=model, processor=processor).result(60)
                assert checkpointer.statistics()["failed"] == 1
        processor.error = None
        path = checkpointer.save(2, model=model, processor=processor).result(60).path
    load(path, model=model)


def test_save_hooks_of_accelerate_are_called_again(root: Path, temporary: Path) -> None:
    """With all the weights that the first call was given, though it had popped them."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    from vembed_async_ckpt.integrations.accelerate import save_state

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))

    def hook(models: list[Any], weights: list[Any], directory: str) -> None:
        state = weights.pop()
        torch.save(state, os.path.join(directory, "mine.pt"))
        if str(temporary) in directory:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    try:
        accelerator.register_save_state_pre_hook(hook)
        with one_warning(str(temporary), str(root / names.WORK)):
            path = save_state(accelerator, root / "checkpoint-1").result(60).path
        assert torch.equal(torch.load(path / "mine.pt", weights_only=True)["weight"], model.weight)
        accelerator.end_training()
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()


CRASHES = """
import os, sys, tempfile, torch
from vembed_async_ckpt import AsyncCheckpointer
tempfile.tempdir = "/nowhere"
class Processor:
    def save_pretrained(self, directory):
        os.makedirs(os.path.join(directory, "inner"))
        for name in ("words", "inner/words"):
            open(os.path.join(directory, name), "w").close()
        print(os.path.basename(directory), flush=True)
        os._exit(7)
AsyncCheckpointer(sys.argv[1]).save(1, model=torch.nn.Linear(2, 2), processor=Processor())
"""


def test_what_a_crash_leaves_is_swept(root: Path) -> None:
    """By the next start."""
    done = subprocess.run([sys.executable, "-c", CRASHES, str(root)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
    left = done.stdout.strip()
    parsed = names.parse_work_entry(left)
    assert parsed is not None
    assert parsed.kind == "scratch"
    assert (root / names.WORK / left / "inner" / "words").exists()
    with AsyncCheckpointer(root) as checkpointer:
        checkpointer.save(1, model=torch.nn.Linear(2, 2)).result(60)
        assert os.listdir(root / names.WORK) == [names.LOCK]


def test_a_sweep_leaves_what_is_in_use(root: Path, temporary: Path) -> None:
    """As a writer does that takes a dead one's place while files are rendered."""
    temporary.rmdir()

    def render(directory: str) -> list[str]:
        Path(directory, "words").touch()
        deletion.sweep(LocalFilesystem(), str(root))
        return os.listdir(directory)

    with one_warning(), Scratch(str(make_work(root))).in_use():
        assert in_scratch(render) == ["words"]
    assert os.listdir(root / names.WORK) == []
