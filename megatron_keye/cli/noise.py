# SPDX-License-Identifier: Apache-2.0
"""Keeps messages of libraries out of a command's output."""

import logging
import threading
import warnings

_EVENT_FILES = "tensorboard."


def quieten_libraries() -> None:
    """Silence warnings about missing optional packages; errors are still logged.

    Call it before torch or Megatron-Core is imported.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    # It warns where there is a CUDA toolkit but no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    threading.excepthook = _report_thread


def _report_thread(failure: threading.ExceptHookArgs) -> None:
    """Show the traceback of a thread, but of TensorBoard's, whose error its caller raises too."""
    if not type(failure.thread).__module__.startswith(_EVENT_FILES):
        threading.__excepthook__(failure)
