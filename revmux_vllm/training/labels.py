"""Labels of a data set as classes of the backbone, by name where both have names, or as values."""

import math
import re
from collections.abc import Sequence
from typing import Any, Protocol

from revmux_vllm.errors import UserError
from revmux_vllm.problems import Problem
from revmux_vllm.training.losses import UNLABELLED

_NOBODYS = re.compile(r"label_\d+|\d+")
"""Names that say nothing about the classes: transformers' own where nobody gave any."""
_TRUTHS = {"false": 0, "true": 1}


Label = int | list[int] | list[float]
"""A class; for every label of several whether it is there; or values."""


class Reader(Protocol):
    """Reads the labels of one data set, in the order of its rows."""

    def read(self, value: Any, place: str) -> Label:
        """A label, or one that ``is_blank``; UserError naming ``place``."""


def is_blank(label: Label) -> bool:
    """Whether it stands for a row without a label."""
    if not isinstance(label, list):
        return label == UNLABELLED
    return any(math.isnan(one) if isinstance(one, float) else one == UNLABELLED for one in label)


def blank_like(label: Label) -> Label:
    """That of a row without a label, beside rows with ``label``."""
    if not isinstance(label, list):
        return UNLABELLED
    return [math.nan if isinstance(one, float) else UNLABELLED for one in label]


class OneClass:
    """Reads one class per row.

    Args:
        names: the backbone's classes in order.
        own: the data set's, where its labels are indices into names of its own (``ClassLabel`` of
            the datasets library); or None.
        words: ``names`` are label words or ours, not what the data set must call its classes.
        place: the data set, for messages.

    Raises:
        UserError: where the data set has other classes than the backbone, with both orders.
    """

    def __init__(
        self, names: Sequence[str], own: Sequence[str] | None, words: bool, place: str
    ) -> None:
        self.names = list(names)
        self._by_name = _unambiguous(names)
        self._own: list[int] | None = None if own is None else self._match(own, words, place)
        self._kinds: set[str] = set()

    def read(self, value: Any, place: str) -> int:
        """A class index, or ``UNLABELLED`` for -1 and for nothing.

        Args:
            value: an index, also as text, as a float or as true and false of two classes; or a
                class by its name, whatever its case.
            place: file and row, for messages.

        Raises:
            UserError: for anything else, and where names and indices are mixed.
        """
        name = self._named(value)
        index = name if name is not None else self._index(value)
        if index == UNLABELLED:
            return UNLABELLED
        most = len(self.names if self._own is None or name is not None else self._own)
        if index is None or not 0 <= index < most:
            raise self._unknown(value, index, place)
        self._kinds.add("index" if name is None else "name")
        if len(self._kinds) > 1:
            cure = "write all of them as indices or all as names"
            raise UserError(place, f"label {value!r}: mixed label types", cure=cure)
        return index if self._own is None or name is not None else self._own[index]

    def _match(self, own: Sequence[str], words: bool, place: str) -> list[int]:
        """Every class of the data set as one of the backbone's."""
        theirs = [self._by_name.get(name.casefold()) for name in own]
        known = [index for index in theirs if index is not None]
        if len(known) == len(own):
            return known
        silent = words or all(map(_NOBODYS.fullmatch, map(str.casefold, self.names)))
        silent = silent or all(map(_NOBODYS.fullmatch, map(str.casefold, own)))
        if silent and len(own) <= len(self.names):
            return list(range(len(own)))
        raise UserError(
            place,
            f"its classes are {', '.join(own)} in this order, the backbone's "
            f"{', '.join(self.names)}",
            cure="give both the same names (id2label of the backbone's config, ClassLabel of the "
            "data), or write the labels as the backbone's names",
        )

    def _named(self, value: Any) -> int | None:
        if not isinstance(value, str):
            return None
        if value in self.names:
            return self.names.index(value)
        return self._by_name.get(value.casefold())

    def _index(self, value: Any) -> int | None:
        if value is None or (isinstance(value, str) and not value.strip()):
            return UNLABELLED
        if isinstance(value, str):
            if len(self.names) == len(_TRUTHS) and value.casefold() in _TRUTHS:
                return _TRUTHS[value.casefold()]
            try:
                value = float(value)
            except ValueError:
                return None
        if isinstance(value, bool):
            return int(value) if len(self.names) == len(_TRUTHS) else None
        if not isinstance(value, int | float):
            return None
        if math.isnan(value) or value == UNLABELLED:
            return UNLABELLED
        return int(value) if float(value).is_integer() else None

    def _unknown(self, value: Any, index: int | None, place: str) -> UserError:
        last = len(self.names) - 1
        cure = ""
        if index == last + 1:
            cure = "indices begin at 0; if yours begin at 1, subtract one from each"
        return UserError(
            place,
            f"label {value!r}",
            expected=f"an integer from 0 to {last} or one of the backbone's classes, "
            + ", ".join(self.names),
            cure=cure,
        )


class SeveralLabels:
    """Reads which of several labels a row has.

    Args:
        names: the backbone's labels in order.
        own, words, place: as for ``OneClass``.
    """

    def __init__(self, names: Sequence[str], own: Sequence[str] | None, place: str) -> None:
        self.count, self._are_named = len(names), own is not None
        self._one = OneClass(names, own, words=False, place=place)

    def read(self, value: Any, place: str) -> list[int]:
        """For every label 1 or 0; ``UNLABELLED`` for -1 and for nothing.

        Args:
            value: a list of names or indices, with commas between them in a text, empty where there
                is none of them; or as many zeros and ones as there are labels, which a tuple always
                is.
            place: file and row, for messages.
        """
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, int | float) or value is None:
            value = [value]
        if not isinstance(value, list | tuple):
            problem = f"label {value!r}"
            raise UserError(place, problem, expected="a list of labels, or a zero or one for each")
        truths = [truth for one in value if (truth := _truth(one)) is not None]
        if len(truths) == len(value) == self.count and self._are_truths(value, place):
            return truths
        found = [self._one.read(one, place) for one in value]
        if UNLABELLED in found:
            return [UNLABELLED] * self.count
        return [int(i in found) for i in range(self.count)]

    def _are_truths(self, value: Sequence[Any], place: str) -> bool:
        """Of as many zeros and ones as there are labels: or are they indices?"""
        if isinstance(value, tuple) or self.count == 1:
            return True
        if self._are_named:
            return False
        if self.count == 2 and sorted(map(str, value)) == ["0", "1"]:
            cure = "write names, or true and false for each label"
            raise UserError(place, f"label {value!r}: two indices, or a zero and a one?", cure=cure)
        return True


class Values:
    """Reads the values that a row is to be given.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def read(self, value: Any, place: str) -> list[float]:
        """One for every output; NaN for nothing.

        Args:
            value: a number or a list of them, with commas between them in a text.
            place: file and row, for messages.
        """
        if value is None or (isinstance(value, str) and not value.strip()):
            return [math.nan] * self.count
        parts = value.split(",") if isinstance(value, str) else value
        try:
            values = [float(one) for one in (parts if isinstance(parts, list | tuple) else [parts])]
        except (TypeError, ValueError):
            values = []
        if len(values) != self.count or any(map(math.isinf, values)):
            expected = "a number" if self.count == 1 else f"{self.count} numbers"
            raise UserError(place, f"label {value!r}", expected=expected)
        return values


def reader(
    problem: Problem, names: Sequence[str], own: Sequence[str] | None, words: bool, place: str
) -> Reader:
    """For a problem; the others are as for ``OneClass``."""
    if problem is Problem.LABELS:
        return SeveralLabels(names, own, place)
    return Values(len(names)) if problem is Problem.VALUES else OneClass(names, own, words, place)


def _truth(value: Any) -> int | None:
    """1 or 0; None for what is neither."""
    return {"0": 0, "0.0": 0, "1": 1, "1.0": 1, **_TRUTHS}.get(str(value).casefold())


def _unambiguous(names: Sequence[str]) -> dict[str, int]:
    """Index by name in lower case; those that only their case tells apart are left out."""
    folded = [name.casefold() for name in names]
    return {name: i for i, name in enumerate(folded) if folded.count(name) == 1}
