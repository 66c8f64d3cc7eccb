"""What the ranks cannot save is refused on all of them, in the call, before anything is touched; the training goes on."""

from __future__ import annotations

from pathlib import Path

from .launch import run_ranks

SAYS = {
    "Partial": ["weight", "rank", "Partial", "redistribute"],
    "an unknown placement": ["weight", "rank", "Odd", "redistribute"],
    "another shape on rank 1": ["weight", "rank 1 holds [3]", "say [5]", "distribute_tensor"],
    "an uneven _StridedShard": ["weight", "not divided evenly", "redistribute it to Shard"],
    "ShardedTensor": ["bias is a ShardedTensor", "Gather the whole model"],
    "ZeRO 3": ["weight is partitioned by DeepSpeed ZeRO-3", "Gather the whole model"],
    "use_orig_params=False": ["use_orig_params=True"],
    "flat parameters on rank 1": ["rank 1", "does not add up", "FSDP2"],
    "the module inside FSDP": ["weight", "FullyShardedDataParallel"],
    "computed weights": ["experts", "save_original_format=False"],
    "pipeline stages": ["stage0.weight"],
    "a parameter of no model": ["shape [3]", "model="],
    "nested state": ["history", "inside another value"],
    "state unlike the parameter": ["rows", "shape [7]"],
}


def test_every_rank_refuses_and_trains_on(tmp_path: Path) -> None:
    """A PlanError on both ranks with the tensor, the rank and what to do, also if only one of them is wrong.

    The directory is as it was, the next step with its collectives gives the loss of a training without saves, and the next
    save succeeds.
    """
    for report in run_ranks("refused_saves.py", 2, str(tmp_path)):
        assert report.pop("saved afterwards") == [
            ["model.safetensors", "optimizer.safetensors", "random_states_0.pkl"],
            ["config.json", "generation_config.json", "model.safetensors"],
        ]
        assert report.keys() == SAYS.keys()
        for name, seen in report.items():
            assert [word for word in SAYS[name] if word not in seen["raised"]] == [], (name, seen["raised"])
            assert seen["goes on"], name
            assert seen["untouched"], name
