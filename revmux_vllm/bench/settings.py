"""What ``revmux bench online`` is asked to do, checked before any server starts."""

import argparse
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revmux_vllm import bundled, checkpoint
from revmux_vllm.backbones import most_positions
from revmux_vllm.bench.lengths import Lengths, choose_texts, make_texts
from revmux_vllm.config import RevMuxConfig
from revmux_vllm.engine.policy import read_options

BURSTINESS = {"poisson": 1.0, "bursty": 0.2}
OURS = ("model", "host", "port", "served-model-name", "additional-config", "load-format")


@dataclass(frozen=True)
class Settings:
    """The options of the command line, read.

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

    def __post_init__(self) -> None:
        if not self.loads or min(self.loads) <= 0:
            found = ",".join(f"{load:g}" for load in self.loads)
            raise ValueError(f"--loads {found}: expected multiples above 0, as in 0.5,1,2")
        if self.arrivals not in BURSTINESS:
            raise ValueError(f"--arrivals {self.arrivals}: expected {' or '.join(BURSTINESS)}")
        for option, value in (("--seconds", self.seconds), ("--slo-ms", self.slo_ms)):
            if value <= 0:
                raise ValueError(f"{option} {value:g}: expected a number above 0")
        taken = [name for name in OURS if _given(self.server_args, name) is not None]
        if taken:
            raise ValueError(
                f"--server-args --{taken[0]}: set by the benchmark itself; leave it out there"
            )

    @property
    def vllm_args(self) -> list[str]:
        """Options of both servers."""
        chosen = [] if self.load_format is None else [f"--load-format={self.load_format}"]
        return [*self.server_args, *chosen]


@dataclass(frozen=True)
class Workload:
    """The model and the texts that it is loaded with."""

    folder: Path
    prefill_layers: int
    num_layers: int
    lengths: Lengths
    texts: list[str]


def prepare(settings: Settings) -> Workload:
    """Read the checkpoint and make the texts.

    Raises:
        ValueError: for a model that cannot be measured, options that its scheduler does not know,
            or texts that cannot be made.
    """
    from transformers import AutoTokenizer

    folder, config, values = read_model(settings.model, settings.load_format)
    read_options(settings.additional_config, config)
    lengths, texts = choose_texts(settings.lengths, settings.texts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    most = most_tokens(folder, tokenizer, settings.server_args)
    return Workload(
        folder,
        config.prefill_layers,
        checkpoint.backbone_shape(values)[1],
        lengths,
        make_texts(tokenizer, lengths, most, settings.seed, texts),
    )


def read_model(
    model: str, load_format: str | None = None
) -> tuple[Path, RevMuxConfig, dict[str, Any]]:
    """Folder, ``revmux`` object and ``config.json`` of a checkpoint whose backbone vLLM serves.

    Raises:
        ValueError: if it is none.
    """
    folder = bundled.resolve(model)
    if load_format != "dummy":  # such a folder has no weights to check
        checkpoint.validate(folder)
    config, values = checkpoint.read_config(folder)
    if config.label_words:
        raise ValueError(
            f"{model}: it answers with label words; vLLM alone cannot serve that backbone, so "
            "there is nothing to compare with"
        )
    return folder, config, values


def most_tokens(folder: Path, tokenizer: Any, server_args: tuple[str, ...] = ()) -> int:
    """The longest text that the model takes, special tokens counted."""
    from transformers import AutoConfig

    limits = [tokenizer.model_max_length, most_positions(AutoConfig.from_pretrained(folder))]
    if (given := _given(server_args, "max-model-len")) is not None:
        if not given.isdecimal():
            raise ValueError(f"--server-args --max-model-len {given}: expected a number here")
        limits.append(int(given))
    return int(min(limit for limit in limits if limit))


def read_loads(text: str) -> tuple[float, ...]:
    """``0.5,1,2``, ascending. Raises ValueError for what is no number."""
    try:
        return tuple(sorted({float(load) for load in text.split(",")}))
    except ValueError:
        raise ValueError(f"--loads {text}: expected numbers, as in 0.5,1,2") from None


def read_server_args(text: str) -> tuple[str, ...]:
    """The words of ``--server-args``, split as a shell does."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"--server-args {text}: {error}") from None


def read_additional_config(text: str | None) -> dict[str, Any] | None:
    """Raises ValueError unless ``text`` is a JSON object."""
    if text is None:
        return None
    example = """as in '{"revmux": {"policy": "off"}}'"""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--additional-config {text}: not JSON: {error}; {example}") from None
    if not isinstance(value, dict):
        raise ValueError(f"--additional-config {text}: expected a JSON object, {example}")
    return value


def _given(arguments: tuple[str, ...], name: str) -> str | None:
    """The value of an option of ``vllm serve``, in either spelling."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", nargs="?", const="", dest="it")
    value: str | None = parser.parse_known_args(arguments)[0].it
    return value
