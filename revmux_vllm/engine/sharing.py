"""Which blocks of the cache a request may take from others, and leave to them.

vLLM finds a prefix by the hashes of its blocks. What the upper layers' pages hold depends on the
rung too, so a block has a name for every rung, and with M tokens to a row for all M blocks whose
rows lie in the first of them. A composite's rows lie in its carrier's blocks and are the same for
all composites of a rung only where all members begin with the same tokens, so:

* members take what the carrier takes, at most over the prefix that they all have;
* the carrier leaves its blocks of that prefix, and nobody leaves another;
* what is under a contract takes what ran alone, and leaves nothing, for it may stop anywhere. So of
  those that begin alike, and find nothing, one runs alone.

vLLM's own manager does all the rest: the names stand where it looks for the hashes of a request.
"""

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, count, takewhile
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from revmux_vllm.planning.packing import MuxPlan
from revmux_vllm.planning.planner import Composite, Step, Waiting
from revmux_vllm.rungs import Rung

_numbers = count()
NAMES = 1 << 16
"""That are remembered, and not made anew."""
GROUPS = [0]
"""vLLM's groups of layers that share their blocks: one, as all our layers attend alike."""


@dataclass(frozen=True)
class Prefix:
    """What the members of a composite have in common.

    Attributes:
        names: of its blocks at the composite's rung.
        hit: how many of them are taken from the cache.
        is_clean: nothing is in the cache of those behind.
    """

    names: Sequence[BlockHash]
    hit: int
    is_clean: bool


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

    def num_cached(self, request_id: str) -> int:
        """Tokens of a request, about, that were computed alone and are in the cache."""
        request = self._requests[request_id]
        hashes = request.block_hashes
        found = bisect_left(hashes, 1, key=lambda name: self._block(name) is None)
        return self._size * min(found, (request.num_tokens - 1) // self._size)

    def alike(self, requests: Sequence[Waiting]) -> list[BlockHash | None]:
        """What each begins with that another one begins with too; None: nothing."""
        hashes = [self._requests[request.id].block_hashes for request in requests]
        times = Counter(chain.from_iterable(hashes))
        found = []
        for own in hashes:
            shared = bisect_left(own, 1, key=lambda name: times[name] < 2)
            found.append(own[shared - 1] if shared else None)
        return found

    def remaining(self, rung: Rung, members: Sequence[Waiting]) -> int:
        """Tokens of a composite that are not in the cache at its rung."""
        prefix = self.find(rung, [self._requests[member.id] for member in members])
        tokens = sum(member.num_tokens for member in members)
        return tokens - len(members) * prefix.hit * self._size

    @contextmanager
    def named(self, step: Step) -> Iterator[Step]:
        """What there is room for of a step, some of it perhaps alone, while its blocks have names.

        Args:
            step: as the planner chose it.
        """
        held: list[KVCacheBlock] = []
        hashes = {m.id: self._requests[m.id].block_hashes for m in step.members}
        try:
            yield replace(step, composites=tuple(self._prepared(step, held)))
        finally:
            self._pool.free_blocks(reversed(held))  # the last ones are to be evicted first
            for name, own in hashes.items():
                self._requests[name].block_hashes = own

    def find(self, rung: Rung, members: Sequence[Request]) -> Prefix:
        """What of the members' prefix is in the cache."""
        first, *others = [member.block_hashes for member in members]
        longest = range(min(member.num_tokens - 1 for member in members) // self._size)
        common = len(list(takewhile(lambda i: all(own[i] == first[i] for own in others), longest)))
        factor = rung.shortening
        if rung == Rung() or rung.sure:
            names = first[:common]
        else:
            whole = common // factor * factor
            ends = [first[i + factor - 1] for i in range(0, whole, factor)]
            names = [name_of(rung, end, i) for end in ends for i in range(factor)]
        if any(member.skip_reading_prefix_cache for member in members):
            return Prefix(names, 0, is_clean=False)
        found = len(list(takewhile(self._block, names)))
        hit = found // factor * factor
        return Prefix(names, hit, found == hit)

    def settle(self, step: Step, plan: MuxPlan, output: SchedulerOutput) -> None:
        """Take the names from blocks of members that vLLM made run otherwise.

        Raises:
            RuntimeError: if one of them begins behind what only its rung may read.
        """
        named = {member.id: rung for rung, group in step.composites for member in group}
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for rung, group in zip(plan.rungs, plan.groups, strict=True):
            for member in group:
                if named.get(member, rung) == rung:
                    continue
                if computed.get(member):
                    told = f"its prefix was taken from the cache for {named[member]}"
                    raise RuntimeError(f"{member} runs at {rung}: {told}")
                (blocks,) = self._manager.get_block_ids(member)
                self._pool.evict_blocks(set(blocks))

    def _prepared(self, step: Step, held: list[KVCacheBlock]) -> Iterator[Composite]:
        entering: set[bytes] = set()
        needed = 0
        is_first = True
        for rung, group in self._with_fillers(step):
            members = [self._requests[member.id] for member in group]
            prefix = self.find(rung, members)
            taken = [block for name in prefix.names[: prefix.hit] if (block := self._block(name))]
            needed += sum(-(-r.num_tokens // self._size) - prefix.hit for r in members)
            free = self._pool.get_num_free_blocks() - sum(not block.ref_cnt for block in taken)
            if needed + self._spare > free:
                if is_first:
                    yield Rung(), (min(group, key=lambda member: member.arrived_s),)
                return
            is_first = False
            self._pool.touch(taken)
            held += taken
            yield rung, group
            if rung == Rung():
                continue
            new = prefix.names[prefix.hit :]
            leaves = prefix.is_clean and not rung.sure
            if rung.mux > 1:  # those of the same step have taken nothing of it
                leaves = leaves and entering.isdisjoint(new)
                entering.update(new)
            for member in members:
                is_left = leaves and member is members[0]
                shared = prefix.names if is_left else prefix.names[: prefix.hit]
                own = [_private() for _ in member.block_hashes[len(shared) :]]
                member.block_hashes = [*shared, *own]

    def _with_fillers(self, step: Step) -> Iterator[Composite]:
        """The composites, and one alone of all that begin alike under a contract, behind what is in
        the cache: it leaves its blocks to the others."""
        nexts: dict[str, BlockHash] = {}
        for rung, (first, *_) in step.composites:
            if rung.sure:
                prefix = self.find(rung, [self._requests[first.id]])
                if prefix.hit < len(prefix.names):
                    nexts[first.id] = prefix.names[prefix.hit]
        alike = Counter(nexts.values())
        for rung, group in step.composites:
            name = nexts.get(group[0].id)
            if name is not None and alike[name] > 1:
                alike[name] = 0
                yield Rung(), (group[0]._replace(fills=True),)
            else:
                yield rung, group

    def _block(self, name: BlockHash) -> KVCacheBlock | None:
        found = self._pool.get_cached_block(name, GROUPS)
        return found[0] if found else None


@lru_cache(NAMES)
def name_of(rung: Rung, end: BlockHash, place: int) -> BlockHash:
    """Of a block at a rung.

    Args:
        rung: at which its upper rows are computed.
        end: vLLM's hash of the last of the blocks whose rows lie in the first of them.
        place: among these.
    """
    return BlockHash(hashlib.sha256(f"{rung} {place} ".encode() + end).digest())


def _private() -> BlockHash:
    """Of a block that nobody else may find."""
    return BlockHash(hashlib.sha256(f"private {next(_numbers)}".encode()).digest())
