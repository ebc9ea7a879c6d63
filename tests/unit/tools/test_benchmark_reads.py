# SPDX-License-Identifier: Apache-2.0
"""A rank reads of a long video the packets that it decodes, and little else."""

from pathlib import Path

import pytest

from megatron_keye.data.media import resolve_media
from megatron_keye.data.video.probe import probe
from tools.benchmark_reads import CLIP, bytes_needed, bytes_read
from tools.make_long_video import encode, repeat


@pytest.fixture(scope="module")
def minute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("minute") / "minute.mp4"
    encode(resolve_media(CLIP, Path()), path, num_frames=240, rate=4)
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_rank_reads_what_it_decodes(tmp_path: Path, minute: Path, suffix: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    repeat(minute, path, times=12)
    info = probe(path)
    # MPEG-TS puts headers around small packets, which any reader must read.
    overhead = path.stat().st_size / info.packet_sizes.sum()
    for share in (range(0, 900, 30), range(1000, 1900, 30), range(2400, 2880, 30)):
        needed = bytes_needed(info, share) * overhead
        read = bytes_read(path, share, "store", tmp_path, info.to_bytes())
        assert needed * 0.9 < read < 1.2 * needed + 500_000, "it reads what others decode"
