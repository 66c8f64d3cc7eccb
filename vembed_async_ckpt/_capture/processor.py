"""The files that a processor or tokenizer writes, whatever their names. The bytes are kept until it changes."""

from __future__ import annotations

import json
from typing import Any

from .._disk.filesystem import read_regular, walk_files
from .._format.plan import BytesContent
from ..errors import CheckpointError, PlanError
from .scratch import in_scratch
from .settings import Settings


class ProcessorFiles:
    """Renders an object with `save_pretrained(directory)`.

    This runs on the caller's thread, because transformers modifies the object meanwhile.
    """

    def __init__(self) -> None:
        self._seen: Any = None
        self._settings: Settings | None = None
        self._older_readers = False
        self._files: tuple[BytesContent, ...] = ()

    def contents(self, processor: Any, *, older_readers: bool = False) -> tuple[BytesContent, ...]:
        """Return its files. They are rendered again only after the object or its settings have changed.

        The settings are the attributes of the processor and of all its parts, whatever their names: init kwargs,
        special and added tokens, chat templates, padding, truncation, the components of the tokenizer, and the settings
        of image, audio and feature processors. `Settings` lists the changes that it does not notice. Rendering every
        time is too slow: with a vocabulary of 150,000 entries it holds the GIL for 0.4 s.

        With `older_readers`, also return the files that transformers 4 wrote beside them. Raises `PlanError` if the
        object has no `save_pretrained`, or if that fails.
        """
        same = processor is self._seen and older_readers == self._older_readers
        if not same or self._settings is None or not self._settings.unchanged():
            self._files = _render(processor)
            if older_readers:
                present = {content.name for content in self._files}
                self._files += tuple(c for c in _for_older_readers(processor) if c.name not in present)
            self._seen, self._older_readers = processor, older_readers
            self._settings = _settings_of(processor)
        return self._files


def _settings_of(processor: Any) -> Settings | None:
    """Return everything from which the files are rendered, or None if that is unknown."""
    if not hasattr(processor, "__dict__"):
        return None
    settings = Settings(of_processor=True)
    settings.follow_attribute(processor, "_auto_class")
    settings.follow(vars(processor))
    return settings


def _render(processor: Any) -> tuple[BytesContent, ...]:
    if not callable(getattr(processor, "save_pretrained", None)):
        raise PlanError(f"processor: a {type(processor).__qualname__} has no save_pretrained(directory)")

    def render(directory: str) -> tuple[BytesContent, ...]:
        processor.save_pretrained(directory)
        return read_files(directory)

    try:
        return in_scratch(render)
    except CheckpointError:
        raise
    except Exception as error:
        raise PlanError(
            f"processor: {type(processor).__qualname__}.save_pretrained failed: {type(error).__name__}: {error}"
        ) from error


def _for_older_readers(processor: Any) -> tuple[BytesContent, ...]:
    """Return preprocessor_config.json and special_tokens_map.json, if the processor has the parts for them."""
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
    """Return every file below `directory`, with its bytes."""
    return tuple(BytesContent(name, read_regular(entry.path)) for name, entry in walk_files(directory))
