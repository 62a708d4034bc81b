import threading
import time

import pytest

from ldm.data import attempts as module
from ldm.data.attempts import Attempts, Hands


@pytest.fixture
def make():
    """Attempts with short limits; closed afterwards."""
    made = []

    def attempts(timeout=5.0, deadline=10.0, retries=5, backoff=0.01, threads=4):
        made.append(Attempts(timeout, deadline, retries, backoff, threads, IsADirectoryError))
        return made[-1]

    yield attempts
    for one in made:
        one.close()


@pytest.fixture
def gate():
    """Something that reads can hang on until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def never():
    return False


def failing(times, error=None):
    """Fails so many times, then gives "fine"; `.calls` are the times of all calls."""

    def read():
        read.calls.append(time.monotonic())
        if len(read.calls) <= times:
            raise error or OSError("no")
        return "fine"

    read.calls = []
    return read


def test_a_read_that_fails_twice_is_read(make):
    attempts, read = make(), failing(2)
    assert attempts.start(attempts(read, never, True)).result() == "fine"
    assert attempts.counts == {"reads": 3, "retries": 2}


def test_five_retries_wait_31_units(make):
    """The default waits 31 s, and up to a quarter more; here a hundredth of it."""
    attempts, read = make(), failing(99, FileNotFoundError("gone"))
    with pytest.raises(FileNotFoundError, match="gone"):
        attempts.start(attempts(read, never, True)).result()
    assert attempts.counts == {"reads": 6, "retries": 5}
    waits = [after - before for before, after in zip(read.calls, read.calls[1:], strict=False)]
    assert all(wait >= 0.01 * 2**i for i, wait in enumerate(waits))
    assert 0.31 <= sum(waits) < 0.31 * 1.25 + 1.0  # the machine may be busy


def test_no_retry_where_none_would_help(make):
    attempts, read = make(), failing(99, IsADirectoryError("other bytes"))
    with pytest.raises(IsADirectoryError):
        attempts.start(attempts(read, never, True)).result()
    assert len(read.calls) == 1


def test_a_read_that_hangs_is_given_up(make, gate):
    attempts = make(timeout=0.05, retries=2)
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        attempts.start(attempts(gate.wait, never, False)).result()
    assert 0.15 <= time.monotonic() - begun < 3
    assert attempts.counts["reads"] == 3


def test_the_deadline_is_for_all_attempts_together(make, gate):
    attempts = make(timeout=0.2, deadline=0.5, retries=99)
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        attempts.start(attempts(gate.wait, never, False)).result()
    assert time.monotonic() - begun < 3
    assert attempts.counts["reads"] == 3  # 0.2 + 0.2 + what was left


def test_waiting_ends_when_there_is_no_hope(make):
    attempts, lost = make(backoff=60.0, deadline=600.0), threading.Event()
    future = attempts.start(attempts(failing(99), lost.is_set, True))
    while not attempts.counts["reads"]:
        time.sleep(0.01)
    lost.set()
    attempts.loop.call_soon_threadsafe(attempts.wake)
    with pytest.raises(OSError, match="no"):
        future.result(timeout=10)


def test_a_late_read_lets_others_pass(make, gate, monkeypatch):
    monkeypatch.setattr(module, "LATE", 0.1)
    attempts = make(threads=1, timeout=30.0)
    stuck = [attempts.start(attempts(gate.wait, never, False)) for _ in range(3)]
    assert attempts.start(attempts(failing(0), never, False)).result(timeout=10) == "fine"
    assert not any(future.done() for future in stuck)


def test_a_late_read_is_asked_twice_and_the_first_answer_counts(make, gate):
    attempts = make(timeout=30.0)
    for _ in range(module.KNOWN):
        attempts.took(0.001)
    first = []

    def read():
        first.append(None)
        if len(first) == 1:
            gate.wait()
            return "late"
        return "second"

    begun = time.monotonic()
    assert attempts.start(attempts(read, never, True)).result() == "second"
    assert module.SOON <= time.monotonic() - begun < 5
    assert attempts.counts == {"reads": 1, "hedges": 1}


def test_second_requests_are_few_when_all_is_slow(make):
    attempts = make()
    for _ in range(module.KNOWN):
        attempts.took(0.001)
    for _ in range(20):
        attempts.start(attempts(lambda: time.sleep(0.12), never, True)).result()
    assert 1 <= attempts.counts["hedges"] <= module.HEDGES * 20


def test_hands_are_used_again_and_grow_with_the_work(gate):
    hands, threads = Hands(), set()
    for _ in range(50):
        threads.add(hands.submit(threading.get_ident).result())
        time.sleep(0.001)
    assert len(threads) < 10
    for _ in range(10):
        hands.submit(gate.wait)
    assert hands.submit(lambda: "still").result(timeout=10) == "still"
    hands.close()


def test_closing_ends_the_threads(make):
    before = threading.active_count()
    attempts = make()
    attempts.start(attempts(failing(0), never, False)).result()
    attempts.close()
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before
