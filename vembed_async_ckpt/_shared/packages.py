"""Finds the folders in which packages are installed, for processes that must not import from the user's folder."""

from __future__ import annotations

import importlib.util
import os
import sys


def folders(*packages: str) -> list[str]:
    """Return the folders of these packages, in the order of `sys.path`. Packages that are not installed are left out.

    Each folder is the one from which this process imports the package. No package is imported.
    """
    found = {os.path.dirname(os.path.dirname(os.path.abspath(path))) for path in map(_file, packages) if path}
    known = [os.path.abspath(path) for path in sys.path]
    return sorted(found, key=lambda path: (known.index(path) if path in known else len(known), path))


def _file(package: str) -> str | None:
    loaded = sys.modules.get(package)
    if loaded is not None and getattr(loaded, "__file__", None):
        return str(loaded.__file__)
    spec = importlib.util.find_spec(package)
    return None if spec is None else spec.origin
