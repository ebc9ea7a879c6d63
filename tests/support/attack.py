# SPDX-License-Identifier: Apache-2.0
"""Files that leave a mark when what is in them is run, as a pickle is that is loaded."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        """Take the folder, which tells that code has run."""
        self.mark = mark

    def __reduce__(self) -> Any:
        """Return what a pickle calls."""
        return os.mkdir, (str(self.mark),)


def pickled(mark: Path) -> bytes:
    """Return a pickle that makes a folder."""
    return pickle.dumps(Attack(mark))


def saved(mark: Path) -> bytes:
    """Return what torch.save writes of such a pickle."""
    stream = io.BytesIO()
    torch.save([Attack(mark)], stream)
    return stream.getvalue()
