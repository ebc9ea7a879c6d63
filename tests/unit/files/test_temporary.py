# SPDX-License-Identifier: Apache-2.0
"""The folder of multiprocessing's sockets stays as long as its process, whoever cleans up."""

import os
import subprocess
import sys
from pathlib import Path

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
