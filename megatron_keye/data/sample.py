# SPDX-License-Identifier: Apache-2.0
"""Tokenizes a conversation: ChatML tokens, labels and placeholders for pictures.

Reads the containers of media but no pixels, so every rank can afford it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from megatron_keye.config import DataConfig, ModelConfig, VisionConfig
from megatron_keye.data.chat_template import Piece, render, render_prompt
from megatron_keye.data.conversation.keys import GROUNDING_MARK
from megatron_keye.data.conversation.turns import Conversation, Part
from megatron_keye.data.media import Medium, locate_media
from megatron_keye.data.remote.copies import local_copy
from megatron_keye.data.row import Picture, Sample, labels_of
from megatron_keye.data.tokens import Tokenizer
from megatron_keye.data.video.frame_files import frame_names, frame_pictures
from megatron_keye.data.video.frames import image_patch_grid, plan_video
from megatron_keye.data.video.image import probe_image
from megatron_keye.data.video.probe import probe
from megatron_keye.data.video.video_info import VideoInfo
from megatron_keye.errors import UserError


def make_sample(
    conversation: Conversation,
    tokenizer: Tokenizer,
    config: DataConfig,
    model: ModelConfig,
    *,
    probe_video: Callable[[Path], VideoInfo] = probe,
) -> Sample:
    """Tokenize one conversation.

    Turns are written as `chat_template.render` says. A video frame is its true time as text,
    `<1.5 seconds>`, then vision_start, its placeholders and vision_end; an image is the same
    without the time. Neither is ever predicted, but times are with `config.loss_tokens` "text".

    Args:
        conversation: What to tokenize.
        tokenizer: Vocabulary with ChatML's control tokens.
        config: Budgets and loss tokens.
        model: Ids of placeholders, patch and merge size.
        probe_video: Reads a video's container; raises what `probe` raises.

    Raises:
        UserError: Naming file and line: a medium that is missing or unreadable, text that
            contains a placeholder, or nothing to predict.
    """
    writer = _writer(conversation, tokenizer, config, model, probe_video)
    try:
        for piece in render(conversation, config):
            writer.write(piece)
        return writer.finish(conversation.name)
    except UserError as error:
        raise UserError(f"{conversation.name}: {error}") from error


def make_prompt(
    conversation: Conversation,
    tokenizer: Tokenizer,
    config: DataConfig,
    model: ModelConfig,
    *,
    skips_thinking: bool = False,
    probe_video: Callable[[Path], VideoInfo] = probe,
) -> Sample:
    """Tokenize a conversation for the assistant to answer, as `make_sample` does up to there.

    Args:
        conversation: Its last turn is not the assistant's.
        tokenizer: Vocabulary with ChatML's control tokens.
        config: Budgets.
        model: Ids of placeholders, patch and merge size.
        skips_thinking: Whether the prompt ends with an empty block of thinking.
        probe_video: Reads a video's container; raises what `probe` raises.

    Returns:
        A sample without labels, up to the opening of the assistant's turn.

    Raises:
        UserError: As `make_sample`, or when the last turn is the assistant's.
    """
    writer = _writer(conversation, tokenizer, config, model, probe_video)
    try:
        for piece in render_prompt(conversation, config, skips_thinking=skips_thinking):
            writer.write(replace(piece, weight=0.0))
        return writer.sample(conversation.name)
    except UserError as error:
        raise UserError(f"{conversation.name}: {error}") from error


def _writer(
    conversation: Conversation,
    tokenizer: Tokenizer,
    config: DataConfig,
    model: ModelConfig,
    probe_video: Callable[[Path], VideoInfo],
) -> "_Writer":
    return _Writer(
        tokenizer=tokenizer,
        config=config,
        model=model,
        base=conversation.base,
        has_grounding_tokens=conversation.has_grounding_tokens,
        probe_video=probe_video,
    )


@dataclass(kw_only=True)
class _Writer:
    """Appends the tokens of one sample from left to right."""

    tokenizer: Tokenizer
    config: DataConfig
    model: ModelConfig
    base: Path
    has_grounding_tokens: bool
    probe_video: Callable[[Path], VideoInfo]
    token_ids: list[int] = field(default_factory=list)
    token_weights: list[float] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    picture_starts: list[int] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    """Text of one weight, which is encoded in one go as it is when the model is served."""
    waiting_weight: float = 0.0

    def write(self, piece: Piece) -> None:
        """Write a piece of the conversation."""
        if piece.part.kind != "text":
            is_predicted = self.config.loss_tokens == "text"
            self._write_medium(piece.part, piece.weight if is_predicted else 0.0)
        elif piece.is_control:
            self._write_control(piece.part.value, piece.weight)
        elif self.has_grounding_tokens:
            # Marks are at the odd places.
            for place, text in enumerate(GROUNDING_MARK.split(piece.part.value)):
                write = self._write_control if place % 2 else self._write_text
                write(text, piece.weight)
        else:
            self._write_text(piece.part.value, piece.weight)

    def finish(self, name: str) -> Sample:
        """Return the sample; an error if nothing in it is predicted."""
        sample = self.sample(name)
        if not sample.weights.any():
            raise UserError(
                "no assistant message that is predicted, so nothing would be learnt, expected at "
                "least one of a weight above 0; add it, or set data.loss_tokens to 'text'"
            )
        return sample

    def sample(self, name: str) -> Sample:
        """Shift the labels and return the sample, its arrays read-only."""
        self._encode_waiting()
        token_ids = np.array(self.token_ids, dtype=np.int64)
        weights = np.array([*self.token_weights[1:], 0.0], dtype=np.float32)
        labels = labels_of(token_ids, weights)
        for array in (token_ids, labels, weights):
            array.setflags(write=False)
        return Sample(
            name=name,
            token_ids=token_ids,
            labels=labels,
            weights=weights,
            pictures=tuple(self.pictures),
            picture_starts=tuple(self.picture_starts),
        )

    def _write_text(self, text: str, weight: float) -> None:
        if weight != self.waiting_weight:
            self._encode_waiting()
            self.waiting_weight = weight
        self.waiting.append(text)

    def _encode_waiting(self) -> None:
        token_ids = self.tokenizer.encode("".join(self.waiting))
        self.waiting.clear()
        reserved = set(token_ids).intersection(self.model.vision_token_ids)
        if reserved:
            raise UserError(
                f"text has token id {min(reserved)}, which is a placeholder of pictures; set "
                "model.image_token_id and model.video_token_id to the tokenizer's placeholders"
            )
        self._append(token_ids, self.waiting_weight)

    def _write_control(self, name: str, weight: float) -> None:
        self._encode_waiting()
        self._append([self.tokenizer.control_id(name)], weight)

    def _append(self, token_ids: list[int], weight: float) -> None:
        self.token_ids += token_ids
        self.token_weights += [weight] * len(token_ids)

    def _write_medium(self, part: Part, weight: float) -> None:
        """Write an image, or the frames of a video with their times, of this weight."""
        vision, probe_video = self.model.vision, self.probe_video
        for picture in media_pictures(part, self.base, self.config, vision, probe_video):
            if picture.seconds is not None:
                self._write_text(f"<{picture.seconds:.1f} seconds>", weight)
            self._write_picture(picture)

    def _write_picture(self, picture: Picture) -> None:
        """Write the brackets and placeholders of one picture; none of them is ever a target."""
        self._encode_waiting()
        model = self.model
        token = model.video_token_id if picture.is_video else model.image_token_id
        count = picture.num_tokens(model.vision.merge_size)
        self.pictures.append(picture)
        self.picture_starts.append(len(self.token_ids) + 1)
        tokens = [model.vision_start_token_id, *[token] * count, model.vision_end_token_id]
        self._append(tokens, 0.0)


def media_pictures(
    part: Part,
    base: Path,
    config: DataConfig,
    vision: VisionConfig,
    probe_video: Callable[[Path], VideoInfo] = probe,
) -> list[Picture]:
    """Return the pictures that the model sees of a media part.

    Args:
        part: An image, a video, or a video of frame files.
        base: Folder that relative names start from.
        config: Rate and budgets of the run, copies of remote media.
        vision: Patch and merge size.
        probe_video: Reads a video's container.

    Raises:
        UserError: For a medium that is missing, unreadable or does not fit what is said of it.
    """
    if part.kind == "video" and (names := frame_names(part, base)):
        return frame_pictures(part, names, base, config, vision)
    location = locate_media(part.value, base)
    if part.kind == "image":
        image = Medium(location, "image")
        with local_copy(image, config.remote) as path:
            size = probe_image(path)
        limited = part.limits.of_image(config.frames, vision)
        patch_grid = image_patch_grid(*size, limited, vision)
        return [Picture(medium=image, frame=0, patch_grid=patch_grid)]
    if part.frame_list_rate is not None:
        raise UserError(
            f"{part.value}: is a video file with 'sample_fps', expected that of a list or folder "
            "of frames; a file has its own times, 'fps' says how many frames are sampled"
        )
    medium = Medium(location, "video")
    with local_copy(medium, config.remote) as path:
        plan = plan_video(
            probe_video(path),
            config.frames,
            vision,
            start_seconds=part.start_seconds,
            end_seconds=part.end_seconds,
            limits=part.limits,
        )
    return [
        Picture(medium=medium, frame=index, patch_grid=plan.patch_grid, seconds=seconds)
        for index, seconds in zip(plan.frame_indices.tolist(), plan.times.tolist(), strict=True)
    ]


def media_names(conversation: Conversation) -> dict[str, str]:
    """Return the name of each media file as written in a conversation, by path or URL."""
    return {
        locate_media(name, conversation.base): name
        for message in conversation.messages
        for part in message.parts
        if part.kind != "text"
        for name in _file_names(part, conversation.base)
    }


def _file_names(part: Part, base: Path) -> tuple[str, ...]:
    names = frame_names(part, base) if part.kind == "video" else ()
    return names or (part.value,)
