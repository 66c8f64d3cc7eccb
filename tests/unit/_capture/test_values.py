"""Values that are more than JSON and tensors: kept as data of the same type, or refused by name; never dropped, never unpickled."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import fractions
import json
import math
import pathlib
import pickle
import subprocess
import sys
import types
import uuid
import zoneinfo
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_optimizer
import torch
import xxhash

from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, CorruptCheckpoint, KeepBest, PlanError, latest, load
from vembed_async_ckpt._capture import tree, values
from vembed_async_ckpt._disk import manifests
from vembed_async_ckpt._format.manifest import parse

BOUND = 30


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Number(enum.IntEnum):
    ONE = 1


class Word(str, enum.Enum):
    A = "a"


class Rights(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Settings:
    lr: float = 0.1
    names: list[str] = dataclasses.field(default_factory=list)
    colour: Any = Colour.RED
    tensor: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: int

    def __post_init__(self) -> None:
        calls.append(self.value)


@dataclasses.dataclass
class Slotted:
    __slots__ = ("value",)
    value: int


calls: list[int] = []


class Outer:
    class Inner(enum.Enum):
        X = 1


def ordered_with_metadata() -> Any:
    state = torch.nn.BatchNorm1d(3).state_dict()
    assert state._metadata
    return state


VALUES: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "layout": torch.strided,
    "memory_format": torch.channels_last,
    "device": torch.device("cuda:1"),
    "Size": torch.Size([2, 3]),
    "complex": complex(-0.0, math.inf),
    "range": range(3, 30, 4),
    "slice": slice(1, None, 2),
    "bytearray": bytearray(b"ab"),
    "datetime": datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
    "datetime with zone": datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.timezone(datetime.timedelta(hours=-3))),
    "fold": datetime.datetime(2026, 1, 2, 3, fold=1),
    "date": datetime.date(2026, 1, 2),
    "time": datetime.time(3, 4, 5),
    "timedelta": datetime.timedelta(days=-1, microseconds=3),
    "Decimal": decimal.Decimal("0.10"),
    "Fraction": fractions.Fraction(1, 3),
    "UUID": uuid.UUID(int=5),
    "Path": pathlib.Path("/a/b"),
    "PureWindowsPath": pathlib.PureWindowsPath("c:\\a"),
    "numpy dtype": np.dtype(">i4"),
    "Enum": Colour.BLUE,
    "IntEnum": Number.ONE,
    "str Enum": Word.A,
    "Flag": Rights.READ | Rights.WRITE,
    "no Flag": Rights(0),
    "Enum in a class": Outer.Inner.X,
    "deque": collections.deque([1, [2]], maxlen=5),
    "deque of tensors": collections.deque([torch.arange(3), torch.eye(2).T]),
    "set": {1, "a", (2, 3), Colour.RED},
    "frozenset": frozenset({1, 2}),
    "OrderedDict": collections.OrderedDict([("b", 1), ("a", 2)]),
    "state_dict": ordered_with_metadata(),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "defaultdict without": collections.defaultdict(None, {"a": 1}),
    "Counter": collections.Counter("abca"),
    "Namespace": argparse.Namespace(lr=1, path=pathlib.Path("x")),
    "SimpleNamespace": types.SimpleNamespace(a=[torch.ones(2)]),
    "namedtuple": Pair(1, Pair([2], None)),
    "dataclass": Settings(0.5, ["a"], Colour.BLUE, torch.ones(2, 2)),
    "frozen dataclass": Frozen(3),
    "slots": Slotted(4),
    "keys": {Colour.RED: 1, (1, 2): 2, None: 3, 2.5: 4, torch.float16: 5, b"x": 6, True: 7},
    "numpy scalar": np.float32(0.1),
    "numpy array of none": np.array(2.5),
    "numpy arrays": [np.arange(3, dtype=np.uint16), np.asfortranarray(np.eye(3)), np.array([True])],
    "numpy texts": [np.array([["a", "bc"]]), np.str_("x"), np.array([], "U3"), np.array(b"ab")],
    "numpy dates": [np.array(["2026-01-01"], "M8[D]"), np.timedelta64(3, "h")],
    "other end first": np.arange(3, dtype=">f8"),
    "long double": np.longdouble("0.1"),
    "Parameter": torch.nn.Parameter(torch.ones(2), requires_grad=False),
    "requires grad": torch.ones(2).requires_grad_(),
    "big": 10**40,
    "text": ["\udcff", "a\0b", ""],
    "floats": [math.nan, -math.inf, -0.0, 5e-324],
    "$tags": {"$tuple": [1], "$deque": 2},
    "one tag": {"$deque": [[3], [1]]},
}


def same(one: Any, other: Any) -> bool:
    """Equal in every bit and of the same type, order included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (
            (one.dtype, one.stride(), one.requires_grad) == (other.dtype, other.stride(), other.requires_grad)
        ) and torch.equal(one, other)
    if isinstance(one, np.ndarray | np.generic):
        return (
            one.dtype == other.dtype and (one.strides == other.strides or not one.size) and np.array_equal(one, other)
        )
    if isinstance(one, float):
        return repr(one) == repr(other)
    if isinstance(one, dict):
        attributes = vars(one) if isinstance(one, collections.OrderedDict) else {}
        return (
            same(list(one), list(other))
            and same(list(one.values()), list(other.values()))
            and (not attributes or same(dict(attributes), dict(vars(other))))
            and getattr(one, "default_factory", 0) == getattr(other, "default_factory", 0)
        )
    if isinstance(one, list | tuple | collections.deque):
        limits = getattr(one, "maxlen", 0) == getattr(other, "maxlen", 0)
        return limits and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Settings | argparse.Namespace | types.SimpleNamespace):
        return same(vars(one), vars(other))
    return bool(one == other)


def saved(root: Path, **objects: Any) -> Path:
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        return checkpointer.save(1, **objects).result(BOUND).path


def test_extra_keeps_every_kind_of_data(root: Path):
    """All at once, as the same types, without a constructor being called."""
    calls.clear()
    extra = load(saved(root, extra=VALUES)).extra
    different = [name for name, value in VALUES.items() if not same(extra[name], value)]
    assert not different
    assert calls == []
    assert same(VALUES["frozen dataclass"], extra["frozen dataclass"])


def test_an_optimizer_keeps_every_kind_of_data(root: Path):
    """In its groups and in its state: for our load, and for torch.load of the file as of one that torch wrote."""
    kinds = {name: value for name, value in VALUES.items() if name != "memory_format"}  # torch pickles none
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [parameter], **kinds}], lr=0.1)
    entry = {"momentum_buffer": torch.ones(2), **kinds, "count": 3}
    optimizer.state[parameter] = entry
    path = saved(root, optimizer=optimizer)
    fresh = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    load(path, optimizer=fresh)
    stock = torch.load(path / "optimizer.bin", weights_only=False)
    options = {name: value.item() if isinstance(value, np.generic) else value for name, value in kinds.items()}
    (loaded,) = fresh.state.values()
    assert list(loaded) == list(stock["state"][0]) == list(entry)
    plain = {"Parameter", "requires grad"}  # tensors of a parameter's state are tensors
    for name in kinds.keys() - plain:
        assert same(loaded[name], kinds[name])
        as_numpy_pickles = np.arange(3.0) if name == "other end first" else kinds[name]
        assert same(stock["state"][0][name], as_numpy_pickles)
        assert same(fresh.param_groups[0][name], options[name])
        assert same(
            stock["param_groups"][0][name], options[name] if kinds[name] is not options[name] else as_numpy_pickles
        )


def test_what_torch_cannot_pickle_is_refused(root: Path):
    """optimizer.bin is a pickle for other programs; torch.save fails there, too."""
    optimizer = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.ones(2))], "format": torch.channels_last}], lr=0.1
    )
    with (
        AsyncCheckpointer(root, writer="thread") as checkpointer,
        pytest.raises(PlanError, match=r"torch\.save cannot"),
    ):
        checkpointer.save(1, optimizer=optimizer)


def of_a_function() -> Any:
    class Hidden(enum.Enum):
        X = 1

    @dataclasses.dataclass
    class AlsoHidden:
        x: int = 1

    return Hidden.X, AlsoHidden(), collections.namedtuple("Nowhere", "a")(1)


def with_more() -> Settings:
    value = Settings()
    value.more = 1  # type: ignore[attr-defined]
    return value


@dataclasses.dataclass
class Mapped(dict):  # type: ignore[type-arg]
    a: int = 1


class Text(str):
    pass


REFUSED: dict[str, tuple[Any, str]] = {
    "a function": (len, "builtin_function_or_method"),
    "an object": (object(), "builtins.object"),
    "a class": (Settings, "builtins.type"),
    "an enum of a function": (of_a_function()[0], "Hidden.*its class is not found by its name"),
    "a dataclass of a function": (of_a_function()[1], "AlsoHidden.*its class is not found by its name"),
    "a namedtuple of a function": (of_a_function()[2], "Nowhere.*its class is not found by its name"),
    "a dataclass with more": (with_more(), "more than the fields"),
    "a dataclass that is a dict": (Mapped(), "more than the fields"),
    "a subclass of str": (Text("a"), "Text"),
    "a generator": (torch.Generator(), "Generator"),
    "a zone": (datetime.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")), "time zone UTC"),
    "a factory": (collections.defaultdict(lambda: 1), "default_factory"),
    "objects of numpy": (np.array([None]), "numpy array of object"),
    "a record of numpy": (np.zeros(2, [("a", int)]), "numpy array of"),
    "a masked array": (np.ma.array([1, 2], mask=[0, 1]), "MaskedArray"),
    "a slice of texts": (slice("a"), "ends are not whole numbers"),
    "fields of numpy": (np.dtype([("a", int)]), "fields"),
    "a proxy": (types.MappingProxyType({}), "mappingproxy"),
    "an iterator": (iter([]), "list_iterator"),
    "a sparse tensor": (torch.eye(2).to_sparse(), "only dense tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_data_is_refused_by_name(root: Path, name: str):
    """At the call, with the place and the type: in `extra`, in a parameter group, in the state of a parameter."""
    value, message = REFUSED[name]
    parameter = torch.nn.Parameter(torch.ones(2))

    def optimizer(option: Any, kept: Any) -> torch.optim.Optimizer:
        made = torch.optim.SGD([{"params": [parameter], "option": [0, option]}], lr=0.1)
        made.state[parameter] = {"kept": [0, kept]}
        return made

    requests: list[tuple[str, dict[str, Any]]] = [
        (r"extra\.a\.1", {"extra": {"a": [0, value]}}),
        (r"group\.0\.option\.1", {"optimizer": optimizer(value, 0)}),
        (r"state\.0\.kept\.1", {"optimizer": optimizer(0, value)}),
    ]
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for place, objects in requests:
            with pytest.raises(PlanError, match=f"{place}.*{message}"):
                checkpointer.save(1, **objects)


@pytest.mark.parametrize(("optimizer", "kept"), [("conda", "GaLoreProjector"), ("scalableshampoo", "PreConditioner")])
def test_an_object_in_the_state_of_an_optimizer_is_refused_by_name(root: Path, optimizer: str, kept: str):
    """A projector is code with tensors in it: neither kept nor dropped."""
    model = torch.nn.Linear(8, 8)
    made = pytorch_optimizer.load_optimizer(optimizer)(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    made.step()
    with (
        AsyncCheckpointer(root, writer="thread") as checkpointer,
        pytest.raises(PlanError, match=rf"state\.0\..*{kept}"),
    ):
        checkpointer.save(1, model=model, optimizer=made)


SCRIPT = """
import enum, sys
from vembed_async_ckpt import CheckpointError, load
if sys.argv[2] == "here":
    class Colour(enum.Enum):
        RED = "red"
    print(load(sys.argv[1]).extra["colour"] is Colour.RED)
else:
    try:
        load(sys.argv[1])
    except CheckpointError as error:
        print(error)
"""


def test_a_class_that_is_not_loaded_is_asked_for(root: Path, tmp_path: Path):
    """Nothing is imported for a saved value: the program that reads it has the class, or is told which one."""
    script = tmp_path / "training.py"
    script.write_text(
        "import enum, sys\nfrom vembed_async_ckpt import AsyncCheckpointer\n"
        "class Colour(enum.Enum):\n    RED = 'red'\n"
        "if __name__ == '__main__':\n"
        "    with AsyncCheckpointer(sys.argv[1], writer='thread') as c: c.save(1, extra={'colour': Colour.RED}).result(30)\n"
    )
    subprocess.run([sys.executable, str(script), str(root)], check=True, timeout=120)
    path = str(root / "checkpoint-1")
    answers = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, path, where], check=True, timeout=120, capture_output=True, text=True
        ).stdout
        for where in ("here", "elsewhere")
    ]
    assert answers[0] == "True\n"
    assert "a saved value is a __main__.Colour" in answers[1]
    assert "import it before load()" in answers[1]


@pytest.mark.parametrize("tag", [*values._MAKERS, "$unknown"])
def test_what_no_save_writes_is_refused(tag: str):
    """Whatever stands in a training state: a value of data comes of it or an error of ours, and no class is made or called."""
    before = set(sys.modules)
    said: list[Any] = [
        [],
        [None],
        ["os", "system"],
        ["subprocess", "Popen"],
        [1, 2, 3],
        ["a" * 50],
        [{}],
        [[1]],
        "xy",
        None,
    ]
    for says in said:
        for holds in (None, [], {}, [1, 2], {"a": 1}, "text", 3):
            try:
                value = tree.decode({tag: [says, holds]}, lambda name: torch.ones(2))
            except CheckpointError:
                continue
            assert not isinstance(value, type | types.FunctionType | subprocess.Popen)
    for content in (None, 3, [], [1], [1, 2, 3], "text", {}):
        with pytest.raises(CorruptCheckpoint):
            tree.decode({tag: content}, lambda name: torch.ones(2))
    assert set(sys.modules) == before


def test_a_capture_does_not_change_with_what_was_captured():
    """Containers of every kind are copied at the call."""
    value = {
        "deque": collections.deque([1]),
        "set": {1},
        "ordered": collections.OrderedDict(a=[1]),
        "namespace": argparse.Namespace(a=[1]),
        "dataclass": Settings(names=["a"]),
        "bytearray": bytearray(b"a"),
    }
    expected = copy.deepcopy(value)
    captured = tree.capture(value, "extra", lambda name, tensor: None)
    value["deque"].append(2)
    value["set"].add(2)
    value["ordered"]["a"].append(2)
    value["namespace"].a.append(2)
    value["dataclass"].names.append("b")
    value["bytearray"].append(3)
    decoded = tree.decode(json.loads(json.dumps(tree.encode(captured))), lambda name: torch.ones(1))
    assert same(decoded, expected)
    assert same(pickle.loads(pickle.dumps(tree.refill(captured, lambda name: None))), expected)


def test_metrics_that_are_no_numbers_are_kept(root: Path):
    """NaN and infinities come back; in the manifest they are JSON, and by NaN nothing is ranked."""
    metrics = {
        "nan": math.nan,
        "inf": math.inf,
        "low": -math.inf,
        "loss": 0.5,
        "count": np.int64(3),
        "half": torch.tensor(0.5),
    }
    path = saved(root, extra={"n": 1}, metrics=metrics)
    kept = load(path).metrics
    assert {name: repr(value) for name, value in kept.items()} == {
        name: repr(float(value)) for name, value in metrics.items()
    }
    content = (path / "vembed_manifest.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(content, parse_constant=refuse)["metrics"]["nan"] == {"$float": "nan"}
    assert manifests.read(str(path)).metrics["inf"] == math.inf
    assert latest(root) == path


def test_a_metric_that_is_nan_is_no_best(root: Path):
    """Of NaN and a number the number is kept, beside the newest."""
    with AsyncCheckpointer(root, writer="thread", retention=KeepBest("loss", unrated="drop")) as checkpointer:
        for step, loss in enumerate([math.nan, 0.5, math.nan, 0.7, math.inf]):
            checkpointer.save(step, extra={"n": 1}, metrics={"loss": loss}).result(BOUND)
    assert {path.name for path in root.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}


@pytest.mark.parametrize("value", [{"$float": "1e400"}, {"$float": 3}, {"$float": "nan", "a": 1}, {}, "0.5", None, [1]])
def test_a_metric_that_no_save_writes_is_corrupt(root: Path, value: Any):
    """As any other nonsense in a manifest."""
    manifest = manifests.read(str(saved(root, extra={"n": 1})))
    body = json.loads(manifest.to_bytes())
    body["metrics"] = {"loss": value}
    before = (
        json.dumps({key: item for key, item in body.items() if key != "self"}, separators=(",", ":"))[:-1].encode()
        + b","
    )
    content = before + b'"self":"' + xxhash.xxh3_128_hexdigest(before).encode() + b'"}'
    with pytest.raises(CorruptCheckpoint, match="a metric is"):
        parse(content, file="manifest")
