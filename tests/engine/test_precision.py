"""Backbones in fewer bits: the adapters stay as they are, and the answers stay near the reference.

Wrong company changes a probability by 0.3 on average, far more than any tolerance here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ByCrowd, RecordingEngine, make_tiny_checkpoint, random_prompts
from safetensors.torch import load_file, save_file
from test_parity import ALL, BATCHES, BOTH, MUX, check, reference_of

from revmux_vllm import checkpoint
from revmux_vllm.engine.plain import PlainEngine
from revmux_vllm.rungs import parse_rungs

# The reference itself, computed in bfloat16, differs from float32 by up to 0.05 on these batches;
# the engine's kernels round elsewhere.
BFLOAT16_TOLERANCE = 0.15
FLOAT16_TOLERANCE = 0.1
# Of the mean: with AVX2 and no VNNI vLLM's own int8 kernel was off by 0.05 on average, and by up to
# 0.5, from the same weights in float32.
INT8_MEAN_TOLERANCE = 0.12


@pytest.mark.parametrize(
    ("family", "dtype", "adapter_dtype", "tolerance"),
    [
        ("llama", "bfloat16", "bfloat16", BFLOAT16_TOLERANCE),  # as on a GPU
        ("bert", "float16", "auto", FLOAT16_TOLERANCE),  # what vLLM takes for a float32 folder
        ("t5", "bfloat16", "auto", BFLOAT16_TOLERANCE),
        # The reference, computed in bfloat16, is itself off by up to 0.13, and by 0.007 on average.
        pytest.param("deberta-v2", "bfloat16", "auto", 0.25, marks=pytest.mark.slow),
        # Scaled embeddings and a norm that computes in float32.
        pytest.param("gemma3_text", "bfloat16", "auto", BFLOAT16_TOLERANCE, marks=pytest.mark.slow),
    ],
)
def test_half_precision(
    family: str,
    dtype: str,
    adapter_dtype: str,
    tolerance: float,
    tmp_path: Path,
    make_engine: Callable[..., RecordingEngine],
) -> None:
    words: dict[str, Any] = {"label_words": ("w8", "w7", "w311")} if family == "t5" else {}
    folder = make_tiny_checkpoint(tmp_path, family=family, rungs=ALL, **words)
    chosen = {"revmux": {"adapter_dtype": adapter_dtype}}
    engine = make_engine(folder, dtype=dtype, additional_config=chosen)
    reference = reference_of(folder)
    # The backbone is narrowed; the adapters stay as they are stored, unless the user says else.
    dtypes = engine.llm.apply_model(dtypes_of)
    assert dtypes == [{dtype, "float32" if adapter_dtype == "auto" else adapter_dtype}]
    for kind in (MUX, BOTH):
        check(engine, reference, kind, tolerance)


def dtypes_of(model: torch.nn.Module) -> set[str]:
    """Of the parameters, without the head, which vLLM keeps in float32."""
    return {
        str(parameter.dtype).removeprefix("torch.")
        for name, parameter in model.named_parameters()
        if "score" not in name and "classifier" not in name
    }


def quantize(backbone: Path) -> None:
    """Weights to int8 by channel, activations by token while running: compressed-tensors' W8A8.

    Written by hand, since the tools that make such folders want a calibration run and a hub.
    """
    state = {}
    for name, weight in load_file(backbone / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            state[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127
        state[name] = (weight / scale).round().to(torch.int8)
        state[f"{name}_scale"] = scale
    save_file(state, backbone / "model.safetensors", {"format": "pt"})
    config = json.loads((backbone / "config.json").read_text())
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "score"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": eight | {"strategy": "channel", "dynamic": False},
                "input_activations": eight | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (backbone / "config.json").write_text(json.dumps(config))


def test_int8(
    tmp_path: Path,
    make_engine: Callable[..., RecordingEngine],
    plain_vllm: Callable[..., PlainEngine],
) -> None:
    """Alone vLLM's own answer; otherwise near transformers' reading of the same folder."""
    ladder = checkpoint.load_adapters(make_tiny_checkpoint(tmp_path, rungs=ALL))
    quantize(tmp_path / "backbone")
    folder = tmp_path / "int8"
    checkpoint.save(folder, ladder, tmp_path / "backbone", "# int8\n", bundle_backbone=True)
    # With AMX vLLM takes kernels that know no float32.
    dtype = {"dtype": "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"}
    engine, reference = make_engine(folder, **dtype), reference_of(folder)
    for kind in (MUX, BOTH):
        engine.planner.policy = ByCrowd(parse_rungs(kind.split(",")))
        for seed, count in BATCHES:
            prompts = random_prompts(seed, count)
            probs, groups, rungs = engine.answers(prompts)
            difference = (probs - reference(prompts, groups, rungs)).abs().mean().item()
            assert difference <= INT8_MEAN_TOLERANCE, (kind, seed, count)
    engine.planner.policy = ByCrowd(())
    prompts = random_prompts(4, 64)
    expected = torch.tensor(plain_vllm(tmp_path / "backbone", **dtype).probabilities(prompts))
    difference = (engine.answers(prompts)[0] - expected).abs()
    # In bfloat16 blocks of another size round elsewhere.
    assert difference.max().item() <= (0.05 if dtype["dtype"] == "bfloat16" else 0)
