"""Jobs in several processes: all done, and a fault is the caller's to see."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightleak.runs.jobs import each


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_is_done_and_told_of(tmp_path, workers):
    files = [tmp_path / str(i) for i in range(5)]
    told = []
    each(files, Path.touch, workers, told.append)
    assert all(file.exists() for file in files)
    assert sum(told) == 5


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_is_raised(tmp_path, workers):
    with pytest.raises(FileNotFoundError):
        each([tmp_path / "a", tmp_path / "b"], Path.unlink, workers)


def test_no_process_outlives_a_caller_that_was_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, time, sys\n"
        "from lightleak.runs.jobs import each\n"
        "def work(file):\n"
        "    open(file, 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    each(sys.argv[1:], work, 2)\n"
    )
    files = [tmp_path / "a", tmp_path / "b"]
    caller = subprocess.Popen([sys.executable, program, *files])
    workers = [int(_wait_for(lambda f=file: f.exists() and f.read_text())) for file in files]
    os.kill(caller.pid, signal.SIGKILL)
    caller.wait()
    assert _wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def _wait_for(condition, seconds=60):
    for _ in range(seconds * 10):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come")
