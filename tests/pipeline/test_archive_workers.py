"""Work on an archive in several processes, and what becomes of it when one dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.archive_workers import over_archive
from pipeline.coco import ArchiveError, ImageArchive
from pipeline.errors import PipelineError
from tests.pipeline.conftest import write_zip


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    write_zip(tmp_path / "a.zip", {f"{n}.jpg": bytes([n]) * 5 for n in range(20)})
    return tmp_path / "a.zip"


def read_and_name_process(archive: ImageArchive, number: int) -> tuple[bytes, int]:
    return archive.read(f"{number}.jpg"), os.getpid()


def test_results_come_in_the_order_of_the_tasks_from_other_processes(archive: Path) -> None:
    results = list(over_archive(archive, 2, read_and_name_process, range(20)))
    assert [content for content, _ in results] == [bytes([n]) * 5 for n in range(20)]
    assert os.getpid() not in {process for _, process in results}


def test_no_tasks_are_no_results(archive: Path) -> None:
    assert list(over_archive(archive, 2, read_and_name_process, [])) == []


def test_error_of_a_task_is_the_callers(archive: Path) -> None:
    with pytest.raises(ArchiveError, match=r"'20\.jpg' is not in the archive"):
        list(over_archive(archive, 2, read_and_name_process, range(21)))


def die(archive: ImageArchive, number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_process_is_named_as_such(archive: Path) -> None:
    with pytest.raises(PipelineError, match=r"a\.zip: a process that read it was killed.*loader_workers"):
        list(over_archive(archive, 2, die, range(4)))


PARENT = """
import os, signal, sys
from pathlib import Path
from pipeline.archive_workers import over_archive
from tests.pipeline.test_archive_workers import count_up, processes

results = over_archive(Path(sys.argv[1]), 2, count_up, range(4))
print(*processes(os.getpid()) if next(results) else (), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def count_up(archive: ImageArchive, number: int) -> bool:
    return number >= 0


def processes(parent: int) -> list[str]:
    """The ids of its children."""
    return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(archive: Path) -> None:
    """They wait for tasks at a pipe whose other end they hold themselves."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    output = archive.with_name("output")  # a pipe would stay open as long as they live
    with output.open("w") as file:
        command = [sys.executable, "-c", PARENT, str(archive)]
        killed = subprocess.run(command, env=environment, stdout=file, stderr=file, check=False)
    assert killed.returncode == -signal.SIGKILL
    workers = [Path("/proc", process) for process in output.read_text().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


def is_alive(process: Path) -> bool:
    """Not gone, and not waiting for whoever is to fetch its exit status."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
