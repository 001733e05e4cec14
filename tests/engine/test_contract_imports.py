"""Every name that the package takes from vLLM is there. Run first: it imports no vLLM at the top.

So it is collected whatever has moved, and names every file at once; functions' own imports too.
"""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import revmux_vllm

ROOT = Path(revmux_vllm.__file__).parent


def names_from_vllm(path: Path) -> list[tuple[int, str, str]]:
    """Line, module and name of every import from vLLM in ``path``, also inside functions."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [
        (node.lineno, node.module, alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "vllm"
        for alias in node.names
    ]


FILES = [path for path in sorted(ROOT.rglob("*.py")) if names_from_vllm(path)]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_every_name_from_vllm_is_there(path: Path) -> None:
    gone = []
    for line, module, name in names_from_vllm(path):
        try:
            if not hasattr(import_module(module), name):
                import_module(f"{module}.{name}")
        except ImportError as error:
            gone.append(f"{path.relative_to(ROOT.parent)}:{line}: {error}")
    assert not gone, "\n".join(gone)
