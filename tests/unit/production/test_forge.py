# SPDX-License-Identifier: Apache-2.0
"""Forged clips show what their questions say, and one seed gives one set of files."""

import hashlib
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_keye.cli import forge_video
from megatron_keye.data.video.probe import probe
from megatron_keye.errors import UserError
from megatron_keye.production.forged.forge import forge
from megatron_keye.production.forged.options import ForgeOptions
from megatron_keye.production.forged.questions import KINDS, Watched, ask
from megatron_keye.production.forged.scene import COLOURS, draw_scene
from megatron_keye.scoring.question import read_question
from megatron_keye.scoring.question_file import read_questions
from megatron_keye.scoring.summary import score_questions, summarize
from megatron_keye.scoring.truth import GroundingTruth

SMALL = ("--size", "96", "80", "--seconds", "4", "6", "--rate", "3", "--workers", "1")


def forged(folder: Path, *words: str) -> Path:
    assert (
        forge_video.main([str(folder), "--samples", "6", "--held-out", "4", *SMALL, *words]) == 0
    )
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.*")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return clips of both rates with questions of all kinds."""
    return forged(tmp_path_factory.mktemp("forge") / "out", "--variable", "0.5", "--per-clip", "9")


@given(st.integers(0, 2**32), st.integers(6, 200), st.integers(1, 5), st.floats(0.5, 30))
def test_what_a_scene_shows_is_within_it(
    seed: int, num_frames: int, most_shapes: int, rate: float
) -> None:
    generator = np.random.default_rng(seed)
    scene = draw_scene(generator, num_frames, most_shapes=most_shapes, frames_per_second=rate)
    names = []
    for shape in scene.shapes:
        bounds = [0, *(bound for stretch in shape.shown for bound in stretch), num_frames]
        assert bounds == sorted(bounds) and all(start < stop for start, stop in shape.shown)
        names.append(shape.name)
        if shape.turns is not None:
            names.append(f"{shape.turns[1]} {shape.form}")
            assert shape.shown[0][0] < shape.turns[0] < shape.shown[0][1] or num_frames < 12
        if shape.moves is not None:
            assert shape.shown[0][0] <= shape.moves[0] < shape.moves[1] <= shape.shown[0][1]
    assert len(names) == len(set(names)), "a name means one shape"
    times = [frame / rate for frame in range(num_frames)]
    watched = Watched(scene=scene, times=times, seconds=num_frames / rate)
    for question in ask(watched, tuple(KINDS), 20, generator):
        # Answers have times in tenths of a second, so short stretches do not match them exactly.
        score = question.truth.score(question.answer, watched.seconds)
        is_exact = not isinstance(question.truth, GroundingTruth) or not question.truth.intervals
        assert score.understood is not None and (score.value == 1 or not is_exact), question


@given(st.integers(0, 2**32), st.integers(6, 200), st.floats(0.5, 30), st.floats(1, 9))
def test_nothing_stays_longer_than_asked(
    seed: int, num_frames: int, rate: float, longest: float
) -> None:
    generator = np.random.default_rng(seed)
    options = {"most_shapes": 3, "frames_per_second": rate, "longest_stay": longest}
    scene = draw_scene(generator, num_frames, **options, word_share=1.0)
    for start, stop in (scene.word_shown, *(s for shape in scene.shapes for s in shape.shown)):
        assert 0 < stop - start <= max(1, round(rate), longest * rate)


def test_as_many_shapes_blink_as_asked() -> None:
    for share in (0.0, 1.0):
        scene = draw_scene(
            np.random.default_rng(0), 40, most_shapes=5, frames_per_second=4, blink_share=share
        )
        assert {len(shape.shown) > 1 for shape in scene.shapes} == {bool(share)}


def test_what_is_at_a_time_is_what_its_frame_shows() -> None:
    generator = np.random.default_rng(0)
    scene = draw_scene(generator, 40, most_shapes=2, frames_per_second=20, word_share=1.0)
    times = [frame / 20 for frame in range(40)]
    watched = Watched(scene=scene, times=times, seconds=2.0)
    for question in ask(watched, ("at",), 2, generator):
        asked = question.text.removeprefix("What is on the screen at ").removesuffix(" ?")
        names = re.findall(r"<[0-9.]+ seconds>", question.answer)
        assert " ".join(names) == asked and len(set(names)) == len(names) == 8
        said = re.split(r" ?<[0-9.]+ seconds> ", question.answer)[1:]
        for name, seen in zip(names, said, strict=True):
            frames = [n for n, time in enumerate(times) if f"<{time:.1f} seconds>" == name]
            expected = [
                " and ".join(
                    [f"{s.colour_at(n)} {s.form}" for s in scene.shapes if s.is_shown(n)]
                    + [scene.word] * (scene.word_shown[0] <= n < scene.word_shown[1])
                )
                or "nothing"
                for n in frames
            ]
            assert seen in expected


def test_answers_of_the_files_are_right(folder: Path) -> None:
    for part in ("train", "held_out"):
        file = folder / f"{part}.questions.jsonl"
        for line, question in zip(
            file.read_text().splitlines(), read_questions(file), strict=True
        ):
            answer = json.loads(line)["messages"][-1]["content"]
            score = question.truth.score(answer, question.seconds)
            # Answers are in tenths of a second, of which a stretch of half a second has five.
            assert score.value >= 0.65, line
            assert score.value == 1 or question.task == "grounding", line


def test_every_kind_and_task_is_asked(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "train.questions.jsonl").open()]
    assert {line["task"] for line in lines} == {"grounding", "choice", "count", "caption"}
    assert len({line["kind"] for line in lines}) >= 8
    assert len({line["id"] for line in lines}) == len(lines)


def test_a_shape_is_seen_when_its_question_says(tmp_path: Path) -> None:
    words = ("--plain", "--shapes", "1", "--questions", "when", "--variable", "1")
    folder = forged(tmp_path / "out", *words)
    lines = [json.loads(line) for line in (folder / "train.questions.jsonl").open()]
    assert len(lines) > 2
    for line in lines:
        video, question = line["messages"][0]["content"]
        colour = np.array(COLOURS[question["text"].split()[3]])
        info = probe(folder / video["video"])
        with av.open(str(info.path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        # A single shape is in the middle of the frame, which is grey without it.
        middles = [frame[40, 48].astype(float) for frame in frames]
        seen = [np.abs(middle - colour).sum() < np.abs(middle - 128).sum() for middle in middles]
        intervals = line["truth"]["intervals"]
        said = [any(start <= t < end for start, end in intervals) for t in info.times + 1e-4]
        assert seen == said, line


def test_one_seed_gives_the_same_files_and_another_gives_others(
    folder: Path, tmp_path: Path
) -> None:
    words = ("--variable", "0.5", "--per-clip", "9")
    assert digests(forged(tmp_path / "again", *words, "--workers", "2")) == digests(folder)
    other = digests(forged(tmp_path / "other", *words, "--seed", "1"))
    clips = {digest for name, digest in other.items() if name.endswith(".mp4")}
    assert not clips & set(digests(folder).values())


def test_parts_share_no_scene_even_where_scenes_are_few(tmp_path: Path) -> None:
    options = ForgeOptions(
        num_clips=30,
        num_held_out=30,
        seed=0,
        kinds=("when", "never"),
        width=28,
        height=28,
        shortest_seconds=6.0,
        longest_seconds=6.0,
        frames_per_second=1.0,
        most_shapes=1,
        variable_share=0.0,
        has_distractors=False,
    )
    forge(tmp_path / "out", options, num_workers=1)
    clips = list((tmp_path / "out").glob("*.mp4"))
    assert len(clips) == 60


def test_noise_and_sway_leave_questions_and_truth_as_they_are(
    folder: Path, tmp_path: Path
) -> None:
    plain = forged(tmp_path / "plain", "--variable", "0.5", "--per-clip", "9", "--plain")
    for name in ("train.questions.jsonl", "held_out.questions.jsonl"):
        assert (plain / name).read_bytes() == (folder / name).read_bytes()
    one, other = digests(plain), digests(folder)
    assert all(one[name] != other[name] for name in one if name.endswith(".mp4"))


def test_clips_without_a_question_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = forged(tmp_path / "out", "--questions", "word", "--held-out", "9")
    lines = (folder / "train.questions.jsonl").read_text().splitlines()
    assert 0 < len(lines) < 6
    shown = f"{len(lines)} questions about 6 clips, {6 - len(lines)} without a question"
    assert shown in capsys.readouterr().out
    out = tmp_path / "none"
    words = [str(out), *SMALL, "--samples", "1", "--held-out", "1", "--shapes", "1"]
    assert forge_video.main([*words, "--questions", "order"]) == 2
    assert "--questions: got order, which no clip" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_conversation_answers_what_is_left_to_rewards(tmp_path: Path) -> None:
    words = ("--questions", "when", "word", "--words", "1", "--per-clip", "9", "--tokenizer")
    whole = forged(tmp_path / "whole", *words)
    part = forged(tmp_path / "part", *words, "--unanswered", "word")
    for name in ("train", "held_out"):
        assert "shown?" in (whole / f"{name}.jsonl").read_text()
        answered = (part / f"{name}.jsonl").read_text()
        assert "When is" in answered and "shown?" not in answered
        questions = f"{name}.questions.jsonl"
        assert (part / questions).read_bytes() == (whole / questions).read_bytes()
    assert "shown?" in (part / "tokenizer" / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seconds", "9", "3"), "--seconds: got 9 3, expected the shortest and the longest"),
        (("--seconds", "5", "9999"), "up to 3600"),
        (("--rate", "0.1"), "--rate: got 0.1, expected"),
        (("--size", "64", "48"), "--questions: got 'letter' with 4 shapes in 64 x 48 pixels"),
        (("--size", "63", "48"), "--size: got 63 48, expected even numbers"),
        (("--shapes", "9"), "--shapes: got 9, expected 1 to 5"),
        (("--variable", "2"), "--variable: got 2, expected a share"),
        (("--words", "-1"), "--words: got -1, expected a share"),
        (("--blinking", "1.1"), "--blinking: got 1.1, expected a share"),
        (("--stay", "0.5"), "--stay: got 0.5, expected 1 second or more"),
        (("--workers", "0"), "--workers: got 0"),
        (("--questions", "when", "--unanswered", "at"), "--unanswered: got at, expected some of"),
        (("--questions", "at", "--unanswered", "at"), "and one at least that is answered"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_left(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert forge_video.main([str(tmp_path / "out"), *SMALL, *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_written_to(folder: Path, tmp_path: Path) -> None:
    before = digests(folder)
    assert forge_video.main([str(folder), *SMALL]) == 2
    assert digests(folder) == before


def test_a_line_is_a_question_and_a_summary_of_right_answers_is_1(folder: Path) -> None:
    file = folder / "held_out.questions.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    questions = [read_question(record, str(file), n) for n, record in enumerate(records, 1)]
    counts = [question for question in questions if question.task == "count"]
    assert counts and summarize(score_questions(counts, {}))[0].num_unanswered == len(counts)
    with pytest.raises(UserError, match="'task': got 'x'"):
        read_question(records[0] | {"task": "x"}, "a:1", 1)
