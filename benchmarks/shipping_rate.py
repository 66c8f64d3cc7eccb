"""How fast an upload is, and what it costs the steps beside it, next to a raw multipart upload of the same bytes.

    python benchmarks/shipping_rate.py [--mib 512] [--pairs 7] [--out FILE.json]

Both send to a server on this machine that only counts: it is not the limit. The raw upload sends parts of 16 MiB
over four connections, with http.client and no signature. Ours is the shipper process as the writer starts it, from the
request to the marker: it hashes what it reads, lists what is there, sends manifest and marker too. This process trains
a small model meanwhile. The two alternate; medians over the pairs.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import xxhash

from vembed_async_ckpt._disk import notes
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt._disk.manifests import read
from vembed_async_ckpt._format import names
from vembed_async_ckpt._format.manifest import FileRecord, Manifest
from vembed_async_ckpt._writer.shipping import Shippers
from vembed_async_ckpt.shipping import upload

PART = 16 << 20
CONNECTIONS = 4
SAVE_ID = "0" * 32
SHARES = {"model.safetensors": 1 / 3, "optimizer.bin": 2 / 3}


class Counting(BaseHTTPRequestHandler):
    """As much of S3 as an upload asks for. Bodies are read and dropped."""

    protocol_version = "HTTP/1.1"
    sizes: dict[str, int] = {}  # noqa: RUF012  (of the objects of all connections)
    parts: dict[str, int] = {}  # noqa: RUF012

    def log_message(self, *_: object) -> None: ...

    def _drop_body(self) -> int:
        left = total = int(self.headers.get("Content-Length", 0))
        buffer = memoryview(bytearray(1 << 20))
        while left:
            left -= self.rfile.readinto(buffer[: min(left, len(buffer))])  # type: ignore[attr-defined]
        return total

    def _send(self, code: int, body: str = "", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "ETag": '"e"', **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    def do_PUT(self) -> None:
        size, path = self._drop_body(), urlsplit(self.path)
        key = unquote(path.path)
        if "partNumber" in path.query:
            self.parts[key] = self.parts.get(key, 0) + size
        else:
            self.sizes[key] = size
        self._send(200)

    def do_POST(self) -> None:
        self._drop_body()
        path = urlsplit(self.path)
        key = unquote(path.path)
        if path.query.startswith("uploads"):
            self.parts[key] = 0
            self._send(200, "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>")
        else:
            self.sizes[key] = self.parts[key]
            self._send(200, "<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>")

    def do_GET(self) -> None:
        self._send(200, "<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>")


def raw_upload(port: int, directory: Path) -> float:
    """Seconds for all files of a checkpoint, as multipart uploads with several parts in flight."""
    files = read(str(directory)).files
    local = threading.local()

    def ask(method: str, path: str, body: Any = None) -> str:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", port)
        local.connection.request(method, path, body)
        return str(local.connection.getresponse().read().decode())

    def part(path: str, name: str, number: int) -> None:
        fd = os.open(directory / name, os.O_RDONLY)
        data = os.pread(fd, PART, number * PART)
        os.close(fd)
        ask("PUT", f"{path}?partNumber={number + 1}&uploadId=u", data)

    begun = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for name, record in files.items():
            path = f"/bucket/raw/{name}"
            assert re.search("<UploadId>u<", ask("POST", path + "?uploads"))
            list(pool.map(lambda number: part(path, name, number), range(-(-record.size // PART))))  # noqa: B023
            ask("POST", path + "?uploadId=u", b"<CompleteMultipartUpload/>")
    return time.perf_counter() - begun


def our_upload(root: Path, n: int, files: dict[str, FileRecord]) -> float:
    """Seconds that the shipper reports for a checkpoint."""
    reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    target = notes.Target(upload(f"s3://bucket/ours-{n}").spec())
    notes.put(LocalFilesystem(), str(root), notes.Note(SAVE_ID, "checkpoint-1", 1, 1, (target,)))
    shippers = Shippers(str(root), reports.put)
    shippers.wake()
    while (report := reports.get(timeout=600)).get("phase") != "complete":
        assert report.get("phase") != "failed", report
    shippers.close()
    assert report["bytes"] == sum(record.size for record in files.values())
    return float(report["seconds"])


def checkpoint(root: Path, mib: int) -> dict[str, FileRecord]:
    """A committed checkpoint of random bytes below `root`; its files, all of them in the page cache."""
    directory = root / "checkpoint-1"
    directory.mkdir(parents=True)
    files = {}
    for name, share in SHARES.items():
        data = os.urandom(int(mib * share) << 20)
        (directory / name).write_bytes(data)
        files[name] = FileRecord(len(data), xxhash.xxh3_128_hexdigest(data))
    (directory / names.MANIFEST).write_bytes(Manifest(SAVE_ID, 1, 1, files=files).to_bytes())
    return files


class Steps:
    """A training that goes on in this process; `during` gives the median seconds of its steps beside something."""

    def __init__(self) -> None:
        import torch  # not in the processes that only send or count

        torch.set_num_threads(1)
        model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
        optimizer = torch.optim.AdamW(model.parameters())
        data = torch.randn(64, 256)

        def step() -> None:
            optimizer.zero_grad()
            model(data).square().mean().backward()
            optimizer.step()

        self._step = step

    def during(self, action: Callable[[], float]) -> tuple[float, float]:
        """(what `action` returned, median seconds of a step meanwhile)."""
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(action)
            times = []
            while not running.done():
                begun = time.perf_counter()
                self._step()
                times.append(time.perf_counter() - begun)
            return running.result(), statistics.median(times)


def compare(port: int, root: Path, files: dict[str, FileRecord], pairs: int) -> dict[str, Any]:
    size = sum(record.size for record in files.values())
    steps = Steps()
    names_of = ("raw_mb_s", "ours_mb_s", "ratio", "step_ms_alone", "step_ms_beside_raw", "step_ms_beside_ours")
    found: dict[str, list[float]] = {name: [] for name in names_of}
    for n in range(pairs):
        _, alone = steps.during(lambda: time.sleep(1) or 0.0)
        raw, beside_raw = steps.during(lambda: float(run_role("raw", str(port), str(root / "checkpoint-1")).read()))
        ours, beside_ours = steps.during(lambda: our_upload(root, n, files))  # noqa: B023
        values = (size / raw / 1e6, size / ours / 1e6, raw / ours, alone * 1e3, beside_raw * 1e3, beside_ours * 1e3)
        for name, value in zip(names_of, values, strict=True):
            found[name].append(round(value, 3))
    return {"median": {name: statistics.median(values) for name, values in found.items()}, **found}


def run_role(role: str, *arguments: str) -> IO[str]:
    """What this script prints as another process."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--role", role, *arguments], stdout=subprocess.PIPE, text=True
    )
    _CHILDREN.append(process)
    assert process.stdout is not None
    return process.stdout


_CHILDREN: list[subprocess.Popen[str]] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--signed", action="store_true", help="sign every byte, as uploads without TLS do")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role is not None:
        if arguments.role[0] == "raw":
            print(raw_upload(int(arguments.role[1]), Path(arguments.role[2])))
        else:
            server = ThreadingHTTPServer(("127.0.0.1", 0), Counting)
            print(server.server_port, flush=True)
            server.serve_forever()
        return
    port = int(run_role("server").readline())
    os.environ.update(
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="not-a-secret",
        AWS_REGION="us-east-1",
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
        AWS_UNSIGNED_PAYLOAD="false" if arguments.signed else "true",
    )
    try:
        with tempfile.TemporaryDirectory() as directory:
            files = checkpoint(Path(directory), arguments.mib)
            result = compare(port, Path(directory), files, arguments.pairs)
    finally:
        for child in _CHILDREN:
            child.kill()
    result |= {
        "mib": arguments.mib,
        "signed": arguments.signed,
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
