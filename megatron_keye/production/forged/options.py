# SPDX-License-Identifier: Apache-2.0
"""How many clips to forge, and what they may show."""

from dataclasses import dataclass

from megatron_keye.errors import UserError
from megatron_keye.production.forged.draw import LEGIBLE_RADIUS, shape_radius
from megatron_keye.production.forged.scene import BLINK_SHARE, MOST_SHAPES

MOST_SECONDS = 3600.0
_FEWEST_FRAMES = 6
_SIDES = (28, 2048)


@dataclass(frozen=True, kw_only=True)
class ForgeOptions:
    """What is forged; the same options give the same files."""

    num_clips: int
    """Clips to train on, 1 or more."""
    num_held_out: int
    """Clips of the held-out part."""
    seed: int
    """Decides everything that is drawn."""
    kinds: tuple[str, ...]
    """Kinds of questions, of `questions.KINDS`."""
    unanswered: tuple[str, ...] = ()
    """Those of them that conversations leave out: a model that trains on these never sees one."""
    width: int = 320
    """Pixels across, even."""
    height: int = 240
    """Pixels down, even."""
    shortest_seconds: float = 10.0
    """Least length of a clip."""
    longest_seconds: float = 30.0
    """Most length of a clip."""
    frames_per_second: float = 4.0
    """Rate, in variable clips the average one."""
    most_shapes: int = 4
    """Most shapes of a clip."""
    longest_stay: float = MOST_SECONDS
    """Most seconds for which a shape or a word stays at once, 1 or more."""
    word_share: float = 0.5
    """Share of clips that show a word."""
    blink_share: float = BLINK_SHARE
    """Share of shapes that vanish and come back, where the clip is long enough."""
    questions_per_clip: int = 4
    """Most questions about a clip."""
    variable_share: float = 0.25
    """Share of clips whose frames come at uneven times."""
    has_distractors: bool = True
    """Whether there is noise, and the picture sways; the truth is the same."""
    writes_tokenizer: bool = False
    """Whether a tokenizer of the words that occur is written too."""

    def __post_init__(self) -> None:
        low, high = self.shortest_seconds, self.longest_seconds
        _check(
            0 < low <= high <= MOST_SECONDS,
            f"--seconds: got {low:g} {high:g}, expected the shortest and the longest, up to "
            f"{MOST_SECONDS:g}",
        )
        _check(
            low * self.frames_per_second >= _FEWEST_FRAMES and self.frames_per_second <= 100,
            f"--rate: got {self.frames_per_second:g}, expected at most 100 frames per second and "
            f"at least {_FEWEST_FRAMES} in the {low:g} s of the shortest clip",
        )
        _check(
            all(_SIDES[0] <= side <= _SIDES[1] and side % 2 == 0 for side in self.size),
            f"--size: got {self.width} {self.height}, expected even numbers of {_SIDES[0]} to "
            f"{_SIDES[1]} pixels",
        )
        _check(
            1 <= self.most_shapes <= MOST_SHAPES,
            f"--shapes: got {self.most_shapes}, expected 1 to {MOST_SHAPES}",
        )
        _check(
            "letter" not in self.kinds
            or shape_radius(self.size, self.most_shapes) >= LEGIBLE_RADIUS,
            f"--questions: got 'letter' with {self.most_shapes} shapes in {self.width} x "
            f"{self.height} pixels, too small to be read, expected a larger --size, fewer "
            "--shapes or other kinds",
        )
        strange = [kind for kind in self.unanswered if kind not in self.kinds]
        _check(
            not strange and set(self.unanswered) != set(self.kinds),
            f"--unanswered: got {' '.join(self.unanswered)}, expected some of --questions, "
            f"{' '.join(self.kinds)}, and one at least that is answered",
        )
        _check(
            min(self.num_clips, self.num_held_out, self.questions_per_clip) >= 1,
            "--samples, --held-out, --per-clip: got less than 1, expected 1 or more",
        )
        _check(
            self.longest_stay >= 1,
            f"--stay: got {self.longest_stay:g}, expected 1 second or more",
        )
        for name, share in (
            ("variable", self.variable_share),
            ("words", self.word_share),
            ("blinking", self.blink_share),
        ):
            _check(0 <= share <= 1, f"--{name}: got {share:g}, expected a share from 0 to 1")

    @property
    def size(self) -> tuple[int, int]:
        """Pixels across and down."""
        return self.width, self.height


def _check(is_right: bool, sentence: str) -> None:
    if not is_right:
        raise UserError(sentence)
