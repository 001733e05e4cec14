"""Plain vLLM in a process of its own: what RevMUX is compared with.

That process gets the environment as it was before RevMUX set anything in it, because an engine of
ours leaves traces in a process: variables, and what vLLM keeps of them. Its scheduler runs in that
process, as ours does in this one, so that neither pays for a hop that the other does not take.
"""

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from revmux_vllm.engine.environment import untouched


class PlainEngineError(RuntimeError):
    """Plain vLLM did not start, or ended while it was asked; the text holds its last words."""


class PlainEngine:
    """``vllm.LLM`` in a child process, which ends with ``close`` or with this process.

    Args:
        model: folder of the backbone alone.
        options: of ``vllm.LLM``; must be picklable.

    Raises:
        PlainEngineError: if it does not start.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, str(model), options))
        with untouched():
            self._process.start()
        there.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def seconds(self, prompts: Sequence[Sequence[int]], salt: str | None = None) -> float:
        """How long it takes to classify ``prompts``, token ids, measured in its process.

        ``salt``: their ``cache_salt``; what prompts of another one left in the cache is not found.
        """
        return float(self._ask(prompts, salt)[0])

    def probabilities(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Of every class, by prompt."""
        probabilities: list[list[float]] = self._ask(prompts)[1]
        return probabilities

    def close(self) -> None:
        """End the process and its engine. Idempotent."""
        self._here.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, prompts: Sequence[Sequence[int]], salt: str | None = None) -> Any:
        try:
            self._here.send(([list(prompt) for prompt in prompts], salt))
        except OSError:
            raise self._ended() from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._here.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, str):
            raise PlainEngineError(f"plain vLLM: {answer}")
        return answer

    def _ended(self) -> PlainEngineError:
        self._process.join()
        status = self._process.exitcode
        return PlainEngineError(f"plain vLLM ended with status {status}; its messages are above")


def _serve(there: Connection, model: str, options: dict[str, Any]) -> None:
    """The child: an engine, then an answer for every message until the other end is closed."""
    from revmux_vllm.engine.in_process import InProcessEngine

    try:
        engine = InProcessEngine(model, **options)
    except Exception as error:
        there.send(repr(error))
        raise
    try:
        there.send(None)
        while True:
            prompts, salt = there.recv()
            start = time.perf_counter()
            outputs = engine.classify(prompts, salts=salt and [salt] * len(prompts))
            seconds = time.perf_counter() - start
            there.send((seconds, [output.outputs.probs for output in outputs]))
    except (EOFError, BrokenPipeError):
        pass  # nobody asks any more
    finally:
        engine.close()
