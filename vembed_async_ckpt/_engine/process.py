"""Starts the writer process and notices its end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

from .._shared.packages import folders

# Modules in the user's folder (a json.py, say) must not reach the writer. So its path has the standard library first,
# then the named folders, and nothing else.
_BOOTSTRAP = (
    "import sys; sys.path += sys.argv[5:]; from vembed_async_ckpt._writer.__main__ import main; main(sys.argv[1:5])"
)
_PACKAGES = ("vembed_async_ckpt", "xxhash", "isal", "obstore", "huggingface_hub")  # the last two are for the shipper
REMEDY = "use writer='thread', which needs no process of its own"


def start(root: str, sock: int, lock: int, log: int) -> subprocess.Popen[bytes]:
    """Start a writer process for `root`. It inherits the descriptors of its socket and of the lock. Raises OSError."""
    try:
        return _popen(root, sock, lock, log)
    except OSError as error:
        what = sys.executable or "python, whose path is unknown,"
        raise OSError(error.errno, f"{what} cannot be started ({error.strerror}); {REMEDY}") from error


def _popen(root: str, sock: int, lock: int, log: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(sys.executable, "-I", "-S", "-c", _BOOTSTRAP),
            *(root, str(os.getpid()), str(sock), str(lock)),
            *folders(*_PACKAGES),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        cwd="/",
        pass_fds=(sock, lock),
        start_new_session=True,
    )


def end_of(process: subprocess.Popen[bytes]) -> int:
    """Return a descriptor that becomes readable when the process has ended.

    It is a pidfd, or a pipe where the kernel has no pidfd.
    """
    try:
        return os.pidfd_open(process.pid)
    except (OSError, AttributeError):
        pass  # kernels before 5.3, gVisor, older seccomp profiles
    fd, other = os.pipe2(os.O_CLOEXEC)

    def wait() -> None:
        process.wait()
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            os.write(other, b"\0")  # closing alone is not enough: a forked child may hold that end
        os.close(other)

    threading.Thread(target=wait, name="vembed-ckpt-writer-end", daemon=True).start()
    return fd


@contextlib.contextmanager
def calling(call: str) -> Iterator[None]:
    """Add to an OSError which call failed: a kernel or a sandbox may refuse the call."""
    try:
        yield
    except OSError as error:
        why = f"{call} is refused by this kernel or sandbox ({error.strerror}); allow the call, every writer needs it"
        raise OSError(error.errno, why) from error
