"""Names in a checkpoint folder, and its JSON."""

import json
from pathlib import Path
from typing import Any

from revmux_vllm.errors import UserError

ADAPTER_FILE = "adapter.safetensors"
KEY_PREFIX = "revmux."
REPORT_FILE = "report.json"
CONTRACT_FILE = "contracts.json"
WORK_FOLDER = "trainer"  # of a training that has not ended, in the folder that it will write


def read_json(path: Path) -> dict[str, Any]:
    """An object of a file; UserError where it is not JSON."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}", f"not JSON: {error}") from error
    return values
