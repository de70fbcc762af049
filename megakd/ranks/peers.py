"""The processes of the other ranks on this machine: which are there, which have ended, which are stopped."""

import os
import pathlib
import socket


def identity() -> dict:
    """Who this process is, for ranks that can see it (one kernel, one process namespace) and for messages."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "kernel": kernel()}


def kernel() -> str:
    """What two processes share exactly when a process number means the same to both; a name of its own elsewhere."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"


class Peers:
    """Watches ranks of this machine by process descriptors, which never mistake a new process for an old one.

    Args:
        identities: rank -> identity(), of all ranks; those that this process cannot see are left out.

    Attributes:
        ranks: descriptor -> rank; a descriptor can be read when its process has ended.
        gone: ranks that had ended before they could be watched.
    """

    def __init__(self, rank: int, identities: dict[int, dict]):
        self.identities, self.ranks, self.gone = identities, {}, []
        here = identities[rank]["kernel"]
        for other, who in identities.items():
            if other != rank and who["kernel"] == here and hasattr(os, "pidfd_open"):
                try:
                    self.ranks[os.pidfd_open(who["pid"])] = other
                except ProcessLookupError:
                    self.gone.append(other)

    def close(self) -> None:
        for descriptor in self.ranks:
            os.close(descriptor)
        self.ranks.clear()

    def describe(self, rank: int) -> str:
        """`rank 3 (process 4242 on n1)`, and whether it is stopped where that can be seen."""
        who = self.identities.get(rank)
        if who is None:
            return f"rank {rank}"
        seen = rank in self.ranks.values() and is_stopped(who["pid"])
        return f"rank {rank} (process {who['pid']} on {who['host']}{', stopped by SIGSTOP' if seen else ''})"


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine has got SIGSTOP and no SIGCONT since."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in "Tt"
