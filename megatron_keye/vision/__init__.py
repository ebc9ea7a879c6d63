"""Patches to decoder embeddings: the native-resolution ViT and the projector behind it.

Plain torch modules that know nothing of ranks, so that any placement can run them on any chunk of
frames.
"""

from megatron_keye.vision.encoder import VisionEncoder
from megatron_keye.vision.projector import Projector
from megatron_keye.vision.tower import VisionTower

__all__ = ["Projector", "VisionEncoder", "VisionTower"]
