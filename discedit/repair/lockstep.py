"""Several passes side by side that wait for each other: what is learned from all of them holds for what comes after."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

Pause = Callable[[Any], None]


# No Exception: a model's own `except Exception` must not keep a pass running.
class _Stopped(BaseException):
    """Ends a pass whose neighbour has failed."""


class _Pass(threading.Thread):
    """One pass, in a thread of its own, which runs only while everybody else waits."""

    def __init__(self, work: Callable[[Pause], None]) -> None:
        # A pass that hangs must not keep the process from ending.
        super().__init__(daemon=True)
        self.work = work
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.place: Any = None  # where it waits
        self.done = self.stopped = False
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._wait()
            self.work(self._pause)
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self.place = "the end"
        self.back.release()

    def _wait(self) -> None:
        self.go.acquire()
        if self.stopped:
            raise _Stopped

    def _pause(self, place: Any) -> None:
        self.place = place
        self.back.release()
        self._wait()

    def resume(self) -> None:
        """Until it waits again, or ends."""
        self.go.release()
        self.back.acquire()


def in_lockstep(
    op: str,
    works: Sequence[Callable[[Pause], None]],
    meet: Callable[[Any], None],
    begins: Callable[[int, Any], bool] = lambda work, place: True,
) -> None:
    """Runs functions one at a time, each in a thread of its own, from one pause to the next.

    Args:
        works: each is given `pause`, which it calls with the name of the place where it waits for the others.
        meet: called with that name when all wait there.
        begins: whether a function that has not begun, by its number, now does, to come to the place where the others
            wait. Asked of all but the first, which shows where that is.

    Raises:
        RuntimeError: they do not come to the same places. Whatever one of them or `meet` raises.
    """
    passes = [_Pass(work) for work in works]
    going = passes[:1]
    try:
        while going:
            place = None
            # Always in this order: sums over the parts are the same bits in every run.
            for number, one in enumerate(passes):
                if one not in going:
                    if not begins(number, place):
                        continue
                    going.append(one)
                one.resume()
                if one.error is not None:
                    raise one.error
                place = passes[0].place
            if all(one.done for one in going):
                return
            places = {one.place for one in going}
            if len(places) > 1:
                raise RuntimeError(f"{op}: the model must do the same for every sample, it comes to {places}.")
            meet(place)
    finally:
        for one in passes:
            if not one.done:
                one.stopped = True
                one.resume()
            one.join()
