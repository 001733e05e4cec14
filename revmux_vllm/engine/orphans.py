"""An engine whose server was killed must not live on, with its memory and its cores.

vLLM's workers end with their engine (a pipe tells them), but 0.32's engine process does not end
with the process that started it when that is killed by SIGKILL.
"""

import multiprocessing
import os
import threading
from multiprocessing.connection import wait

ENGINE_PROCESS = "EngineCore"


def end_with_parent() -> None:
    """In vLLM's engine process: exit as soon as its parent is gone. Nothing anywhere else."""
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith(ENGINE_PROCESS):
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="revmux-parent", daemon=True).start()
