"""What training and conversions share of the native format: names of files, a tensor's form."""

import json
from typing import BinaryIO

import torch
from torch import Tensor

CONFIG, METADATA = "metadata.json", ".metadata"
CONFIG_TEXT = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
"""Content of metadata.json, by which Megatron-Core knows the format."""


def write_tensor(stream: BinaryIO, tensor: Tensor) -> tuple[int, int]:
    """Append a tensor, as torch.load reads it, and return its first byte and its size in bytes."""
    start = stream.tell()
    data = tensor.detach().cpu()
    if data.untyped_storage().nbytes() != data.nbytes or not data.is_contiguous():
        # torch.save writes a tensor's whole storage.
        data = data.clone(memory_format=torch.contiguous_format)
    checksums = torch.serialization.get_crc32_options()
    # torch.load verifies no checksums, so computing them would be wasted time.
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(data, stream)
    finally:
        torch.serialization.set_crc32_options(checksums)
    return start, stream.tell() - start
