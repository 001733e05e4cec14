"""What happens beside the steps of transformers' Trainer: progress, a log, a repeatable order."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from revmux_vllm.terminal import Watch, make_console


class Progress(TrainerCallback):
    """How far the training is, and a line whenever the held-out rows were asked."""

    def __init__(self) -> None:
        self._watch: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The main process alone; a resumed training goes on where it was."""
        if state.is_world_process_zero:
            console, done = make_console(stderr=True), state.global_step
            self._watch = Watch(console, "training, steps", state.max_steps, done).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step more."""
        if self._watch is not None:
            self._watch.advance(state.global_step - self._watch.done)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """What the held-out rows say."""
        if self._watch is not None and "eval_loss" in (logs or {}):
            loss = float(logs["eval_loss"])
            self._watch.say(f"step {state.global_step}: held-out loss {loss:.4f}")

    def close(self) -> None:
        """The training is over, or was stopped."""
        if self._watch is not None:
            self._watch.__exit__()


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
