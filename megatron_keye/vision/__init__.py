# SPDX-License-Identifier: Apache-2.0
"""Patches to decoder embeddings: the native-resolution ViT and the projector.

Plain torch modules without communication, so that any rank can run them on any chunk.
"""

from megatron_keye.vision.adapters import add_adapters
from megatron_keye.vision.encoder import VisionEncoder
from megatron_keye.vision.projector import Projector
from megatron_keye.vision.tower import VisionTower

__all__ = ["Projector", "VisionEncoder", "VisionTower", "add_adapters"]
