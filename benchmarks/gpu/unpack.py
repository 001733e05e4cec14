"""The far side of ``pack.py``: puts the pieces together, on a machine without a network.

    python benchmarks/gpu/unpack.py missing                  what vLLM needs and this machine lacks
    python benchmarks/gpu/unpack.py FOLDER PIECE ...         take pieces; unpack with the last one

Needs nothing but Python 3.11. Each call may bring some of the pieces, each beside the manifest that
``pack.py`` wrote; what came is kept in FOLDER. With the last piece it unpacks into ``FOLDER/site``,
compares every file with its hash, writes metadata of RevMUX there, so that vLLM finds the plugin,
and prints what to put into PYTHONPATH.
"""

import hashlib
import json
import shutil
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MANIFEST, PIECES, SITE = "manifest.json", "pieces", "site"
NEEDED = """
aiohappyeyeballs aiohttp aiosignal annotated_doc annotated_types anyio attr:attrs cachetools
cbor2 certifi cloudpickle compressed_tensors:compressed-tensors cpuinfo:py-cpuinfo einops
fastapi frozenlist h11 httpcore2 httpx2 huggingface_hub:huggingface-hub idna jinja2
llguidance loguru markupsafe msgspec multidict numpy openai openai_harmony:oss-harmony
partial_json_parser:partial-json-parser PIL:pillow prometheus_client:prometheus-client
propcache psutil pybase64 pydantic pydantic_core:pydantic-core regex requests rich
safetensors sniffio starlette tokenizers torch tqdm transformers triton truststore
tvm_ffi:apache-tvm-ffi typer typing_extensions:typing-extensions
typing_inspection:typing-inspection urllib3 uvloop xgrammar yaml:pyyaml yarl zmq:pyzmq
"""
"""Modules that an engine of vLLM 0.32 and this project do not start without, each with the name of
the distribution that brings it where that is another.

Found by hiding modules from the CPU build's engine one after the other. vLLM's metadata name many
more, which classifying text does not load.
"""


class Refused(Exception):
    """Something is not as it was packed, or not as it was asked for; the text says what."""


def missing() -> list[str]:
    """Distributions of ``NEEDED`` that are not here."""
    pairs = (entry.partition(":") for entry in NEEDED.split())
    return [name or module for module, _, name in pairs if find_spec(module) is None]


def take(folder: Path, pieces: list[Path]) -> list[str]:
    """Keep pieces, and their manifest, in ``folder``; the names of those that have not come yet.

    Raises:
        Refused: for a piece that is not what its manifest says, or of another packing.
    """
    kept = folder / PIECES
    kept.mkdir(parents=True, exist_ok=True)
    for piece in pieces:
        beside = piece.with_name(MANIFEST)
        if not piece.is_file() or not beside.is_file():
            raise Refused(f"{piece}: expected that file, and {MANIFEST} beside it")
        text = beside.read_text(encoding="utf-8")
        if (kept / MANIFEST).is_file() and (kept / MANIFEST).read_text(encoding="utf-8") != text:
            raise Refused(f"{piece} is of another packing than the pieces in {kept}; remove those")
        wanted = json.loads(text)["pieces"].get(piece.name)
        if wanted != sha256(piece):
            raise Refused(f"{piece}: its SHA-256 is not the manifest's; carry it again")
        (kept / MANIFEST).write_text(text, encoding="utf-8")
        shutil.copyfile(piece, kept / piece.name)
    if not (kept / MANIFEST).is_file():
        raise Refused(f"no pieces given, and none in {kept}")
    return [name for name in manifest_of(folder)["pieces"] if not (kept / name).is_file()]


def manifest_of(folder: Path) -> dict[str, Any]:
    """What the pieces in ``folder`` are of."""
    text = (folder / PIECES / MANIFEST).read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text)
    return values


def unpack(folder: Path) -> int:
    """Unpack all pieces into ``folder / "site"``, anew; the number of files, each compared.

    Raises:
        Refused: for a file whose SHA-256 is another than when it was packed.
    """
    manifest, site = manifest_of(folder), folder / SITE
    shutil.rmtree(site, ignore_errors=True)
    whole = folder / "whole.tar.xz"
    with whole.open("wb") as target:
        for name in manifest["pieces"]:
            with (folder / PIECES / name).open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
    with tarfile.open(whole, "r:xz") as archive:
        archive.extractall(site, filter="data")
    whole.unlink()
    found = {path.relative_to(site).as_posix(): sha256(path) for path in files_under(site)}
    if found != manifest["files"]:
        differing = sorted(dict(found.items() ^ manifest["files"].items()))
        raise Refused(f"not as they were packed: {', '.join(differing[:5])}")
    return len(found)


def write_metadata(site: Path, project: Path = ROOT / "pyproject.toml") -> Path:
    """Metadata of this checkout with its entry points: so vLLM finds a plugin that lies in a path.

    Returns:
        The folder that was written.
    """
    values = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    groups = {"console_scripts": values.get("scripts", {}), **values["entry-points"]}
    lines = []
    for group, entries in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()), ""]
    folder = site / f"{values['name'].replace('-', '_')}-0.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    metadata = f"Metadata-Version: 2.1\nName: {values['name']}\nVersion: 0\n"
    (folder / "METADATA").write_text(metadata, encoding="utf-8")
    return folder


def files_under(folder: Path) -> Iterator[Path]:
    """All files, deep down."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(words: list[str]) -> None:
    """The command."""
    if words == ["missing"]:
        found = missing()
        print(" ".join(found) if found else "nothing is missing")
        return
    if not words or words[0].startswith("-"):
        raise Refused(f"expected `missing`, or a folder and pieces\n\n{__doc__}")
    folder = Path(words[0]).resolve()
    if left := take(folder, [Path(word) for word in words[1:]]):
        print(f"still to come: {', '.join(left)}")
        return
    number = unpack(folder)
    write_metadata(folder / SITE)
    print(f"{number} files are as they were packed\n")
    print(f"export PYTHONPATH={folder / SITE}:{ROOT}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refused as refused:
        sys.exit(f"error: {refused}")
