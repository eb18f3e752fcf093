"""What a killed run leaves behind is found by its driver's identity, and only that is removed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from grpo import cluster, leftovers
from grpo.config_sections import RayConfig
from grpo.errors import ActorError
from grpo.leftovers import MARK, claim_segments, clean, identity, is_gone, marked, segment_prefix

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked for in /proc")
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path)
    return tmp_path


@pytest.fixture
def start():
    """A process that sleeps, with what is given in its environment."""
    processes = []

    def start(**environment: str) -> subprocess.Popen:
        processes.append(subprocess.Popen(SLEEP, env=os.environ | environment, start_new_session=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def gone(start) -> str:
    """The identity of a driver that was killed."""
    driver = start()
    mark = identity(driver.pid)
    driver.kill()
    driver.wait()
    return mark


def test_an_identity_is_of_one_process_and_ends_with_it(start, gone):
    driver = start()
    mark = identity(driver.pid)
    assert mark == identity(driver.pid) != identity(os.getpid())
    assert not is_gone(mark) and is_gone(gone)
    os.kill(driver.pid, signal.SIGSTOP)
    assert not is_gone(mark)  # it may go on
    driver.kill()
    deadline = time.monotonic() + 5
    while not is_gone(mark) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_gone(mark)  # though nobody has waited for it yet


def test_another_process_of_the_same_number_is_another():
    boot, namespace, pid, started = identity(os.getpid()).split(".")
    assert is_gone(f"{boot}.{namespace}.{pid}.{int(started) - 1}")


def test_other_machines_and_containers_are_not_judged(gone):
    boot, namespace, pid, started = gone.split(".")
    assert not is_gone(f"00000000.{namespace}.{pid}.{started}")
    assert not is_gone(f"{boot}.{int(namespace) + 1}.{pid}.{started}")


def test_processes_of_a_driver_that_is_gone_are_ended_though_they_are_stopped_and_no_others(
    start, gone, shared_memory, capsys
):
    living = start(**{MARK: identity(os.getpid())})
    unmarked = start()
    stopped = start(**{MARK: gone})
    time.sleep(0.2)  # until the environment is theirs
    os.kill(stopped.pid, signal.SIGSTOP)
    clean()
    assert stopped.wait(5) == -signal.SIGKILL
    assert living.poll() is None and unmarked.poll() is None
    assert "had left processes (1) and segments of shared memory (0): all removed" in capsys.readouterr().err
    clean()
    assert capsys.readouterr().err == ""


def test_segments_of_a_driver_that_is_gone_are_removed_with_those_on_its_lists_and_no_others(gone, shared_memory, capsys):
    own = f"grpo-{identity(os.getpid())}-weights-abc"
    listed, foreign = "psm_listed", "psm_foreign"
    for name in (own, f"grpo-{gone}-weights-abc", listed, foreign, "grpo-else"):
        (shared_memory / name).write_text("")
    (shared_memory / f"grpo-{gone}-segments-def").write_text(f"{listed}\npsm_no_longer_there")
    clean()
    assert {path.name for path in shared_memory.iterdir()} == {own, foreign, "grpo-else"}
    assert "segments of shared memory (2)" in capsys.readouterr().err  # neither the list nor what was gone already


def test_what_another_user_lists_is_not_removed(gone, shared_memory, monkeypatch, capsys):
    names = {"psm_listed", f"grpo-{gone}-weights-abc", f"grpo-{gone}-segments-def"}
    for name in names:
        (shared_memory / name).write_text("psm_listed")
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    clean()
    assert {path.name for path in shared_memory.iterdir()} == names
    assert capsys.readouterr().err == ""


def test_a_list_names_nothing_outside_of_shared_memory(gone, tmp_path, shared_memory):
    inside, outside = shared_memory / "inside" / "mine", tmp_path.parent / f"{tmp_path.name}-mine"
    inside.parent.mkdir()
    for path in (inside, outside):
        path.write_text("")
    (shared_memory / f"grpo-{gone}-segments-def").write_text(f"inside/mine\n../{outside.name}\n{outside}")
    clean()
    assert inside.exists() and outside.exists()


def test_what_a_run_starts_is_marked_and_its_segments_go_with_it(shared_memory, monkeypatch):
    monkeypatch.delenv(MARK, raising=False)
    with marked():
        assert os.environ[MARK] == identity(os.getpid())
        assert segment_prefix("weights") == f"grpo-{os.environ[MARK]}-weights-"
        (shared_memory / f"{segment_prefix('weights')}abc").write_text("")
    assert MARK not in os.environ
    assert list(shared_memory.iterdir()) == []


def test_segments_that_a_process_has_mapped_are_listed(shared_memory, monkeypatch):
    monkeypatch.setenv(MARK, identity(os.getpid()))
    mapped, other = shared_memory / "psm_mapped", shared_memory / "psm_other"
    for path in (mapped, other):
        path.write_bytes(b"x" * 4096)
    code = (
        f"import mmap, time; f = open({str(mapped)!r}, 'r+b'); m = mmap.mmap(f.fileno(), 0); "
        "print(1, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    claim_segments([os.getpid(), process.pid])
    process.kill()
    process.wait()
    (list_of_them,) = shared_memory.glob("grpo-*")
    assert list_of_them.read_text() == "psm_mapped"


def test_what_was_left_is_removed_by_a_run_that_starts_and_not_by_one_that_is_refused(gone, shared_memory, monkeypatch):
    left = shared_memory / f"grpo-{gone}-weights-abc"
    left.write_text("")
    with marked():  # in which a run finds out that it cannot begin
        assert left.exists()
    monkeypatch.setattr(cluster, "_start_own", lambda *_: None)
    cluster.start_ray(RayConfig(), 1, ExitStack())
    assert not left.exists()


@pytest.mark.parametrize(("raised", "expected"), [(Exception, ActorError), (OSError, OSError)])
def test_that_ray_does_not_come_up_is_said_in_one_line(monkeypatch, raised, expected):
    """Which it says by a bare Exception; what has a class is no business of ours."""

    def init(**options):
        raise raised("The current node timed out during startup.")

    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(expected, match=r"The current node timed out during startup\.") as error, ExitStack() as closing:
        cluster.start_ray(RayConfig(), 1, closing)
    assert str(error.value).startswith("Ray did not start: ") == (expected is ActorError)
