"""SIGKILL before every call that changes the disk: what is visible is whole, what was acknowledged is there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from . import checks
from .conftest import Tally
from .faults import Point, attached, kill_options, needs_strace, parse_trace, points, trace_options, tracer_script
from .nursery import Child, Nursery

pytestmark = needs_strace
