"""What the Ray Serve application is asked to do, checked before anything starts."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from revmux_vllm import bundled, checkpoint
from revmux_vllm.errors import UserError, UserErrors
from revmux_vllm.protocol import MAX_TEXTS

OURS = {
    "model": "``model`` names it",
    "host": "Ray Serve listens; `host` of `revmux serve`, or http_options of the YAML file",
    "port": "Ray Serve listens; `port` of `revmux serve`, or http_options of the YAML file",
    "uds": "Ray Serve listens",
    "ssl-keyfile": "Ray Serve listens; end TLS before it",
    "ssl-certfile": "Ray Serve listens; end TLS before it",
    "api-server-count": "``fronts`` are the API servers here",
    "headless": "every replica is whole",
    "data-parallel-size": "``replicas`` are the copies here",
    "disable-log-stats": "router and autoscaler read these statistics",
    "root-path": "route_prefix of the Ray Serve application is it",
}
"""Options of ``vllm serve`` that mean something else, or nothing, in a replica.

Of two pairs of backticks the inner one names an option and goes when it is spelled.
"""


def _split(value: Any) -> Any:
    return shlex.split(value) if isinstance(value, str) else value


class ServeOptions(BaseModel):
    """Arguments of the application: ``serve run revmux_vllm.serving:app KEY=VALUE ...``.

    The same keys stand under ``args`` of a YAML file, and are options of ``revmux serve``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("revmux-llama", description="Checkpoint folder, bundled name or hub id.")
    replicas: int = Field(1, ge=1, description="Engines; with max_replicas the fewest.")
    max_replicas: int | None = Field(
        None, ge=1, description="Most engines: switches autoscaling on."
    )
    cpus_per_replica: float = Field(
        1.0, gt=0, description="CPUs reserved for an engine, and threads it computes with on CPUs."
    )
    gpus_per_replica: float | None = Field(
        None, ge=0, description="Default: as many as tensor parallelism takes if there are GPUs."
    )
    fronts: int = Field(2, ge=1, description="HTTP processes before the engines.")
    router: Literal["pack-aware", "power-of-two"] = Field(
        "pack-aware", description="Which engine gets a request."
    )
    fill_ms: float = Field(
        250.0, gt=0, description="Work, at the widest rung, that fills an engine before the next."
    )
    target_load: float = Field(
        0.7, gt=0, le=1, description="Of an engine at its widest rung: what autoscaling aims at."
    )
    upscale_delay_s: float = Field(10.0, ge=0, description="Load must last before engines come.")
    downscale_delay_s: float = Field(300.0, ge=0, description="And its lack before they go.")
    retries: int = Field(
        5, ge=0, description="Engines that may die of a request before it is given up."
    )
    max_texts: int = Field(
        MAX_TEXTS, ge=1, description="Texts of one request; with more it is refused (413)."
    )
    drain_s: float = Field(60.0, ge=0, description="A leaving engine's time for its last answers.")
    max_queued: int = Field(
        -1, ge=-1, description="Requests waiting in a front; more are refused (429). -1: no limit."
    )
    max_ongoing: int = Field(
        1024, ge=1, description="Requests under way at one engine; more wait in the front."
    )
    vllm_args: Annotated[list[str], BeforeValidator(_split)] = Field(
        [], description="Options of `vllm serve` for every engine, in quotes."
    )

    @model_validator(mode="after")
    def _check_together(self) -> "ServeOptions":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise UserError(
                f"`max_replicas` {self.max_replicas} is less than `replicas` {self.replicas}",
                cure="`replicas` are the fewest, `max_replicas` the most",
            )
        for word in self.vllm_args:
            name = word.removeprefix("--").partition("=")[0].replace("_", "-")
            if word.startswith("--") and name in OURS:
                raise UserError(f"`vllm_args` --{name}", f"leave it out: {OURS[name]}")
        return self


def read_options(values: dict[str, Any]) -> ServeOptions:
    """The options that ``values`` say.

    Raises:
        UserError: one line for each that is wrong.
    """
    try:
        return ServeOptions.model_validate(values)
    except ValidationError as error:
        raise UserErrors([_mistake(problem) for problem in error.errors()]) from None


def _mistake(problem: Mapping[str, Any]) -> UserError:
    """One of pydantic's findings."""
    own = problem.get("ctx", {}).get("error")
    if isinstance(own, UserError):
        return own
    key, *inside = map(str, problem["loc"])
    if problem["type"] == "extra_forbidden":
        return UserError(key, f"unknown; known are {', '.join(sorted(ServeOptions.model_fields))}")
    message = problem["msg"].removeprefix("Value error, ")
    return UserError(".".join((f"`{key}`", *inside)), f"{message}, found {problem['input']!r}")


def locate(model: str, vllm_args: Sequence[str] = ()) -> tuple[str, str]:
    """What engines are to load, and the name that clients call it by.

    A folder becomes absolute, because engines run elsewhere; other names stay. With
    ``--load-format dummy`` among ``vllm_args`` it needs no weights.

    Raises:
        UserError: if there is no such model, or it is no RevMUX checkpoint.
    """
    if Path(model).is_dir():
        is_dummy = "dummy" in " ".join(vllm_args).replace("=", " ").split()
        (checkpoint.read_config if is_dummy else checkpoint.validate)(model)
        return str(Path(model).resolve()), model
    if model in bundled.bundled_checkpoints():
        return model, model
    if not _on_hub(model):
        names = ", ".join(bundled.bundled_checkpoints()) or "none"
        raise UserError(
            f"model {model}",
            f"no folder here, not bundled (bundled: {names}), and not to be had from the hub",
            cure="engines on other nodes need a folder at the same absolute path",
        )
    return model, model


def _on_hub(name: str) -> bool:
    from transformers import PretrainedConfig

    try:
        values, _ = PretrainedConfig.get_config_dict(name)
    except (OSError, ValueError):
        return False
    if "revmux" not in values:
        cure = f"`revmux train` with `backbone` {name} makes one"
        raise UserError(f"model {name}", "not a RevMUX checkpoint", cure=cure)
    return True
