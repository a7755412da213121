"""Jobs in several processes: all done, and a fault is the caller's to see."""

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
