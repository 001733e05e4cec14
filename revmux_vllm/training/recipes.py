"""The named ways to train. Light to import: ``revmux train --help`` reads the defaults here."""

from dataclasses import dataclass, replace
from typing import Any

from revmux_vllm.rungs import parse_rungs


@dataclass(frozen=True)
class Recipe:
    """How to train. ``RECIPES`` has the named ones.

    Attributes:
        learning_rate: peak, after the warm-up.
        schedule: of the learning rate, by transformers' name.
        batch_size: sequences per step and device.
        epochs: passes over the rows and their copies.
        copies: unlabelled spliced copies per row (``data.spliced_copies``).
        skip: whether the adapters have the skip connection. Then every member is answered twice in
            training, with it and without: with it always there composites come to be ignored.
        paper_loss: cross-entropy, InfoNCE and stream similarity as the reference code has them;
            otherwise distilled answers and vectors.
    """

    learning_rate: float
    schedule: str
    batch_size: int
    epochs: float
    copies: float
    skip: bool
    paper_loss: bool

    def with_given(self, **options: Any) -> "Recipe":
        """This recipe with what the user gave in place of its own; None means not given."""
        return replace(self, **{key: value for key, value in options.items() if value is not None})


RECIPES = {
    "default": Recipe(1e-3, "cosine", 64, 2.0, 1.0, True, False),
    "paper": Recipe(2e-5, "linear", 32, 10.0, 0.0, False, True),
}
PAPER_RUNGS = parse_rungs(("mux:2", "mux:4"))
