"""Who shares a composite.

A plan says only which requests go together. How their rows are combined is the adapter's matter,
and how the upper layers see them is the engine's.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from revmux_vllm.rungs import Rung

Packed = tuple[Rung, tuple[int, ...]]
"""A rung, and indices of the requests that share it, carrier first."""


@dataclass(frozen=True)
class MuxPlan:
    """The composites of one engine step.

    Attributes:
        groups: request ids of each composite, the carrier (its longest member) first. A group of
            one shares its rows with nobody.
        rungs: at which each of them runs, as many as there are groups.
    """

    groups: tuple[tuple[str, ...], ...]
    rungs: tuple[Rung, ...]

    def __post_init__(self) -> None:
        members = [member for group in self.groups for member in group]
        if len(members) != len(set(members)):
            raise ValueError(f"plan: a request stands in more than one composite: {self.groups}")
        if any(not group for group in self.groups):
            raise ValueError("plan: an empty composite")
        if [rung.mux for rung in self.rungs] != [len(group) for group in self.groups]:
            raise ValueError(f"plan: rungs {self.rungs} for composites {self.groups}")

    @property
    def all_alone(self) -> bool:
        """Whether every request runs on the backbone alone."""
        return all(rung == Rung() for rung in self.rungs)


def pack(
    lengths: Sequence[int],
    widths: Iterable[int],
    domains: Sequence[Hashable] | None = None,
    max_tokens: float = math.inf,
) -> list[tuple[int, ...]]:
    """Group sequences into composites, similar lengths together.

    Within a domain the sequences are sorted by length, longest first, and cut greedily from the
    top: each time as many as the largest width that there are enough for and that a step has room
    for, and what is left runs alone. O(n log n); equal lengths keep their order, so the result
    depends on the arguments alone.

    Args:
        lengths: tokens of each sequence, all positive.
        widths: composite widths that adapters exist for; 1 is always allowed.
        domains: isolation domain of each sequence; sequences of different domains never share a
            composite. Default: one domain.
        max_tokens: of a step: no composite has more, all members together.

    Returns:
        Groups of indices into ``lengths``, each index in exactly one, carrier first.
    """
    ladder = sorted(set(widths) - {1}, reverse=True)
    if any(width < 1 for width in ladder):
        raise ValueError(f"widths: expected positive integers, found {sorted(set(widths))}")
    by_domain: dict[Hashable, list[int]] = {}
    if domains is None:
        by_domain[None] = list(range(len(lengths)))
    else:
        for index, domain in enumerate(domains):
            by_domain.setdefault(domain, []).append(index)

    groups: list[tuple[int, ...]] = []
    for members in by_domain.values():
        members.sort(key=lengths.__getitem__, reverse=True)
        until = list(accumulate(map(lengths.__getitem__, members), initial=0))
        start = 0
        while start < len(members):
            for width in ladder:
                end = start + width
                if end <= len(members) and until[end] - until[start] <= max_tokens:
                    break
            else:
                end = start + 1
            groups.append(tuple(members[start:end]))
            start = end
    return groups


def pack_rungs(
    lengths: Sequence[int],
    rungs: Iterable[Rung],
    domains: Sequence[Hashable] | None = None,
    exact: Collection[int] = (),
    max_tokens: float = math.inf,
    prefixes: Sequence[Hashable] | None = None,
) -> list[Packed]:
    """``pack`` for the widest of ``rungs``, narrower ones for what is left.

    What is left without a partner runs at the one of them that needs none, or else on the backbone
    alone.

    Args:
        lengths, domains, max_tokens: as for ``pack``.
        rungs: that may be used, all of one way; the backbone alone always may.
        exact: indices of those that run on the backbone alone whatever else may be used.
        prefixes: what each of them begins with; None: like no other. Where there are enough for the
            widest composite those that begin alike are partners, before others are.
    """
    by_width = {1: Rung()} | {rung.mux: rung for rung in rungs}
    own = [None] * len(lengths) if domains is None else domains

    def packed(
        indices: list[int], widths: Iterable[int], apart: Sequence[Hashable]
    ) -> list[Packed]:
        theirs = [apart[i] for i in indices]
        groups = pack([lengths[i] for i in indices], widths, theirs, max_tokens)
        return [(by_width[len(group)], tuple(indices[i] for i in group)) for group in groups]

    left = [i for i in range(len(lengths)) if i not in exact]
    found: list[Packed] = []
    if prefixes is not None:
        widest = max(by_width)
        shared = [i for i in left if prefixes[i] is not None]
        apart = list(zip(own, prefixes, strict=True))
        found = [entry for entry in packed(shared, [widest], apart) if len(entry[1]) == widest]
        taken = {i for _, group in found for i in group}
        left = [i for i in left if i not in taken]
    return [*found, *packed(left, by_width, own), *((Rung(), (i,)) for i in sorted(exact))]


def alike(blocks: Sequence[Sequence[Hashable]], least: int) -> list[Hashable]:
    """What each sequence begins with that ``least`` of them begin with, as much as possible.

    Those that have so many partners for a long beginning are not counted for a shorter one, so a
    few of the others may find no partners. O(n log m) for n sequences of m blocks.

    Args:
        blocks: of every sequence; a block is named by all tokens until its end, so sequences that
            have one in common have all before it in common.
        least: how many, at least 2.

    Returns:
        The name of the last block that is shared, or None.
    """
    found: list[Hashable] = [None] * len(blocks)
    most = max(map(len, blocks), default=0)
    todo: list[tuple[list[int], int, int]] = [(list(range(len(blocks))), 0, most)]
    while todo:
        members, low, high = todo.pop()  # these share ``low`` blocks, and none more than ``high``
        if len(members) < least:
            continue
        if low == high:
            for i in members if low else ():
                found[i] = blocks[i][low - 1]
            continue
        middle = (low + high + 1) // 2
        classes: dict[Hashable, list[int]] = defaultdict(list)
        others = []
        for i in members:
            own = blocks[i]
            if len(own) < middle:
                others.append(i)
            else:
                classes[own[middle - 1]].append(i)
        for group in classes.values():
            if len(group) < least:
                others += group
            else:
                todo.append((group, middle, high))
        todo.append((sorted(others), low, middle - 1))
    return found


def first_of(
    packed: Iterable[Packed],
    lengths: Sequence[int],
    rungs: Collection[Rung],
    max_tokens: int,
    max_requests: int,
    fresh: frozenset[int] | set[int] = frozenset(),
    tokens_of: Callable[[Packed], int] | None = None,
) -> list[Packed]:
    """The composites that run now: the one with the longest waiting member first, and so on.

    So whoever overtakes shares a composite with one that did not: the p-th request of the queue is
    overtaken by at most ``(N - 1) * p`` others, and runs no later than if its predecessors had run
    alone, as many in a step as there are composites. ``fresh`` ones may wait for one step more, as
    long as a composite of the widest kind runs meanwhile. O(n log n).

    Args:
        packed: as ``pack_rungs`` gives them; indices are places in the queue.
        lengths: tokens of each request.
        rungs: as for ``pack_rungs``.
        max_tokens, max_requests: of a step. A composite beyond them by itself runs in part, and a
            request longer than a step alone in it, as the first of its chunks. Upper layers never
            have more rows or sequences than lower ones, so these are theirs too.
        fresh: requests that may be left for the next step, where they may find partners.
        tokens_of: how many a composite takes of the step; default: all of its members'.
    """
    chosen: list[Packed] = []
    for rung, group in sorted(packed, key=lambda entry: min(entry[1])):
        tokens = tokens_of((rung, group)) if tokens_of else sum(lengths[i] for i in group)
        if tokens > max_tokens or len(group) > max_requests:
            if not chosen and max_requests and len(group) == 1:
                chosen = [(rung, group)]
            elif not chosen:
                part = _fitting(sorted(group), lengths, max_tokens, max_requests)
                packed_part = pack_rungs([lengths[i] for i in part], rungs)
                chosen = [(at, tuple(part[i] for i in members)) for at, members in packed_part]
            break
        chosen.append((rung, group))
        max_tokens -= tokens
        max_requests -= len(group)
    widest = max((rung.mux for rung in rungs), default=1)
    if any(rung.mux == widest for rung, _ in chosen):
        return [e for e in chosen if e[0].mux == widest or not fresh.issuperset(e[1])]
    return chosen


def _fitting(
    members: Sequence[int], lengths: Sequence[int], max_tokens: int, max_requests: int
) -> list[int]:
    """As many of ``members`` as fit, from the first on."""
    fitting: list[int] = []
    for i in members:
        max_tokens -= lengths[i]
        max_requests -= 1
        if min(max_tokens, max_requests) < 0:
            break
        fitting.append(i)
    return fitting


def fallbacks(alone: Sequence[tuple[Hashable, str]], because: str | None) -> Counter[str]:
    """Why requests run alone, counted.

    Args:
        alone: isolation domain of each, and a reason of its own (``exact``, ``long``) or "".
        because: what to call it where no other rung was used; None where one was. Then those of one
            domain had no partner left (``no_partner``), those of several were kept apart
            (``isolation``).
    """
    domains = [domain for domain, own in alone if not own]
    apart = "isolation" if len(set(domains)) > 1 else "no_partner"
    reasons = Counter(own for _, own in alone if own)
    return +(reasons + Counter({because or apart: len(domains)}))
