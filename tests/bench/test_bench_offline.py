"""``revmux bench offline`` with stand-ins for engines: what is compared, and what is closed."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_tiny_checkpoint, revmux

from revmux_vllm import checkpoint
from revmux_vllm.backbones.loading import load_backbone
from revmux_vllm.bench import offline
from revmux_vllm.engine.plain import PlainEngineError
from revmux_vllm.rungs import Rung
from revmux_vllm.training.cost import Costs


class StandIn:
    """In place of either engine; remembers what it was asked."""

    def __init__(self, name: str, log: list[Any], model: Path, options: dict[str, Any]) -> None:
        self.name, self.log, self.options = name, log, options
        self.asked: set[Any] = set()
        log.append((name, "started", Path(model)))

    def run_at(self, rungs: Rung | tuple[Rung, ...]) -> None:
        self.log.append((self.name, "at", rungs))

    def classify(self, prompts: list[list[int]], salts: list[str]) -> None:
        self.ask(prompts, salts[0])
        assert len(salts) == len(prompts)

    def seconds(self, prompts: list[list[int]], salt: str) -> float:
        self.ask(prompts, salt)
        return 2.0

    def ask(self, prompts: list[list[int]], salt: str) -> None:
        for prompt in prompts[:1]:
            asked = salt, tuple(prompt)
            assert asked not in self.asked, "a round that is answered from the cache"
            self.asked.add(asked)
        self.prompts = prompts

    def close(self) -> None:
        self.log.append((self.name, "closed", None))


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What both engines did, in order, and the options that they were started with."""
    found = SimpleNamespace(log=[], options={}, asked=[])

    def make(name: str) -> Callable[..., StandIn]:
        def start(model: Path, **options: Any) -> StandIn:
            found.options[name] = options
            made = StandIn(name, found.log, model, options)
            found.asked.append((name, made.asked))
            return made

        return start

    monkeypatch.setattr(offline, "InProcessEngine", make("ours"))
    monkeypatch.setattr(offline, "PlainEngine", make("plain"))
    return found


def measured(arguments: str) -> dict[str, Any]:
    result = revmux(f"bench offline {arguments} --requests 8 --dtype float32 --json")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_the_baseline_is_plain_vllm(tiny_checkpoint: Path, engines: SimpleNamespace) -> None:
    report = measured(f"{tiny_checkpoint} --rungs mux:4 --lengths fixed:12")
    assert (report["baseline"], report["plain_requests_per_s"]) == ("plain vLLM", 4.0)
    assert [row["rung"] for row in report["configurations"]] == ["alone", "mux:4", "load"]
    common = {
        "dtype": "float32",
        "load_format": "auto",
        "max_model_len": 12,
        "enforce_eager": False,
    }
    assert engines.options["ours"] == common
    assert engines.options["plain"] == common | {
        "hf_overrides": {"architectures": ["LlamaForSequenceClassification"]},
        "kv_cache_memory_bytes": 1 << 30,
    }
    assert engines.log[-2:] == [("plain", "closed", None), ("ours", "closed", None)]


def test_the_arithmetic_is_that_of_the_weights_at_the_prompts_length(
    tiny_checkpoint: Path, engines: SimpleNamespace
) -> None:
    """Counted without weights, as it is with them."""
    report = measured(f"{tiny_checkpoint} --rungs mux:4 --lengths fixed:40")
    backbone, ladder = load_backbone(tiny_checkpoint, 1), checkpoint.load_adapters(tiny_checkpoint)
    expected = Costs(backbone, 40).speedup(ladder, Rung(mux=4))
    alone, mux, load = report["configurations"]
    assert alone["arithmetic"] == 1
    assert mux["arithmetic"] == load["arithmetic"] == pytest.approx(expected)
    for row in (alone, mux, load):
        assert row["ratio_over_arithmetic"] == row["ratio"] / row["arithmetic"]


def test_dummy_weights_need_no_tokenizer_in_the_engine(
    tiny_checkpoint: Path, engines: SimpleNamespace
) -> None:
    measured(f"{tiny_checkpoint} --rungs mux:4 --load-format dummy --enforce-eager")
    for options in engines.options.values():
        assert options["skip_tokenizer_init"]
        assert (options["load_format"], options["enforce_eager"]) == ("dummy", True)


@pytest.mark.parametrize(
    ("family", "words", "why"),
    [
        ("t5", ("w1", "w2"), "it answers with label words"),
        ("electra", None, "vLLM has no such class"),
    ],
)
def test_what_vllm_cannot_serve_is_compared_with_the_backbone_alone(
    family: str,
    words: tuple[str, ...] | None,
    why: str,
    tmp_path: Path,
    engines: SimpleNamespace,
) -> None:
    """``online`` refuses it."""
    folder = make_tiny_checkpoint(
        tmp_path, family=family, rungs="mux:2", num_labels=2, label_words=words
    )
    report = measured(str(folder))
    assert report["baseline"] == "alone"
    assert "plain" not in engines.options
    asked = [rungs for _, what, rungs in engines.log if what == "at"]
    first = [Rung(), (), Rung(mux=2)]  # never measured, so by load it runs alone
    assert asked == [*first, *reversed(first)] * 3
    result = revmux(f"bench offline {folder} --dtype float32")
    assert "alone" in result.output
    assert "plain vLLM" not in result.output
    result = revmux(f"bench online {folder}")
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert f"{why}; vLLM alone cannot serve that backbone" in said
    assert "nothing to compare with; `revmux bench offline` compares with the backbone" in said


def test_an_engine_that_does_not_start_is_told_and_the_other_is_closed(
    tiny_checkpoint: Path, engines: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise PlainEngineError("plain vLLM ended with status 1; its messages are above")

    monkeypatch.setattr(offline, "PlainEngine", fails)
    result = revmux(f"bench offline {tiny_checkpoint} --dtype float32")
    assert result.exit_code == 2
    assert "plain vLLM ended with status 1" in result.output
    assert "Traceback" not in result.output
    assert engines.log == [("ours", "started", tiny_checkpoint), ("ours", "closed", None)]


def test_a_shared_prefix_is_all_that_rounds_have_in_common(
    tiny_checkpoint: Path, engines: SimpleNamespace
) -> None:
    report = measured(f"{tiny_checkpoint} --rungs mux:4 --lengths fixed:12 --shared-prefix 20")
    assert (report["shared_prefix"], report["mean_tokens"]) == (20, 32)
    assert engines.options["plain"]["max_model_len"] == 32
    for _, asked in engines.asked:
        assert len({prompt[:20] for _, prompt in asked}) == 1
        assert len({prompt[20] for _, prompt in asked}) > 1
