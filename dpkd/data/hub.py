"""Whether the hub can be reached at all: without it, its clients would retry for half a minute before saying so."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlparse


def out_of_reach() -> bool:
    """Whether the hub's address has no number here, and no proxy would find one."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


@contextmanager
def local_only() -> Iterator[None]:
    """For the time of the block, `datasets` looks into its cache alone when the hub is out of reach."""
    import datasets
    from huggingface_hub import constants

    if not out_of_reach():
        yield
        return
    places: tuple[Any, ...] = (constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
