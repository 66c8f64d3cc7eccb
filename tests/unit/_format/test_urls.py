"""Which URLs checkpoints can be stored below."""

from __future__ import annotations

from pathlib import Path

import pytest

from vembed_async_ckpt._format.urls import checked_url, is_url


@pytest.mark.parametrize(
    "url",
    [
        *("s3://bucket", "s3://bucket/a/run", "gs://bucket/run", "az://container/run", "file:///data/a%20run"),
        "abfss://container@account.dfs.core.windows.net/run",
    ],
)
def test_a_url_is_taken_without_the_slash_at_its_end(url: str) -> None:
    assert checked_url(url) == checked_url(url + "/") == url
    assert is_url(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("runs/one", "kind '' cannot be used"),
        ("http://bucket/run", "use one of s3"),
        ("memory:///run", "use one of s3"),
        ("s3://key:secret@bucket/run", "from the environment"),
        ("s3://key@bucket/run", "from the environment"),
        ("abfss://container:secret@account/run", "from the environment"),
        ("az://container/run?sig=secret", "from the environment"),
        ("s3://bucket/run#secret", "from the environment"),
        ("s3://", "names no bucket"),
        ("file:///", "names no folder"),
        ("file://data/run", "file:///data/run"),
        (Path("/data"), "is not a URL"),
    ],
)
def test_what_cannot_be_used_is_refused_without_its_secrets(url: object, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        checked_url(url)
    assert "secret" not in str(caught.value)


def test_paths_are_not_urls() -> None:
    for path in ("runs/one", "/runs/one", "C:\\runs", "a:b", Path("s3://bucket"), b"runs", 5, None):
        assert not is_url(path)
    assert is_url(b"s3://bucket/run")
