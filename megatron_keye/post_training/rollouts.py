# SPDX-License-Identifier: Apache-2.0
"""The answers of a step: prompts are asked in rounds until enough groups of answers differ."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_keye.config.run import RunConfig
from megatron_keye.data.tokens import END_OF_TEXT, TURN_END, Tokenizer
from megatron_keye.post_training.answered import AnsweredGroup
from megatron_keye.post_training.prompts import AskedQuestion, Prompts
from megatron_keye.post_training.reward import Reward
from megatron_keye.post_training.reward_pool import Job, RewardPool
from megatron_keye.rollout.engine import Engine
from megatron_keye.rollout.request import (
    BegunAnswer,
    Completion,
    Finish,
    NewToken,
    Request,
    SamplingLaw,
)

_TOKENS_BETWEEN_LOOKS = 256
"""Tokens after which the ranks agree on whether one was asked to stop."""
Begun = dict[tuple[int, int], BegunAnswer]
"""Answers of a step that did not end, by prompt and number."""


class GenerationStopped(Exception):  # noqa: N818  # a request, no error
    """A rank was asked to stop while answers were generated."""

    def __init__(self, begun: Begun) -> None:
        """Carry the answers so far."""
        super().__init__("generation was stopped")
        self.begun = begun


@dataclass(kw_only=True)
class Rollout:
    """The answers of one step."""

    groups: list[AnsweredGroup] = field(default_factory=list)
    """All groups, those of equal rewards too."""
    num_prompts: int = 0
    """Prompts that were asked."""
    failures: list[str] = field(default_factory=list)
    """Why answers were not scored; on rank 0 alone."""
    score_seconds: float = 0.0
    """How long rewards took beyond generation, beside which most are found."""

    def kept(self, *, drops_equal: bool) -> list[AnsweredGroup]:
        """Return the groups that a step learns from."""
        return [group for group in self.groups if group.teaches or not drops_equal]


class Rollouts:
    """Generates and scores the answers of steps; the same on every rank."""

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        prompts: Prompts,
        tokenizer: Tokenizer,
        *,
        pool: RewardPool | None,
        is_asked_to_stop: Callable[[], bool],
        device: torch.device,
    ) -> None:
        """Prepare for all steps.

        Args:
            run: Law, limits and group sizes.
            engine: Answers with the newest weights.
            prompts: The questions.
            tokenizer: Vocabulary.
            pool: Scores answers; on rank 0 alone.
            is_asked_to_stop: Whether this rank was.
            device: Where this rank computes.
        """
        self._run, self._engine, self._prompts, self._tokenizer = run, engine, prompts, tokenizer
        self._pool, self._is_asked_to_stop, self._device = pool, is_asked_to_stop, device
        self._stop_ids = tuple(tokenizer.control_id(name) for name in (TURN_END, END_OF_TEXT))

    def __call__(self, first: int, begun: Begun) -> Rollout:
        """Ask prompts until enough groups differ, or the limit of a step is reached. Collective.

        Args:
            first: Number of the first prompt.
            begun: Answers that an earlier process began.

        Raises:
            GenerationStopped: On all ranks, when any was asked to stop.
            UserError: For a prompt that cannot be read.
        """
        settings, rollout = self._run.post_training, Rollout()
        drawn: Begun = dict(begun)
        while True:
            num_kept = len(rollout.kept(drops_equal=settings.drops_equal_groups))
            missing = settings.prompts_per_step - num_kept
            count = min(missing, settings.most_prompts - rollout.num_prompts)
            if count <= 0:
                return rollout
            start = first + rollout.num_prompts
            asked = [self._prompts.read(key) for key in range(start, start + count)]
            self._generate(asked, drawn)
            rollout.groups += self._scored(asked, drawn, rollout)
            rollout.num_prompts += count

    def _generate(self, asked: Sequence[AskedQuestion], drawn: Begun) -> None:
        """Bring the answers to some prompts to their end, and let each be scored at once."""
        by_key = {each.key: each for each in asked}
        for (key, answer), begun in drawn.items():
            if key in by_key and begun.finish is not None:
                self._submit(by_key[key], answer, begun)
        requests = [request for each in asked if (request := self._request(each, drawn))]
        watch = _Watch(drawn, self._engine.version, self._finish, self._any_asked_to_stop)
        for completion in self._engine.generate(requests, watch.note):
            ended = _begun_of(completion)
            drawn[completion.key, completion.answer] = ended
            self._submit(by_key[completion.key], completion.answer, ended)

    def _request(self, asked: AskedQuestion, drawn: Begun) -> Request | None:
        """Return the request for the answers to a prompt, None if all have ended."""
        count, rollout = self._run.post_training.answers_per_prompt, self._run.rollout
        begun = {n: drawn[asked.key, n] for n in range(count) if (asked.key, n) in drawn}
        if sum(answer.finish is not None for answer in begun.values()) == count:
            return None
        return Request(
            key=asked.key,
            prompt=asked.prompt,
            num_answers=count,
            max_new_tokens=rollout.max_new_tokens,
            stop_ids=self._stop_ids,
            law=SamplingLaw.of(rollout),
            seed=self._run.training.seed,
            begun=begun,
        )

    def _finish(self, token_ids: Sequence[int]) -> Finish | None:
        """Return why an answer of these tokens has ended, None if it goes on."""
        if token_ids and token_ids[-1] in self._stop_ids:
            return "stop"
        return "length" if len(token_ids) == self._run.rollout.max_new_tokens else None

    def _submit(self, asked: AskedQuestion, answer: int, ended: BegunAnswer) -> None:
        if self._pool is not None:
            assert ended.finish is not None, "only whole answers are scored"
            text, key = self._text(ended), (asked.key, answer)
            self._pool.submit(
                Job(key=key, question=asked.question, text=text, finish=ended.finish)
            )

    def _text(self, answer: BegunAnswer) -> str:
        """Return the text of an answer, without the token that ends it."""
        has_end = answer.finish == "stop"
        return self._tokenizer.decode(list(answer.token_ids[: -1 if has_end else None]))

    def _scored(
        self, asked: Sequence[AskedQuestion], drawn: Begun, rollout: Rollout
    ) -> list[AnsweredGroup]:
        """Return the groups of some prompts, with rewards that rank 0 tells all ranks."""
        found: list[Any] = [None]
        began = time.perf_counter()
        if self._pool is not None:
            found = [self._pool.collect()]
            rollout.failures += self._pool.failures
        rollout.score_seconds += time.perf_counter() - began
        dist.broadcast_object_list(found, src=0, device=self._device)
        rewards: dict[tuple[int, int], Reward | None] = found[0]
        groups = []
        for each in asked:
            numbers = range(self._run.post_training.answers_per_prompt)
            answers = [drawn[each.key, number] for number in numbers]
            groups.append(
                AnsweredGroup(
                    key=each.key,
                    name=each.name,
                    task=each.question.task,
                    prompt=each.prompt,
                    completions=[
                        _completion(each.key, number, answer)
                        for number, answer in zip(numbers, answers, strict=True)
                    ],
                    texts=[self._text(answer) for answer in answers],
                    rewards=[rewards[each.key, number] for number in numbers],
                )
            )
        return groups

    def _any_asked_to_stop(self) -> bool:
        asks = torch.tensor(int(self._is_asked_to_stop()), device=self._device)
        dist.all_reduce(asks, op=dist.ReduceOp.MAX)
        return bool(asks)


class _Watch:
    """Keeps the tokens of answers that have not ended, and stops generation if asked to."""

    def __init__(
        self,
        drawn: Begun,
        version: int,
        finish: Callable[[Sequence[int]], Finish | None],
        any_asked_to_stop: Callable[[], bool],
    ) -> None:
        self._drawn, self._version = drawn, version
        self._finish, self._any_asked_to_stop = finish, any_asked_to_stop
        self._tokens = {
            key: (list(answer.token_ids), list(answer.log_probs)) for key, answer in drawn.items()
        }
        self._num_tokens = 0

    def note(self, token: NewToken) -> None:
        """Keep a token; raise `GenerationStopped` on all ranks when any was asked to stop."""
        key = token.key, token.answer
        token_ids, log_probs = self._tokens.setdefault(key, ([], []))
        token_ids.append(token.token_id)
        log_probs.append(token.log_prob)
        self._num_tokens += 1
        if self._num_tokens % _TOKENS_BETWEEN_LOOKS == 0 and self._any_asked_to_stop():
            raise GenerationStopped(self._begun())

    def _begun(self) -> Begun:
        going = {
            key: BegunAnswer(
                token_ids=tuple(token_ids),
                log_probs=tuple(log_probs),
                version=self._version,
                finish=self._finish(token_ids),
            )
            for key, (token_ids, log_probs) in self._tokens.items()
        }
        # What has ended was noted as a whole.
        ended = {key: answer for key, answer in self._drawn.items() if answer.finish is not None}
        return going | ended


def _begun_of(completion: Completion) -> BegunAnswer:
    return BegunAnswer(
        token_ids=completion.token_ids,
        log_probs=completion.log_probs,
        version=completion.versions[-1][0] if completion.versions else 0,
        finish=completion.finish,
        routes=completion.routes,
    )


def _completion(key: int, number: int, answer: BegunAnswer) -> Completion:
    assert answer.finish is not None, "the answers of a round have ended"
    length = len(answer.token_ids)
    return Completion(
        key=key,
        answer=number,
        token_ids=answer.token_ids,
        log_probs=answer.log_probs,
        finish=answer.finish,
        versions=((answer.version, length),) if length else (),
        routes=answer.routes,
    )
