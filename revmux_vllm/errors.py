"""What the user can mend, told apart by its type from our own bugs.

A library raises ``UserError`` and names options in Python's spelling. Each front (command line,
``config.json``, ``--additional-config``, Ray Serve) renders it in the spelling of its own users.
Every other exception is a bug and keeps its traceback.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

Spelling = Callable[[str], str]
"""Name of an option in Python to its name at a front, such as ``hold_out`` to ``--hold-out``."""

CLONE_CURE = "in a clone of this repository `pip install -e '.[{extra}]'` cures it"
_OPTION = re.compile(r"`([a-z][a-z0-9_]*)`")
_UNSAID = object()


class UserError(ValueError):
    """Something that the user can mend.

    Options are named in backticks, ``"`hold_out`"``, in any of the texts, and nothing else is; what
    was found is printed as it is.

    Args:
        what: the option, file or row at fault.
        problem: what is wrong with it, where that is not what was expected and found.
        expected: which values it may have.
        found: the value that it has.
        cure: what to do.
    """

    def __init__(
        self,
        what: str,
        problem: str = "",
        *,
        expected: str = "",
        found: object = _UNSAID,
        cure: str = "",
    ) -> None:
        self.what, self.problem, self.expected, self.found, self.cure = (
            what,
            problem,
            expected,
            found,
            cure,
        )
        super().__init__(self.words())

    def words(self, spell: Spelling = str, typed: bool = False) -> str:
        """The message.

        Args:
            spell: of the front; default Python's.
            typed: the value stands behind its option, as in ``--epochs 0``.
        """
        what, problem, expected, cure = (
            _OPTION.sub(lambda option: spell(option[1]), text)
            for text in (self.what, self.problem, self.expected, self.cure)
        )
        wanted = f"expected {expected}" if expected else ""
        found = "" if self.found is _UNSAID else f"found {self.found!r}"
        if found and typed and _OPTION.fullmatch(self.what):
            what, found = f"{what} {_as_typed(self.found)}".rstrip(), ""
        compared = ", ".join(part for part in (wanted, found) if part)
        text = ": ".join(part for part in (what, problem, compared) if part)
        return f"{text}; {cure}" if cure else text

    def __reduce__(self) -> tuple[Any, ...]:
        said = {name: getattr(self, name) for name in ("problem", "expected", "cure")}
        if self.found is not _UNSAID:
            said["found"] = self.found
        return _unpickled, (self.what, said)


class UserErrors(UserError):
    """Several mistakes, one on each line of the message."""

    def __init__(self, mistakes: Sequence[UserError]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("")

    def words(self, spell: Spelling = str, typed: bool = False) -> str:
        """The messages of all."""
        return "\n".join(mistake.words(spell, typed) for mistake in self.mistakes)

    def __reduce__(self) -> tuple[Any, ...]:
        return UserErrors, (self.mistakes,)


def _unpickled(what: str, said: dict[str, Any]) -> UserError:
    return UserError(what, **said)


def raise_all(mistakes: Sequence[UserError]) -> None:
    """Raise all ``mistakes`` at once; nothing where there is none."""
    if len(mistakes) == 1:
        raise mistakes[0]
    if mistakes:
        raise UserErrors(mistakes)


def as_option(name: str) -> str:
    """An option as a message names it, so that a front can still spell it."""
    return f"`{name}`"


@contextmanager
def within(place: str, spell: Spelling = as_option) -> Iterator[None]:
    """UserErrors raised inside name their ``place``, and options as ``spell`` does."""
    try:
        yield
    except UserError as error:
        raise UserError(place, error.words(spell)) from error


def require(*modules: str, extra: str) -> None:
    """Raise UserError unless all ``modules`` are installed, naming what installs them.

    Args:
        modules: top-level names.
        extra: of this package, which brings them; vLLM has a script of its own.
    """
    for module in modules:
        if find_spec(module) is None:
            cure = CLONE_CURE.format(extra=extra)
            if module == "vllm":
                cure = "tools/install.sh installs vLLM"
            raise UserError(f"{module} is not installed", cure=cure)


def _as_typed(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
