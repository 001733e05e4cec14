"""Early exit, the alternative to fewer rows: a small head answers after some layer."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn

from revmux_vllm.adapters.reading import ExitHead
from revmux_vllm.checkpoint import write_whole
from revmux_vllm.config import RevMuxConfig

MOST_EXITS = 9
# In a folder of its own: vLLM reads every safetensors file that lies beside config.json.
EXIT_FOLDER = Path("early_exit")
EXIT_FILE = EXIT_FOLDER / "exits.safetensors"


def exit_layers(config: RevMuxConfig, num_layers: int) -> list[int]:
    """After which layers to measure early exit: the cut, stops, and others evenly spread.

    These are a third of the layers, at most nine.
    """
    count = min(MOST_EXITS, max(3, num_layers // 3), num_layers - 1)
    spread = {round((i + 1) * num_layers / (count + 1)) for i in range(count)}
    stops = {rung.stop for rung in config.rungs if rung.stop}
    return sorted(spread | stops | {config.prefill_layers})


def make_exits(
    layers: list[int], hidden_size: int, inner_size: int, num_labels: int
) -> nn.ModuleDict:
    """A head per layer, by the layer's number."""
    return nn.ModuleDict(
        {str(layer): ExitHead(hidden_size, inner_size, num_labels) for layer in layers}
    )


def save_exits(folder: Path, exits: nn.ModuleDict, inner_size: int, dtype: torch.dtype) -> None:
    """Write the heads beside a checkpoint."""
    path = folder / EXIT_FILE
    path.parent.mkdir(exist_ok=True)
    state = {key: tensor.to(dtype).contiguous() for key, tensor in exits.state_dict().items()}
    write_whole(path, serialize(state, metadata={"inner_size": str(inner_size)}))


def load_exits(folder: Path, hidden_size: int, num_labels: int) -> nn.ModuleDict:
    """The heads of a checkpoint in float32, by layer; empty if it has none."""
    path = folder / EXIT_FILE
    if not path.is_file():
        return nn.ModuleDict()
    state = load_file(path)
    with safe_open(path, "pt") as file:
        inner_size = int(file.metadata()["inner_size"])
    layers = sorted({int(key.split(".")[0]) for key in state})
    exits = make_exits(layers, hidden_size, inner_size, num_labels)
    exits.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return exits.eval()
