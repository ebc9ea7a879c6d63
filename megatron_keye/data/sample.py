"""Tokenizes a conversation: ChatML tokens, labels and placeholders for pictures.

Reads the containers of media but no pixels, so every rank can afford it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_keye.config import DataConfig, ModelConfig
from megatron_keye.data.conversation import Conversation, Message, Part
from megatron_keye.data.media import Medium, resolve_media
from megatron_keye.data.row import IGNORED_LABEL, Picture, Sample
from megatron_keye.data.tokens import TURN_END, TURN_START, Tokenizer
from megatron_keye.data.video.frames import image_patch_grid, plan_video
from megatron_keye.data.video.image import probe_image
from megatron_keye.data.video.probe import VideoInfo, probe
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

    Each turn is `<|im_start|>role`, newline, content, `<|im_end|>`, newline. A video frame is its
    true time as text, `<1.5 seconds>`, then vision_start, its placeholders and vision_end; an
    image is the same without the time. `config.loss_tokens` decides what is predicted:
    "assistant" is the assistant's text with its `<|im_end|>`, "text" everything but placeholders
    and their brackets.

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
    writer = _Writer(
        tokenizer=tokenizer,
        config=config,
        model=model,
        base=conversation.base,
        probe_video=probe_video,
    )
    try:
        for message in conversation.messages:
            writer.write_message(message)
        return writer.finish(conversation.name)
    except UserError as error:
        raise UserError(f"{conversation.name}: {error}") from error


@dataclass(kw_only=True)
class _Writer:
    """Appends the tokens of one sample from left to right."""

    tokenizer: Tokenizer
    config: DataConfig
    model: ModelConfig
    base: Path
    probe_video: Callable[[Path], VideoInfo]
    token_ids: list[int] = field(default_factory=list)
    is_target: list[bool] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    picture_starts: list[int] = field(default_factory=list)

    def write_message(self, message: Message) -> None:
        """Write one turn."""
        is_answer = message.role == "assistant"
        self._write([self.tokenizer.control_id(TURN_START)], is_answer=False)
        self._write_text(f"{message.role}\n", is_answer=False)
        for part in message.parts:
            if part.kind == "text":
                self._write_text(part.value, is_answer=is_answer)
            else:
                self._write_media(part)
        self._write([self.tokenizer.control_id(TURN_END)], is_answer=is_answer)
        self._write_text("\n", is_answer=False)

    def finish(self, name: str) -> Sample:
        """Shift the labels and return the sample, its arrays read-only."""
        token_ids = np.array(self.token_ids, dtype=np.int64)
        labels = np.full_like(token_ids, IGNORED_LABEL)
        labels[:-1] = np.where(self.is_target[1:], token_ids[1:], IGNORED_LABEL)
        if not (labels != IGNORED_LABEL).any():
            raise UserError(
                "no assistant message, so nothing would be predicted, expected at least one; add "
                "it, or set data.loss_tokens to 'text'"
            )
        token_ids.setflags(write=False)
        labels.setflags(write=False)
        return Sample(
            name=name,
            token_ids=token_ids,
            labels=labels,
            pictures=tuple(self.pictures),
            picture_starts=tuple(self.picture_starts),
        )

    def _write(self, token_ids: list[int], *, is_answer: bool) -> None:
        is_target = is_answer or self.config.loss_tokens == "text"
        self.token_ids += token_ids
        self.is_target += [is_target] * len(token_ids)

    def _write_text(self, text: str, *, is_answer: bool) -> None:
        token_ids = self.tokenizer.encode(text)
        reserved = set(token_ids).intersection(self.model.vision_token_ids)
        if reserved:
            raise UserError(
                f"text has token id {min(reserved)}, which is a placeholder of pictures; set "
                "model.image_token_id and model.video_token_id to the tokenizer's placeholders"
            )
        self._write(token_ids, is_answer=is_answer)

    def _write_media(self, part: Part) -> None:
        """Write an image, or the frames of a video with their times."""
        path = resolve_media(part.value, self.base)
        if part.kind == "image":
            size = probe_image(path)
            patch_grid = image_patch_grid(*size, self.config.frames, self.model.vision)
            self._write_picture(
                Picture(medium=Medium(str(path), "image"), frame=0, patch_grid=patch_grid)
            )
            return
        plan = plan_video(
            self.probe_video(path),
            self.config.frames,
            self.model.vision,
            start_seconds=part.start_seconds,
            end_seconds=part.end_seconds,
        )
        medium = Medium(str(path), "video")
        for index, seconds in zip(plan.frame_indices.tolist(), plan.times.tolist(), strict=True):
            self._write_text(f"<{seconds:.1f} seconds>", is_answer=False)
            self._write_picture(
                Picture(
                    medium=medium,
                    frame=index,
                    patch_grid=plan.patch_grid,
                    seconds=seconds,
                )
            )

    def _write_picture(self, picture: Picture) -> None:
        """Write the brackets and placeholders of one picture; none of them is ever a target."""
        model = self.model
        token = model.video_token_id if picture.is_video else model.image_token_id
        count = picture.num_tokens(model.vision.merge_size)
        self.pictures.append(picture)
        self.picture_starts.append(len(self.token_ids) + 1)
        self.token_ids += [model.vision_start_token_id, *[token] * count]
        self.token_ids.append(model.vision_end_token_id)
        self.is_target += [False] * (count + 2)
