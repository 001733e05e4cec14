"""LLaMA shapes that are measured with weights drawn at random: nothing is downloaded.

The widths, heads and layers of ``1b`` and ``8b`` are those of LLaMA 3's models of that name. A
classifier has no language-model head, so ``8b`` has 7.5 billion parameters here.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.rungs import Rung, parse_rungs

RUNGS = parse_rungs(["mux:2", "mux:4", "mux:8", "merge:2", "merge:4", "merge:2+mux:2"])
"""What is measured, beside the backbone alone and the policy ``load``."""


@dataclass(frozen=True)
class Shape:
    """A backbone that is measured.

    Attributes:
        name: as ``--shapes`` has it.
        parameters: of the backbone with its head, without adapters.
        prefill_layers: layers l, a quarter of all, so that the layer limits are those of the other
            measurements.
        tokens_per_round: of all prompts that wait at once, so that a round takes several steps.
        start_s: a guess at how long its two engines take to start on one H100.
        values: of ``config.json``, where shapes differ.
    """

    name: str
    parameters: int
    prefill_layers: int
    tokens_per_round: int
    start_s: float
    values: dict[str, Any] = field(hash=False)

    @property
    def config(self) -> dict[str, Any]:
        """``config.json`` without the ``revmux`` object."""
        return {
            "architectures": ["RevMuxLlamaForSequenceClassification"],
            "model_type": "llama",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "pad_token_id": 0,
            "max_position_embeddings": 8192,
            "id2label": {"0": "negative", "1": "positive"},
            **self.values,
        }

    @property
    def num_layers(self) -> int:
        """Layers L."""
        return int(self.values["num_hidden_layers"])

    @property
    def vocab_size(self) -> int:
        """Token ids that it knows."""
        return int(self.values["vocab_size"])

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.values["hidden_size"])

    def requests(self, length: int) -> int:
        """Prompts of ``length`` tokens in a round: a multiple of 16, so that composites fill."""
        return max(16, self.tokens_per_round // length // 16 * 16)


def _sizes(layers: int, hidden: int, inner: int, heads: int, kv: int, vocab: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
    }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 632_192, 1, 1 << 11, 20, _sizes(4, 128, 256, 2, 1, 320)),
        Shape("0.1b", 109_531_392, 3, 1 << 16, 60, _sizes(12, 768, 2048, 12, 12, 32_000)),
        Shape("1b", 1_235_818_496, 4, 1 << 17, 75, _sizes(16, 2048, 8192, 32, 8, 128_256)),
        Shape("8b", 7_504_932_864, 8, 1 << 16, 120, _sizes(32, 4096, 14336, 32, 8, 128_256)),
    )
}


def revmux_config(shape: Shape, rungs: tuple[Rung, ...]) -> RevMuxConfig:
    """Adapters as wide inside as the backbone."""
    return RevMuxConfig(rungs, shape.prefill_layers, adapter_hidden_size=shape.hidden_size)


def write_shape(folder: Path, shape: Shape, rungs: tuple[Rung, ...]) -> None:
    """A folder that describes the checkpoint; prompts are token ids, so it has no tokenizer."""
    folder.mkdir(parents=True)
    values = shape.config | {"revmux": revmux_config(shape, rungs).to_dict()}
    (folder / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
