"""Checkpoints by name: those that ship with the package, and those of the hub."""

from pathlib import Path

from revmux_vllm import hub
from revmux_vllm.assembly import assembled
from revmux_vllm.errors import UserError

_HERE = Path(__file__).resolve().parent


def bundled_checkpoints() -> dict[str, Path]:
    """Name to folder: ``bundled/`` of an installed wheel, or ``adapters/`` of a checkout."""
    for root in (_HERE / "bundled", _HERE.parent / "adapters"):
        found = {
            path.parent.name: path.parent for path in sorted(root.glob("*/adapter.safetensors"))
        }
        if found:
            return found
    return {}


def resolve(name: str | Path) -> Path:
    """A folder: the path itself if there is one of that name, else the bundled checkpoint, which is
    put together first where it is not whole, else that of the hub, which is fetched.

    Raises:
        UserError: listing the bundled names, or saying why the hub's cannot be had.
    """
    if Path(name).is_dir():
        return Path(name)
    bundled = bundled_checkpoints()
    if str(name) in bundled:
        return assembled(bundled[str(name)])
    if hub.is_id(str(name)):
        return hub.snapshot(str(name))
    raise UserError(f"{name}", "no such folder", cure=f"bundled are {', '.join(bundled) or 'none'}")
