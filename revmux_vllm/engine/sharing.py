"""Which blocks of the cache a request may take from others, and leave to them.

vLLM finds a prefix by the hashes of its blocks. What the upper layers' pages hold depends on the
rung too, so a block has a name for every rung, and with M tokens to a row for all M blocks whose
rows lie in the first of them. A composite's rows lie in its carrier's blocks and are the same for
all composites of a rung only where all members begin with the same tokens, so:

* members take what the carrier takes, at most over the prefix that they all have;
* the carrier leaves its blocks of that prefix, and nobody leaves another;
* what is under a contract takes what ran alone, and leaves nothing, for it may stop anywhere. So of
  those that begin alike, and find nothing, one runs alone.

What is left is there for all that come behind, in the same step too: a layer writes all rows of a
step before it reads any. vLLM's own manager does all the rest: the names stand where it looks for
the hashes of a request.
"""

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from revmux_vllm.planning.packing import MuxPlan
from revmux_vllm.planning.planner import Composite, Step, Waiting
from revmux_vllm.rungs import Rung

_numbers = count()
NAMES = 1 << 16
"""Of a rung that are remembered, and not made anew."""
GROUPS = [0]
"""vLLM's groups of layers that share their blocks: one, as all our layers attend alike."""


@dataclass(frozen=True)
class Prefix:
    """What the members of a composite have in common.

    Attributes:
        names: of its blocks at the composite's rung.
        hit: how many of them are taken from others.
        is_clean: nothing is in the cache of those behind.
        blocks: those of the hit that are in the cache already.
    """

    names: Sequence[BlockHash]
    hit: int
    is_clean: bool
    blocks: Sequence[KVCacheBlock] = ()

    @property
    def next(self) -> BlockHash | None:
        """Of the first block that is missing."""
        return self.names[self.hit] if self.hit < len(self.names) else None


class SharedBlocks:
    """Names the blocks of what a step will run, for as long as vLLM schedules it.

    Args:
        manager: vLLM's ``KVCacheManager``.
        size: tokens of a block.
        requests: vLLM's, by id.
    """

    def __init__(self, manager: Any, size: int, requests: Mapping[str, Request]) -> None:
        self._pool, self._spare, self._size = manager.block_pool, manager.watermark_blocks, size
        self._manager, self._requests = manager, requests
        self._names = cache(Names)
        # Of the step that is made:
        self._entered: set[BlockHash] = set()
        self._asked: dict[tuple[Rung | str, ...], Sequence[BlockHash]] = {}
        self._taken: dict[str, int] = {}

    def num_cached(self, request_id: str, rungs: Sequence[Rung] = ()) -> int:
        """Tokens of a request, about, that are in the cache: computed alone, or at one of
        ``rungs``."""
        request = self._requests[request_id]
        most = (request.num_tokens - 1) // self._size
        hashes = request.block_hashes[:most]
        return self._size * max(
            # By halves, and not all names of every request that comes.
            bisect_left(range(names.count(hashes)), True, key=partial(self._misses, names, hashes))
            for names in map(self._names, {Rung(), *rungs})
        )

    def blocks(self, requests: Sequence[Waiting]) -> list[Sequence[BlockHash]]:
        """Names of the blocks that each begins with; a name stands for all tokens until there."""
        return [self._requests[request.id].block_hashes for request in requests]

    def remaining(self, rung: Rung, members: Sequence[Waiting]) -> int:
        """Tokens of a composite that are not in the cache at its rung, or its rows if these are
        more: behind a prefix a single token may be two merged rows. Never too few: a composite that
        a step has no room for would be torn apart behind what only it may read."""
        prefix = self.find(rung, [self._requests[member.id] for member in members])
        tokens = sum(member.num_tokens for member in members)
        one_more = rung.shortening > 1 and prefix.hit > 0
        return tokens - len(members) * prefix.hit * self._size + one_more

    @contextmanager
    def named(self, step: Step) -> Iterator[Step]:
        """What there is room for of a step, some of it perhaps alone, while its blocks have names.

        Args:
            step: as the planner chose it.
        """
        held: list[KVCacheBlock] = []
        hashes = {m.id: self._requests[m.id].block_hashes for m in step.members}
        num_shared: dict[str, int] = {}
        self._taken = {}
        try:
            yield replace(step, composites=tuple(self._prepared(step, held, num_shared)))
        finally:
            self._pool.free_blocks(reversed(held))  # the last ones are to be evicted first
            for name, shared in num_shared.items():  # nobody can ask for the others
                self._evict(name, shared)
            for name, own in hashes.items():
                self._requests[name].block_hashes = own
            self._entered.clear()
            self._asked.clear()

    def find(self, rung: Rung, members: Sequence[Request]) -> Prefix:
        """What of the members' prefix is in the cache, or will be when they run."""
        names = self._in_common(rung, members)
        if any(member.skip_reading_prefix_cache for member in members):
            return Prefix(names, 0, is_clean=False)
        there: list[KVCacheBlock | None] = []  # None: a composite before it in the step leaves it
        for name in names:
            block = self._block(name)
            if block is None and name not in self._entered:
                break
            there.append(block)
        hit = len(there) // rung.shortening * rung.shortening
        return Prefix(names, hit, len(there) == hit, [block for block in there[:hit] if block])

    def _in_common(self, rung: Rung, members: Sequence[Request]) -> Sequence[BlockHash]:
        """Names of the blocks that all of them begin with."""
        key = rung, *(member.request_id for member in members)
        if key not in self._asked:
            first, *others = [member.block_hashes for member in members]
            common = min(member.num_tokens - 1 for member in members) // self._size
            for own in others:
                common = _common(first, own, common)
            self._asked[key] = self._names(rung).of(first[:common])
        return self._asked[key]

    def settle(self, step: Step, plan: MuxPlan, output: SchedulerOutput) -> None:
        """Take the names from blocks of members that vLLM made run otherwise.

        Raises:
            RuntimeError: if one of them begins behind what only its own composite may read.
        """
        named = {
            m.id: (rung, tuple(o.id for o in own)) for rung, own in step.composites for m in own
        }
        cached = output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs} | {
            name: tokens
            for name, tokens in zip(cached.req_ids, cached.num_computed_tokens, strict=True)
            if name in cached.resumed_req_ids
        }
        for runs in zip(plan.rungs, plan.groups, strict=True):
            for member in runs[1]:
                as_named = named.get(member, runs) == runs
                taken = self._taken.get(member, 0)
                if as_named and computed.get(member, taken) >= taken:
                    continue
                if computed.get(member) or (as_named and len(runs[1]) > 1):
                    raise RuntimeError(
                        f"{member} runs as {runs} behind {computed[member]} tokens in the cache; "
                        f"as {named[member]} it would be {taken}"
                    )
                self._evict(member, 0)

    def _prepared(
        self, step: Step, held: list[KVCacheBlock], num_shared: dict[str, int]
    ) -> Iterator[Composite]:
        missing = self._missing(step)
        needed = 0
        is_first = True
        for rung, group in step.composites:
            members = [self._requests[member.id] for member in group]
            prefix = self.find(rung, members)
            if prefix.next is not None and missing[prefix.next] > 1:  # under a contract
                rung, group = Rung(), (group[0]._replace(fills=True),)
            hits = prefix.names[: prefix.hit]
            needed += sum(-(-r.num_tokens // self._size) - prefix.hit for r in members)
            free = self._pool.get_num_free_blocks() - sum(
                not block.ref_cnt for block in prefix.blocks
            )
            if needed + self._spare > free:
                if is_first:
                    yield Rung(), (min(group, key=lambda member: member.arrived_s),)
                return
            is_first = False
            self._pool.touch(prefix.blocks)
            held += prefix.blocks
            self._taken |= dict.fromkeys((r.request_id for r in members), prefix.hit * self._size)
            yield rung, group
            leaves = prefix.is_clean and not rung.sure
            if leaves:
                self._entered.update(prefix.names[prefix.hit :])
            if rung == Rung():
                continue
            for member in members:
                is_left = leaves and member is members[0]
                shared = prefix.names if is_left else hits
                own = [_private() for _ in member.block_hashes[len(shared) :]]
                member.block_hashes = [*shared, *own]
                num_shared[member.request_id] = len(shared)

    def _missing(self, step: Step) -> Counter[BlockHash | None]:
        """Blocks that what is under a contract does not find, and how often."""
        return Counter(
            self.find(rung, [self._requests[first.id]]).next
            for rung, (first, *_) in step.composites
            if rung.sure
        )

    def _evict(self, request_id: str, first: int) -> None:
        """Of a request's blocks, from the ``first`` on: they lose their names."""
        (blocks,) = self._manager.get_block_ids(request_id)
        self._pool.evict_blocks(set(blocks[first:]))

    def _misses(self, names: "Names", hashes: Sequence[BlockHash], place: int) -> bool:
        return self._block(names.at(hashes, place)) is None

    def _block(self, name: BlockHash) -> KVCacheBlock | None:
        found = self._pool.get_cached_block(name, GROUPS)
        return found[0] if found else None


class Names:
    """Of blocks at a rung, by vLLM's hashes of them; these where it is the backbone alone."""

    def __init__(self, rung: Rung) -> None:
        self._rung, self._blocks_per_row = rung, rung.shortening
        self._are_hashes = rung == Rung() or rung.sure
        self._known: dict[BlockHash, list[BlockHash]] = {}

    def count(self, hashes: Sequence[BlockHash]) -> int:
        """How many of the blocks have one: those of whole rows."""
        return len(hashes) // self._blocks_per_row * self._blocks_per_row

    def of(self, hashes: Sequence[BlockHash]) -> Sequence[BlockHash]:
        """All of them."""
        if self._are_hashes:
            return hashes
        ends = hashes[self._blocks_per_row - 1 :: self._blocks_per_row]
        return [name for end in ends for name in self._of_row(end)]

    def at(self, hashes: Sequence[BlockHash], place: int) -> BlockHash:
        """One of them."""
        if self._are_hashes:
            return hashes[place]
        row, own = divmod(place, self._blocks_per_row)
        return self._of_row(hashes[(row + 1) * self._blocks_per_row - 1])[own]

    def _of_row(self, end: BlockHash) -> list[BlockHash]:
        known = self._known
        if end not in known:
            if len(known) > NAMES:
                known.clear()
            known[end] = names_of(self._rung, end)
        return known[end]


def _common(one: Sequence[BlockHash], other: Sequence[BlockHash], most: int) -> int:
    """Blocks that two requests begin with, at most ``most``; an equal name stands for all before
    it."""
    return bisect_left(range(most), 1, key=lambda i: one[i] != other[i])


def names_of(rung: Rung, end: BlockHash) -> list[BlockHash]:
    """Of the blocks, as many as a row has tokens, whose rows lie in the first of them.

    Args:
        rung: at which these are computed.
        end: vLLM's hash of the last of the blocks.
    """
    places = range(rung.shortening)
    return [BlockHash(hashlib.sha256(f"{rung} {i} ".encode() + end).digest()) for i in places]


def _private() -> BlockHash:
    """Of a block that nobody else may find: no hash is as short."""
    return BlockHash(next(_numbers).to_bytes(8, "big"))
