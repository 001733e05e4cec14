"""The examples as they stand, and the parts of the demo that need no server."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import instruction
import pytest
from bursts import Answer
from demo import Comparison
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from revmux_vllm import layer_limit
from revmux_vllm.bench.local_server import LocalServer
from revmux_vllm.bench.metrics import mixed_layer_limit, parse_rung_counts
from revmux_vllm.engine.environment import untouched
from revmux_vllm.rungs import Rung

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
POSITIVE, NEGATIVE = "A warm, funny and beautifully acted film", "The plot makes no sense"
METRICS = """\
# HELP revmux:requests_total Requests by the width of the composite they ran in.
# TYPE revmux:requests_total counter
revmux:requests_total{engine="0",model_name="revmux-llama",rung="mux:4"} 300.0
revmux:requests_total{engine="1",model_name="revmux-llama",rung="mux:4"} 12.0
revmux:requests_total{engine="0",model_name="revmux-llama",rung="alone"} 8.0
# TYPE revmux:requests_created gauge
revmux:requests_created{engine="0",model_name="revmux-llama",rung="mux:4"} 1.7e+09
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",model_name="revmux-llama"} 320.0
"""


def run_example(*command: str) -> str:
    with untouched():  # what a user's shell has, without what engines of other tests have set
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def line_with(text: str, output: str) -> str:
    return next(line for line in output.splitlines() if text in line)


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    with untouched():
        server = LocalServer("revmux-llama", ["--enforce-eager"], env=os.environ)
    with server:
        server.wait_ready(timeout_s=400)
        yield server.base_url


def test_http_example(server_url: str) -> None:
    output = run_example(sys.executable, str(EXAMPLES / "classify_http.py"), "--url", server_url)
    assert line_with(POSITIVE, output).startswith("positive\t")
    assert line_with(NEGATIVE, output).startswith("negative\t")


def test_curl_example(server_url: str) -> None:
    first, second = run_example(str(EXAMPLES / "classify_curl.sh"), server_url).splitlines()
    assert '"label":"positive"' in first
    assert '"label":"negative"' in second


def test_offline_example() -> None:
    output = run_example(sys.executable, str(EXAMPLES / "classify_offline.py"))
    assert line_with(POSITIVE, output).startswith("positive\t")
    assert line_with(NEGATIVE, output).startswith("negative\t")


def test_sentences_are_many_and_unique() -> None:
    lines = (EXAMPLES / "sentences.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 300
    assert len(set(lines)) == len(lines)
    assert all(line == line.strip() != "" for line in lines)


def test_rung_counts_are_summed_over_engines() -> None:
    assert parse_rung_counts(METRICS) == Counter({"mux:4": 312, "alone": 8})


def test_rung_counts_of_a_server_without_the_plugin_are_empty() -> None:
    assert parse_rung_counts("# TYPE x counter\nx_total 1.0\n") == Counter()


def test_mixed_limit_of_one_width_is_that_width_s_limit() -> None:
    assert mixed_layer_limit({"mux:4": 7}, 3, 12) == pytest.approx(layer_limit(Rung(mux=4), 3, 12))
    assert mixed_layer_limit({"alone": 7}, 3, 12) == pytest.approx(1)


def test_mixed_limit_adds_costs_and_not_speeds() -> None:
    # Half of the requests cost 1, half 3/12 + 9/12/2 = 0.625.
    assert mixed_layer_limit({"alone": 5, "merge:2": 5}, 3, 12) == pytest.approx(1 / 0.8125)


def test_mixed_limit_needs_requests() -> None:
    with pytest.raises(ValueError, match="no request was counted"):
        mixed_layer_limit({}, 3, 12)


@pytest.mark.parametrize(("label", "shown"), [("positive", "positive"), (None, "1")])
def test_answer_falls_back_to_the_index(label: str | None, shown: str) -> None:
    body = {"data": [{"index": 0, "label": label, "probs": [0.2, 0.8], "num_classes": 2}]}
    assert Answer.from_response(body) == Answer(shown, 0.8, (0.2, 0.8), 1)


def test_a_comparison_is_of_medians() -> None:
    yes, no = Answer("positive", 0.9, (0.1, 0.9), 1), Answer("negative", 0.6, (0.6, 0.4), 0)
    rates = [200, 400, 300], [100, 100, 150], [5, 6, 9], [3, 2, 4]
    found = Comparison([yes, no], [yes, yes], *rates, Counter({"mux:4": 6}), 2.3)
    assert (found.ratio, found.engine_ratio) == (3, 2)
    assert found.agreement == 0.5
    assert found.distance == pytest.approx(0.25)


def test_the_instruction_example_finds_its_prompt_in_the_cache(tmp_path: Path) -> None:
    """Of a tiny language model, which knows the example's own words."""
    sentences = (EXAMPLES / "sentences.txt").read_text(encoding="utf-8").splitlines()
    texts = " ".join(map(instruction.prompt, sentences))
    words = sorted({"positive", "negative", *re.findall(r"\w+|[^\w\s]+", texts)})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    backbone = tmp_path / "backbone"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(backbone)
    shape = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape, **heads)).save_pretrained(backbone)
    command = [sys.executable, str(EXAMPLES / "instruction.py"), "--output", str(tmp_path)]
    done = json.loads(run_example(*command, "--prefill-layers", "2", "--rounds", "1", "--json"))
    assert set(done) == {"alone", "merge:2", "mux:2"}
    for row in done.values():
        assert row["cached"] > 0.6
        assert row["texts_per_s"] > 0
    assert (done["alone"]["agreement"], done["alone"]["distance"]) == (1, 0)


def test_the_demo(tmp_path: Path) -> None:
    """Of the small model, and a few sentences."""
    plot = tmp_path / "demo.png"
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--model", "revmux-llama", "--json"]
    command += ["--agreement", "0"]
    done = json.loads(run_example(*command, "--sentences", "16", "--plot", str(plot)))
    loaded, composites = done["under load"], done["in composites"]
    assert composites["rung_counts"]["mux:2"] > 50
    assert loaded["agreement"] >= 0.8
    for one, count in ((loaded, 16), (composites, 8)):
        assert len(one["answers"]) == count
        assert one["ratio"] > 0
        assert one["engine_ratio"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
