"""What ``pack.py`` writes arrives as it was, and what does not is refused."""

import json
import zipfile
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

import pytest
from gpu import pack, unpack

CARRIED = {
    "vllm/__init__.py": b"",
    "vllm/_C_stable_libtorch.abi3.so": bytes(range(256)) * 400,
    "vllm/spinloop.abi3.so": b"spin",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": b"three",
    "vllm/third_party/deep_gemm/README": b"read me",
    "vllm-0.32.0.dist-info/METADATA": b"Name: vllm\n",
}
LEFT = (
    "vllm/vllm-rs",
    "vllm/_moe_C_stable_libtorch.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
    "vllm/vllm_flash_attn/cute/interface",
    "vllm/third_party/deep_gemm/include/a.hpp",
    "vllm/third_party/deep_gemm/_C_extension.abi3.so",
    "vllm-0.32.0.dist-info/RECORD",
)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Pieces of 300 bytes of a wheel like vLLM's, and of a small one."""
    wheel, small = tmp_path / "vllm.whl", tmp_path / "small"
    small.mkdir()
    with zipfile.ZipFile(wheel, "w") as opened:
        for name, content in CARRIED.items():
            opened.writestr(name, content)
        for name in LEFT:
            opened.writestr(name, b"large")
    with zipfile.ZipFile(small / "tiny-1.whl", "w") as opened:
        opened.writestr("tiny-1.data/purelib/tiny/it", b"1")
    pack.pack([wheel, *small.glob("*.whl")], tmp_path / "pieces", 3, 300, 1)
    return tmp_path / "pieces"


def test_what_was_packed_arrives_and_is_found(packed: Path, tmp_path: Path) -> None:
    there, pieces = tmp_path / "there", sorted(packed.glob("vllm-*"))
    assert len(pieces) > 2
    assert all(piece.stat().st_size <= 300 for piece in pieces)
    assert unpack.take(there, pieces[1:]) == ["vllm-01"], "in any order, in several calls"
    assert unpack.take(there, pieces[:1]) == []
    assert unpack.unpack(there) == len(CARRIED) + 1
    site = there / unpack.SITE
    paths = list(unpack.files_under(site))
    found = {path.relative_to(site).as_posix(): path.read_bytes() for path in paths}
    assert found == CARRIED | {"tiny/it": b"1"}
    unpack.write_metadata(site)
    points = [point for one in distributions(path=[str(site)]) for point in one.entry_points]
    value = "revmux_vllm.engine.plugin:register"
    assert EntryPoint("revmux", value, "vllm.general_plugins") in points


def test_a_damaged_piece_and_a_foreign_one_are_refused(packed: Path, tmp_path: Path) -> None:
    piece = packed / "vllm-01"
    content = piece.read_bytes()
    piece.write_bytes(content[::-1])
    with pytest.raises(unpack.Refused, match="carry it again"):
        unpack.take(tmp_path / "there", [piece])
    piece.write_bytes(content)
    unpack.take(tmp_path / "there", [piece])
    manifest = packed / unpack.MANIFEST
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"files": {"other": ""}}))
    with pytest.raises(unpack.Refused, match="another packing"):
        unpack.take(tmp_path / "there", [piece])
    every = sorted(packed.glob("vllm-*"))
    unpack.take(tmp_path / "other", every)
    with pytest.raises(unpack.Refused, match="not as they were packed"):
        unpack.unpack(tmp_path / "other")


def test_nothing_that_vllm_needs_is_missing_here() -> None:
    assert unpack.missing() == []
