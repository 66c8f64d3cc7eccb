"""Plan: contents become files and offsets, by arithmetic alone; names that clash or leave the directory are refused."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vembed_async_ckpt import PlanError
from vembed_async_ckpt._format.plan import (
    PAGE,
    START,
    BytesContent,
    TensorContent,
    ZipContent,
    check_names,
    is_safe_relative,
    pages,
    plan,
)
from vembed_async_ckpt._format.safetensors import TensorSpec

WEIGHTS = TensorContent(
    "model.safetensors", (TensorSpec("b", "F32", (3, 5)), TensorSpec("a", "U8", (7,))), {"format": "pt"}
)
OPTIMIZER = ZipContent("optimizer.bin", (60, 0, 4), 100)
CONFIG = BytesContent("config.json", b"{}")


@pytest.mark.parametrize(
    ("size", "rounded"), [(0, 0), (1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE), (1 << 40, 1 << 40)]
)
def test_pages_round_up(size, rounded):
    """O_DIRECT writes whole pages."""
    assert pages(size) == rounded


CONTENTS = st.lists(
    st.one_of(
        st.binary(max_size=9000).map(lambda data: BytesContent("", data)),
        st.lists(st.integers(0, 5000), max_size=4).map(lambda sizes: ZipContent("", tuple(sizes), 50)),
        st.lists(st.integers(0, 5000), max_size=4).map(
            lambda sizes: TensorContent("", tuple(TensorSpec(f"t{n}", "U8", (size,)) for n, size in enumerate(sizes)))
        ),
    ),
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(CONTENTS)
def test_files_pieces_and_tensors_never_overlap(contents):
    """Every file starts on a page of its own behind the control page; every byte of the arena has at most one meaning."""
    contents = [dataclasses.replace(content, name=f"f{n}") for n, content in enumerate(contents)]
    made = plan(contents)
    position = START
    for file, content in zip(made.files, contents, strict=True):
        assert (file.name, file.start) == (content.name, position)
        assert file.start % PAGE == 0
        position += pages(file.size)
    assert made.end == position
    assert made.capacity >= made.end + (1 << 20)
    sizes = []
    for content in contents:
        if isinstance(content, TensorContent):
            sizes += [tensor.nbytes for tensor in content.tensors]
        elif isinstance(content, ZipContent):
            sizes += content.sizes
    ranges = [(at, at + size) for at, size in zip(made.offsets, sizes, strict=True) if size]
    ranges += [(at, at + len(data)) for at, data in made.pieces if data]
    ranges.sort()
    for (_, end), (start, _) in itertools.pairwise(ranges):
        assert end <= start
    for start, end in ranges:
        assert any(file.start <= start and end <= file.start + file.size for file in made.files)


def test_offsets_follow_the_order_of_the_contents_not_of_the_file():
    """Callers zip offsets with their tensors; safetensors sorts in the file."""
    made = plan([WEIGHTS, OPTIMIZER])
    b, a, *storages = made.offsets
    assert a == b + 60  # F32 before U8
    assert len(storages) == 3
    assert all(at % 64 == 0 for at in storages)


def test_the_same_contents_give_the_same_plan():
    """A pure function: nothing of one call shows in the next."""
    contents = [WEIGHTS, CONFIG, OPTIMIZER, BytesContent("sub/dir/x", b"y" * 5000)]
    first, second = plan(contents), plan(list(contents))
    for field in dataclasses.fields(first):
        assert getattr(first, field.name) == getattr(second, field.name)
    assert contents == [WEIGHTS, CONFIG, OPTIMIZER, BytesContent("sub/dir/x", b"y" * 5000)]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a", "b", "a"], "two files"),
        (["a", "a/b"], "both a file and a directory"),
        (["a/b/c", "a/b"], "both a file and a directory"),
    ],
)
def test_clashing_names_are_refused(names, reason):
    """Two files of one name, or a name that is a file and a directory."""
    with pytest.raises(PlanError, match=reason):
        plan([BytesContent(name, b"") for name in names])


LEAVING = [
    "",
    "/etc/passwd",
    "..",
    "../x",
    "a/../b",
    "a/./b",
    ".",
    "a//b",
    "a/",
    "/",
    "a\0b",
    "a\\b",
    "x" * 256,
    "é" * 128,
    "a/" * 600,
]


@pytest.mark.parametrize("name", LEAVING, ids=[repr(name[:12]) for name in LEAVING])
def test_names_that_leave_the_directory_are_refused(name):
    """Only plain relative paths that every file system takes."""
    assert not is_safe_relative(name)
    with pytest.raises(PlanError, match="plain relative path"):
        check_names([name])


@pytest.mark.parametrize(
    "name", ["a", "a/b", "a..b", "..a", "a b", "é", "a-b/c.d", ".hidden", "x" * 255, "ab", "a.b/a"]
)
def test_plain_names_pass(name):
    """Dots inside a part, spaces and letters of any script are only names."""
    check_names([name, "other"])


def test_a_common_prefix_is_no_clash():
    """`ab` is not inside `a`."""
    check_names(["a", "ab", "a.b", "d/a", "d/ab", "da"])
