# SPDX-License-Identifier: Apache-2.0
"""Settings of a language model that judges answers, asked by HTTP."""

from dataclasses import dataclass

from megatron_keye.config.check import check, check_numbers

JUDGED_TASKS = ("caption", "scenes", "text")
"""Tasks whose answers are free text, of which a rule sees words alone."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who judges answers in place of a rule, and to which questions.

    The judge reads the question, the right answer and the model's, and no video. What it said is
    kept on disk, so that the same answer is judged once.
    """

    url: str = ""
    """Server with OpenAI's /v1/chat/completions, such as http://localhost:8000; "": no judge, and
    every answer is scored by its rule."""
    model: str = ""
    """Name of the judge's model on the server."""
    tasks: tuple[str, ...] = ("caption",)
    """Kinds of questions whose answers it judges: caption, scenes, text."""
    timeout_seconds: float = 60.0
    """Longest wait for a judgement. An answer whose judge fails is not scored."""
    cache_folder: str = ""
    """Where judgements are kept, for several runs; "": in judgements/ of the run's folder."""

    def __post_init__(self) -> None:
        check_numbers(self, "post_training.judge", above_zero="timeout_seconds")
        for task in self.tasks:
            check(
                task in JUDGED_TASKS,
                "post_training.judge.tasks",
                task,
                f"some of {', '.join(JUDGED_TASKS)}, which have no exact rule",
            )
        check(
            bool(self.url) == bool(self.model),
            "post_training.judge.model",
            self.model,
            f"a name with, and '' without, post_training.judge.url (now {self.url!r})",
        )

    def judges(self, task: str) -> bool:
        """Return whether answers to this kind of question are judged."""
        return bool(self.url) and task in self.tasks
