"""What happens beside the steps of transformers' Trainer: progress, a log, a repeatable order."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback


class Progress(ProgressCallback):
    """One bar, and a line above it whenever the held-out rows were asked."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """On standard error, as the bar."""
        if self.training_bar is not None and "eval_loss" in (logs or {}):
            line = f"step {state.global_step}: held-out loss {float(logs['eval_loss']):.4f}"
            self.training_bar.write(line, file=sys.stderr)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No second bar."""


class JsonLines(TrainerCallback):
    """One JSON object per report of the trainer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append it; the main process alone."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step} | logs) + "\n")


class SameOrder(TrainerCallback):
    """The order of an epoch's rows comes from seed and epoch, so a resumed one is the same."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The sampler draws from torch's own generator."""
        torch.manual_seed(args.seed + int(state.epoch or 0))
