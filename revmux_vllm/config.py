"""What the ``revmux`` object of a checkpoint's ``config.json`` says.

Every mistake in it is collected and raised at once, in the spelling of the file, before an engine
or a trainer starts.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

FORMAT_VERSION = 1
ADAPTER_TYPES = ("revmux", "ora", "vanilla")


@dataclass(frozen=True)
class RevMuxConfig:
    """A ladder of composite widths over one frozen backbone.

    Attributes:
        widths: streams per composite (N), each at least 2, ascending; width 1 is always there.
        prefill_layers: backbone layers (l) that every sequence runs by itself.
        adapter_type: which multiplexer and demultiplexer; see ``ADAPTER_TYPES``.
        adapter_hidden_size: width of the demultiplexer's inner layers.
        skip: a member's own prefill state reaches its demultiplexer.
        label_words: the words, one per class, whose LM-head logits are the answer; None for a
            backbone with a classification head.
        backbone: folder or hub id of the backbone's weights; None when they lie beside this file.
            A relative path counts from the checkpoint folder.
        format_version: version of the checkpoint format.

    Raises:
        ValueError: naming every field whose value cannot work, with what was expected.
    """

    widths: tuple[int, ...]
    prefill_layers: int
    adapter_type: str = "revmux"
    adapter_hidden_size: int = 256
    skip: bool = True
    label_words: tuple[str, ...] | None = None
    backbone: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if isinstance(self.label_words, list):
            object.__setattr__(self, "label_words", tuple(self.label_words))
        problems = []
        if self.format_version != FORMAT_VERSION:
            problems.append(
                f"revmux.format_version: expected {FORMAT_VERSION}, found {self.format_version!r}; "
                "this checkpoint was written by another version of revmux-vllm"
            )
        if not self.widths or any(not _is_int(n) or n < 2 for n in self.widths):
            problems.append(
                f"revmux.widths: expected integers of at least 2, found {list(self.widths)!r}"
            )
        elif list(self.widths) != sorted(set(self.widths)):
            problems.append(
                f"revmux.widths: expected ascending and unique, found {list(self.widths)!r}"
            )
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
        if not isinstance(self.skip, bool):
            problems.append(f"revmux.skip: expected true or false, found {self.skip!r}")
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RevMuxConfig":
        """Read the ``revmux`` object. Unknown and missing keys are errors that name them."""
        if not isinstance(values, Mapping):
            raise ValueError(f"revmux: expected an object in config.json, found {values!r}")
        known = {field.name for field in fields(cls)}
        required = {"widths", "prefill_layers", "adapter_type", "format_version"}
        problems = [
            f"revmux.{key}: unknown key; known are {', '.join(sorted(known))}"
            for key in sorted(set(values) - known)
        ]
        problems += [f"revmux.{key}: missing" for key in sorted(required - set(values))]
        if not isinstance(values.get("widths", []), list | tuple):
            problems.append(f"revmux.widths: expected a list, found {values['widths']!r}")
        _raise(problems)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``from_dict`` reads it back."""
        words = list(self.label_words) if self.label_words else None
        return asdict(self) | {"widths": list(self.widths), "label_words": words}

    def check_backbone(self, hidden_size: int, num_layers: int) -> None:
        """Raise ValueError if a backbone of this shape cannot carry these widths."""
        problems = [
            f"revmux.widths: {n} does not divide the backbone's hidden_size {hidden_size}"
            for n in self.widths
            if hidden_size % n
        ]
        if self.prefill_layers >= num_layers:
            problems.append(
                f"revmux.prefill_layers: expected fewer than the backbone's {num_layers} layers, "
                f"found {self.prefill_layers}"
            )
        _raise(problems)


def layer_limit(width: int, prefill_layers: int, num_layers: int) -> float:
    """Speed-up at ``width`` if layers were the only cost: 1 / (l/L + (1 - l/L)/N)."""
    lower = prefill_layers / num_layers
    return 1 / (lower + (1 - lower) / width)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))
