"""Renders `vembed_config.json`: the parts of a config that are data.

Live objects and secrets are left out, with one warning.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import math
import os
import re
import types
from collections.abc import Mapping
from typing import Any

import torch

from .._format import bounded_json
from ..errors import warn

_SECRET = re.compile(r"(?:^|_)(?:tokens?|secrets?|passwords?|passwd|api_?keys?|credentials?)$")
_SPECIAL_TOKEN = re.compile(
    r"(?:bos|eos|pad|unk|mask|cls|sep|image|video|audio|start|end|special|instruction|prompt)_tokens?$"
)


def render(config: Any) -> bytes:
    """Return the config as JSON with indent 2.

    JSON values stay. Paths, dtypes, devices, enums, dataclasses and objects with `to_dict` are converted. Everything
    else is left out, and so are keys that look like secrets (token, secret, password, api_key); one warning names them.
    Raises TypeError if the config is not a mapping, a dataclass or an object with `to_dict`, and ValueError if it is too
    large to be read back.
    """
    dropped: list[str] = []
    body = _convert(config, "", dropped)
    if not isinstance(body, dict):
        raise TypeError(
            f"config must be a mapping, a dataclass or an object with to_dict, not {type(config).__qualname__}"
        )
    if dropped:
        warn(f"left out of the saved config (live objects or secrets): {', '.join(dropped)}")
    content = json.dumps(body, indent=2, ensure_ascii=False).encode("utf-8", "replace")
    if reason := bounded_json.excess(content):
        raise ValueError(f"it has {reason} when it is read")
    return content


_DROP = object()


def _convert(value: Any, where: str, dropped: list[str]) -> Any:
    if isinstance(value, enum.Enum):
        return _convert(value.value, where, dropped)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, argparse.Namespace | types.SimpleNamespace):
        value = vars(value)
    elif not isinstance(value, Mapping | list | tuple | set | frozenset) and callable(getattr(value, "to_dict", None)):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return _convert_mapping(value, where, dropped)
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        converted = [_convert(item, f"{where}[{n}]", dropped) for n, item in enumerate(items)]
        return [item for item in converted if item is not _DROP]
    dropped.append(where or type(value).__qualname__)
    return _DROP


def _convert_mapping(value: Mapping[Any, Any], where: str, dropped: list[str]) -> dict[str, Any]:
    result = {}
    for key, item in value.items():
        path = f"{where}.{key}" if where else str(key)
        if _looks_secret(str(key), item):
            dropped.append(path)
            continue
        converted = _convert(item, path, dropped)
        if converted is not _DROP:
            result[str(key)] = converted
    return result


def _looks_secret(key: str, value: Any) -> bool:
    """Return whether a key like `hub_token` or `apiKey` has a value that may be secret.

    A number is not secret, so a count of tokens is kept. The special tokens of a tokenizer are kept too.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).replace("-", "_").lower()
    number = value is None or isinstance(value, bool | int | float)
    return not number and bool(_SECRET.search(words)) and not _SPECIAL_TOKEN.search(words)
