"""Who shares a composite: plain Python and numpy, no engine, no torch.

A plan says only which requests go together. How their rows are combined is the adapter's matter,
and how the upper layers see them is the engine's.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MuxPlan:
    """The composites of one engine step.

    Attributes:
        groups: request ids of each composite, the carrier (its longest member) first. A group of
            one is a sequence that runs alone, which is the backbone itself.
    """

    groups: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        members = [member for group in self.groups for member in group]
        if len(members) != len(set(members)):
            raise ValueError(f"plan: a request stands in more than one composite: {self.groups}")
        if any(not group for group in self.groups):
            raise ValueError("plan: an empty composite")

    def counts(self) -> dict[int, int]:
        """Requests by the width at which they run, ascending."""
        counts: dict[int, int] = {}
        for group in self.groups:
            counts[len(group)] = counts.get(len(group), 0) + len(group)
        return dict(sorted(counts.items()))


def pack(
    lengths: Sequence[int],
    widths: Iterable[int],
    domains: Sequence[Hashable] | None = None,
) -> list[tuple[int, ...]]:
    """Group sequences into composites, similar lengths together.

    Within a domain the sequences are sorted by length, longest first, and cut greedily from the
    top: as many of the largest width as there are, then the next, and what is left runs alone.
    O(n log n); equal lengths keep their order, so the result depends on the arguments alone.

    Args:
        lengths: tokens of each sequence, all positive.
        widths: composite widths that adapters exist for; 1 is always allowed.
        domains: isolation domain of each sequence; sequences of different domains never share a
            composite. Default: one domain.

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
        start = 0
        for width in ladder:
            while len(members) - start >= width:
                groups.append(tuple(members[start : start + width]))
                start += width
        groups.extend((index,) for index in members[start:])
    return groups


def plan_requests(
    request_ids: Sequence[str],
    lengths: Sequence[int],
    widths: Iterable[int],
    domains: Sequence[Hashable] | None = None,
) -> MuxPlan:
    """``pack`` under the requests' own names."""
    groups = pack(lengths, widths, domains)
    return MuxPlan(tuple(tuple(request_ids[i] for i in group) for group in groups))
