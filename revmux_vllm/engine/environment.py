"""What RevMUX sets in the environment of a process, and how it was before.

vLLM reads some of its settings from there alone. Whatever is compared with RevMUX must not find
them, so they are set here and nowhere else, and ``untouched`` gives the environment without them.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from revmux_vllm.errors import UserError

_before: dict[str, str | None] = {}


def set_for_good(name: str, value: str) -> None:
    """Set a variable for the rest of the process, and for the processes that it starts."""
    _before.setdefault(name, os.environ.get(name))
    os.environ[name] = value


@contextmanager
def set_inside(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables inside the block, and put them back as they were."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            _put(os.environ, name, before.get(name))


@contextmanager
def untouched() -> Iterator[None]:
    """Inside the block the environment is as it was before ``set_for_good``."""
    now = {name: os.environ.get(name) for name in _before}
    for name, value in _before.items():
        _put(os.environ, name, value)
    try:
        yield
    finally:
        for name, value in now.items():
            _put(os.environ, name, value)


def check_plugins() -> None:
    """Raise UserError where vLLM would not load ours, and then not know our architectures."""
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and "revmux" not in chosen.split(","):
        raise UserError(
            "VLLM_PLUGINS",
            "it names the plugins that vLLM may load, and revmux is not among them",
            found=chosen,
            cure=f"VLLM_PLUGINS={','.join(filter(None, [chosen, 'revmux']))}, or unset it",
        )


def _put(environ: "os._Environ[str]", name: str, value: str | None) -> None:
    if value is None:
        environ.pop(name, None)
    else:
        environ[name] = value
