"""The request router of Ray Serve that keeps partners together (``choice.py`` decides).

Ray's interface for custom routers is alpha in 2.60; tests/serving/test_router.py pins what is
used of it here. Every front has a router of its own, which knows exactly what it sent itself and
learns from the replicas' answers how many requests others have there.
"""

import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from revmux_vllm.serving.choice import Load, MeanChars, choose
from revmux_vllm.serving.messages import Work


@dataclass
class _Known:
    """What is known of a replica.

    Attributes:
        load: of this router's own requests.
        look: of the last statistics, and when they came (``time.monotonic``).
        place: in this router's order.
    """

    load: Load = field(default_factory=lambda: Load(0.0))
    look: float = 0
    looked_at: float = 0.0
    place: float = field(default_factory=random.random)


class PackAwareRouter(RequestRouter):
    """Fills one replica to its best packing before it opens the next.

    Where the statistics of a replica are older than ``stale_s``, or there are none yet, it does
    what Ray's default does: the less busy one of two at random.
    """

    def initialize_state(self, fill_s: float, stale_s: float) -> None:
        """Serve's hook for ``request_router_kwargs``."""
        self._fill_s, self._stale_s = fill_s, stale_s
        self._known: defaultdict[ReplicaID, _Known] = defaultdict(_Known)
        self._sent: dict[str, tuple[ReplicaID, Work]] = {}
        self._mean = MeanChars()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One replica, and after it two others in case that it is full or gone."""
        if not candidate_replicas:
            return []
        replicas = sorted(candidate_replicas, key=lambda each: self._known[each.replica_id].place)
        two = random.sample(replicas, min(2, len(replicas)))
        if pending_request is None:
            return [two]
        work = _work_of(pending_request)
        loads = self._loads(replicas)
        if loads is None:
            return [two]
        best = replicas[choose(work, loads, self._fill_s)]
        self._expect(pending_request, best.replica_id, work)
        return [[best], two]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        """Serve's hook: a replica has taken a request, perhaps another one than was chosen."""
        self._expect(pending_request, replica_id, _work_of(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve's hook: answered, failed or refused."""
        if self._sent.get(internal_request_id, (None,))[0] == replica_id:
            self._forget(internal_request_id)

    def _expect(self, request: PendingRequest, replica_id: ReplicaID, work: Work) -> None:
        """Count a request at a replica from the moment of the choice, so that choices made before
        the next answer see it."""
        name = request.metadata.internal_request_id
        if name in self._sent:
            self._forget(name)
        else:
            request.future.add_done_callback(
                lambda future: self._forget(name) if future.cancelled() else None
            )
            self._mean.add(work)
        self._sent[name] = replica_id, work
        self._known[replica_id].load.add(work)

    def _forget(self, name: str) -> None:
        replica_id, work = self._sent.pop(name, (None, None))
        if replica_id in self._known and work is not None:
            self._known[replica_id].load.remove(work)

    def _loads(self, replicas: Sequence[RunningReplica]) -> list[Load] | None:
        """Of all ``replicas``; None where one is not known well enough."""
        now = time.monotonic()
        gone = self._known.keys() - self._replicas.keys()
        for replica_id in gone:
            del self._known[replica_id]
        loads = []
        for replica in replicas:
            known, stats = self._known[replica.replica_id], replica.routing_stats or {}
            if stats.get("look", 0) != known.look:
                known.look, known.looked_at = stats["look"], now
                known.load.chars_per_s = stats.get("chars_per_s", 0.0)
            if not known.load.chars_per_s or now - known.looked_at > self._stale_s:
                return None
            under_way = self.replica_queue_len_cache.get(replica.replica_id) or 0
            known.load.see(under_way, self._mean.value)
            loads.append(known.load)
        return loads


def _work_of(request: PendingRequest) -> Work:
    arguments: Sequence[Any] = request.args
    return arguments[0] if arguments and isinstance(arguments[0], Work) else Work()
