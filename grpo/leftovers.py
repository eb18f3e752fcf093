"""What a run that was killed leaves behind, and how the next start finds it: processes, and segments of shared memory.

Every process of a run has its driver's identity in the environment, and every segment in its name, or in the name of a list
that it is on. What belongs to a driver that is gone is removed; what belongs to one that lives, or that this process
cannot judge (another machine's, or another container's), stays. Where there is no /proc, nothing is looked for.
"""

import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm") if os.path.isdir("/dev/shm") else Path(tempfile.gettempdir())
MARK = "GRPO_DRIVER"  # the environment variable
PROC = Path("/proc")
LIST = "segments"  # what a list of foreign segments is called


@contextmanager
def marked() -> Iterator[None]:
    """Mark what is started meanwhile as this process's, and remove its segments in the end."""
    own = identity(os.getpid())
    if own is None:
        yield
        return
    before, os.environ[MARK] = os.environ.get(MARK), own
    try:
        yield
    finally:
        del os.environ[MARK]
        if before is not None:
            os.environ[MARK] = before
        _remove_segments(lambda mark: mark == own)


def clean() -> None:
    """End the processes and remove the segments of drivers that are gone, and say so."""
    if identity(os.getpid()) is None:
        return
    ended = 0
    for pid, mark in _marked_processes():
        if is_gone(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                ended += 1
    removed = _remove_segments(is_gone)
    if ended or removed:
        print(
            f"A run that was killed had left processes ({ended}) and segments of shared memory ({removed}): all removed",
            file=sys.stderr,
        )


def identity(pid: int) -> str | None:
    """Which process `pid` is, at any time and among all that ever had this number: BOOT.NAMESPACE.PID.START."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{_here()}.{pid}.{fields[19]}"


def _here() -> str:
    """This machine since it was started, and this process's name space of process ids."""
    boot = (PROC / "sys/kernel/random/boot_id").read_text()[:8]
    return f"{boot}.{os.stat(PROC / 'self/ns/pid').st_ino}"


def is_gone(mark: str) -> bool:
    """Whether the driver of this mark has ended, as far as this process can tell."""
    here, _, rest = mark.rpartition(".")[0].rpartition(".")
    return here == _here() and identity(int(rest)) != mark


def _marked_processes() -> Iterator[tuple[int, str]]:
    """This user's processes that have a mark, but those that clean up themselves (multiprocessing's resource tracker)."""
    for path in PROC.glob("[0-9]*"):
        with suppress(OSError):
            if path.stat().st_uid != os.geteuid() or b"resource_tracker" in (path / "cmdline").read_bytes():
                continue
            found = re.search(rf"(?:^|\0){MARK}=([\w.]+)".encode(), (path / "environ").read_bytes())
            if found:
                yield int(path.name), found.group(1).decode()


def segment_prefix(what: str) -> str:
    """How a segment's name begins that holds `what`."""
    return f"grpo-{os.environ.get(MARK) or identity(os.getpid())}-{what}-"


def claim_segments(pids: list[int]) -> None:
    """List the named segments that the processes have mapped, which a library made under names of its own."""
    names = set()
    for pid in pids:
        with suppress(OSError):
            names |= set(re.findall(rf" {SHARED_MEMORY}/(\S+)$", (PROC / str(pid) / "maps").read_text(), re.MULTILINE))
    names = {name for name in names if not name.startswith("grpo-")}
    if names:
        descriptor, _ = tempfile.mkstemp(prefix=segment_prefix(LIST), dir=SHARED_MEMORY)
        with os.fdopen(descriptor, "w") as file:
            file.write("\n".join(sorted(names)))


def _remove_segments(belongs: Callable[[str], bool]) -> int:
    """Remove this user's segments whose mark `belongs`; returns how many there were.

    Anybody may write a list: what another user's names is not removed in this one's name.
    """
    removed = 0
    for path in SHARED_MEMORY.glob("grpo-*"):
        found = re.match(r"grpo-([0-9a-f]+\.\d+\.\d+\.\d+)-(\w+)-", path.name)
        if found is None or not belongs(found.group(1)):
            continue
        with suppress(FileNotFoundError):  # another start removes it
            if path.lstat().st_uid != os.geteuid():
                continue
            if found.group(2) == LIST:
                names = path.read_text().split()
                removed += sum(_unlinked(SHARED_MEMORY / name) for name in names if "/" not in name)
                path.unlink()
            else:
                removed += _unlinked(path)
    return removed


def _unlinked(path: Path) -> bool:
    with suppress(FileNotFoundError, PermissionError):
        path.unlink()
        return True
    return False
