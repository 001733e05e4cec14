"""``revmux-llama`` from any directory, online and offline, unless a folder has that name."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from revmux_vllm import bundled
from revmux_vllm.engine import plugin

SHOW = """
import json
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(model="revmux-llama").create_engine_config().model_config
print("RESULT", json.dumps([str(config.model), str(config.tokenizer), config.served_model_name]))
print("DTYPE", config.dtype)
"""


def resolved(cwd: Path, **environment: str) -> list[str]:
    """Model folder, tokenizer folder and served name that vLLM arrives at, in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_bundled_folder_is_found_from_anywhere(tmp_path: Path, offline: str) -> None:
    folder = str(bundled.resolve("revmux-llama"))
    assert resolved(tmp_path, HF_HUB_OFFLINE=offline) == [folder, folder, "revmux-llama"]


def test_a_folder_of_that_name_wins(tmp_path: Path, tiny_checkpoint: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "revmux-llama")
    model, *_ = resolved(tmp_path, HF_HUB_OFFLINE="1")
    assert model == "revmux-llama"


def test_both_patches_are_still_needed() -> None:
    """When this fails, vLLM redirects names in time: use VLLM_MODEL_REDIRECT_PATH instead."""
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    source = inspect.getsource(inspect.unwrap(EngineArgs.create_engine_config))
    assert "maybe_model_redirect" not in source
    assert source.index("maybe_override_with_speculators(") < source.index("create_model_config(")
    assert "maybe_model_redirect" not in inspect.getsource(EngineArgs.__post_init__)
