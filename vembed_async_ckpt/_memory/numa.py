"""Places host memory on the NUMA node of a device, so that copies do not cross the link between sockets."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from typing import Any

import torch

_MBIND = {"x86_64": 237, "aarch64": 235}  # syscall numbers
_MPOL_PREFERRED = 1  # linux/mempolicy.h: use that node while it has free memory, else another
_MAX_NODES = 1024
_PCI = "/sys/bus/pci/devices"

_libc = ctypes.CDLL(None, use_errno=True)


def node_of(device: torch.device, pci: str = _PCI) -> int | None:
    """Return the NUMA node of a CUDA device, or None if it is not known."""
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    try:
        address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        with open(f"{pci}/{address}/numa_node") as file:
            node = int(file.read())
    except (AttributeError, OSError, ValueError):  # an older torch, or the file does not exist
        return None
    return node if node >= 0 else None  # -1: the machine has one node only


def prefer(address: int, size: int, node: int) -> bool:
    """Ask the kernel to take the missing pages of a mapping from `node`, whichever process touches them first.

    Returns whether the kernel accepted. If not, pages may come from any node.
    """
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
