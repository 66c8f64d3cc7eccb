"""One rank of a training under `accelerate launch`. ddp.py PHASE DIRECTORY

`begin`: train from beginning to end and note what that came to; train anew, save on the way, and stand still once all is staged,
to be killed. `resume`: go on from both checkpoints, with both readers, and note what that came to; then one rank dies in a save.
`alone`: only the first rank saves.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "integration" / "frameworks"))

import trainings

AT = 6  # micro-batches before the checkpoint that is resumed


class Rank:
    def __init__(self, directory: Path) -> None:
        self.root = directory / "checkpoints"
        self.notes = directory / "notes"
        self.notes.mkdir(exist_ok=True)
        self.rank = int(os.environ["RANK"])

    def training(self, seed: int) -> trainings.Training:
        return trainings.Training(seed + self.rank, accumulate=2)

    def note(self, what: str, **facts: Any) -> None:
        """A file `what-RANK.json`, there as a whole or not at all."""
        file = self.notes / f"{what}-{self.rank}.json"
        file.with_suffix(".part").write_text(json.dumps(facts))
        file.with_suffix(".part").rename(file)

    def begin(self) -> None:
        self.note("pid", pid=os.getpid())
        reference = self.training(1)
        self.note("reference", digest=reference.finish())
        training = self.training(1)
        for done in training.steps():
            if done in (AT // 2, AT):
                handles = [
                    training.save("save_checkpoint", str(self.root / f"checkpoint-step-{done}")),
                    training.save("save_state", str(self.root / f"checkpoint_{done}")),
                ]
            if done == AT + 1:
                for handle in handles:
                    handle.wait_staged(60)
                self.note("staged")
                while True:
                    signal.pause()

    def alone(self) -> None:
        self.note("pid", pid=os.getpid())
        training = self.training(1)
        took = []
        for done in training.steps():
            if training.accelerator.is_main_process:
                begun = time.monotonic()
                training.save("save_checkpoint", str(self.root / f"checkpoint-{done}"))
                took.append(time.monotonic() - begun)
        training.accelerator.end_training()
        self.note("alone", took=took)

    def resume(self) -> None:
        self.note("pid", pid=os.getpid())
        for kind, name in (("checkpoint", f"checkpoint-step-{AT}"), ("state", f"checkpoint_{AT}")):
            for reader in ("ours", "attached" if kind == "checkpoint" else "stock"):
                training = self.training(99)
                training.resume(reader, str(self.root / name), AT)
                self.note(f"{kind}-{reader}", digest=training.finish())
        training.save("save_state", str(self.root / "checkpoint_12")).result(60)
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        begun = time.monotonic()
        try:
            handle = training.save("save_state", str(self.root / "checkpoint_13"))
            self.note("called")
            handle.result(60)
        except Exception as error:
            self.note("failed", error=f"{type(error).__name__}: {error}", seconds=time.monotonic() - begun)
            raise


def main() -> None:
    getattr(Rank(Path(sys.argv[2])), sys.argv[1])()


if __name__ == "__main__":
    main()
