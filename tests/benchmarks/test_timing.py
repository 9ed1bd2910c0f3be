"""What is made of a profiler's trace: whose event is whose, and the times of calls."""

from types import SimpleNamespace

import pytest

from benchmarks import timing
from benchmarks.timing import Event, Side


def profile(*planes):
    def lane(name, events):
        return SimpleNamespace(
            name=name,
            events=[SimpleNamespace(name=n, start_ns=s, duration_ns=d) for n, s, d in events],
        )

    return SimpleNamespace(
        planes=[SimpleNamespace(name=p, lines=[lane(*x) for x in lanes]) for p, lanes in planes]
    )


HOST = ("/host:CPU", [("python", [("window 0", 0, 1e7), ("window 1", 2e7, 1e7)])])
GPU = (
    "/device:GPU:0",
    [
        ("Stream #1", [("k", 1e6, 5.0), ("k", 2.1e7, 5.0)]),
        ("XLA Ops", [("op", 1e6, 5.0)]),  # what streams have is there once more
    ],
)


def test_events_are_those_of_streams_by_the_window_that_they_start_in():
    found = timing.assign(profile(HOST, GPU), 2)
    assert found == [[Event(1e6, 1e6 + 5, "k")], [Event(2.1e7, 2.1e7 + 5, "k")]]


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ([("window 0", 0, 1e7)], "1 of 2 windows"),
        ([("window 0", 0, 1e7), ("window 1", 4e7, 1e7)], "2 events do not fill 2 windows"),
    ],
)
def test_a_trace_that_lacks_something_is_none(host, message):
    with pytest.raises(timing.NoTrace, match=message):
        timing.assign(profile(("/host:CPU", [("python", host)]), GPU), 2)


def test_a_call_takes_from_its_first_start_to_its_last_end():
    # Two groups of two calls each: 4 and 8 milliseconds, with a gap in the one and kernels that
    # run beside each other in the other.
    groups = [
        [Event(0, 2e6, "a"), Event(3e6, 4e6, "b")],
        [Event(10e6, 14e6, "a"), Event(12e6, 18e6, "b")],
    ]
    found = timing.summary(groups, 2)
    assert found["ms"] == (4 + 8) / 2 / 2
    assert found["busy_ms"] == (3 + 8) / 2 / 2
    assert found["kernels"] == {"b": 7 / 4, "a": 6 / 4}


def test_windows_are_cut_into_calls_of_the_same_kernels():
    a, b = Event(0, 1, "a"), Event(1, 2, "b")
    assert timing.split([[a, b, b, a]], 2) == ([[a, b], [b, a]], 1)
    assert timing.split([[a, b, a, a]], 2) == ([[a, b, a, a]], 2)


def test_what_holds_the_device_is_no_part_of_a_call(monkeypatch):
    held = [Event(0, 5, "hold"), Event(5, 9, "rest of it")]
    calls = [Event(9, 10, "a"), Event(10, 11, "a")]
    windows = [held, [*held, *calls], calls, [*held, *calls]]
    monkeypatch.setattr(timing, "assign", lambda profile, count, device: windows[:count])
    monkeypatch.setattr(timing.jax.profiler.ProfileData, "from_file", lambda path: None)
    monkeypatch.setattr(timing.jax.profiler, "start_trace", _trace_file)
    monkeypatch.setattr(timing.jax.profiler, "stop_trace", lambda: None)
    order = []

    def side(name, hold=None):
        return Side(lambda i: order.append(f"{name}{i}"), wait=lambda _: None, hold=hold)

    hold = side("h")
    sides = [side("a", hold), side("b"), side("c", hold)]
    assert timing.traced(sides, 2) == [calls] * 3
    # Alone first, once for all whom it holds the device for.
    assert order == ["h0", "h0", "a0", "a1", "b0", "b1", "h0", "c0", "c1"]


def _trace_file(folder, profiler_options):
    with open(f"{folder}/host.xplane.pb", "w"):
        pass


def test_what_is_not_checked_says_so_and_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda sides, **_: {name: {"ms": 1.0} for name in sides})

    def wrong(side, built):
        raise AssertionError("off")

    side, log = Side(lambda i: None), timing.Log()
    contenders = {
        "right": timing.Contender(lambda: side, lambda side, built: 0.25),
        "compared with": timing.Contender(lambda: side),
        "wrong": timing.Contender(lambda: side, wrong),
    }
    found = timing.contest(log, "here", contenders)
    assert found == {
        "right": {"error": 0.25, "ms": 1.0},
        "compared with": {"error": None, "ms": 1.0},
    }
    assert log.errors == ["wrong, here: AssertionError: off"]


def test_as_many_sets_of_operands_as_leave_nothing_in_the_cache():
    sizes = (3 * timing.L2, 3 * timing.L2 + 1, timing.L2, timing.L2 - 1, 1)
    assert [timing.sets_of(n) for n in sizes] == [1, 1, 3, 4, 16]
