"""Who shares a composite: plain Python and numpy, no engine, no torch.

A plan says only which requests go together. How their rows are combined is the adapter's matter,
and how the upper layers see them is the engine's.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from revmux_vllm.rungs import Rung


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

    def counts(self) -> dict[Rung, int]:
        """Requests by the rung at which they run."""
        counts: dict[Rung, int] = {}
        for rung in self.rungs:
            counts[rung] = counts.get(rung, 0) + rung.mux
        return counts


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


def pack_rungs(
    lengths: Sequence[int],
    rungs: Iterable[Rung],
    domains: Sequence[Hashable] | None = None,
) -> list[tuple[Rung, tuple[int, ...]]]:
    """``pack`` for the cheapest of ``rungs``, narrower ones as merged as it for what is left.

    What is left without a partner runs at the rung that merges as much, or else at the cheapest one
    that needs no partner, which is the backbone alone if nothing merges.

    Args:
        lengths, domains: as for ``pack``.
        rungs: that may be used; the backbone alone always may.
    """
    ladder = [Rung(), *rungs]
    cheapest = max(ladder, key=lambda rung: (rung.saving, rung.merge))
    alone = max(
        (rung for rung in ladder if rung.mux == 1),
        key=lambda rung: (rung.merge == cheapest.merge > 1, rung.saving),
    )
    widths = [rung.mux for rung in ladder if rung.merge == cheapest.merge]
    return [
        (alone if len(group) == 1 else Rung(cheapest.merge, len(group)), group)
        for group in pack(lengths, widths if cheapest.mux > 1 else [], domains)
    ]


def plan_requests(
    request_ids: Sequence[str],
    lengths: Sequence[int],
    rungs: Iterable[Rung],
    domains: Sequence[Hashable] | None = None,
) -> MuxPlan:
    """``pack_rungs`` under the requests' own names."""
    packed = pack_rungs(lengths, rungs, domains)
    groups = tuple(tuple(request_ids[i] for i in group) for _, group in packed)
    return MuxPlan(groups, tuple(rung for rung, _ in packed))
