"""What the ``revmux`` object of a checkpoint's ``config.json`` says.

Every mistake in it is collected and raised at once, in the spelling of the file, before an engine
or a trainer starts.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from revmux_vllm.rungs import Rung, parse_rungs

FORMAT_VERSION = 2
ADAPTER_TYPES = ("revmux", "ora", "vanilla")


@dataclass(frozen=True)
class RevMuxConfig:
    """A ladder of rungs over one frozen backbone.

    Attributes:
        rungs: what the upper layers may run on, sorted; the backbone alone is always there.
        prefill_layers: backbone layers (l) that every sequence runs by itself.
        adapter_type: which multiplexer and demultiplexer; see ``ADAPTER_TYPES``.
        adapter_hidden_size: width of the demultiplexer's inner layers.
        skip: a member's own prefill state reaches its demultiplexer.
        label_words: the words, one per class, whose LM-head logits are the answer; None for a
            backbone with a classification head.
        pairs: the texts come in pairs, two in one sequence.
        backbone: folder or hub id of the backbone's weights; None when they lie beside this file.
            A relative path counts from the checkpoint folder.
        format_version: version of the checkpoint format.

    Raises:
        ValueError: naming every field whose value cannot work, with what was expected.
    """

    rungs: tuple[Rung, ...]
    prefill_layers: int
    adapter_type: str = "revmux"
    adapter_hidden_size: int = 256
    skip: bool = True
    label_words: tuple[str, ...] | None = None
    pairs: bool = False
    backbone: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if isinstance(self.label_words, list):
            object.__setattr__(self, "label_words", tuple(self.label_words))
        problems = []
        if self.format_version != FORMAT_VERSION:
            problems.append(
                f"revmux.format_version: expected {FORMAT_VERSION}, found {self.format_version!r}; "
                "this checkpoint was written by another version of revmux-vllm"
            )
        if not self.rungs:
            problems.append("revmux.rungs: expected at least one, such as mux:2")
        if not _is_int(self.prefill_layers) or self.prefill_layers < 1:
            problems.append(
                f"revmux.prefill_layers: expected at least 1, found {self.prefill_layers!r}"
            )
        if self.adapter_type not in ADAPTER_TYPES:
            problems.append(
                f"revmux.adapter_type: expected one of {', '.join(ADAPTER_TYPES)}, "
                f"found {self.adapter_type!r}"
            )
        if not _is_int(self.adapter_hidden_size) or self.adapter_hidden_size < 1:
            problems.append(
                "revmux.adapter_hidden_size: expected at least 1, "
                f"found {self.adapter_hidden_size!r}"
            )
        for key in ("skip", "pairs"):
            if not isinstance(value := getattr(self, key), bool):
                problems.append(f"revmux.{key}: expected true or false, found {value!r}")
        words = self.label_words
        if words is not None and (
            not isinstance(words, tuple)
            or len(set(words)) < 2
            or not all(isinstance(word, str) and word for word in words)
        ):
            problems.append(
                f"revmux.label_words: expected at least two different words, found {words!r}"
            )
        if self.backbone is not None and not isinstance(self.backbone, str):
            problems.append(f"revmux.backbone: expected a path or hub id, found {self.backbone!r}")
        _raise(problems)

    def kind(self, rung: Rung) -> tuple[Rung, ...]:
        """``rung`` and what serves those whom it leaves over: as merged, and no wider.

        Empty for the backbone alone.
        """
        if rung.exit:
            return (rung,)
        alike = (r for r in self.rungs if r.merge == rung.merge and not r.exit)
        return tuple(r for r in alike if r.mux <= rung.mux)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RevMuxConfig":
        """Read the ``revmux`` object. Unknown and missing keys are errors that name them."""
        if not isinstance(values, Mapping):
            raise ValueError(f"revmux: expected an object in config.json, found {values!r}")
        known = {field.name for field in fields(cls)}
        required = {"rungs", "prefill_layers", "adapter_type", "format_version"}
        problems = [
            f"revmux.{key}: unknown key; known are {', '.join(sorted(known))}"
            for key in sorted(set(values) - known)
        ]
        problems += [f"revmux.{key}: missing" for key in sorted(required - set(values))]
        rungs: tuple[Rung, ...] = ()
        names = values.get("rungs", [])
        if not isinstance(names, list | tuple):
            problems.append(f"revmux.rungs: expected a list, found {names!r}")
        else:
            try:
                rungs = parse_rungs(names)
            except ValueError as error:
                problems.append(f"revmux.rungs: {error}")
        _raise(problems)
        return cls(**dict(values) | {"rungs": rungs})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``from_dict`` reads it back."""
        words = list(self.label_words) if self.label_words else None
        rungs = [str(rung) for rung in self.rungs]
        return asdict(self) | {"rungs": rungs, "label_words": words}

    @property
    def widths(self) -> tuple[int, ...]:
        """Streams N of the rungs that only multiplex, ascending."""
        return tuple(rung.mux for rung in self.rungs if rung.merge == 1 and rung.mux > 1)

    def check_backbone(self, hidden_size: int, num_layers: int) -> None:
        """Raise ValueError if a backbone of this shape cannot carry these rungs."""
        problems = [
            f"revmux.rungs: {rung}: {rung.mux} does not divide the backbone's hidden_size "
            f"{hidden_size}"
            for rung in self.rungs
            if hidden_size % rung.mux
        ]
        if self.prefill_layers >= num_layers:
            problems.append(
                f"revmux.prefill_layers: expected fewer than the backbone's {num_layers} layers, "
                f"found {self.prefill_layers}"
            )
        _raise(problems)


def layer_limit(saving: float, prefill_layers: int, num_layers: int) -> float:
    """Speed-up if layers were the only cost: 1 / (l/L + (1 - l/L)/N).

    Args:
        saving: N, rows of the backbone that one row of the upper layers stands for.
        prefill_layers: l.
        num_layers: L.
    """
    lower = prefill_layers / num_layers
    return 1 / (lower + (1 - lower) / saving)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))
