"""How a command comes by Ray: a cluster of its own, or one that is running."""

from typing import Any

import ray

from revmux_vllm.errors import UserError


def connect(address: str | None, **options: Any) -> None:
    """``ray.init`` on the cluster at ``address``; None starts one that ends with this process.

    Raises:
        UserError: if there is none at this address, in Ray's words.
    """
    if address is None:
        ray.init("local", **options)
        return
    try:
        ray.init(address, **options)
    except (ConnectionError, ValueError) as error:
        raise UserError("`address`", str(error), found=address) from error
