# SPDX-License-Identifier: Apache-2.0
"""Processes end with those that started them, at any depth and from any thread; so do files."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from megatron_keye.files.temporary import remove_leftovers, shared_folder

ROOT = Path(__file__).resolve().parents[3]
SECONDS_TO_END = 10.0
FORKS = """
import multiprocessing, os, sys, threading, time
from megatron_keye.files.children import take_children_along
from megatron_keye.files.temporary import keep_sockets_removable

def grandchild():
    print(os.getpid(), flush=True)
    time.sleep(60)

def child():
    fork.Process(target=grandchild).start()
    print(os.getpid(), flush=True)
    time.sleep(60)

fork = multiprocessing.get_context("fork")
spawn = multiprocessing.get_context("spawn")
take_children_along()
keep_sockets_removable()
kept = []  # also what the thread starts, which ends long before
threads = [threading.Thread(target=lambda: kept.append(fork.Manager()))]
for thread in threads:
    thread.start()
    thread.join()
print(kept[0]._process.pid, flush=True)
kept.append(spawn.Manager())
print(kept[1]._process.pid, flush=True)
queue = kept[0].Queue()
fork.Process(target=child).start()
time.sleep(0.3)
queue.put("a manager that a thread has started is still there")
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for temporary files of this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_processes_and_their_files_go_with_a_killed_one(apart: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "ready\n")
    others = [psutil.Process(int(line)) for line in lines]
    assert len(others) == 4 and all(other.is_running() for other in others)
    assert list(apart.rglob("listener-*")), "a manager has a socket"
    remove_leftovers()
    assert list(apart.rglob("listener-*")), "a living process keeps its files"
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(others, timeout=SECONDS_TO_END)
    assert not alive
    assert list(apart.rglob("*")) == [shared_folder()]


MAKER = """
import os, sys, time
from pathlib import Path
from megatron_keye.files.partial_folder import PartialFolder
from megatron_keye.files.workers import make_files

class Maker:
    def fill(self, name, stream, advance):
        print(os.getpid(), flush=True)
        time.sleep(60)

if __name__ == "__main__":
    import maker
    folder = PartialFolder(Path(sys.argv[1]), "")
    make_files(maker.Maker(), ["a", "b"], folder, num_workers=2, advance=lambda amount: None)
"""


def test_workers_in_the_middle_of_a_file_end_with_a_killed_command(apart: Path) -> None:
    (apart / "maker.py").write_text(MAKER)
    process = subprocess.Popen(
        [sys.executable, str(apart / "maker.py"), str(apart / "made")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{apart}"},
    )
    assert process.stdout is not None
    workers = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=SECONDS_TO_END)
    assert not alive
    assert not list(apart.glob("pymp-*"))


def test_an_orderly_end_leaves_no_files(apart: Path) -> None:
    code = FORKS.partition("threads = ")[0] + "fork.Manager().Queue().put(1)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(apart.rglob("*")) == [shared_folder()]


def test_a_process_that_has_lost_its_parent_before_ends_at_once() -> None:
    code = "from megatron_keye.files.children import *; end_with_parent(1); print('goes on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")
