"""Where the time of a run goes (`dpkd train --timings`): its start, its steps and its end, phase by phase."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch

OUTSIDE = "host"  # what belongs to no phase


class HostClock:
    """The time of this process: takes moments, and gives the seconds between two of them."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def now(self) -> float:
        return self._now()

    def seconds(self, earlier: float, later: float, *, wait: bool) -> float:
        return later - earlier


class CudaClock:
    """The time of a GPU: events in its current stream, read after they have passed, so that the host does not wait.

    `seconds` is None while the later one has not come.
    """

    def now(self) -> torch.cuda.Event:
        import torch  # not above: importing it is one of the phases

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, earlier: torch.cuda.Event, later: torch.cuda.Event, *, wait: bool) -> float | None:
        if wait:
            later.synchronize()
        return earlier.elapsed_time(later) / 1e3 if later.query() else None


Clock: TypeAlias = HostClock | CudaClock


def clock_of(device: torch.device) -> Clock:
    """The clock that sees when the work of a device is done."""
    return CudaClock() if device.type == "cuda" else HostClock()


class Timings:
    """The seconds of phases, which are entered by `with timings("name"):`.

    A moment belongs to the outermost phase around it, or to OUTSIDE: the phases of a part of the run (start, steps,
    end) sum to the whole of it. Start and end are measured on the host, steps on the device.
    """

    def __init__(self, *, on: bool = False, began: float | None = None, clock: Clock | None = None) -> None:
        """Nothing is measured unless `on`. `began`: when the run did, on the clock, if that was before now."""
        self.on, self.steps = on, 0
        self.seconds: dict[str, dict[str, float]] = {}
        self._begin("start", clock or HostClock(), began)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """What is done in the block belongs to a phase, unless another one is around it."""
        if not self.on or self._phase != OUTSIDE:
            yield
            return
        self._switch(phase)
        try:
            yield
        finally:
            self._switch(OUTSIDE)

    def begin_steps(self, clock: Clock) -> None:
        """The start ends here."""
        if self.on:
            self._switch(OUTSIDE)
            self._begin("steps", clock)

    def begin_end(self, steps: int, clock: Clock | None = None) -> None:
        """So many steps after the first end here; the host waits for the device."""
        if self.on:
            self._switch(OUTSIDE, wait=True)
            self.steps = steps
            self._begin("end", clock or HostClock())

    def lines(self) -> list[str]:
        """For printing, at the end of the run: seconds of its start and its end, and milliseconds of a step."""
        if not self.on:
            return []
        self._switch(OUTSIDE, wait=True)
        steps = self.seconds.get("steps", {})
        one = {phase: 1e3 * seconds / max(1, self.steps) for phase, seconds in steps.items()}
        return [
            f"timings: start, to the end of the first step: {_shares(self.seconds['start'], 's')}",
            f"timings: {self.steps:,} more steps: {sum(steps.values()):.2f} s, each {_shares(one, 'ms')}",
            f"timings: end: {_shares(self.seconds.get('end', {}), 's')}",
        ]

    def _begin(self, part: str, clock: Clock, began: float | None = None) -> None:
        self._clock, self._phase = clock, OUTSIDE
        self._counted = self.seconds[part] = {}
        self._moments: deque[tuple[str, Any]] = deque([(OUTSIDE, clock.now() if began is None else began)])

    def _switch(self, phase: str, *, wait: bool = False) -> None:
        """From now on a phase counts; add up the moments that have come."""
        self._phase = phase
        self._moments.append((phase, self._clock.now()))
        while len(self._moments) > 1:
            (before, earlier), (_, later) = self._moments[0], self._moments[1]
            if (seconds := self._clock.seconds(earlier, later, wait=wait)) is None:
                return
            self._counted[before] = self._counted.get(before, 0.0) + seconds
            self._moments.popleft()


def _shares(values: dict[str, float], unit: str) -> str:
    """The sum, and what is not too short to be shown, the longest first."""
    parts = sorted(((name, value) for name, value in values.items() if value >= 0.005), key=lambda item: -item[1])
    return f"{sum(values.values()):.2f} {unit} ({', '.join(f'{name} {value:.2f}' for name, value in parts)})"
