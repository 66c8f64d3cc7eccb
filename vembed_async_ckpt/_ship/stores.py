"""Opens object stores by their URL. obstore is imported only here and in the modules beside this one.

Credentials, region and endpoint come from the environment.
"""

from __future__ import annotations

import datetime
import os
import re
from typing import TYPE_CHECKING, Any

from .._format.urls import checked_url
from ..errors import CheckpointError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AZURE_STORAGE_ENDPOINT")
_SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|CREDENTIAL|(?:ACCESS|ACCOUNT|API|SAS|STORAGE|MASTER|_)_?KEY", re.I)
_SHORTEST = 6  # a value with fewer characters would be found inside harmless words
_LONGEST = 400  # characters of an error that are shown


def open_store(url: str, *, create: bool = False) -> ObjectStore:
    """Return the store of everything below `url`. `create`: make the folder if it is a `file://` URL.

    Opens no connection. Raises `CheckpointError` if the URL or the environment cannot be used.
    """
    try:
        checked = checked_url(url)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise CheckpointError(f"{url}: reading it needs obstore: pip install 'vembed-async-ckpt[ship]'") from error
    try:
        if checked.startswith("file:"):
            return from_url(checked, mkdir=create)
        plain = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
        # TLS guards what is sent; a signature over every byte would cost more time than the upload. Never without TLS.
        options: dict[str, Any] = {} if plain or not checked.startswith("s3") else {"unsigned_payload": True}
        return from_url(
            checked,
            client_options={"allow_http": plain, "connect_timeout": "10s", "timeout": "120s"},
            # A longer outage is waited for outside, where it is reported.
            retry_config={"max_retries": 3, "retry_timeout": datetime.timedelta(seconds=60)},
            **options,
        )
    except Exception as error:  # obstore raises its own kinds, which have no common base with the built-in ones
        raise CheckpointError(f"{url}: {said(error)}") from None


def said(error: BaseException) -> str:
    """Return what an error says, in one line and without the secrets in this process's environment."""
    text = f"{type(error).__name__}: {error}" if not isinstance(error, CheckpointError) else str(error)
    return without_secrets(" ".join(text.partition("\n\n")[0].split())[:_LONGEST])


def without_secrets(text: str) -> str:
    """Return `text` without the values of environment variables that hold secrets, and without queries of URLs."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= _SHORTEST:
            text = text.replace(value, "***")
    return re.sub(r"(https?://[^\s?]*)\?[^\s,)]*", r"\1", text)
