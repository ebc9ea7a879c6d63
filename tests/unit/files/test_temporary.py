# SPDX-License-Identifier: Apache-2.0
"""The folder of multiprocessing's sockets stays as long as its process, whoever cleans up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOOKED_AT_BEFORE_IT_IS_LOCKED = """
from multiprocessing import util
from pathlib import Path

from megatron_keye.files import lock, temporary

try_to_lock = lock._try

def looked_at(*arguments, **more):
    lock._try = try_to_lock
    temporary.remove_leftovers()
    return try_to_lock(*arguments, **more)

lock._try = looked_at
temporary.keep_sockets_removable()
assert lock._try is try_to_lock
print(Path(util.get_temp_dir()).is_dir())
temporary.remove_leftovers()
print(Path(util.get_temp_dir()).is_dir())
"""


def test_a_process_that_starts_beside_another_leaves_its_folder(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LOOKED_AT_BEFORE_IT_IS_LOCKED],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["True", "True"]
    assert result.stderr == ""
    assert not list(tmp_path.rglob("*pymp-*"))


IN_A_CHILD_OF_A_PROCESS_WITH_A_FOLDER = """
import multiprocessing
import os
from multiprocessing import util
from pathlib import Path

from megatron_keye.files import temporary

def end_as_if_killed():
    temporary.keep_sockets_removable()
    os._exit(0)

if __name__ == "__main__":
    folder = Path(util.get_temp_dir())
    if ITS_PARENT_KEEPS_IT:
        temporary.keep_sockets_removable()
    child = multiprocessing.get_context("spawn").Process(target=end_as_if_killed)
    child.start()
    child.join()
    temporary.remove_leftovers()
    print(child.exitcode, folder.is_dir())
"""


@pytest.mark.parametrize("its_parent_keeps_it", [False, True])
def test_a_child_leaves_the_folder_of_its_parent(
    tmp_path: Path, its_parent_keeps_it: bool
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        IN_A_CHILD_OF_A_PROCESS_WITH_A_FOLDER.replace(
            "ITS_PARENT_KEEPS_IT", str(its_parent_keeps_it)
        )
    )
    result = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout.split() == ["0", "True"]
    assert result.stderr == ""
