"""Ray, where work is spread over processes or machines: a cluster that is joined, or one of this machine's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flabc.errors import UsageError, require

#: The address that starts a Ray on this machine, for as long as it is needed.
LOCAL = "local"


@contextmanager
def joined(address: str) -> Iterator[Any]:
    """Ray's module while this process belongs to a cluster. Nothing is reported to Ray's makers.

    Args:
        address: ``local``; ``auto`` for the cluster that this machine belongs to; or where one's head is.

    Raises:
        MissingExtraError: if Ray is not installed.
        UsageError: if there is no such cluster.
    """
    ray: Any = require("ray", "distributed")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except ConnectionError as error:
        raise UsageError(
            f"There is no Ray at {address!r}: {error}",
            fix="Start one with ray start --head, or leave the address out.",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
