"""Errors of stores, as they are shown."""

from __future__ import annotations

import pytest

from vembed_async_ckpt import CheckpointError
from vembed_async_ckpt._ship.stores import open_store, said

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "first-secret",
    "AWS_ACCESS_KEY_ID": "second-secret",
    "AWS_SESSION_TOKEN": "third-secret",
    "AZURE_STORAGE_ACCOUNT_KEY": "fourth-secret",
    "AZURE_STORAGE_SAS_KEY": "fifth-secret",
    "GOOGLE_SERVICE_ACCOUNT_KEY": "sixth-secret",
    "HF_TOKEN": "seventh-secret",
}


def test_no_secret_of_the_environment_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    text = said(RuntimeError(" and ".join(SECRETS.values()) + " at https://host/key?sig=eighth-secret, twice"))
    assert "secret" not in text
    assert text == f"RuntimeError: {' and '.join(['***'] * 7)} at https://host/key, twice"


def test_an_error_is_one_short_line() -> None:
    """Without the source that obstore adds, and without the name of our own errors."""
    assert said(ValueError("a\n  b\n\nDebug source:\nGeneric {")) == "ValueError: a b"
    assert said(CheckpointError("as it is")) == "as it is"
    assert len(said(ValueError("x" * 10_000))) < 500


def test_a_url_that_cannot_be_used_is_an_error_of_ours() -> None:
    for url in ("ftp://host/run", "s3://a:b@bucket"):
        with pytest.raises(CheckpointError):
            open_store(url)
