"""What `Share` says a rank holds, compared with what torch really laid out, on 2 and on 4 ranks (gloo, on the CPU)."""

from __future__ import annotations

import pytest

from .launch import run_ranks


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_knows_what_it_holds(world_size: int):
    """200 random cases of `distribute_tensor` in 12 dtypes, and FSDP2, HSDP, tensor parallelism and FSDP version 1.

    Every element is where its region says, and all ranks together write every element once. The script checks that; here
    its counts show that it looked.
    """
    for counts in run_ranks("shares.py", world_size):
        assert counts["cases"] == 200
        assert counts["shares"] > 700
        assert counts["empty"] > 20
        assert counts["strided"] > counts["uneven"] + 40
        assert counts["models"] == (16 if world_size == 2 else 17)
        assert counts["states"] > 10
        assert counts["refused"] == 6
