# SPDX-License-Identifier: Apache-2.0
"""Questions about a forged clip, with answers and truth that follow from its scene by rule."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from megatron_keye.production.forged.forged_question import (
    ForgedQuestion,
    Watched,
    choice,
    grounding,
    written_intervals,
)
from megatron_keye.production.forged.scene import LETTERS, SHAPE_NAMES, WORDS, Scene, Shape
from megatron_keye.scoring.truth import CaptionTruth, CountTruth

_NUM_OPTIONS = 4
_NUM_TIMES = 8
"""Most times that one question asks about."""
_WEIGHT_OF_SHOWN = 3.0
"""How much likelier than an empty frame one that shows something is asked about."""
Draw = np.random.Generator
Candidates = Iterator[ForgedQuestion]


def ask(watched: Watched, kinds: Sequence[str], count: int, draw: Draw) -> list[ForgedQuestion]:
    """Return some of the questions that can be asked about a clip, no two of one text.

    Args:
        watched: The clip.
        kinds: Kinds of questions, each of which is drawn equally often as far as it can be asked;
            questions come in this order of their kinds, so that what tells most can come last.
        count: Most questions.
        draw: Chooses.
    """
    left = [
        list({each.text: each for each in KINDS[kind](watched, draw)}.values()) for kind in kinds
    ]
    chosen: list[ForgedQuestion] = []
    while len(chosen) < count and (left := [group for group in left if group]):
        group = left[draw.integers(len(left))]
        chosen.append(group.pop(draw.integers(len(group))))
    return sorted(chosen, key=lambda question: kinds.index(question.kind))


def _when(watched: Watched, draw: Draw) -> Candidates:
    for shape in watched.scene.shapes:
        text = f"When is the {shape.name} on the screen?"
        if shape.turns is None:
            yield grounding("when", text, [watched.interval(each) for each in shape.shown])


def _never(watched: Watched, draw: Draw) -> Candidates:
    """Ask for what is not there, of which one cannot tell by the question."""
    shown = {name for shape in watched.scene.shapes for name in _names(shape)}
    absent = [name for name in SHAPE_NAMES if name not in shown]
    for place in draw.permutation(len(absent))[:2]:
        yield grounding("never", f"When is the {absent[place]} on the screen?", [])
    words = [word for word in WORDS if word != watched.scene.word]
    yield grounding("never", f"When is the word {words[draw.integers(len(words))]} shown?", [])


def _moves(watched: Watched, draw: Draw) -> Candidates:
    for shape in watched.scene.shapes:
        if shape.moves is not None:
            text = f"When does the {shape.name} move to the right?"
            yield grounding("moves", text, [watched.interval(shape.moves)])


def _turns(watched: Watched, draw: Draw) -> Candidates:
    for shape in watched.scene.shapes:
        if shape.turns is not None:
            frame, colour = shape.turns
            text = f"When is the {shape.name} {colour} instead?"
            yield grounding("turns", text, [watched.interval((frame, shape.shown[-1][1]))])


def _word(watched: Watched, draw: Draw) -> Candidates:
    scene = watched.scene
    if scene.word:
        text = f"When is the word {scene.word} shown?"
        yield grounding("word", text, [watched.interval(scene.word_shown)])


def _blinks(watched: Watched, draw: Draw) -> Candidates:
    """Ask how often a shape comes back, in all and up to some time."""
    num_frames = watched.scene.num_frames
    for shape in watched.scene.shapes:
        returns = [watched.times[start] for start, _ in shape.shown[1:]]
        limit = round(watched.times[int(draw.integers(num_frames // 2, num_frames))], 1)
        for text, number in (
            ("", len(returns)),
            (f" before {limit:.1f} seconds", sum(time < limit for time in returns)),
        ):
            yield ForgedQuestion(
                kind="blinks",
                task="count",
                text=f"How often does the {shape.name} vanish and come back{text}?",
                answer=f"{number} times",
                truth=CountTruth(number=number),
            )


def _first(watched: Watched, draw: Draw) -> Candidates:
    shapes = watched.scene.shapes
    pairs = [(one, other) for one in shapes for other in shapes if one.name < other.name]
    for one, other in pairs:
        if one.shown[0][0] != other.shown[0][0]:
            first = min(one, other, key=lambda shape: shape.shown[0][0])
            options = [f"the {one.name}", f"the {other.name}"]
            text = "Which comes onto the screen first?"
            yield choice("first", text, f"the {first.name}", options, draw)


def _together(watched: Watched, draw: Draw) -> Candidates:
    """Ask what was on the screen at some time together with a shape."""
    shapes = watched.scene.shapes
    shown = {name for shape in shapes for name in _names(shape)}
    absent = [name for name in SHAPE_NAMES if name not in shown]
    for shape in shapes:
        others = [other for other in shapes if other is not shape and other.turns is None]
        seen = [other.name for other in others if _meet(shape, other)]
        unseen = [other.name for other in others if not _meet(shape, other)]
        if seen and shape.turns is None:
            right = seen[draw.integers(len(seen))]
            more = [absent[place] for place in draw.permutation(len(absent))]
            wrong = [*unseen, *more][: _NUM_OPTIONS - 1]
            text = f"Which of these is on the screen at some time together with the {shape.name}?"
            options = [f"the {name}" for name in (right, *wrong)]
            yield choice("together", text, f"the {right}", options, draw)


def _order(watched: Watched, draw: Draw) -> Candidates:
    shapes = sorted(watched.scene.shapes, key=lambda shape: shape.shown[0][0])
    starts = {shape.shown[0][0] for shape in shapes}
    if len(shapes) < 3 or len(starts) < len(shapes):
        return
    names = [f"the {shape.name}" for shape in shapes]
    orders = {", ".join(names): None}
    while len(orders) < _NUM_OPTIONS:
        orders[", ".join(names[place] for place in draw.permutation(len(names)))] = None
    text = "In which order do these come onto the screen?"
    yield choice("order", text, ", ".join(names), list(orders), draw)


def _letter(watched: Watched, draw: Draw) -> Candidates:
    for shape in watched.scene.shapes:
        others = [letter for letter in LETTERS if letter != shape.letter]
        wrong = [others[place] for place in draw.permutation(len(others))[: _NUM_OPTIONS - 1]]
        text = f"Which letter is on the {shape.name}?"
        options = [f"the letter {letter}" for letter in (shape.letter, *wrong)]
        yield choice("letter", text, options[0], options, draw)


def _at(watched: Watched, draw: Draw) -> Candidates:
    """Ask what is there at some times, in any order: each is answered by one frame."""
    scene = watched.scene
    seen = [" and ".join(_shown(scene, frame)) for frame in range(scene.num_frames)]
    # Mostly of frames that show something.
    weights = np.array([_WEIGHT_OF_SHOWN if each else 1.0 for each in seen])
    drawn = draw.choice(len(seen), len(seen), replace=False, p=weights / weights.sum())
    # Of frames that share a tenth of a second, one.
    frames = {f"<{watched.times[frame]:.1f} seconds>": frame for frame in drawn}
    for times in np.array_split(list(frames)[: 2 * _NUM_TIMES], 2):
        answer = " ".join(f"{time} {seen[frames[time]] or 'nothing'}" for time in times)
        yield ForgedQuestion(
            kind="at",
            task="caption",
            text=f"What is on the screen at {' '.join(times)} ?",
            answer=answer,
            truth=CaptionTruth(text=answer),
        )


def _describe(watched: Watched, draw: Draw) -> Candidates:
    sentences = []
    for shape in sorted(watched.scene.shapes, key=lambda shape: shape.shown[0][0]):
        times = written_intervals([watched.interval(each) for each in shape.shown])
        turned = f" and turns {shape.turns[1]}" if shape.turns else ""
        moved = " and moves to the right" if shape.moves else ""
        sentences.append(f"The {shape.name} is on the screen from {times}{turned}{moved}.")
    if watched.scene.word:
        times = written_intervals([watched.interval(watched.scene.word_shown)])
        sentences.append(f"The word {watched.scene.word} is shown from {times}.")
    caption = " ".join(sentences)
    yield ForgedQuestion(
        kind="describe",
        task="caption",
        text="What happens, and when?",
        answer=caption,
        truth=CaptionTruth(text=caption),
    )


KINDS: dict[str, Callable[[Watched, Draw], Candidates]] = {
    "when": _when,
    "never": _never,
    "moves": _moves,
    "turns": _turns,
    "word": _word,
    "blinks": _blinks,
    "first": _first,
    "together": _together,
    "order": _order,
    "letter": _letter,
    "describe": _describe,
    "at": _at,
}
"""What makes the questions of each kind."""


def _shown(scene: Scene, frame: int) -> Iterator[str]:
    """Yield what a frame shows."""
    for shape in scene.shapes:
        if shape.is_shown(frame):
            yield f"{shape.colour_at(frame)} {shape.form}"
    if scene.word and scene.word_shown[0] <= frame < scene.word_shown[1]:
        yield scene.word


def _names(shape: Shape) -> Iterator[str]:
    """Yield the names that a shape goes by."""
    yield shape.name
    if shape.turns is not None:
        yield f"{shape.turns[1]} {shape.form}"


def _meet(one: Shape, other: Shape) -> bool:
    return any(
        max(start, other_start) < min(stop, other_stop)
        for start, stop in one.shown
        for other_start, other_stop in other.shown
    )
