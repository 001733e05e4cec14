"""The router inside Ray's machinery, with replicas that are only names; what it rests on."""

import asyncio
import inspect
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from ray.serve._private.common import (  # noqa: E402
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica  # noqa: E402

from revmux_vllm.serving.messages import Work  # noqa: E402
from revmux_vllm.serving.router import PackAwareRouter  # noqa: E402

DEPLOYMENT = DeploymentID(name="Engine", app_name="default")
FILL_S = 1.0


class Replica:
    """What the router sees of one: its name, its statistics, its free places."""

    max_ongoing_requests = 1000

    def __init__(self, name: str, chars_per_s: float) -> None:
        self.replica_id = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT)
        self.routing_stats: dict[str, float] = {}
        self.looks = 0
        if chars_per_s:
            self.look(chars_per_s)

    def look(self, chars_per_s: float) -> None:
        self.looks += 1
        self.routing_stats = {"look": self.looks, "chars_per_s": chars_per_s}

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


def make_router(*replicas: Replica, stale_s: float = 60.0) -> PackAwareRouter:
    router = PackAwareRouter(
        DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
    )
    router.initialize_state(fill_s=FILL_S, stale_s=stale_s)
    router.update_replicas(list(replicas))  # type: ignore[arg-type]
    return router


numbers = iter(range(10**6))


def pending(work: Work) -> PendingRequest:
    name = str(next(numbers))
    metadata = RequestMetadata(request_id=name, internal_request_id=name)
    return PendingRequest(args=[work, None], kwargs={}, metadata=metadata)


async def send(router: PackAwareRouter, work: Work) -> tuple[str, str]:
    """As Serve does it, up to the replica's acceptance: which replica, and the request's name."""
    request = pending(work)
    replica = await asyncio.wait_for(router._choose_replica_for_request(request), 10)
    router.on_send_request(replica.replica_id)
    router.on_request_routed(request, replica.replica_id, None)  # type: ignore[arg-type]
    return replica.replica_id.unique_id, request.metadata.internal_request_id


def test_it_fills_one_replica_before_the_next() -> None:
    async def story() -> None:
        router = make_router(Replica("b", 100), Replica("a", 100), Replica("c", 100))
        sent = [await send(router, Work(10, 4)) for _ in range(14)]
        (first, tenth), (second, fourth) = Counter(name for name, _ in sent).items()
        assert (tenth, fourth) == (10, 4)
        for name, request in sent[:10]:
            assert name == first
            router.on_request_completed(ReplicaID(name, DEPLOYMENT), request)
        assert (await send(router, Work(10, 4)))[0] == second, "the open one, not the empty one"

    asyncio.run(story())


def test_all_at_once_is_no_other_than_one_by_one() -> None:
    async def story() -> None:
        router = make_router(*(Replica(name, 100) for name in "abcd"))
        sent = await asyncio.gather(*(send(router, Work(10, 4)) for _ in range(30)))
        assert sorted(Counter(name for name, _ in sent).values()) == [10, 10, 10]

    asyncio.run(story())


def test_nothing_stays_in_its_books() -> None:
    async def story() -> None:
        router = make_router(Replica("a", 100), Replica("b", 100))
        sent = [await send(router, Work(7, 3, domain)) for domain in ("x", "y", None) * 5]
        for name, request in sent:
            router.on_request_completed(ReplicaID(name, DEPLOYMENT), request)
        given_up = pending(Work(50, 6))
        await router.choose_replicas(router._replicas_list, given_up)
        given_up.future.cancel()
        await asyncio.sleep(0)
        assert router._sent == {}
        assert all(known.load.chars == 0 for known in router._known.values())

    asyncio.run(story())


def test_a_refused_request_is_counted_where_it_went_in_the_end() -> None:
    async def story() -> None:
        router = make_router(Replica("a", 100), Replica("b", 100))
        request = pending(Work(10, 4))
        first = await router._choose_replica_for_request(request)
        (second,) = router._replicas.keys() - {first.replica_id}
        router.on_request_routed(request, second, None)  # type: ignore[arg-type]
        router.on_request_completed(first.replica_id, request.metadata.internal_request_id)
        chars = {key: known.load.chars for key, known in router._known.items()}
        assert chars == {first.replica_id: 0, second: 10}

    asyncio.run(story())


@pytest.mark.parametrize("why", ["never measured", "stale"])
def test_without_statistics_it_does_what_rays_default_does(why: str) -> None:
    async def story() -> None:
        speeds = (100, 0) if why == "never measured" else (100, 100)
        replicas = [Replica(name, speed) for name, speed in zip("ab", speeds, strict=True)]
        router = make_router(*replicas, stale_s=60.0 if why == "never measured" else 0.0)
        if why == "stale":
            router._loads(replicas)  # type: ignore[arg-type]
            await asyncio.sleep(0.01)
        sent = [await send(router, Work(1, 1)) for _ in range(40)]
        assert Counter(name for name, _ in sent) == {"a": 20, "b": 20}, "the less busy of two"
        replicas[0].look(1000)
        replicas[1].look(1000)
        if why == "never measured":
            chosen = {(await send(router, Work(1, 1)))[0] for _ in range(20)}
            assert len(chosen) == 1

    asyncio.run(story())


def test_the_others_requests_are_estimated() -> None:
    async def story() -> None:
        router = make_router(Replica("a", 100), Replica("b", 100))
        first, _ = await send(router, Work(10, 4))
        router.on_new_queue_len_info(ReplicaID(first, DEPLOYMENT), 10)  # nine are of other fronts
        second, _ = await send(router, Work(10, 4))
        assert second != first
        router.on_new_queue_len_info(ReplicaID(second, DEPLOYMENT), 9)
        assert (await send(router, Work(10, 4)))[0] == second

    asyncio.run(story())


def test_a_replica_that_died_is_forgotten() -> None:
    async def story() -> None:
        router = make_router(Replica("a", 100), Replica("b", 100))
        first, _ = await send(router, Work(10, 4))
        router.on_replica_actor_died(ReplicaID(first, DEPLOYMENT))
        second, _ = await send(router, Work(10, 4))
        assert second != first
        assert {key.unique_id for key in router._known} == {second}

    asyncio.run(story())


def test_what_we_rely_on_in_rays_alpha_interface() -> None:
    """A failure says that serving/router.py must be looked at before the new Ray is allowed."""

    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert ray.__version__.startswith("2.60.")
    assert parameters(RequestRouter.choose_replicas) == [
        "self", "candidate_replicas", "pending_request",
    ]  # fmt: skip
    assert parameters(RequestRouter.on_request_routed) == [
        "self", "pending_request", "replica_id", "result",
    ]  # fmt: skip
    assert parameters(RequestRouter.on_request_completed) == [
        "self", "replica_id", "internal_request_id",
    ]  # fmt: skip
    assert isinstance(RunningReplica.routing_stats, property)
    fields = {"args", "kwargs", "metadata", "future"}
    assert fields <= set(PendingRequest.__dataclass_fields__)
    handle = SimpleNamespace(options=inspect.signature(ray.serve.handle.DeploymentHandle.options))
    assert "_by_reference" in handle.options.parameters
