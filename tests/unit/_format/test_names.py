"""Names on disk: what is made is parsed back, and near misses are not taken for ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from vembed_async_ckpt._format import names

ID = "0123456789abcdef" * 2
ROOT = "/somewhere/run"


@pytest.mark.parametrize("step", [0, 7, 10**18])
def test_a_step_comes_back_from_its_directory_name(step: int) -> None:
    assert names.parse_checkpoint(names.checkpoint(step)) == step


@pytest.mark.parametrize(
    ("name", "step"),
    [("checkpoint-12", 12), ("checkpoint_12", 12), ("checkpoint-step-12", 12), ("checkpoint-epoch-12", 12)],
)
def test_the_four_forms_of_a_checkpoint_name(name: str, step: int) -> None:
    assert names.parse_checkpoint(name) == step


@pytest.mark.parametrize(
    "name",
    ["checkpoint", "checkpoint-", "checkpoint-01", "checkpoint--1", "checkpoint-1 ", "checkpoint-1\n", " checkpoint-1",
     "checkpoint-1.tmp", "Checkpoint-1", "checkpoint-1-2", "checkpoint-step1", "checkpoint-\u0661", "tmp-checkpoint-1", ""],
)  # fmt: skip
def test_near_misses_are_no_checkpoints(name: str) -> None:
    """Arabic digits, leading zeros and a line feed at the end among them: int() would take all three."""
    assert names.parse_checkpoint(name) is None


@pytest.mark.parametrize(
    ("name", "number"), [("a1b22", 22), ("epoch=3-step=40.ckpt", 40), ("none", None), ("", None), ("007", 7)]
)
def test_the_last_number_in_a_name(name: str, number: int | None) -> None:
    assert names.trailing_number(name) == number


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (names.save_directory(ROOT, ID, 2), "work"),
        (names.trash_directory(ROOT, ID), "trash"),
        (names.rotated_directory(ROOT, ID), "rotated"),
        (names.scratch_directory(ROOT, ID), "scratch"),
    ],
)
def test_an_entry_of_the_work_directory_comes_back(path: str, kind: str) -> None:
    assert names.parse_work_entry(Path(path).name) == names.WorkEntry(kind, ID)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [f"work-{ID}", f"trash-{ID}.0", f"rotated-{ID}.1", f"scratch-{ID}.1", f"work-{ID}.", f"work-{ID}.-1",
     f"work-{ID.upper()}.0", f"work-{ID[1:]}.0", f"work-{ID}0.0", f"work-{ID}.0\n", f"other-{ID}", "lock", "replaced", ""],
)  # fmt: skip
def test_near_misses_are_no_work_entries(name: str) -> None:
    assert names.parse_work_entry(name) is None


def test_a_swapped_directory_comes_back_with_any_name() -> None:
    for name in ("checkpoint-1", "swap-of.dots", "with space"):
        assert names.parse_swap(Path(names.swap_directory(ROOT, ID, name)).name) == (ID, name)


@pytest.mark.parametrize(
    "name", [f"swap-{ID}", f"swap-{ID}.", f"kept-{ID}.checkpoint-1", f"swap-{ID[1:]}.checkpoint-1"]
)
def test_near_misses_are_no_swaps(name: str) -> None:
    assert names.parse_swap(name) is None


def test_a_new_link_is_known_by_its_name() -> None:
    assert names.is_new_link(Path(names.new_link(ROOT, ID)).name)
    assert not names.is_new_link("latest")
    assert not names.is_new_link(f"latest-{ID}.1")


def test_all_that_is_not_committed_is_in_the_work_directory() -> None:
    made = [
        names.lock_file(ROOT),
        names.save_directory(ROOT, ID, 0),
        names.trash_directory(ROOT, ID),
        names.rotated_directory(ROOT, ID),
        names.scratch_directory(ROOT, ID),
        names.new_link(ROOT, ID),
        names.swap_directory(ROOT, ID, "checkpoint-1"),
        names.kept_directory(ROOT, ID, "checkpoint-1"),
    ]
    assert {Path(path).relative_to(ROOT).parts[0] for path in made} == {names.WORK}


def test_the_work_directory_beside_the_root_is_used_where_it_exists(tmp_path: Path) -> None:
    """accelerate's automatic folder may contain nothing but checkpoints."""
    root = tmp_path / "checkpoints"
    root.mkdir()
    assert names.work_directory(str(root)) == str(root / names.WORK)
    beside = tmp_path / f"{names.WORK}.checkpoints"
    beside.mkdir()
    assert names.work_directory(str(root)) == str(beside) == names.work_directory_beside(str(root))


@pytest.mark.parametrize("value", [ID[:-1], ID + "0", ID.upper(), "../" + ID[3:], "", None, 7, ID.encode()])
def test_other_values_are_no_save_ids(value: object) -> None:
    assert not names.is_save_id(value)
    assert names.is_save_id(ID)


PLANNED = [
    names.WEIGHTS, names.MANIFEST, names.CONFIG, names.TRAINING_STATE, names.TRAINING_TENSORS, names.UNCOVERED, names.SCALER,
    names.PROGRESS, names.TRAINER_OPTIMIZER, names.TRAINER_SCHEDULER, names.TRAINER_STATE, names.TRAINING_ARGUMENTS,
    *(make(n) for n in (0, 3) for make in (
        names.optimizer, names.scheduler, names.sampler, names.dataloader_state, names.custom_checkpoint, names.random_states,
        names.rank_state, names.plain_weights, names.pickled_weights)),
    *(names.trainer_random_states(rank, ranks) for rank, ranks in ((0, 1), (0, 2), (1, 2))),
    names.state_dict(""), names.state_dict("pytorch_model"), "model-00001-of-00003.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin.index.json", "adapter_model.safetensors", "adapter_config.json", "query/model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", PLANNED)
def test_what_a_plan_can_make_is_known(name: str) -> None:
    """So a file of a replaced checkpoint is not carried over and read as part of the new one."""
    assert names.is_plan_name(name)


@pytest.mark.parametrize(
    "name", ["notes.txt", "model.safetensors.bak", "a/b/model.safetensors", "my_model.safetensors", "optimizer"]
)
def test_files_of_others_are_not_taken_for_planned_ones(name: str) -> None:
    assert not names.is_plan_name(name)


def test_what_is_needed_to_resume_only_is_told_from_the_weights() -> None:
    for name in (
        "optimizer.bin",
        "scheduler_1.bin",
        "random_states_3.pkl",
        "vembed_rank_state_2.json",
        "query/optimizer.bin",
    ):
        assert names.is_training_state(name)
    for name in ("model.safetensors", "vembed_manifest.json", "vembed_config.json", "adapter_config.json", "notes.txt"):
        assert not names.is_training_state(name)


def test_no_two_ranks_or_indices_share_a_name() -> None:
    for make in (names.optimizer, names.scheduler, names.sampler, names.dataloader_state, names.custom_checkpoint,
                 names.random_states, names.rank_state, names.plain_weights, names.pickled_weights):  # fmt: skip
        assert len({make(n) for n in range(12)}) == 12


def test_the_second_name_of_the_weights() -> None:
    assert names.is_second_name(names.state_dict("model"))
    assert not names.is_second_name(names.WEIGHTS)


def test_notes_of_what_is_to_be_shipped() -> None:
    """They are found again by their save id; nothing else in their directory is taken for one."""
    note = names.shipping_note("/root", "0" * 32)
    assert names.parse_shipping_note(note.rpartition("/")[2]) == "0" * 32
    for path in (names.shipping_lock("/root"), names.shipping_successor("/root"), note + ".new", "x.json"):
        assert names.parse_shipping_note(path.rpartition("/")[2]) is None


def test_the_marker_of_the_newest_comes_first_in_a_list_of_keys() -> None:
    """In the order of bytes, whatever the checkpoints are called; markers tell their checkpoint, other keys nothing."""
    keys = [
        names.remote_checkpoint(name, f"{n:032x}") for n, name in enumerate(["checkpoint-10", "checkpoint-9", "a b"])
    ]
    markers = [names.remote_marker(order, key) for order, key in zip((9, 10, 1000), keys, strict=True)]
    assert sorted(markers, key=str.encode) == markers[::-1]
    assert [names.parse_remote_marker(marker) for marker in markers] == list(zip((9, 10, 1000), keys, strict=True))
    for key in (
        keys[0],
        f"{names.MARKERS}/x",
        f"{names.MARKERS}/{'1' * 12}-checkpoint-1",
        f"{names.MARKERS}/1-{keys[0]}",
    ):
        assert names.parse_remote_marker(key) is None
