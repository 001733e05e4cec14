"""The house: the order of the rooms, what each may import, and the size of what stands in them."""

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 60
PYTHON = sorted(
    path
    for folder in ("revmux_vllm", "benchmarks", "examples", "tests", "tools")
    for path in (ROOT / folder).rglob("*.py")
)


def test_rooms_import_only_what_lies_below_them() -> None:
    """The contracts of pyproject.toml: no circle, no way up, planning without engine and torch."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "5 kept, 0 broken" in done.stdout


def test_planning_and_families_load_neither_engine_nor_torch() -> None:
    """Also not by the way of what they import: a fresh interpreter says what is there."""
    modules = sorted((ROOT / "revmux_vllm" / "planning").glob("*.py"))
    names = [f"revmux_vllm.planning.{path.stem}" for path in modules if path.stem != "__init__"]
    code = "import sys\n" + "\n".join(f"import {name}" for name in [*names, "revmux_vllm.families"])
    code += "\nprint(sorted({'torch', 'vllm', 'transformers', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_exports_what_it_names() -> None:
    import revmux_vllm

    for name in revmux_vllm.__all__:
        assert getattr(revmux_vllm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        revmux_vllm.Nothing  # noqa: B018


def test_files_that_are_named_exist() -> None:
    """In comments, docstrings and documents: files of ours, or of vLLM's."""
    vllm = Path(next(iter(find_spec("vllm").submodule_search_locations)))  # type: ignore[union-attr,arg-type]
    there = [f"/{path.relative_to(ROOT).as_posix()}" for path in PYTHON]
    there += [f"/vllm/{path.relative_to(vllm).as_posix()}" for path in vllm.rglob("*.py")]
    texts = [*PYTHON, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("adapters/*.md")]
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in texts
        for name in re.findall(r"(?<![\w*/.{-])((?:\w+/)*\w+\.py)\b", path.read_text("utf-8"))
        if not any(each.endswith(f"/{name}") for each in there)
    }
    assert not missing


def long_functions(source: str) -> list[str]:
    """Functions over ``LONGEST`` lines without the reason next to them: ``# Long because ...``."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        above = first - 2
        while above > 0 and lines[above].lstrip().startswith("#"):
            if lines[above].lstrip().startswith("# Long because "):
                break
            above -= 1
        is_explained = lines[above].lstrip().startswith("# Long because ")
        if node.end_lineno and node.end_lineno - node.lineno >= LONGEST and not is_explained:
            found.append(node.name)
    return found


def test_no_function_is_longer_than_a_screen_without_a_reason() -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for path in PYTHON
        if (names := long_functions(path.read_text(encoding="utf-8")))
    }
    assert not found


def test_a_long_function_is_found() -> None:
    body = "    pass\n" * LONGEST
    assert long_functions(f"def one():\n{body}") == ["one"]
    assert long_functions(f"# Long because it is.\n@wrapped\ndef one():\n{body}") == []
    assert long_functions(f"# A comment.\ndef one():\n{body}") == ["one"]
    assert long_functions(f"def one():\n{body[9:]}") == []
