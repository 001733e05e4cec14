"""What is refused before anything starts."""

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import revmux, save_backbone

import revmux_vllm.serving
from revmux_vllm.serving.options import locate, read_options


def test_defaults_are_one_engine_of_the_bundled_model() -> None:
    options = read_options({})
    assert (options.model, options.replicas, options.max_replicas) == ("revmux-llama", 1, None)


def test_words_of_a_command_line_are_read() -> None:
    options = read_options({"replicas": "2", "vllm_args": "--dtype float32 --max-num-seqs 8"})
    assert options.replicas == 2
    assert options.vllm_args == ["--dtype", "float32", "--max-num-seqs", "8"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replica": 2}, "replica: unknown; known are cpus_per_replica"),
        ({"replicas": 0}, "replicas: .* found 0"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas 2 is less than replicas 3"),
        ({"router": "random"}, "router: .*'pack-aware' or 'power-of-two'"),
        ({"vllm_args": "--port 9"}, "--port: leave it out: Ray Serve listens"),
        ({"vllm_args": "--api_server_count=2"}, "`fronts` are the API servers"),
        ({"vllm_args": ["--disable-log-stats"]}, "router and autoscaler read"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read_options(values)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nobody/nothing: no folder here.*bundled: revmux-llama"):
        locate("nobody/nothing")
    save_backbone("llama", tmp_path / "plain")
    with pytest.raises(ValueError, match="revmux: missing; is this a plain backbone"):
        locate(str(tmp_path / "plain"))


def test_a_folder_is_found_from_anywhere(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    name = tiny_checkpoint.name
    assert locate(name) == (str(tiny_checkpoint.resolve()), name), "clients call it as it was typed"


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Ray were not installed."""
    real = builtins.__import__

    def refusing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "revmux_vllm.serving.application", raising=False)
    monkeypatch.setattr(builtins, "__import__", refusing)
    monkeypatch.setattr("revmux_vllm.errors.find_spec", lambda name: None)


@pytest.mark.usefixtures("without_ray")
def test_without_ray_the_error_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r"pip install -e '.\[ray\]'"):
        _ = revmux_vllm.serving.app
    result = revmux("serve")
    assert result.exit_code == 2
    assert ".[ray]" in result.output


def test_the_command_refuses_what_the_application_refuses() -> None:
    result = revmux("serve --replicas 0 --option fill_ms=fast --option foo=1")
    assert result.exit_code == 2
    assert all(word in result.output for word in ("replicas", "fill_ms", "foo: unknown"))
    assert "--replicas: Input should be greater than or equal to 1, found 0" in result.output
    assert "--option fill_ms: Input should be a valid number" in result.output
    assert "expected KEY=VALUE" in revmux("serve --option fast").output
    result = revmux("serve --vllm-args --bogus")
    assert result.exit_code == 2
    assert "--bogus" in result.output
