"""Pieces of vLLM's CUDA wheel for a machine that has torch and no network; see ``docs/gpu.md``.

    python benchmarks/gpu/pack.py vllm-0.32.0-...whl --wheels small --output pieces

Takes what classifying text on NVIDIA GPUs loads: vLLM's Python part, its kernels and one
FlashAttention. Left out are kernels of other kinds of models, the Rust front end and sources of
kernels that are built while running. The small wheels go along as they would be installed. All of
it is one xz archive, cut into pieces that are small enough to be carried one by one.
"""

import io
import json
import re
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import typer

PIECE = "vllm-{:02d}"
LEFT_OUT = {
    "vllm/vllm-rs": "the Rust front end",
    r"vllm/_(?!C_stable)\w+\.abi3\.so": "kernels for mixtures of experts and other attention",
    r"vllm/third_party/.*\.(so|h|hpp|cuh|cu|cpp|inl)": "kernels that are built while running",
    r"vllm/vllm_flash_attn/_vllm_fa\d_C\.abi3\.so": "another FlashAttention",
    r"vllm/vllm_flash_attn/cute/.*": "FlashAttention 4",
    r"[^/]+\.dist-info/RECORD": "the list of all files, which are not all here",
    r"[^/]+\.data/.*": "scripts and headers",
}
"""Patterns of whole names in a wheel, and what they are."""


def wanted(name: str, flash_attention: int) -> bool:
    """Whether a file of a wheel is carried; ``flash_attention`` is the version that is."""
    if name.endswith("/"):
        return False
    if name == f"vllm/vllm_flash_attn/_vllm_fa{flash_attention}_C.abi3.so":
        return True
    return not any(re.fullmatch(pattern, name) for pattern in LEFT_OUT)


def installed_as(name: str) -> str:
    """Where a file of a wheel goes, seen from the folder that it is installed into."""
    return re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", name)


def pack(
    wheels: list[Path], output: Path, flash_attention: int, piece_bytes: int, preset: int
) -> dict[str, dict[str, str]]:
    """Write pieces and ``manifest.json`` into a new folder; the manifest.

    Args:
        wheels: vLLM's first; of files that two of them have the first one's is taken.
        output: created; must be empty.
        flash_attention: which version's compiled code goes along.
        piece_bytes: most of a piece.
        preset: of xz.
    """
    files: dict[str, str] = {}
    whole = output / "whole.tar.xz"
    output.mkdir(parents=True, exist_ok=True)
    with tarfile.open(whole, "w:xz", preset=preset) as archive:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as opened:
                for inside in sorted(opened.namelist()):
                    name = installed_as(inside)
                    if name in files or not wanted(name, flash_attention):
                        continue
                    content = opened.read(inside)
                    files[name] = sha256(content).hexdigest()
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    pieces = _cut(whole, output, piece_bytes)
    manifest = {"pieces": pieces, "files": dict(sorted(files.items()))}
    (output / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return manifest


def _cut(whole: Path, output: Path, piece_bytes: int) -> dict[str, str]:
    """Pieces of a file, which is removed; their names and hashes, in order."""
    pieces: dict[str, str] = {}
    with whole.open("rb") as source:
        while content := source.read(piece_bytes):
            name = PIECE.format(len(pieces) + 1)
            (output / name).write_bytes(content)
            pieces[name] = sha256(content).hexdigest()
    whole.unlink()
    return pieces


def main(
    wheel: Annotated[Path, typer.Argument(help="vLLM's CUDA wheel, of the supported version.")],
    wheels: Annotated[
        Path | None,
        typer.Option(help="Folder of the small wheels that `unpack.py missing` named over there."),
    ] = None,
    output: Annotated[Path, typer.Option(help="New folder for the pieces.")] = Path("pieces"),
    flash_attention: Annotated[
        int, typer.Option(min=2, max=3, help="3 for compute capability 9 (H100, H200), else 2.")
    ] = 3,
    mib: Annotated[
        float,
        typer.Option(min=1, help="Most of a piece. The checkout itself has to be carried too."),
    ] = 32.0,
    preset: Annotated[int, typer.Option(min=0, max=9, help="Of xz.")] = 6,
) -> None:
    """Cut vLLM's CUDA wheel into pieces for a machine that has torch and no network."""
    if not zipfile.is_zipfile(wheel):
        raise typer.BadParameter(f"{wheel} is no wheel", param_hint="WHEEL")
    if output.exists() and any(output.iterdir()):
        raise typer.BadParameter(f"{output} is not empty", param_hint="--output")
    small = sorted(wheels.glob("*.whl")) if wheels else []
    if wheels and not small:
        raise typer.BadParameter(f"no wheels in {wheels}", param_hint="--wheels")
    manifest = pack([wheel, *small], output, flash_attention, int(mib * 2**20), preset)
    for name in manifest["pieces"]:
        print(f"{output / name}: {(output / name).stat().st_size / 2**20:.1f} MiB")
    print(f"{len(manifest['files'])} files; carry {output / 'manifest.json'} with every piece")


if __name__ == "__main__":
    typer.run(main)
