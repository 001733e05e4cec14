"""How many replicas: by work, not by requests.

A replica's *load* is what arrives and waits at it, over what it can answer at its widest rung. So a
load that wider composites can carry adds no replica: an engine widens first, by itself, and only
what is left at the widest rung is spread over more of them.
"""

import math
from typing import Any

LOAD = "load"


class ByWork:
    """Ray Serve's autoscaling policy; Serve adds bounds and delays.

    Args:
        target_load: of a replica, between 0 and 1.
    """

    def __init__(self, target_load: float) -> None:
        self.target_load = target_load

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Replicas wanted, and no state. Without any statistics as many as there are."""
        loads = (context.aggregated_metrics or {}).get(LOAD, {})
        if not loads:
            return context.target_num_replicas, {}
        return replicas_for(
            list(loads.values()), context.current_num_replicas, self.target_load
        ), {}


def replicas_for(loads: list[float], num_replicas: int, target_load: float) -> int:
    """Replicas of ``target_load`` each that carry all of ``loads``; at least one.

    Args:
        loads: of the replicas that have reported one.
        num_replicas: that there are; those without a report count as loaded like the others.
    """
    total = sum(loads) / len(loads) * max(num_replicas, len(loads))
    return max(1, math.ceil(total / target_load - 1e-9))
