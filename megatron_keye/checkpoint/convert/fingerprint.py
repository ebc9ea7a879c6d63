# SPDX-License-Identifier: Apache-2.0
"""What decides the content of a converted folder, so that only the same conversion is resumed."""

import json
from collections.abc import Iterable
from pathlib import Path


def fingerprint(settings: list[str], sources: Iterable[Path]) -> str:
    """Return settings and source files as text; files by size and modification time."""
    stats = [(str(path.resolve()), path.stat()) for path in sources]
    return json.dumps([settings, [(p, s.st_size, s.st_mtime_ns) for p, s in stats]])
