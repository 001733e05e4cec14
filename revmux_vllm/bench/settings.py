"""What ``revmux bench`` is asked to do, checked before any engine or server starts."""

import argparse
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revmux_vllm.bench.lengths import Lengths
from revmux_vllm.errors import UserError
from revmux_vllm.rungs import Rung

BURSTINESS = {"poisson": 1.0, "bursty": 0.2}
NOTHING_KEPT = "--no-enable-prefix-caching"
"""Of both servers where texts are repeated: they would be answered from the cache."""
OURS = ("model", "host", "port", "served-model-name", "additional-config", "load-format")


@dataclass(frozen=True)
class OfflineSettings:
    """The options of ``revmux bench offline``, read.

    Attributes:
        models: checkpoint folders or bundled names. The command line gives one; several are cuts
            of one backbone, measured in the same rounds.
        lengths: of the texts.
        rungs: those to measure; None is all of each model.
        requests: prompts of a round.
        rounds: after one to warm up.
        texts: their file, for ``texts``.
        dtype: of all engines; ``auto`` is float32 on CPUs without bfloat16.
        load_format: ``dummy`` draws the weights at random; None is vLLM's own choice.
        enforce_eager: compile nothing.
        seed: of the texts.
        agreement: measure the first model's accuracy contract of so much, too.
        shared_prefix: tokens that all prompts begin with, before the texts.
    """

    models: tuple[str, ...]
    lengths: Lengths
    rungs: tuple[Rung, ...] | None = None
    requests: int = 128
    rounds: int = 5
    texts: Path | None = None
    dtype: str = "auto"
    load_format: str | None = None
    enforce_eager: bool = False
    seed: int = 0
    agreement: float | None = None
    shared_prefix: int = 0


@dataclass(frozen=True)
class OnlineSettings:
    """The options of ``revmux bench online``, read.

    Attributes:
        model: checkpoint folder or bundled name.
        loads: offered loads, as multiples of plain vLLM's capacity.
        seconds: that each load is offered for, to each server.
        arrivals: a key of ``BURSTINESS``.
        lengths: of the texts.
        texts: their file, for ``texts``.
        slo_ms: latency that 99 of 100 requests must keep for a load to count as sustained.
        server_args: options of ``vllm serve`` for both servers.
        additional_config: for the RevMUX server alone.
        load_format: ``dummy`` draws the weights at random; None is vLLM's own choice.
        seed: of arrivals and texts.
        shared_prefix: tokens that all texts begin with; both servers keep them in their cache.

    Raises:
        UserError: naming the first option whose value cannot work.
    """

    model: str
    loads: tuple[float, ...]
    seconds: float
    arrivals: str
    lengths: Lengths
    texts: Path | None
    slo_ms: float
    server_args: tuple[str, ...] = ()
    additional_config: dict[str, Any] | None = None
    load_format: str | None = None
    seed: int = 0
    shared_prefix: int = 0

    def __post_init__(self) -> None:
        if not self.loads or min(self.loads) <= 0:
            found = ",".join(f"{load:g}" for load in self.loads)
            raise UserError("`loads`", expected="multiples above 0, as in 0.5,1,2", found=found)
        if self.arrivals not in BURSTINESS:
            raise UserError("`arrivals`", expected=" or ".join(BURSTINESS), found=self.arrivals)
        for option, value in (("`seconds`", self.seconds), ("`slo_ms`", self.slo_ms)):
            if value <= 0:
                raise UserError(option, expected="a number above 0", found=value)
        for name in OURS:
            if option_of_vllm(self.server_args, name) is not None:
                problem, cure = "set by the benchmark itself", "leave it out there"
                raise UserError(f"`server_args` --{name}", problem, cure=cure)

    @property
    def vllm_args(self) -> list[str]:
        """Options of both servers."""
        chosen = [] if self.load_format is None else [f"--load-format={self.load_format}"]
        return [*([] if self.shared_prefix else [NOTHING_KEPT]), *self.server_args, *chosen]


def read_loads(text: str) -> tuple[float, ...]:
    """``0.5,1,2``, ascending. Raises UserError for what is no number."""
    try:
        return tuple(sorted({float(load) for load in text.split(",")}))
    except ValueError:
        raise UserError("`loads`", expected="numbers, as in 0.5,1,2", found=text) from None


def read_server_args(text: str) -> tuple[str, ...]:
    """The words of an option that holds options, split as a shell does."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"`server_args` {text}", str(error)) from None


def read_additional_config(text: str | None) -> dict[str, Any] | None:
    """Raises UserError unless ``text`` is a JSON object."""
    if text is None:
        return None
    what, example = f"`additional_config` {text}", """as in '{"revmux": {"policy": "off"}}'"""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(what, f"not JSON: {error}", cure=example) from None
    if not isinstance(value, dict):
        raise UserError(what, expected=f"a JSON object, {example}")
    return value


def option_of_vllm(arguments: tuple[str, ...], name: str) -> str | None:
    """The value of an option of ``vllm serve``, in either spelling; None where it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", nargs="?", const="", dest="it")
    value: str | None = parser.parse_known_args(arguments)[0].it
    return value
