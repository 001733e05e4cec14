"""What the kit is asked to do, checked before anything starts, and how long that may take."""

from dataclasses import dataclass
from pathlib import Path

from gpu.shapes import RUNGS, SHAPES, Shape
from revmux_vllm.config import layer_limit
from revmux_vllm.errors import UserError
from revmux_vllm.rungs import Rung

CHECK, PARITY, SYNC, THROUGHPUT, LATENCY = STAGES = (
    "check",
    "parity",
    "sync",
    "throughput",
    "latency",
)
"""In the order in which they run; the last two share their engines, shape by shape."""
FAMILIES = ("llama", "bert")
DTYPES = ("float32", "bfloat16")
"""Of parity: on a GPU the first runs on Triton's attention, the second on FlashAttention."""
LENGTHS = (40, 128, 512)
LATENCY_LENGTH = 128
MOST_TOKENS = 4096
"""A step of vLLM on CPUs; on GPUs it is longer."""

TOKENS_PER_S_AND_PARAMETER = 2.0e14
"""Tokens per second times parameters: 400 TFLOP/s at two operations each. A guess for one H100."""
REQUEST_S = 2e-4
"""A guess at what a request costs the host."""
START_S = 45.0
"""A guess at how long two engines of a tiny model take to start."""


@dataclass(frozen=True)
class Settings:
    """The options of the kit, read.

    Attributes:
        stages: some of ``STAGES``.
        shapes: names; None is 0.1b, 1b and 8b on a GPU and tiny on a CPU.
        lengths: tokens of a prompt.
        rungs: that are measured.
        rounds: of throughput, after one to warm up.
        latency_s: that each engine is offered a quarter load for, twice.
        memory_share: of the GPU's memory, for each of the two engines of a shape.
        minutes: no item starts later, and none runs on; None is no limit.
        enforce_eager: neither compile nor capture graphs.
        seed: of prompts.
        out: folder of the report and the logs.

    Raises:
        UserError: naming the first option whose value cannot work.
    """

    stages: tuple[str, ...] = STAGES
    shapes: tuple[str, ...] | None = None
    lengths: tuple[int, ...] = LENGTHS
    rungs: tuple[Rung, ...] = RUNGS
    rounds: int = 5
    latency_s: float = 10.0
    memory_share: float = 0.45
    minutes: float | None = None
    enforce_eager: bool = False
    seed: int = 0
    out: Path = Path("gpu-report")

    def __post_init__(self) -> None:
        for option, given, known in (
            ("`stages`", self.stages, STAGES),
            ("`shapes`", self.shapes or (), tuple(SHAPES)),
            ("`rungs`", self.rungs, RUNGS),
        ):
            unknown = [str(one) for one in given if one not in known]
            if unknown or (not given and option != "`shapes`"):
                expected = f"some of {', '.join(map(str, known))}"
                raise UserError(option, expected=expected, found=",".join(unknown))
        if not self.lengths or min(self.lengths) < 1 or max(self.lengths) > MOST_TOKENS:
            expected = f"numbers of tokens from 1 to {MOST_TOKENS}, as in 40,128"
            raise UserError("`lengths`", expected=expected, found=self.lengths)
        if not 0 < self.memory_share <= 0.48:
            expected = "above 0 and at most 0.48, for two engines share a GPU"
            raise UserError("`memory_share`", expected=expected, found=self.memory_share)

    def shapes_on(self, is_gpu: bool) -> list[Shape]:
        """Those that are measured."""
        default = ("0.1b", "1b", "8b") if is_gpu else ("tiny",)
        return [SHAPES[name] for name in self.shapes or default]

    def latency_length(self) -> int:
        """Of the prompts whose latency is measured: 128 tokens, or the first of ``lengths``."""
        return LATENCY_LENGTH if LATENCY_LENGTH in self.lengths else self.lengths[0]

    def planned_s(self, shapes: list[Shape]) -> dict[str, float]:
        """Seconds of every stage on one H100, guessed before anything was measured there."""
        per_parity = START_S
        seconds = {
            CHECK: 20.0,
            PARITY: len(FAMILIES) * len(DTYPES) * per_parity,
            SYNC: 2 * START_S / 2,
            THROUGHPUT: sum(shape.start_s + self._throughput_s(shape) for shape in shapes),
            LATENCY: sum(4 * self.latency_s + 2 for _ in shapes),
        }
        if THROUGHPUT not in self.stages:
            seconds[LATENCY] += sum(shape.start_s for shape in shapes)
        return {stage: seconds[stage] for stage in STAGES if stage in self.stages}

    def _throughput_s(self, shape: Shape) -> float:
        """Of all rounds: plain, alone, ``load`` and every rung, each as fast as its layer limit."""
        cut, layers = shape.prefill_layers, shape.num_layers
        limits = [layer_limit(rung, cut, layers) for rung in self.rungs]
        passes = 2 + sum(1 / limit for limit in limits) + 1 / max(limits, default=1)
        seconds = 0.0
        for length in self.lengths:
            requests = shape.requests(length)
            model_s = requests * length * shape.parameters / TOKENS_PER_S_AND_PARAMETER
            seconds += (self.rounds + 1) * max(passes * model_s, 9 * requests * REQUEST_S)
        return seconds


def read_names(text: str) -> tuple[str, ...]:
    """``a,b`` without empty ones."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def read_lengths(text: str) -> tuple[int, ...]:
    """``40,128``. Raises UserError for what is no number."""
    words = read_names(text)
    if not words or not all(word.isdecimal() for word in words):
        raise UserError("`lengths`", expected="numbers of tokens, as in 40,128", found=text)
    return tuple(map(int, words))
