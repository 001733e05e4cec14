"""The folder of a training that has not ended: its options, its log, the trainer's checkpoints."""

import json
import shutil
from pathlib import Path

from revmux_vllm.checkpoint import WORK_FOLDER, write_whole
from revmux_vllm.errors import UserError, within
from revmux_vllm.training.options import TrainOptions

LOG_FILE = "training-log.jsonl"
OPTIONS_FILE = "training-options.json"


def folder_in(output: Path) -> Path:
    """Where a training works that will write ``output``."""
    return output / WORK_FOLDER


def unfinished(work: Path) -> Path | None:
    """The last complete trainer checkpoint under ``work``: its state is what is written last."""
    found = [path.parent for path in work.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def begin(work: Path, options: TrainOptions, resume: bool) -> None:
    """Check that a training can start, or go on, in ``work``, and note its ``options`` there.

    Raises:
        UserError: an unfinished training stands in the way, or there is none to resume, or it was
            begun with other options.
    """
    path = work / OPTIONS_FILE
    if resume:
        if not path.is_file():
            cure = "leave `resume` out"
            raise UserError("`resume`", f"no unfinished training in {work}", cure=cure)
        if changes := options.changes_since(_read(path)):
            raise UserError("`resume`", f"begun with other options: {'; '.join(changes)}")
        return
    if unfinished(work):
        cure = "continue it with `resume`, or remove that folder"
        raise UserError(f"{work}", "an unfinished training", cure=cure)
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        note(work, options)
    except OSError as error:
        raise UserError(f"`output` {work.parent}", f"cannot be written: {error}") from error


def resumed(work: Path, options: TrainOptions) -> TrainOptions:
    """``options``, with cut and rungs of what began in ``work`` where they are open."""
    path = work / OPTIONS_FILE
    if options.is_settled or not path.is_file():
        return options
    before = _read(path)
    if before.prefill_layers is None or before.rungs is None:
        return options
    return options.settled(before.prefill_layers, before.rungs)


def forget_lines(work: Path, step: int) -> None:
    """Drop what the log says of later than ``step``: it is run again. Nothing may be there yet."""
    log = work / LOG_FILE
    if not log.is_file():
        return
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    log.write_text("".join(kept), encoding="utf-8")


def end(work: Path, options: TrainOptions) -> None:
    """Leave the log and the options beside the checkpoint, and nothing else of ``work``."""
    note(work.parent, options)
    shutil.move(work / LOG_FILE, work.parent / LOG_FILE)
    shutil.rmtree(work)


def note(folder: Path, options: TrainOptions) -> None:
    """Write the options into a folder."""
    text = json.dumps(options.to_dict(), indent=1) + "\n"
    write_whole(folder / OPTIONS_FILE, text.encode())


def _read(path: Path) -> TrainOptions:
    with within(f"{path}"):
        return TrainOptions.from_dict(json.loads(path.read_text(encoding="utf-8")))
