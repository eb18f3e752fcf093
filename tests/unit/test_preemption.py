"""A signal or the clock asks the run to end; the run answers where its state is whole."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from grpo.preemption import REQUEST, GraceOver, Preempted, at_once, listen, saved_in_time


def wait_for(condition, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_raises_a_flag_and_nothing_else(number):
    with listen(60, None):
        REQUEST.check()
        os.kill(os.getpid(), number)
        wait_for(lambda: REQUEST.reason is not None)
        with pytest.raises(Preempted, match=number.name):
            REQUEST.check()
    REQUEST.check()  # the next run in this process was not asked


def test_the_second_signal_ends_at_once():
    with pytest.raises(KeyboardInterrupt), listen(60, None):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)


def test_the_grace_period_is_kept():
    with pytest.raises(GraceOver, match=r"SIGTERM.*train.grace_s \(0.1\).*LATEST"), listen(0.1, None):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_once_saved_there_is_no_hurry():
    with listen(0.1, None):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: REQUEST.reason is not None)
        saved_in_time()
        time.sleep(0.3)


def test_the_clock_asks_too():
    with listen(60, 0.1):
        REQUEST.check()
        wait_for(lambda: REQUEST.reason is not None)
        with pytest.raises(Preempted, match=r"train\.max_wall_time"):
            REQUEST.check()


def test_another_thread_goes_on():
    seen = []

    def work() -> None:
        REQUEST.check()
        seen.append("went on")

    with listen(60, None):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: REQUEST.reason is not None)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == ["went on"]


def test_the_handlers_of_before_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)]
    with listen(60, 60):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_forked_child_ends_as_it_would_have():
    code = (
        "import os, signal, time\n"
        "from grpo.preemption import listen\n"
        "with listen(60, None):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        time.sleep(30)\n"
        "    time.sleep(0.3)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    print(os.waitpid(child, 0)[1])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert ended.stdout.strip() == str(int(signal.SIGTERM)), ended.stderr


@pytest.mark.parametrize("clock", [None, 0.1])
def test_while_there_is_nothing_to_save_a_request_ends_what_goes_on(clock):
    start = time.monotonic()
    with pytest.raises(Preempted) as ended, listen(60, clock), at_once():
        if clock is None:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert time.monotonic() - start < 5
    assert str(ended.value) == ("SIGTERM" if clock is None else "train.max_wall_time")


def test_a_request_of_before_is_answered_too_and_of_later_waits_again():
    with listen(60, None):
        with at_once():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: REQUEST.reason is not None)
        with pytest.raises(Preempted), at_once():
            raise AssertionError("it is not begun")


def test_a_program_that_does_not_catch_it_ends_as_the_scripts_do():
    code = "from grpo.preemption import Preempted\nraise Preempted('SIGTERM')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert (ended.returncode, ended.stderr) == (75, "")


def test_it_says_how_the_run_goes_on_if_there_is_one():
    stop = Preempted("SIGUSR1")
    assert stop.told("x") == "Ended by SIGUSR1 before there was anything to save: start it again as it was started"
    stop.saved = "checkpoint_000004"
    assert stop.told("python x.py") == "Ended by SIGUSR1 after saving checkpoint_000004; it goes on with python x.py"
