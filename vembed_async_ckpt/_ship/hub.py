"""Pushes one checkpoint to the Hugging Face Hub, as one commit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .._format import names
from .checkpoint import LocalCheckpoint

_CHUNK = 16 << 20
_MAIN = "main"


@dataclass(frozen=True)
class Pushing:
    """The push of one checkpoint to a repository: see `shipping.push_to_hub`.

    `again`: an earlier try may have pushed it already. `between` is called between reads and may raise.
    """

    local: LocalCheckpoint
    repo_id: str
    revision: str
    private: bool | None
    training_state: bool
    again: bool
    between: Callable[[], None]

    def run(self) -> int:
        """Push. Returns the bytes of the files; 0 if an earlier try had pushed them.

        Raises what huggingface_hub raises, OSError, `Gone` and `Damaged`; then there is no commit.
        """
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # this process has no terminal
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(library_name="vembed-async-ckpt")
        api.create_repo(self.repo_id, private=self.private, exist_ok=True)
        if self.revision != _MAIN:
            api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        mark = f"save {self.local.manifest.save_id}"
        if self.again and any(
            mark in commit.message for commit in api.list_repo_commits(self.repo_id, revision=self.revision)
        ):
            return 0
        files = list(self._files())
        for name in files:
            for _ in self.local.chunks(name, _CHUNK, self.between):
                pass  # raises `Damaged` before anything is sent
        everything = [*files, names.MANIFEST] if self.training_state else files
        api.create_commit(
            self.repo_id,
            operations=[CommitOperationAdd(name, self.local.file(name)) for name in everything],
            commit_message=f"{os.path.basename(self.local.path)}",
            commit_description=mark,
            revision=self.revision,
        )
        return sum(self.local.manifest.files[name].size for name in files)

    def _files(self) -> Iterator[str]:
        """Yield the files to push. A second name of the weights file is left out: the Hub would store it twice."""
        for name in self.local.manifest.files:
            if names.is_second_name(name) and names.WEIGHTS in self.local.manifest.files:
                continue
            if self.training_state or not (names.is_training_state(name) or name.startswith("vembed_")):
                yield name
