"""What lies on a disk and is near what we write: every parser refuses it in its own words or reads it."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import strategies as st

from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, CorruptCheckpoint, checkpoints, latest, load, verify
from vembed_async_ckpt._capture import tree
from vembed_async_ckpt._disk import lock, notes
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt._disk.stored_tensors import digests, stored_tensors
from vembed_async_ckpt._format import manifest as manifests
from vembed_async_ckpt._format import names, torch_zip
from vembed_async_ckpt._format import safetensors as st_format
from vembed_async_ckpt.cli import exporting
from vembed_async_ckpt.integrations import rotation

from ..by_hand import checkpoint, manifest, safetensors, save_id
from .strategies import bytes_near, fuzz, near, values


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def signed(body: Any) -> bytes:
    """A manifest whose own hash fits whatever it says."""
    if not isinstance(body, dict):
        return encoded(body)
    before = encoded({key: value for key, value in body.items() if key != "self"})[:-1] + b","
    return before + b'"self":"' + xxhash.xxh3_128_hexdigest(before).encode() + b'"}'


FULL = manifest(
    3, metrics={"loss": 0.5, "nan": float("nan")}, ranks=(0, 1), world_size=2, versions={"torch": "2.13"},
    names={"model.safetensors": {"w": "w"}}, tensors={"optimizer.bin": {"0.step": ["F32", [], 64, []]}},
)  # fmt: skip


def test_manifest(examples: int) -> None:
    good = FULL.to_bytes()
    assert manifests.parse(good, file="m").save_id == FULL.save_id
    strategy = bytes_near(good) | near(json.loads(good)).map(signed) | values.map(signed) | st.binary(max_size=200)
    fuzz(strategy, lambda content: manifests.parse(content, file="m"), CorruptCheckpoint, examples=examples)


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]},
}


def with_length(header: Any) -> bytes:
    text = encoded(header)
    return struct.pack("<Q", len(text)) + text + b"\0" * 16


def test_safetensors_header(examples: int) -> None:
    good = with_length(HEADER)
    assert set(st_format.parse(good, len(good), file="f")[0]) == {"a", "b"}
    strategy = bytes_near(good) | near(HEADER).map(with_length) | st.binary(max_size=100)
    fuzz(
        strategy, lambda content: st_format.parse(content, len(content), file="f"), CorruptCheckpoint, examples=examples
    )


def test_tensors_of_a_file(tmp_path: Path, examples: int) -> None:
    """The header of one file and the manifest's table of another, with the disk between."""
    files = {"model.safetensors": safetensors({"a": ("F32", [2], b"\0" * 8)}), "optimizer.bin": b"\0" * 100}
    path = checkpoint(tmp_path / "checkpoint-1", 1, files)

    def parse(content: tuple[Any, bytes]) -> None:
        table, weights = content
        (path / "model.safetensors").write_bytes(weights)
        found = manifest(1, {**files, "model.safetensors": weights}, tensors=table)
        list(stored_tensors(str(path), found))
        digests(str(path), found)

    table = {"optimizer.bin": {"0.step": ["F32", [], 64], "0.exp_avg": ["F32", [2, 2], 68, [1, 2]]}}
    parse((table, files["model.safetensors"]))
    tables = near(table).filter(lambda value: isinstance(value, dict))
    strategy = st.tuples(tables, st.just(files["model.safetensors"]) | bytes_near(files["model.safetensors"]))
    fuzz(strategy, parse, CorruptCheckpoint, examples=examples, size=lambda content: len(str(content)))


def test_lock_file(tmp_path: Path, examples: int) -> None:
    """Whatever it says, somebody may write it just now: it is a file without a name."""
    fd = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    good = {"where": "host pid:[1]", "processes": [[1, 2], [3, 4]]}

    def parse(content: bytes) -> None:
        lock._write(fd, content)
        holder = lock._holder(fd)
        if holder is not None:
            str(holder)
            holder.may_live()

    parse(encoded(good))
    fuzz(bytes_near(encoded(good)) | near(good).map(encoded) | values.map(encoded), parse, examples=examples)
    os.close(fd)


def test_shipping_note(tmp_path: Path, examples: int) -> None:
    note = notes.Note(save_id(1), "checkpoint-1", 1, 1, (notes.Target({"kind": "x"}, True, {"a": "tag"}),), 3)
    (tmp_path / names.WORK).mkdir()
    notes.put(LocalFilesystem(), str(tmp_path), note)
    path = Path(names.shipping_note(str(tmp_path), save_id(1)))
    good = path.read_bytes()

    def parse(content: bytes) -> None:
        path.write_bytes(content)
        notes.read(str(tmp_path), save_id(1))

    parse(good)
    fuzz(bytes_near(good) | near(json.loads(good)).map(encoded), parse, CorruptCheckpoint, examples=examples)


def test_trainer_state_of_others(tmp_path: Path, examples: int) -> None:
    good = {"global_step": 3, "log_history": [{"loss": 1.0, "step": 1}]}

    def parse(content: bytes) -> None:
        (tmp_path / names.TRAINER_STATE).write_bytes(content)
        assert rotation._is_trainers_own(str(tmp_path), 3) in (True, False)

    fuzz(bytes_near(encoded(good)) | near(good).map(encoded), parse, examples=examples)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_index_and_config_that_are_exported(name: str, examples: int) -> None:
    good = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-00001-of-00001.safetensors"}, "dtype": "float32"}

    def parse(content: bytes) -> None:
        assert isinstance(exporting._in_dtype(content, name, ["model-00001-of-00001.safetensors"], {}, "bf16"), bytes)

    fuzz(bytes_near(encoded(good)) | near(good).map(encoded), parse, examples=examples)


@st.composite
def zip_of(draw: st.DrawFn) -> tuple[list[bytes], bytes]:
    return draw(st.lists(st.binary(max_size=200), max_size=6)), draw(st.binary(max_size=100))


def test_torch_zip(examples: int) -> None:
    """We only write it. zipfile, which checks every sum, reads each record back."""

    def write_and_read(content: tuple[list[bytes], bytes]) -> None:
        records, pickle = content
        plan = torch_zip.layout([len(record) for record in records])
        tail, central = torch_zip.tail(plan, pickle)
        image = bytearray(plan.end) + tail
        for at, piece in plan.pieces:
            image[at : at + len(piece)] = piece
        for (start, size, local, where), record in zip(plan.records(), records, strict=True):
            crc = struct.pack("<I", zipfile.crc32(record))  # type: ignore[attr-defined]
            image[start : start + size] = record
            image[local : local + 4] = image[central + where : central + where + 4] = crc
            assert start % torch_zip.ALIGNMENT == 0
        with zipfile.ZipFile(io.BytesIO(bytes(image))) as read:
            assert [read.read(f"archive/data/{n}") for n in range(len(records))] == records
            assert read.read("archive/data.pkl") == pickle

    fuzz(zip_of(), write_and_read, examples=examples, size=lambda content: len(str(content)))


STATE: dict[str, Any] = {
    "a": [1, 2.5, None, "x", {"$float": "nan"}, {"$bytes": "AAE="}],
    "b": {"$tuple": [1, {"$tensor": "t"}, {"$numpy": "t"}, {"$strided": [{"$tensor": "t"}, [1, 2]]}]},
    "c": {"$dict": [[1, 2], [{"$tuple": [1]}, 3]]}, "d": {"$counter": [["x", 1]]},
    "e": [{"$complex": [["1.0", "2.0"], None]}, {"$range": [[0, 5, 1], None]}, {"$slice": [[0, None, 1], None]}],
    "f": [{"$fraction": [[1, 3], None]}, {"$decimal": [["1.5"], None]}, {"$timedelta": [[1, 2, 3], None]}],
    "g": [{"$raw_array": [["<M8[s]", False, 1], {"$numpy": "bytes"}]}, {"$set": [[], [1, 2]]}, {"$deque": [[3], [1]]}],
    "h": [{"$torch": [["torch.float32"], None]}, {"$size": [[1, 2], None]}, {"$device": [["cpu"], None]}],
    "i": [{"$uuid": [["0" * 32], None]}, {"$datetime": [["2026-01-01T00:00:00", 0], None]}, {"$path": [["PosixPath", "/x"], None]}],
}  # fmt: skip


def test_values_of_a_training_state(examples: int) -> None:
    tensors = {"t": torch.zeros(2, 2), "bytes": torch.zeros(8, dtype=torch.uint8)}

    def get(name: Any) -> torch.Tensor:
        if not isinstance(name, str) or name not in tensors:
            raise CorruptCheckpoint(f"no tensor {name!r}")
        return tensors[name].clone()

    def parse(value: Any) -> None:
        tree.decode(value, get)

    fuzz(
        near(STATE) | values,
        parse,
        CheckpointError,
        RecursionError,
        examples=examples,
        size=lambda value: len(str(value)),
    )


def test_load_verify_and_list_of_a_real_checkpoint(tmp_path: Path, examples: int) -> None:
    """The training state or the manifest is near a good one, with hashes that fit. Nothing is half loaded."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    root = tmp_path / "checkpoints"
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=model, optimizer=optimizer, extra={"k": (1, {2})}).result().path
    good = json.loads((path / names.MANIFEST).read_bytes())
    state = json.loads((path / names.TRAINING_STATE).read_bytes())
    load(path, model=model, optimizer=optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def parse(content: tuple[str, Any]) -> None:
        which, body = content
        if which == "state":
            text = encoded(body)
            record = {"size": len(text), "xxh3_128": xxhash.xxh3_128_hexdigest(text)}
            (path / names.TRAINING_STATE).write_bytes(text)
            body = {**good, "files": {**good["files"], names.TRAINING_STATE: record}}
        else:
            (path / names.TRAINING_STATE).write_bytes(json.dumps(state, separators=(",", ":")).encode())
        (path / names.MANIFEST).write_bytes(signed(body))
        checkpoints(root)
        for call in (lambda: latest(root), lambda: verify(path), lambda: load(path, model=model, optimizer=optimizer)):
            try:
                call()
            except CheckpointError:
                pass
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    strategy = near(state).map(lambda body: ("state", body)) | near(good).map(lambda body: ("manifest", body))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        dice = random.getstate(), torch.get_rng_state()
        fuzz(strategy, parse, examples=examples, size=lambda content: len(str(content)))
        random.setstate(dice[0])
        torch.set_rng_state(dice[1])
