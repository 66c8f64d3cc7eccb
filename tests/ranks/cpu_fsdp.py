"""FSDP through accelerate and Trainer on the CPU, where accelerate itself offers it only with an accelerator."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType


def allow() -> None:
    """Let an `Accelerator` with an FSDP plugin use it on the CPU too."""
    original = AcceleratorState.__init__

    def initialized(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            for state in (self, PartialState()):
                state.distributed_type = DistributedType.FSDP
                state.device = torch.device("cpu")  # FSDP version 1 wants no index

    AcceleratorState.__init__ = initialized


def join(rank: int, world_size: int) -> None:
    """Join the ranks that `launch.run_ranks` has started."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", ACCELERATE_USE_CPU="true")
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=rank, world_size=world_size)


def forget() -> None:
    """Forget the accelerator of this process, so that another one may have other options."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def accelerator(version: int, *layers: str, **options: Any) -> Accelerator:
    """A new accelerator, as a new process would have it. FSDP wraps the layers of these classes."""
    forget()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=list(layers),
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
        use_orig_params=True if version == 1 else None,
    )
    return Accelerator(cpu=True, fsdp_plugin=plugin, **options)
