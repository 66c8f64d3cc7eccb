"""Where checkpoints go after they are committed: `after_commit=[upload("s3://bucket/run"), push_to_hub("me/model")]`.

`upload` and `push_to_hub` return data. A process of its own ships, which survives the training. It takes credentials
from the environment and from nowhere else: they are never in a note, a manifest, an event, a log or a command line.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ._format.urls import checked_url


@dataclass(frozen=True)
class Shipment:
    """Something that a process of its own does with a committed checkpoint."""

    kind: ClassVar[str]

    def spec(self) -> dict[str, Any]:
        """Return it as JSON, without secrets, for the process that does it."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Upload(Shipment):
    """Upload to an object store or a folder. `url`: of the run; its checkpoints lie below it."""

    url: str
    kind: ClassVar[str] = "upload"

    def __str__(self) -> str:
        return f"upload to {self.url}"


@dataclass(frozen=True)
class Push(Shipment):
    """Push to a repository on the Hugging Face Hub, in one commit per checkpoint."""

    repo_id: str
    revision: str = "main"
    private: bool | None = None
    training_state: bool = False
    kind: ClassVar[str] = "push"

    def __str__(self) -> str:
        return f"push to {self.repo_id}"


def upload(url: str) -> Upload:
    """Upload each checkpoint below `url`: `s3://bucket/run`, `gs://`, `az://`, or a folder as `file:///path`.

    Give every run a URL of its own. `latest(url)`, `load(url)`, `checkpoints(url)` and `verify(url)` read from there.
    What `latest(url)` finds is always complete: the manifest is uploaded after all other files, and then a marker that
    makes the checkpoint visible. An upload that was interrupted goes on, and does not send finished files again.

    Credentials, region and endpoint come from the environment, under the names that the stores' own tools use
    (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL; GOOGLE_APPLICATION_CREDENTIALS;
    AZURE_STORAGE_ACCOUNT_NAME, ...; see `obstore`). Raises ValueError for a URL that cannot be used, and ImportError
    without `obstore`.
    """
    checked = checked_url(url)
    if importlib.util.find_spec("obstore") is None:
        raise ImportError("upload() needs obstore: pip install 'vembed-async-ckpt[ship]'")
    return Upload(checked)


def push_to_hub(
    repo_id: str, *, revision: str = "main", private: bool | None = None, training_state: bool = False
) -> Push:
    """Push each checkpoint to the repository `repo_id` on the Hugging Face Hub, as one commit per checkpoint.

    `revision`: the branch. `private`: whether the repository is private, if it has to be created; None leaves that to
    the Hub. `training_state`: push optimizer, random states and our manifest too, not only what `from_pretrained`
    opens. The token comes from HF_TOKEN or from the login on this machine. Raises ValueError for a `repo_id` that
    cannot be used.
    """
    if not isinstance(repo_id, str) or not re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", repo_id):
        raise ValueError(f"repo_id is {repo_id!r}; use 'name' or 'owner/name'")
    if not isinstance(revision, str) or not revision:
        raise ValueError(f"revision is {revision!r}; use the name of a branch")
    return Push(repo_id, revision, private, training_state)


def described(spec: Mapping[str, Any]) -> str:
    """Return for people where a shipment goes."""
    return str(spec["url"] if spec["kind"] == Upload.kind else spec["repo_id"])
