"""From files to packed rows and patches.

A sample goes conversation -> sample -> row on every rank, from containers alone; pixels go
video or image -> patches only where they are encoded, on the CPU or on the GPU.
"""

from megatron_keye.data.conversation import Conversation, read_conversations
from megatron_keye.data.frames import VideoPlan, frame_grid, image_grid, plan_video
from megatron_keye.data.loader import RowLoader
from megatron_keye.data.media import resolve_media
from megatron_keye.data.packing import pack
from megatron_keye.data.row import IGNORED_LABEL, PackedRow, Picture, Sample
from megatron_keye.data.sample import make_sample
from megatron_keye.data.tokens import Tokenizer, load_tokenizer
from megatron_keye.data.video import VideoInfo, decode_frames, probe

__all__ = [
    "IGNORED_LABEL",
    "Conversation",
    "PackedRow",
    "Picture",
    "RowLoader",
    "Sample",
    "Tokenizer",
    "VideoInfo",
    "VideoPlan",
    "decode_frames",
    "frame_grid",
    "image_grid",
    "load_tokenizer",
    "make_sample",
    "pack",
    "plan_video",
    "probe",
    "read_conversations",
    "resolve_media",
]
