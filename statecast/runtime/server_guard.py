"""Ends a server whose starter is gone; run as a script of its own beside the server.

    python -I -S server_guard.py PID FOLDER

Standard input is a pipe that only the starter holds open. When it closes without a word, however the starter died, the
server's processes are killed and its folder is removed; after one byte the guard leaves them alone. A parent-death
signal would not do: the kernel sends it when the *thread* that started the server ends, such as a worker of
`asyncio.to_thread`, and forgets it where a server changes its user.
"""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """One line of the process table. `started` differs for two processes that had the same pid one after the other."""

    pid: int
    parent: int
    ended: bool
    started: str


def find_process(pid: int) -> Process | None:
    """Return the process if it runs; one that has ended and waits to be reaped does not."""
    process = _read_process(pid) if Path("/proc/self/stat").exists() else _list_by_ps().get(pid)
    return None if process is None or process.ended else process


def family(pid: int) -> list[int]:
    """List `pid` and all its descendants. Postgres puts each backend into a session of its own: no group holds them."""
    children: dict[int, list[int]] = {}
    for process in _list_processes():
        children.setdefault(process.parent, []).append(process.pid)
    members = [pid]
    for member in members:
        members += children.get(member, [])
    return members


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _list_processes() -> list[Process]:
    if not Path("/proc/self/stat").exists():
        return list(_list_by_ps().values())
    found = (_read_process(int(entry)) for entry in os.listdir("/proc") if entry.isdecimal())
    return [process for process in found if process is not None]


def _read_process(pid: int) -> Process | None:
    try:
        # The name in brackets may hold blanks and brackets itself: proc_pid_stat(5).
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return Process(pid, parent=int(fields[1]), ended=fields[0] in "ZX", started=f"{_boot_id()}:{fields[19]}")


def _boot_id() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _list_by_ps() -> dict[int, Process]:
    command = ["ps", "-A", "-o", "pid=,ppid=,stat=,lstart="]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 3) for line in listing.splitlines())
    return {int(row[0]): Process(int(row[0]), int(row[1]), row[2].startswith("Z"), row[3]) for row in rows}


def _watch(pid: int, folder: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read(1):
        return
    signal_all(family(pid), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2])
