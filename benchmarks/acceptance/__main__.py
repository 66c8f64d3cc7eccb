"""Run one part: `python -m acceptance MODULE DEVICE TINY SECONDS DIRECTORY RESULT`."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from .common import Setting


def main() -> None:
    module, device, tiny, seconds, directory, result = sys.argv[1:]
    setting = Setting(device, bool(int(tiny)), time.monotonic() + float(seconds) - 3, Path(directory))
    found: dict[str, Any] = {}

    def say(**what: Any) -> None:
        """Note a finding; on disk at once."""
        found.update(what)
        Path(result).write_text(json.dumps(found, default=str))

    importlib.import_module(f"acceptance.{module}").run(setting, say)


if __name__ == "__main__":
    main()
