"""Host memory on the NUMA node that a device is attached to: copies then do not cross the link between sockets."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from typing import Any

import torch

_MBIND = {"x86_64": 237, "aarch64": 235}  # syscall numbers
_MPOL_PREFERRED = 1  # linux/mempolicy.h: on that node while it has room, else elsewhere
_MAX_NODES = 1024
_PCI = "/sys/bus/pci/devices"

_libc = ctypes.CDLL(None, use_errno=True)


def node_of(device: torch.device, pci: str = _PCI) -> int | None:
    """The node of a CUDA device, None if it is not known."""
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    try:
        address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        with open(f"{pci}/{address}/numa_node") as file:
            node = int(file.read())
    except (AttributeError, OSError, ValueError):  # an older torch, or no such file
        return None
    return node if node >= 0 else None  # -1: one node only


def prefer(address: int, size: int, node: int) -> bool:
    """Have pages of a mapping that are not there yet come from `node`, whichever process touches them first. Returns whether the
    kernel took it; where it does not, pages come from anywhere."""
    number = _MBIND.get(platform.machine())
    if number is None or not 0 <= node < _MAX_NODES:
        return False
    mask = (ctypes.c_ulong * (_MAX_NODES // 64))()
    mask[node // 64] = 1 << node % 64
    with contextlib.suppress(OSError):
        arguments = (
            ctypes.c_void_p(address),
            ctypes.c_ulong(size),
            _MPOL_PREFERRED,
            mask,
            ctypes.c_ulong(_MAX_NODES + 1),
            0,
        )
        return int(_libc.syscall(ctypes.c_long(number), *arguments)) == 0
    return False
