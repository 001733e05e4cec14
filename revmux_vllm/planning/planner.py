"""One step, planned: what the engine's scheduler, the simulation and the tests ask.

Of the requests that wait, a window is packed into composites, and those with the oldest members are
chosen. The engine takes what it has room for, and what it took is the step. Nothing is remembered
from one step to the next but the rung, the costs and the times of the last choice: a request that
was aborted, preempted or not taken is simply not there, or there again, when the next step is
planned.

A request longer than a step is chosen by itself and runs in chunks. Until its last chunk the engine
chooses nobody else, and in a step with a chunk of a request in it everything runs alone.

All times are seconds on one clock, the caller's.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.planning.costs import ArrivalRate, Backlog, Budgets, LayerCosts
from revmux_vllm.planning.options import Options
from revmux_vllm.planning.packing import MuxPlan, alike, fallbacks, first_of, pack_rungs
from revmux_vllm.planning.policy import Fixed, Policy, make_policy
from revmux_vllm.planning.watching import TRUST_NAMES, Drift
from revmux_vllm.rungs import Rung

IDLE_S = 0.1
"""An engine that had nothing to do for so long has no load, whatever came before."""
RATE_HORIZONS = 5
"""The rate of arrivals is an average over so many horizons, so that a burst is no rate."""

SAMPLE = 16
"""Of what waits: it is looked up how much of so many is in the cache."""

Counts = Counter[tuple[str, str]]
"""What happened how often, by kind and label; of kind ``us`` how many microseconds it took."""


class Waiting(NamedTuple):
    """A request, as far as planning knows it.

    Attributes:
        id: of the request.
        num_tokens: of its prompt.
        domain: its isolation domain; None shares composites with others of no domain.
        exact: it asks for the backbone alone.
        arrived_s: when it came.
        fills: it runs alone, so that others find in the cache what they begin with.
    """

    id: str
    num_tokens: int
    domain: Hashable = None
    exact: bool = False
    arrived_s: float = 0.0
    fills: bool = False


Composite = tuple[Rung, tuple[Waiting, ...]]
"""A rung, and the requests that share it, carrier first."""


class Prefixes(Protocol):
    """What the engine knows of how requests begin."""

    def num_cached(self, request_id: str, rungs: Sequence[Rung] = ()) -> int:
        """Tokens of a request, about, that are in the cache: computed alone, or at one of
        ``rungs``."""

    def blocks(self, requests: Sequence[Waiting]) -> Sequence[Sequence[Hashable]]:
        """Names of the blocks that each begins with; a name stands for all tokens until there."""

    def remaining(self, rung: Rung, members: Sequence[Waiting]) -> int:
        """Tokens of a composite that are not in the cache at its rung."""


@dataclass(frozen=True)
class Step:
    """What should run now; empty while the engine lingers or is paused.

    Attributes:
        rungs: that it may use, beside the backbone alone.
        composites: by their longest waiting member.
    """

    rungs: tuple[Rung, ...] = ()
    composites: tuple[Composite, ...] = ()

    @property
    def members(self) -> list[Waiting]:
        """Of all composites, in their order."""
        return [member for _, group in self.composites for member in group]


def savings_of(options: Options, config: RevMuxConfig, num_layers: int) -> dict[Rung, float]:
    """What the contract saves, if there is one; see ``LayerCosts``."""
    if options.contract is None:
        return {}
    saving = options.contract.saving(config.prefill_layers, num_layers)
    return {Rung(sure=True): saving}


class StepPlanner:
    """Plans step after step: ``choose`` what should run, and ``plan`` what the engine took of it.

    Args:
        config: of the checkpoint.
        options: of the user.
        num_layers: layers L of the backbone.
        budgets: of one step.
        now_s: the time.
        costs: what steps cost; default: to be measured.
        windows: of every layer; see ``LayerCosts``.

    Attributes:
        policy: which rungs a step may use; may be replaced between two steps.
        counts: what was planned since they were last taken, and cleared, by whoever reports them.
        drift: of the traffic from what the contract was calibrated for; None without one.
        length: of the text that a waiting token is of, on average; the last that was seen.
        prefixes: None where the engine keeps none.
        uncached: share of what waits, in tokens, that is in no cache; of a sample.
    """

    def __init__(
        self,
        config: RevMuxConfig,
        options: Options,
        num_layers: int,
        budgets: Budgets,
        now_s: float,
        costs: LayerCosts | None = None,
        windows: Sequence[int | None] | None = None,
    ) -> None:
        self.config, self.options, self.budgets = config, options, budgets
        self.costs = costs or LayerCosts(
            config.prefill_layers, num_layers, savings_of(options, config, num_layers), windows
        )
        self.policy: Policy = make_policy(config, options, self.costs, budgets)
        self.arrivals = ArrivalRate(RATE_HORIZONS * options.target_ms / 1000, now_s)
        self.counts: Counts = Counter()
        self._chose_at_s = now_s
        self.length = 0.0
        self.drift = None if options.contract is None else Drift(options.contract)
        self.prefixes: Prefixes | None = None
        self.uncached = 1.0
        self._rungs: tuple[Rung, ...] = ()
        self._lingering_since_s: float | None = None
        self._idle_since_s: float | None = None

    def fix(self, rungs: tuple[Rung, ...]) -> None:
        """Answer at these rungs from now on, all of one way; none is the backbone alone."""
        self.policy = Fixed(rungs, self.costs)

    @property
    def window(self) -> int:
        """Most waiting requests to show to ``choose``, the longest waiting ones."""
        return self.policy.window

    def rest(self, now_s: float) -> None:
        """Everything that came is answered."""
        self._idle_since_s = now_s

    def left(
        self,
        counts: Mapping[str, int],
        shadows: Mapping[tuple[str, str], int] | None = None,
        trusts: Mapping[str, Sequence[int]] | None = None,
    ) -> bool:
        """So many requests under the contract left at each exit, or went to the end.

        Args:
            counts: by rung.
            shadows: of those that went to the end as a sample, by the rung where they would have
                left and by ``same`` or ``other``, their answer there.
            trusts: at every stop, how many requests had a trust in each of ``TRUST_NAMES``.

        Returns:
            Whether the traffic is not any more, since now, what the contract was calibrated for.
        """
        would = Counter(counts)
        for (rung, outcome), number in (shadows or {}).items():
            self.counts["shadow", outcome] += number
            would[rung] += number
            would[str(Rung())] -= number
        for rung, number in counts.items():
            self.counts["requests", rung] += number
            self.counts["composites", rung] += number
        for rung, number in would.items():
            self.counts["contract", rung] += number
        for rung, numbers in (trusts or {}).items():
            for name, number in zip(TRUST_NAMES, numbers, strict=True):
                if number:
                    self.counts["trust", f"{rung} {name}"] += number
        return self.drift is not None and bool(counts) and self.drift.observe(would)

    def arrive(self, num_tokens: int, request_id: str = "") -> None:
        """A request came; by its id the engine's ``prefixes`` know it."""
        if self.prefixes is not None:
            num_tokens -= self.prefixes.num_cached(request_id, self._rungs)
        self.arrivals.add(num_tokens)
        self.counts["arrived_tokens", ""] += num_tokens

    def choose(
        self, window: Sequence[Waiting], num_waiting: int, free_requests: int, now_s: float
    ) -> Step:
        """What should run now.

        Args:
            window: the first that wait, at most ``window`` of them.
            num_waiting: how many wait in all.
            free_requests: sequences that the engine has room for now.
            now_s: the time.
        """
        if window and self._idle_since_s is not None:
            if now_s - self._idle_since_s > IDLE_S:
                self.arrivals.forget(now_s)
            self._idle_since_s = None
        rungs = self._rungs = self.policy.rungs(self._backlog(window, num_waiting, now_s))
        if self._lingers(window, rungs, now_s):
            if self._lingering_since_s is None:
                self._lingering_since_s = now_s
            return Step(rungs)
        if self._lingering_since_s is not None and window:
            self.counts["us", "linger"] += round(1e6 * (now_s - self._lingering_since_s))
        self._lingering_since_s = None
        if all(rung.mux == 1 for rung in rungs):
            window = window[:free_requests]  # nobody looks for partners among the others
        lengths = [request.num_tokens for request in window]

        def remaining(entry: tuple[Rung, tuple[int, ...]]) -> int:
            rung, group = entry
            members = [window[i] for i in group]
            if self.prefixes is None:
                return sum(request.num_tokens for request in members)
            return self.prefixes.remaining(rung, members)

        packed = first_of(
            self._pack(window, rungs),
            lengths,
            rungs,
            self.budgets.max_tokens,
            free_requests,
            self._fresh(window, now_s),
            remaining,
        )
        return Step(rungs, tuple((rung, tuple(window[i] for i in group)) for rung, group in packed))

    def plan(
        self, step: Step, taken: Sequence[Waiting], chunks: Mapping[str, bool] | None = None
    ) -> MuxPlan:
        """The plan of the step, once the engine has taken what it could.

        Args:
            step: as ``choose`` gave it.
            taken: all that run, in the engine's order. Composites of which every member is there
                stay as they are; the members of others are packed anew.
            chunks: ids of those that run in part, and whether it is their last part, with which
                they are counted. Where there are any, everything runs alone.
        """
        if chunks:
            done = [request for request in taken if chunks.get(request.id, True)]
            self._count([(Rung(), (request,)) for request in done], "long")
            return MuxPlan(tuple((r.id,) for r in taken), (Rung(),) * len(taken))
        left = {request.id: request for request in taken}
        whole = [entry for entry in step.composites if all(m.id in left for m in entry[1])]
        for _, group in whole:
            for member in group:
                del left[member.id]
        rest = list(left.values())
        whole += [
            (rung, tuple(rest[i] for i in group)) for rung, group in self._pack(rest, step.rungs)
        ]
        self._count(whole, None if step.rungs else self.policy.alone_because)
        groups = tuple(tuple(member.id for member in group) for _, group in whole)
        return MuxPlan(groups, tuple(rung for rung, _ in whole))

    def capacity(self) -> dict[str, float]:
        """Tokens that full steps answer per second, at the rung in use and at the cheapest one."""
        most = self.budgets.max_tokens
        by_rung = {
            rung: self.costs.tokens_per_s(rung, most, self.length) for rung in self.policy.levels
        }
        return {"in_use": by_rung[self.policy.in_use], "widest": max(by_rung.values())}

    def _backlog(self, window: Sequence[Waiting], num_waiting: int, now_s: float) -> Backlog:
        """All that waits, its lengths judged by the window's."""
        rate = self.arrivals.update(now_s)
        tokens = sum(request.num_tokens for request in window) / max(1, len(window))
        if window:
            squares = sum(request.num_tokens**2 for request in window)
            self.length = squares / len(window) / tokens
        if window and self.prefixes is not None:
            sample = window[:: -(-len(window) // SAMPLE)]
            # What was computed at the rung in use is soon there for another one too.
            cached = sum(self.prefixes.num_cached(r.id, self._rungs) for r in sample)
            self.uncached = 1 - cached / sum(request.num_tokens for request in sample)
            tokens *= self.uncached
        return Backlog(num_waiting, num_waiting * tokens, rate, self.length)

    def _lingers(self, window: Sequence[Waiting], rungs: tuple[Rung, ...], now_s: float) -> bool:
        """Whether to wait for partners, which only ``linger_ms`` allows."""
        if not 0 < len(window) < max((rung.mux for rung in rungs), default=1):
            return False
        waited_ms = 1000 * (now_s - min(request.arrived_s for request in window))
        return waited_ms < self.options.linger_ms and not any(map(self._alone_because, window))

    def _fresh(self, window: Sequence[Waiting], now_s: float) -> set[int]:
        """Those that came while the last step ran, and could share a composite."""
        if not self.policy.defers:
            return set()
        began, self._chose_at_s = self._chose_at_s, now_s
        came = (i for i, request in enumerate(window) if request.arrived_s > began)
        return {i for i in came if not self._alone_because(window[i])}

    def _pack(
        self, requests: Sequence[Waiting], rungs: tuple[Rung, ...]
    ) -> list[tuple[Rung, tuple[int, ...]]]:
        most, prefixes = self.budgets.max_tokens, None
        widest = max((rung.mux for rung in rungs), default=1)
        if self.prefixes is not None and widest > 1:
            prefixes = alike(self.prefixes.blocks(requests), widest)
        return pack_rungs(
            [request.num_tokens for request in requests],
            rungs,
            # Members influence one another's answer, so tenants are kept apart.
            self._domains(requests),
            {i for i, r in enumerate(requests) if r.exact or r.num_tokens > most},
            most,
            prefixes,
        )

    def _alone_because(self, request: Waiting) -> str:
        """Why it never shares, whoever waits; empty if it may."""
        if request.exact or request.fills:
            return "exact" if request.exact else "prefix"
        return "long" if request.num_tokens > self.budgets.max_tokens else ""

    def _domains(self, requests: Sequence[Waiting]) -> list[Hashable]:
        if not self.options.isolate:
            return [request.domain for request in requests]
        # A tuple, which no name of a domain equals.
        return [(r.id,) if r.domain is None else r.domain for r in requests]

    def _count(self, composites: Sequence[Composite], alone_because: str | None) -> None:
        # Where those under the contract leave is known behind the step; see ``left``.
        known = (rung for rung, _ in composites if not rung.sure)
        for rung, number in Counter(known).items():
            self.counts["requests", str(rung)] += number * rung.mux
            self.counts["composites", str(rung)] += number
        for rung, group in composites:
            if rung.mux > 1:
                self.counts["composite_slots", ""] += rung.mux * group[0].num_tokens
                self.counts["composite_tokens", ""] += sum(r.num_tokens for r in group)
        alone = [group[0] for rung, group in composites if rung == Rung()]
        own = map(self._alone_because, alone)
        reasons = fallbacks(list(zip(self._domains(alone), own, strict=True)), alone_because)
        for reason, n in reasons.items():
            self.counts["fallbacks", reason] += n
