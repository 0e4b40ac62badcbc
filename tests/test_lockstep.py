"""Passes that wait for each other: in turns, never two at once, and no thread left behind."""

import threading

import pytest

from discedit.repair.lockstep import in_lockstep


def test_everybody_comes_to_a_place_before_anybody_goes_on():
    log = []

    def work(number):
        def run(pause):
            for place in ("a", "b"):
                log.append((number, f"before {place}"))
                pause(place)
                log.append((number, f"after {place}"))

        return run

    in_lockstep("prune", [work(0), work(1), work(2)], lambda place: log.append(("meet", place)))
    expected = [(n, "before a") for n in range(3)] + [("meet", "a")]
    for n in range(3):
        expected += [(n, "after a"), (n, "before b")]
    assert log == [*expected, ("meet", "b"), *((n, "after b") for n in range(3))]


def test_only_one_runs_at_a_time():
    running = most = 0

    def run(pause):
        nonlocal running, most
        for place in range(20):
            running += 1
            most = max(most, running)
            sum(range(2000))
            running -= 1
            pause(place)

    in_lockstep("prune", [run] * 8, lambda _: None)
    assert most == 1


@pytest.mark.parametrize("where", ["pass", "meet"])
def test_an_error_ends_all_passes(where):
    before = threading.active_count()
    ended = []

    def work(number):
        def run(pause):
            try:
                pause("a")
                if where == "pass" and number == 1:
                    raise KeyError("broken")
                pause("b")
            finally:
                ended.append(number)

        return run

    def meet(place):
        if where == "meet" and place == "b":
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        in_lockstep("prune", [work(n) for n in range(3)], meet)
    assert sorted(ended) == [0, 1, 2]
    assert threading.active_count() == before


def test_passes_that_go_different_ways_are_told():
    with pytest.raises(RuntimeError, match="^prune: the model must do the same for every sample, it comes to"):
        in_lockstep("prune", [lambda pause: pause("a"), lambda pause: pause("b")], lambda _: None)
    with pytest.raises(RuntimeError, match="^unlearn: the model must do the same for every sample"):
        in_lockstep("unlearn", [lambda pause: pause("a"), lambda _: None], lambda _: None)
    in_lockstep("prune", [], lambda _: None)
