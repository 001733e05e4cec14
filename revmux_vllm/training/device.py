"""Where to compute, as which of several processes, and in how much memory."""

import logging
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from transformers import AutoConfig

CGROUP = Path("/sys/fs/cgroup")
"""Of this container, version 2."""
SHARE_FOR_WEIGHTS = 0.7
"""Of what is free; the rest is for states."""

logger = logging.getLogger(__name__)


def on_cpu() -> bool:
    """Whether there is nothing better."""
    return not torch.accelerator.is_available()


def process_state() -> PartialState:
    """This process among those of ``accelerate launch``; accelerate must be told of CPUs."""
    return PartialState(cpu=on_cpu())


def backbone_dtype(backbone: str | Path, device: torch.device) -> torch.dtype:
    """What a frozen backbone is computed in: float32, unless it fits only as it is stored.

    Args:
        backbone: its folder.
        device: to compute on.
    """
    stored = getattr(AutoConfig.from_pretrained(backbone), "dtype", None) or torch.float32
    kinds = ("model*.safetensors", "pytorch_model*.bin")  # transformers reads the first there is
    files = next(filter(None, (list(Path(backbone).glob(kind)) for kind in kinds)), [])
    needed = sum(path.stat().st_size for path in files) * 4 // stored.itemsize
    on_cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_cuda else free_memory()
    if stored.itemsize == 4 or needed < SHARE_FOR_WEIGHTS * free:
        return torch.float32
    logger.warning(
        "the backbone is computed in %s, as it is stored: in float32 it takes %.1f GB, and %.1f GB "
        "are free",
        *(str(stored).removeprefix("torch."), needed / 1e9, free / 1e9),
    )
    return stored


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
