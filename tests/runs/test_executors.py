"""Jobs in this process, in several and in Ray's actors: all done, and nobody's death loses more
than the job in hand."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightleak.errors import UserError
from lightleak.runs.executors import executor

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from lightleak.runs.executors import executor

def work(job, advance):
    name, folder = job
    with (folder / f"{name}.log").open("a") as log:
        log.write(f"{os.getpid()}\\n")
    for _ in range(10):
        time.sleep(0.05)
        advance(1)
    return name.upper()

if __name__ == "__main__":
    # What is started in the background may have been told not to hear it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, told = Path(sys.argv[2]), []
    with executor(sys.argv[1], 2) as these:
        print(these.map(work, [(name, folder) for name in "abcd"], told.append), sum(told))
"""


def touch(file, advance):
    file.touch()
    advance(1)
    return file.name


def fail(file, advance):
    raise UserError("it is empty", str(file), "Fill it.")


def die(file, advance):
    advance(7)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module", params=["here", "local", "ray"])
def these(request):
    # Ray's actors import this file by its name.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
    )
    kind = "ray" if request.param == "ray" else "local"
    with executor(kind, 1 if request.param == "here" else 2) as started:
        yield started


def test_every_job_is_done_and_answers_in_order(these, tmp_path):
    files = [tmp_path / str(i) for i in range(5)]
    told = []
    assert these.map(touch, files, told.append) == ["0", "1", "2", "3", "4"]
    assert all(file.exists() for file in files)
    assert sum(told) == 5


def test_a_users_mistake_comes_back_as_it_was(these, tmp_path):
    with pytest.raises(UserError) as caught:
        these.map(fail, [tmp_path / "a", tmp_path / "b"])
    assert str(caught.value) == f"{tmp_path / 'a'}: it is empty. Fill it."
    assert these.map(touch, [tmp_path / "c"]) == ["c"]


@pytest.mark.parametrize("these", ["local", "ray"], indirect=True)
def test_a_job_that_kills_every_process_ends_with_one_line(these, tmp_path):
    told = []
    with pytest.raises(UserError, match="a worker process died 3 times"):
        these.map(die, [tmp_path / "a"], told.append)
    assert sum(told) == 0
    assert these.map(touch, [tmp_path / "c"]) == ["c"]


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_a_worker_that_is_killed_loses_its_job_and_no_other(kind, tmp_path):
    caller = start(kind, tmp_path)
    victim = int(wait_for(lambda: read(tmp_path / "b.log"))[0])
    os.kill(victim, signal.SIGKILL)
    said = caller.communicate(timeout=90)[0]
    assert "['A', 'B', 'C', 'D'] 40" in said
    tries = {name: len(read(tmp_path / f"{name}.log")) for name in "abcd"}
    assert tries == {"a": 1, "b": 2, "c": 1, "d": 1}


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_no_process_outlives_a_caller_that_was_killed(kind, tmp_path):
    caller = start(kind, tmp_path)
    workers = [int(wait_for(lambda n=name: read(tmp_path / f"{n}.log"))[0]) for name in "ab"]
    os.kill(caller.pid, signal.SIGKILL)
    caller.wait()
    assert wait_for(lambda: not any(alive(pid) for pid in workers))


def test_an_interrupt_ends_at_once_and_says_nothing_but_itself(tmp_path):
    program = PROGRAM.replace("range(10)", "range(10_000)")
    caller = start("local", tmp_path, program, stderr=subprocess.PIPE)
    workers = [int(wait_for(lambda n=name: read(tmp_path / f"{n}.log"))[0]) for name in "ab"]
    os.killpg(caller.pid, signal.SIGINT)
    said = caller.communicate(timeout=20)[1]
    assert said.count("Traceback") == said.count("KeyboardInterrupt") == 1
    assert not any(alive(pid) for pid in workers)


def test_ray_that_is_not_there_is_one_line():
    with (
        pytest.raises(UserError, match="no Ray cluster could be joined"),
        executor("ray", 2, address="127.0.0.1:1"),
    ):
        pass


def start(kind, folder, content=PROGRAM, **streams):
    program = folder / "program.py"
    program.write_text(content)
    return subprocess.Popen(
        [sys.executable, program, kind, folder],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **streams,
    )


def read(file):
    return file.read_text().split() if file.exists() else []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=60):
    for _ in range(seconds * 20):
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come")
