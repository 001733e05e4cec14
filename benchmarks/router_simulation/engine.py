"""A replica's engine: the planner that serves, over a queue, with given costs."""

from collections.abc import Sequence

from revmux_vllm.planning.costs import Budgets, LayerCosts
from revmux_vllm.planning.options import read_options
from revmux_vllm.planning.planner import Composite, StepPlanner, Waiting
from revmux_vllm.rungs import Ends, row_counts
from router_simulation.setting import Calibration
from router_simulation.traffic import Request


class Engine:
    """Steps of ``planner``, one at a time; what it chooses runs.

    Attributes:
        waiting: records of the requests that wait, numbered as they were received.
        running: requests of the step that runs.
        num_received: requests so far.
    """

    def __init__(self, calibration: Calibration, costs: LayerCosts) -> None:
        config = calibration.config
        self.planner = StepPlanner(
            config,
            read_options({}, config),
            calibration.layers,
            Budgets(calibration.max_tokens, calibration.max_requests),
            now_s=0.0,
            costs=costs,
        )
        self.waiting: list[Waiting] = []
        self.running: list[Request] = []
        self._requests: dict[str, Request] = {}
        self.num_received = 0

    @property
    def under_way(self) -> int:
        """Requests received and not answered."""
        return len(self.waiting) + len(self.running)

    def add(self, request: Request, now: float) -> None:
        """One more waits."""
        self.num_received += 1
        name = str(self.num_received)
        self._requests[name] = request
        self.waiting.append(Waiting(name, request.tokens, request.work.domain, arrived_s=now))
        self.planner.arrive(request.tokens)

    def start(self, now: float) -> tuple[Sequence[Composite], float]:
        """Begin a step: its composites, and how long it will take."""
        planner = self.planner
        window = self.waiting[: planner.window]
        step = planner.choose(window, len(self.waiting), planner.budgets.max_requests, now)
        members = step.members
        self.running = [self._requests.pop(member.id) for member in members]
        self.waiting = [record for record in self.waiting if record.id in self._requests]
        rows = sum(
            0 if rung.exit else row_counts(group[0].num_tokens, rung.shortening, Ends())
            for rung, group in step.composites
        )
        tokens = sum(member.num_tokens for member in members)
        return step.composites, planner.costs.seconds(tokens, rows)
