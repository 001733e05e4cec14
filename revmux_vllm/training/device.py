"""Where to compute, as which of several processes, and in how much memory."""

from pathlib import Path

import psutil
import torch
from accelerate import PartialState

CGROUP = Path("/sys/fs/cgroup")
"""Of this container, version 2."""


def on_cpu() -> bool:
    """Whether there is nothing better."""
    return not torch.accelerator.is_available()


def process_state() -> PartialState:
    """This process among those of ``accelerate launch``; accelerate must be told of CPUs."""
    return PartialState(cpu=on_cpu())


def free_memory() -> int:
    """Bytes that a process may still take: of the machine, or of its container where that has less.

    Files that a container keeps in memory can be dropped.
    """
    free = int(psutil.virtual_memory().available)
    try:
        most = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no container, or an older kind
        return free
    if most == "max":
        return free
    kept = {name: int(count) for name, count in (line.split() for line in lines)}
    return max(0, min(free, int(most) - used + kept.get("inactive_file", 0)))
