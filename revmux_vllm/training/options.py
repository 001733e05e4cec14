"""What a user may choose of a training, in one piece. Light to import: the command reads it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.errors import UserError, raise_all
from revmux_vllm.rungs import Rung, parse_rungs
from revmux_vllm.training.recipes import RECIPES, Recipe

AUTO = "auto"
STORE_DTYPES = (AUTO, "float32", "bfloat16", "float16")
MAY_CHANGE = ("output", "eval", "bundle_backbone", "store_dtype")
"""Options that a resumed training need not have been begun with: what is done with its result."""


@dataclass(frozen=True)
class TrainOptions:
    """One training. ``revmux train`` fills it from its command line, and a folder keeps it.

    Attributes:
        backbone: folder or hub id of the frozen classifier.
        train: file or hub data set to train on.
        output: checkpoint folder to write.
        eval: rows to measure the result on; None measures nothing.
        text_columns: one column, or two for pairs; None: the usual names.
        label_column: None: the usual names.
        label_words: one word per class, for a language model that answers with words.
        score_template: how a pair becomes one text where two words say whether it fits; see
            ``prompts.render``.
        rungs: all trained together; None: proposed by a survey of early exits.
        prefill_layers: None: proposed likewise.
        adapter_type, adapter_hidden_size: as ``RevMuxConfig`` has them.
        recipe: how, with what the user gave in place of its own.
        max_tokens: longer texts are cut.
        hold_out: share of the rows that chooses the best of the checkpoints, and the thresholds of
            the cascade.
        validation: rows that do so in place of a share, better if the backbone never saw them.
        bundle_backbone: copy the backbone into the folder; otherwise the folder names it.
        store_dtype: of the adapters; see ``STORE_DTYPES``. ``auto`` is the backbone's.
        bf16: automatic mixed precision.
        gradient_accumulation: batches per step.
        seed: of everything random.

    Raises:
        UserError: naming every option whose value cannot work, with what was expected.
    """

    backbone: str
    train: str
    output: Path
    eval: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    label_words: tuple[str, ...] | None = None
    score_template: str | None = None
    rungs: tuple[Rung, ...] | None = None
    prefill_layers: int | None = None
    adapter_type: str = "revmux"
    adapter_hidden_size: int = 256
    recipe: Recipe = RECIPES["default"]
    max_tokens: int = 256
    hold_out: float = 0.05
    validation: str | None = None
    bundle_backbone: bool = False
    store_dtype: str = AUTO
    bf16: bool = False
    gradient_accumulation: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        rate, epochs, copies = self.recipe.learning_rate, self.recipe.epochs, self.recipe.copies
        steps, share = self.gradient_accumulation, self.hold_out
        checks = (
            ("epochs", epochs, 0 < epochs < math.inf, "more than 0"),
            ("learning_rate", rate, 0 < rate < math.inf, "more than 0"),
            ("augment", copies, 0 <= copies < math.inf, "at least 0"),
            ("hold_out", share, 0 <= share < 1, "a share of the rows, 0 to below 1"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("gradient_accumulation", steps, steps >= 1, "at least 1"),
            (
                "store_dtype",
                self.store_dtype,
                self.store_dtype in STORE_DTYPES,
                ", ".join(STORE_DTYPES),
            ),
        )
        mistakes = [
            UserError(f"`{name}`", expected=expected, found=value)
            for name, value, is_right, expected in checks
            if not is_right
        ]
        try:
            self.config()
        except UserError as error:
            mistakes.append(error)
        raise_all(mistakes)

    @property
    def is_settled(self) -> bool:
        """Whether cut and rungs are known; otherwise a survey proposes them."""
        return self.prefill_layers is not None and self.rungs is not None

    def settled(self, prefill_layers: int, rungs: tuple[Rung, ...]) -> "TrainOptions":
        """With these where the user gave none."""
        cut = self.prefill_layers if self.prefill_layers is not None else prefill_layers
        return replace(self, prefill_layers=cut, rungs=self.rungs or rungs)

    def config(self, pairs: bool = False) -> RevMuxConfig:
        """What the checkpoint says of itself; until these options are settled, of an exit alone.

        Args:
            pairs: whether the rows are pairs of texts.
        """
        return RevMuxConfig(
            rungs=(Rung(exit=True),) if self.rungs is None else self.rungs,
            prefill_layers=1 if self.prefill_layers is None else self.prefill_layers,
            adapter_type=self.adapter_type,
            adapter_hidden_size=self.adapter_hidden_size,
            skip=self.recipe.skip,
            label_words=self.label_words,
            pairs=pairs,
            score_template=self.score_template,
            max_tokens=self.max_tokens,
        )

    def changes_since(self, before: "TrainOptions") -> list[str]:
        """What a training that was begun with ``before`` cannot go on with, in words."""
        now, then = self._begun_with(), before._begun_with()
        return [f"{name} was {then[name]!r}" for name in now if now[name] != then[name]]

    def _begun_with(self) -> dict[str, Any]:
        values = self.to_dict()
        recipe: dict[str, Any] = values.pop("recipe")
        return recipe | {name: values[name] for name in values if name not in MAY_CHANGE}

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``from_dict`` reads it back."""
        rungs = None if self.rungs is None else list(map(str, self.rungs))
        values = asdict(self) | {"output": str(self.output), "rungs": rungs}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainOptions":
        """Read what ``to_dict`` wrote.

        Raises:
            UserError: naming options that are not known here.
        """
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            cure = "it was written by another version of revmux-vllm"
            raise UserError(", ".join(unknown), "unknown options", cure=cure)
        read: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in values.items()
        }
        rungs = values["rungs"]
        read |= {
            "output": Path(values["output"]),
            "rungs": None if rungs is None else parse_rungs(rungs),
        }
        return cls(**read | {"recipe": Recipe(**values["recipe"])})
