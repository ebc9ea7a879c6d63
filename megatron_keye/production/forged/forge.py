# SPDX-License-Identifier: Apache-2.0
"""Forges clips with their questions into a folder: videos, and sample files about them."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_keye.data.video.probe import probe
from megatron_keye.errors import UserError
from megatron_keye.files.partial_folder import PartialFolder
from megatron_keye.files.progress import NoProgress, Progress
from megatron_keye.files.workers import Advance, make_files
from megatron_keye.production.forged.clip import write_clip
from megatron_keye.production.forged.draw import draw_frames
from megatron_keye.production.forged.forged_question import ForgedQuestion, Watched
from megatron_keye.production.forged.options import ForgeOptions
from megatron_keye.production.forged.questions import ask
from megatron_keye.production.forged.scene import SHAPE_NAMES, Scene, draw_scene
from megatron_keye.production.word_tokenizer import write_tokenizer
from megatron_keye.scoring.question import Question, user_turn

Line = dict[str, Any]
"""A question with its truth, and its answer as the last turn, ready for JSON."""
PARTS = ("train", "held_out")
"""Parts of what is forged, which share no scene."""
_MOST_ATTEMPTS = 1000
_UNEVEN = 0.3
"""Most shift of a frame of a variable clip, as a share of the mean distance of two."""


@dataclass(frozen=True, kw_only=True)
class PartCount:
    """What one part holds."""

    num_questions: int
    """Questions about its clips."""
    num_clips: int
    """Clips that were made."""
    num_unasked: int
    """Clips among them that allow none of the kinds of questions, so that no line names them."""


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """A clip to be made."""

    scene: Scene
    milliseconds: tuple[int, ...]
    seed: tuple[int, ...]


def forge(
    out: Path, options: ForgeOptions, *, num_workers: int, progress: Progress | None = None
) -> dict[str, PartCount]:
    """Write videos, and for each part a file of conversations and one of questions.

    PART.jsonl has one conversation for each clip, with all its questions and answers but those of
    options.unanswered, to train on; PART.questions.jsonl has one question a line, with its truth.

    Args:
        out: Folder to make; must not exist.
        options: What is forged; a killed run with the same options continues.
        num_workers: Processes.
        progress: Receives the clips that are done.

    Returns:
        What is in each part.

    Raises:
        UserError: When the folder exists, the options leave too few different scenes, or no clip
            of a part allows a kind of questions that is answered; nothing is left then.
        DiskError: When the disk refuses a file.
    """
    progress = progress or NoProgress()
    clips = _draw_clips(options)
    folder = PartialFolder(out, repr(options))
    with folder.filling():
        progress.begin(len(clips), sum(folder.record(name) is not None for name in clips))
        maker = _ClipMaker(clips=clips, options=options)
        make_files(maker, list(clips), folder, num_workers=num_workers, advance=progress.advance)
        parts = {
            part: [folder.record(name) for name in clips if name.startswith(f"{part}-")]
            for part in PARTS
        }
        counts = {part: _count(lines) for part, lines in parts.items()}
        answered = {part: _answered(lines, options.unanswered) for part, lines in parts.items()}
        if not all(any(each) for each in answered.values()):
            folder.discard()
            raise UserError(
                f"--questions: got {' '.join(options.kinds)}, which no clip of some part allows, "
                "expected some that do, and are answered; add 'when' or 'never', or ask for more "
                "clips"
            )
        for part, lines in parts.items():
            _write_lines(folder.path, part, lines, answered[part])
        if options.writes_tokenizer:
            tenths = range(int(10 * options.longest_seconds) + 2)
            lines = [line for lines in parts.values() for each in lines for line in each]
            write_tokenizer(folder.path / "tokenizer", _vocabulary(lines, tenths))
        folder.finish()
    return counts


def _draw_clips(options: ForgeOptions) -> dict[str, _Clip]:
    """Draw the scenes of all clips by the names of their files; no two are equal."""
    clips: dict[str, _Clip] = {}
    seen: set[Scene] = set()
    for number, part in enumerate(PARTS):
        count = options.num_clips if part == "train" else options.num_held_out
        for index in range(count):
            seed = (options.seed, number, index)
            for attempt in range(_MOST_ATTEMPTS):
                clip = _draw_clip((*seed, attempt), options)
                if clip.scene not in seen:
                    break
            else:
                raise UserError(
                    f"{part} {index}: got no scene that differs from the {len(seen):,} before, "
                    "expected all to differ; ask for fewer clips, longer ones or more --shapes"
                )
            seen.add(clip.scene)
            clips[f"{part}-{index:06d}.mp4"] = clip
    return clips


def _draw_clip(seed: tuple[int, ...], options: ForgeOptions) -> _Clip:
    generator = np.random.default_rng(seed)
    seconds = generator.uniform(options.shortest_seconds, options.longest_seconds)
    num_frames = int(seconds * options.frames_per_second)
    scene = draw_scene(
        generator,
        num_frames,
        most_shapes=options.most_shapes,
        frames_per_second=options.frames_per_second,
        longest_stay=options.longest_stay,
        word_share=options.word_share,
        blink_share=options.blink_share,
    )
    places = np.arange(num_frames, dtype=np.float64)
    if generator.random() < options.variable_share:
        places[1:] += generator.uniform(-_UNEVEN, _UNEVEN, num_frames - 1)
    milliseconds = (1000 * places / options.frames_per_second).round().astype(int)
    return _Clip(scene=scene, milliseconds=tuple(milliseconds.tolist()), seed=seed)


@dataclass(frozen=True, kw_only=True)
class _ClipMaker:
    """Writes the video of a clip; its record is the lines of the questions about it."""

    clips: Mapping[str, _Clip]
    options: ForgeOptions

    def fill(self, name: str, stream: BinaryIO, advance: Advance) -> Any:
        clip, options = self.clips[name], self.options
        # Each draws by itself, so that noise changes no question.
        noise, questions = (np.random.default_rng((*clip.seed, use)) for use in (1, 2))
        distractors = noise if options.has_distractors else None
        frames = draw_frames(clip.scene, options.size, distractors)
        # MP4 is not written from front to back.
        with tempfile.NamedTemporaryFile(suffix=".mp4") as made:
            write_clip(Path(made.name), frames, clip.milliseconds)
            # What the file says counts, not what was meant to be written.
            times = probe(Path(made.name)).times.tolist()
            made.seek(0)
            shutil.copyfileobj(made, stream)
        if len(times) != clip.scene.num_frames:
            raise RuntimeError(f"{name}: has {len(times)} frames, not {clip.scene.num_frames}")
        watched = Watched(
            scene=clip.scene,
            times=times,
            seconds=times[-1] + 1 / options.frames_per_second,
        )
        advance(1)
        asked = ask(watched, options.kinds, options.questions_per_clip, questions)
        return [
            _line(question, name, number, watched.seconds) for number, question in enumerate(asked)
        ]


def _line(question: ForgedQuestion, clip: str, number: int, seconds: float) -> Line:
    """Return the line of a question with its answer as the last turn."""
    asked = Question(
        id=f"{clip.removesuffix('.mp4')}-{number}",
        task=question.task,
        messages=user_turn(clip, question.text),
        truth=question.truth,
        seconds=round(seconds, 3),
    )
    line = asked.written()
    line["messages"].append({"role": "assistant", "content": question.answer})
    return line | {"kind": question.kind}


def _count(lines: Sequence[list[Line]]) -> PartCount:
    return PartCount(
        num_questions=sum(map(len, lines)),
        num_clips=len(lines),
        num_unasked=sum(not each for each in lines),
    )


def _vocabulary(lines: Sequence[Line], tenths: Iterable[int]) -> list[str]:
    """Return the phrases that are one token each, and the words of questions and answers."""
    phrases = [*(f"<{tenth / 10:.1f} seconds>" for tenth in tenths), *SHAPE_NAMES]
    return [*phrases, *sorted(set(_words(lines, phrases)))]


def _words(lines: Iterable[Line], phrases: Sequence[str]) -> Iterator[str]:
    """Yield the words of questions and answers that stand outside the phrases."""
    between = re.compile("|".join(map(re.escape, phrases)))
    for line in lines:
        user, assistant = line["messages"]
        for text in (user["content"][1]["text"], assistant["content"]):
            yield from between.sub(" ", text).split()


def _answered(lines: Sequence[list[Line]], unanswered: Sequence[str]) -> list[list[Line]]:
    """Return those of the lines about each clip that its conversation has."""
    return [[line for line in each if line["kind"] not in unanswered] for each in lines]


def _write_lines(
    folder: Path, part: str, lines: Sequence[list[Line]], answered: Sequence[list[Line]]
) -> None:
    """Write the sample files of a part, of which the lines about each clip are given."""
    conversations = [{"messages": list(_turns(each))} for each in answered if each]
    questions = [line for each in lines for line in each]
    for name, records in ((part, conversations), (f"{part}.questions", questions)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text)


def _turns(lines: list[Line]) -> Iterator[Line]:
    """Yield the turns of all questions about a clip, which is shown in front of the first."""
    for number, line in enumerate(lines):
        user, assistant = line["messages"]
        yield user if number == 0 else user | {"content": user["content"][1:]}
        yield assistant
