"""Converts between torch dtypes and safetensors dtype names."""

from __future__ import annotations

import torch

from .._format.safetensors import TensorSpec
from ..errors import PlanError

_NAMES = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64", "F32": "float32", "U32": "uint32", "I32": "int32",
    "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I8": "int8", "U8": "uint8", "F4": "float4_e2m1fn_x2", "BOOL": "bool",
}  # fmt: skip
TO_TORCH: dict[str, torch.dtype] = {name: getattr(torch, t) for name, t in _NAMES.items() if hasattr(torch, t)}
FROM_TORCH: dict[torch.dtype, str] = {dtype: name for name, dtype in TO_TORCH.items()}


def spec(name: str, tensor: torch.Tensor, *, file: str, needs_data: bool = True) -> TensorSpec:
    """Return the entry of `tensor` in a safetensors file.

    `needs_data`: whether the tensor itself is what will be saved.

    Raises `PlanError` for a tensor without dense storage of its own, if it needs data.
    """
    if needs_data:
        check_storage(name, tensor, file=file)
    dtype = FROM_TORCH.get(tensor.dtype)
    if dtype is None:
        raise PlanError(
            f"{file}: tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold; convert it first"
        )
    shape = tuple(tensor.shape)
    if dtype == "F4":
        if not shape:
            raise PlanError(f"{file}: tensor {name!r}: a 0-dim float4 tensor has no safetensors form")
        shape = (*shape[:-1], 2 * shape[-1])
    return TensorSpec(name, dtype, shape)


def check_storage(name: str, tensor: torch.Tensor, *, file: str) -> None:
    """Raise `PlanError` unless `tensor` is a plain dense tensor whose bytes can be copied."""
    if tensor.is_meta:
        raise PlanError(
            f"{file}: tensor {name!r} is on the meta device and has no data; load or initialize the model first"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        said = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        raise PlanError(f"{file}: tensor {name!r} is {said}; only dense tensors can be saved, convert it first")
    kind = type(tensor)
    if kind not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) and _is_wrapper(tensor):
        raise PlanError(
            f"{file}: tensor {name!r} is a {kind.__module__}.{kind.__qualname__}, which has no storage of its own; "
            "save its full, plain value instead"
        )


def _is_wrapper(tensor: torch.Tensor) -> bool:
    if hasattr(type(tensor), "__tensor_flatten__") or hasattr(tensor, "full_tensor"):
        return True
    try:
        return tensor.numel() > 0 and tensor.data_ptr() == 0
    except RuntimeError:
        return True
