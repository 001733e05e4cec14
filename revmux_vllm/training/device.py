"""Where to compute, and as which of several processes."""

import torch
from accelerate import PartialState


def on_cpu() -> bool:
    """Whether there is nothing better."""
    return not torch.accelerator.is_available()


def process_state() -> PartialState:
    """This process among those of ``accelerate launch``; accelerate must be told of CPUs."""
    return PartialState(cpu=on_cpu())
