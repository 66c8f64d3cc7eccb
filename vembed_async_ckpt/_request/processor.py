"""The files a processor or tokenizer writes, whatever their names, kept as bytes until it changes."""

from __future__ import annotations

import json
import tempfile
from typing import Any

from .._plan.plan import BytesContent
from .._store.fs import read_regular, walk_files
from ..errors import PlanError


class ProcessorFiles:
    """Renders an object with `save_pretrained(directory)`. On the caller's thread: transformers changes it on the way."""

    def __init__(self) -> None:
        self._seen: Any = None
        self._known: Any = None
        self._files: tuple[BytesContent, ...] = ()

    def contents(self, processor: Any, *, older_readers: bool = False) -> tuple[BytesContent, ...]:
        """Its files; rendered again only when the object, its length, chat template, padding or truncation changed.

        With `older_readers` also what transformers 4 wrote beside them. Raises `PlanError` if it has no `save_pretrained`.
        """
        fingerprint = (older_readers, _fingerprint(processor))
        if processor is not self._seen or fingerprint != self._known:
            self._files = _render(processor)
            if older_readers:
                present = {content.name for content in self._files}
                self._files += tuple(c for c in _for_older_readers(processor) if c.name not in present)
            self._seen = processor
            self._known = (older_readers, _fingerprint(processor))
        return self._files


def _render(processor: Any) -> tuple[BytesContent, ...]:
    if not callable(getattr(processor, "save_pretrained", None)):
        raise PlanError(f"processor: a {type(processor).__qualname__} has no save_pretrained(directory)")
    try:
        with tempfile.TemporaryDirectory(prefix="vembed-ckpt-") as directory:
            processor.save_pretrained(directory)
            return read_files(directory)
    except Exception as error:
        raise PlanError(
            f"processor: {type(processor).__qualname__}.save_pretrained failed: {type(error).__name__}: {error}"
        ) from error


def _for_older_readers(processor: Any) -> tuple[BytesContent, ...]:
    """preprocessor_config.json and special_tokens_map.json, of the parts that have them."""
    files: list[BytesContent] = []
    image_processor = getattr(processor, "image_processor", None)
    if callable(getattr(image_processor, "save_pretrained", None)):
        files += [content for content in _render(image_processor) if content.name == "preprocessor_config.json"]
    tokens = getattr(getattr(processor, "tokenizer", processor), "special_tokens_map", None)
    if isinstance(tokens, dict):
        body = {
            name: [str(t) for t in token] if isinstance(token, list) else str(token) for name, token in tokens.items()
        }
        text = json.dumps(body, indent=2, ensure_ascii=False) + "\n"
        files.append(BytesContent("special_tokens_map.json", text.encode()))
    return tuple(files)


def read_files(directory: str) -> tuple[BytesContent, ...]:
    """Every file below `directory`, with its bytes."""
    return tuple(BytesContent(name, read_regular(entry.path)) for name, entry in walk_files(directory))


def _fingerprint(processor: Any) -> Any:
    parts = [
        processor,
        *(getattr(processor, name, None) for name in ("tokenizer", "image_processor", "feature_extractor")),
    ]
    return [_state(part) for part in parts if part is not None]


def _state(part: Any) -> Any:
    length = len(part) if hasattr(type(part), "__len__") else None
    backend = getattr(part, "backend_tokenizer", None)
    return (
        id(part),
        length,
        repr(getattr(part, "chat_template", None)),
        repr(getattr(backend, "padding", None)),
        repr(getattr(backend, "truncation", None)),
        *(repr(getattr(part, name, None)) for name in ("padding_side", "truncation_side", "model_max_length")),
    )
