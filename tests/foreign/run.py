"""Other projects' own tests of checkpoints, from their sources, with their saving and with ours.

    python tests/foreign/run.py accelerate|transformers|lightning|peft SOURCE [--saving stock|waited|background] [pytest options]

SOURCE is an unpacked source distribution or repository of the installed version. `waited`: every save is durable when the call that
began it returns. `background`: nobody waits; what looks at the disk earlier may fail. Directories are listed as they are.
PEFT's own tests load at once, so they have no `background`. They need diffusers and datasets. Its source distribution lacks
`tests/conftest.py` and `tests/__init__.py`: take them from its repository.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SUITES = {
    "accelerate": ["tests/test_state_checkpointing.py", "tests/test_accelerator.py"],
    "transformers": [
        "tests/trainer/test_trainer_checkpointing.py",
        "tests/trainer/test_trainer_resume.py",
        "tests/trainer/test_trainer_jit_checkpoint.py",
    ],
    "lightning": [
        "tests/tests_pytorch/checkpointing/test_model_checkpoint.py",
        "tests/tests_pytorch/checkpointing/test_trainer_checkpoint.py",
        "tests/tests_pytorch/checkpointing/test_checkpoint_callback_frequency.py",
        "tests/tests_pytorch/trainer/connectors/test_checkpoint_connector.py",
        "tests/tests_pytorch/callbacks/test_model_checkpoint_additional_cases.py",
        "tests/tests_pytorch/callbacks/test_model_checkpoint_edge_cases.py",
        "tests/tests_pytorch/callbacks/test_model_checkpoint_manual_opt.py",
        "tests/tests_pytorch/callbacks/test_model_checkpoint_step_interval_val_metric.py",
    ],
    "peft": [
        f"tests/test_{name}.py"
        for name in (
            "custom_models", "mixed", "low_level_api", "other", "bufferdict", "initialization", "trainable_tokens",
            "target_parameters", "vera", "xlora", "shira", "vblora",
        )
    ],
}  # fmt: skip
OPTIONS = {"peft": ["-o", "addopts=", "-k", "save_pretrained"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("source", type=Path)
    parser.add_argument("--saving", choices=["stock", "waited", "background"], default="waited")
    options, further = parser.parse_known_args()
    plugin = [] if options.saving == "stock" else ["-p", f"with_{options.suite}"]
    paths = [path for path in SUITES[options.suite] if (options.source / path).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, *paths]
    command += [*OPTIONS.get(options.suite, []), *further]
    search = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {
        "FOREIGN_SAVING": options.saving,
        "PYTHONPATH": search,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, cwd=options.source, env={**os.environ, **environment}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
