"""Keeps out of a command's output what libraries say when they are imported."""

import logging
import warnings


def quieten_libraries() -> None:
    """Silence notes about what is not installed; errors still come through.

    Call it before torch or Megatron-Core is imported.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    # On a machine with a CUDA toolkit and no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
