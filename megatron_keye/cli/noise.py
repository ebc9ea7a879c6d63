"""Keeps messages of libraries out of a command's output."""

import logging
import warnings


def quieten_libraries() -> None:
    """Silence warnings about missing optional packages; errors are still logged.

    Call it before torch or Megatron-Core is imported.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    # It warns where there is a CUDA toolkit but no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
