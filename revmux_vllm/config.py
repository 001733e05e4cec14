"""What the ``revmux`` object of a checkpoint's ``config.json`` says.

Every mistake in it is collected and raised at once, before an engine or a trainer starts.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from revmux_vllm.errors import UserError, raise_all, within
from revmux_vllm.rungs import Rung, parse_rungs

FORMAT_VERSION = 3
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
        score_template: how such a pair becomes one text, where two label words say whether it fits
            (``prompts.render``); None of any other checkpoint.
        backbone: folder or hub id of the backbone's weights; None when they lie beside this file.
            A relative path counts from the checkpoint folder.
        backbone_revision: commit of a backbone on the hub; None of any other.
        fingerprint: of a backbone in a folder of its own (``checkpoint/fingerprint.py``), or None.
        max_tokens: longer texts were cut in training; None where nobody noted it.
        format_version: version of the checkpoint format.

    Raises:
        UserError: naming every field whose value cannot work, with what was expected.
    """

    rungs: tuple[Rung, ...]
    prefill_layers: int
    adapter_type: str = "revmux"
    adapter_hidden_size: int = 256
    skip: bool = True
    label_words: tuple[str, ...] | None = None
    pairs: bool = False
    score_template: str | None = None
    backbone: str | None = None
    backbone_revision: str | None = None
    fingerprint: Mapping[str, Any] | None = field(default=None, hash=False)
    max_tokens: int | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if isinstance(self.label_words, list):
            object.__setattr__(self, "label_words", tuple(self.label_words))
        mistakes = [
            self._mistake_of("prefill_layers", _is_positive_int, "at least 1"),
            self._mistake_of(
                "adapter_type", ADAPTER_TYPES.__contains__, f"one of {', '.join(ADAPTER_TYPES)}"
            ),
            self._mistake_of("adapter_hidden_size", _is_positive_int, "at least 1"),
            *(self._mistake_of(key, _is_bool, "true or false") for key in ("skip", "pairs")),
            self._mistake_of("label_words", _are_different_words, "at least two different words"),
            self._mistake_of(
                "backbone", lambda name: name is None or isinstance(name, str), "a path or hub id"
            ),
            self._mistake_of(
                "backbone_revision", lambda name: name is None or isinstance(name, str), "a commit"
            ),
            self._mistake_of(
                "fingerprint", lambda own: own is None or isinstance(own, Mapping), "an object"
            ),
            self._mistake_of(
                "max_tokens", lambda most: most is None or _is_positive_int(most), "at least 1"
            ),
        ]
        if self.score_template is not None and len(self.label_words or ()) != 2:
            wanted = "two words, no and yes in this order, beside `score_template`"
            found = self.label_words or ()
            mistakes.append(UserError("`label_words`", expected=wanted, found=found))
        elif self.score_template is not None and self.label_words is not None:
            no, yes = (word.strip().casefold() for word in self.label_words)
            if no in ("yes", "true") or yes in ("no", "false"):
                expected, found = "no before yes", self.label_words
                mistakes.append(UserError("`label_words`", expected=expected, found=found))
        if not self.rungs:
            mistakes.insert(0, UserError("`rungs`", expected="at least one, such as mux:2"))
        if self.format_version != FORMAT_VERSION:
            problem = f"expected {FORMAT_VERSION}, found {self.format_version!r}"
            cure = "this checkpoint was written by another version of revmux-vllm"
            mistakes.insert(0, UserError("`format_version`", problem, cure=cure))
        raise_all([mistake for mistake in mistakes if mistake])

    def _mistake_of(
        self, key: str, is_right: Callable[[Any], bool], expected: str
    ) -> UserError | None:
        value = getattr(self, key)
        if is_right(value):
            return None
        return UserError(f"`{key}`", expected=expected, found=value)

    def kind(self, rung: Rung) -> tuple[Rung, ...]:
        """``rung`` and what serves those whom it leaves over: as short, and no wider.

        Empty for the backbone alone.
        """
        if rung.sure:
            return (rung,)
        alike = (r for r in self.rungs if r.way == rung.way)
        return tuple(r for r in alike if r.mux <= rung.mux)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RevMuxConfig":
        """Read the ``revmux`` object of a ``config.json``.

        Raises:
            UserError: in the spelling of the file; unknown and missing keys are named.
        """
        if not isinstance(values, Mapping):
            raise UserError("revmux", f"expected an object in config.json, found {values!r}")
        with within("", as_key):
            return cls._read(values)

    @classmethod
    def _read(cls, values: Mapping[str, Any]) -> "RevMuxConfig":
        known = {field.name for field in fields(cls)}
        required = {"rungs", "prefill_layers", "adapter_type", "format_version"}
        mistakes = [
            UserError(f"revmux.{key}", f"unknown key; known are {', '.join(sorted(known))}")
            for key in sorted(set(values) - known)
        ]
        mistakes += [UserError(f"`{key}`", "missing") for key in sorted(required - set(values))]
        rungs: tuple[Rung, ...] = ()
        names = values.get("rungs", [])
        if not isinstance(names, list | tuple):
            mistakes.append(UserError("`rungs`", expected="a list", found=names))
        else:
            try:
                rungs = parse_rungs(names)
            except UserError as error:
                mistakes.append(UserError("`rungs`", str(error)))
        raise_all(mistakes)
        return cls(**dict(values) | {"rungs": rungs})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``from_dict`` reads it back."""
        words = list(self.label_words) if self.label_words else None
        rungs = [str(rung) for rung in self.rungs]
        return asdict(self) | {"rungs": rungs, "label_words": words}

    def check_backbone(self, hidden_size: int, num_layers: int) -> None:
        """Raise UserError if a backbone of this shape cannot carry these rungs."""
        mistakes = [
            UserError(
                "`rungs`",
                f"{rung}: {rung.mux} does not divide the backbone's hidden_size {hidden_size}",
            )
            for rung in self.rungs
            if hidden_size % rung.mux
        ]
        mistakes += [
            UserError(
                "`rungs`",
                f"{rung}: stops between `prefill_layers` {self.prefill_layers} and the last of the "
                f"backbone's {num_layers} layers are",
                expected=f"{self.prefill_layers + 1} to {num_layers - 1}",
            )
            for rung in self.rungs
            if rung.stop and not self.prefill_layers < rung.stop < num_layers
        ]
        if self.prefill_layers >= num_layers:
            mistakes.append(
                UserError(
                    "`prefill_layers`",
                    expected=f"fewer than the backbone's {num_layers} layers",
                    found=self.prefill_layers,
                )
            )
        raise_all(mistakes)


def layer_limit(rung: Rung, prefill_layers: int, num_layers: int) -> float:
    """Speed-up if layers were the only cost: 1 / (l/L + (1 - l/L)/N).

    Args:
        rung: whose saving is N.
        prefill_layers: l.
        num_layers: L.
    """
    lower = prefill_layers / num_layers
    return 1 / (lower + (1 - lower) / rung.saving(prefill_layers, num_layers))


def as_key(name: str) -> str:
    """An option as ``config.json`` has it."""
    return f"revmux.{name}"


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _are_different_words(words: object) -> bool:
    if words is None:
        return True
    if not isinstance(words, tuple) or len(set(words)) < 2:
        return False
    return all(isinstance(word, str) and word for word in words)
