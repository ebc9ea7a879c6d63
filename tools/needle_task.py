# SPDX-License-Identifier: Apache-2.0
"""A needle task: texts and videos in which one key of many decides each token of an answer.

    python tools/needle_task.py runs/needles
    megatron-keye train tools/needle_task.py:dense --ranks 1

A text lists words that give a key its value, "key7=value2", between filler words; a video shows
one colour a second. A question lists keys, or times, and the answer repeats each with its value,
or with the colour of that frame. So each word of an answer depends on one or two tokens out of a
hundred, and a model whose indexer selects few keys answers only if the indexer finds them. (With
key and value as two words, a model has to learn to join neighbours first, which takes thousands of
steps and says nothing about an indexer.)

Writes {text,frames}.{train,held_out}.jsonl, {text,frames}.questions.jsonl, videos/ and tokenizer/,
whose vocabulary of whole words keeps the model small. The functions below are recipes, each to be
run from the checkpoint of the one before: dense attention, the indexers' warm-up, and sparse
attention to 16 keys. The last one from dense weights (training.checks_hand_over=false) shows what
the warm-up is worth. A GPU gets rows of many samples, a CPU eight short ones a step.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_keye.cli.arguments import make_parser
from megatron_keye.cli.status import reports_user_errors
from megatron_keye.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ValidationConfig,
)
from megatron_keye.production.forged.clip import write_clip
from megatron_keye.production.forged.scene import COLOURS
from megatron_keye.production.word_tokenizer import vocabulary, write_tokenizer
from megatron_keye.recipes.keye_tiny_grounding import keye_tiny_grounding

FOLDER = "runs/needles"
MAX_PAIRS, NUM_FRAMES, MAX_QUESTIONS = 16, 16, 12
TEXTS_PER_VIDEO = 10
"""Videos take time to decode, texts none, and 4,000 of them are learned by heart in 500 steps."""
_KEYS = [f"key{number}" for number in range(32)]
_VALUES = [f"value{number}" for number in range(8)]
_FILLERS = [f"word{number}" for number in range(8)]
_TIMES = [f"<{second}.0" for second in range(NUM_FRAMES)]
_FRAME = (56, 56, 3)


def words() -> list[str]:
    """Return the words of the task, in the order of their ids."""
    pairs = (_pair(key, value) for key in _KEYS for value in _VALUES)
    return ["ask", "seconds>", *_TIMES, *COLOURS, *_KEYS, *_VALUES, *_FILLERS, *pairs]


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser("tools/needle_task.py", __doc__)
    parser.add_argument("out", type=Path, help="folder for samples, videos and the tokenizer")
    parser.add_argument(
        "--samples",
        type=int,
        default=4000,
        help=f"videos for training, and {TEXTS_PER_VIDEO} times as many texts; default: 4000",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: Sequence[str]) -> int:
    """Write everything and return the exit status."""
    options = parse_arguments(arguments)
    (options.out / "videos").mkdir(parents=True, exist_ok=True)
    write_tokenizer(options.out / "tokenizer", words())
    makers: dict[str, Callable[[np.random.Generator, str], dict[str, Any]]] = {
        "text": lambda generator, name: text_sample(generator),
        "frames": lambda generator, name: frames_sample(generator, options.out, name),
    }
    for number, (kind, make) in enumerate(makers.items()):
        per_video = TEXTS_PER_VIDEO if kind == "text" else 1
        for part, count in (("train", per_video * options.samples), ("held_out", 64)):
            generator = np.random.default_rng((options.seed, number, part == "train"))
            samples = [make(generator, f"{part}-{line}") for line in range(count)]
            _write_lines(options.out / f"{kind}.{part}.jsonl", samples)
            if part == "held_out":
                questions = [_with_truth(sample) for sample in samples]
                _write_lines(options.out / f"{kind}.questions.jsonl", questions)
    return 0


def _write_lines(file: Path, samples: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    sys.stdout.write(f"{file}: {len(samples)} samples\n")


def _with_truth(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the sample as a question of `megatron-keye evaluate`: right if all its words are."""
    return sample | {"task": "text", "truth": {"text": sample["messages"][-1]["content"]}}


def text_sample(generator: np.random.Generator) -> dict[str, Any]:
    """Return a conversation about a text of 4 to 16 pairs and half as many other words."""
    num_pairs = int(generator.choice([4, 8, MAX_PAIRS]))
    keys = generator.permutation(_KEYS)[:num_pairs].tolist()
    values = generator.choice(_VALUES, num_pairs).tolist()
    pieces = [_pair(key, value) for key, value in zip(keys, values, strict=True)]
    pieces += generator.choice(_FILLERS, num_pairs // 2).tolist()
    text = " ".join(generator.permutation(np.array(pieces, dtype=object)).tolist())
    question, answer = _question(generator, keys, values)
    return {"messages": _messages(f"{text} {question}", answer)}


def frames_sample(generator: np.random.Generator, folder: Path, name: str) -> dict[str, Any]:
    """Write a video of one colour a second, and return a conversation about it."""
    names = list(COLOURS)
    colours = [names[number] for number in generator.integers(0, len(names), NUM_FRAMES)]
    path = Path("videos") / f"{name}.mp4"
    frames = (np.full(_FRAME, COLOURS[colour], dtype=np.uint8) for colour in colours)
    write_clip(folder / path, frames, range(0, 1000 * NUM_FRAMES, 1000))
    question, answer = _question(generator, _TIMES, colours)
    video, text = {"type": "video", "video": str(path)}, {"type": "text", "text": question}
    return {"messages": _messages([video, text], answer)}


def _pair(key: str, value: str) -> str:
    return f"{key}={value}"


def _question(
    generator: np.random.Generator, keys: list[str], values: list[str]
) -> tuple[str, str]:
    """Return a question for some of the keys in random order, and its answer."""
    asked = generator.permutation(len(keys))[:MAX_QUESTIONS]
    answer = " ".join(f"{keys[place]} {values[place]}" for place in asked)
    return "ask " + " ".join(keys[place] for place in asked), answer


def _messages(question: str | list[dict[str, str]], answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def dense(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run that learns the task with attention to all keys, on one rank."""
    base = keye_tiny_grounding(num_ranks=1, has_gpu=has_gpu)
    decoder = replace(
        base.model.decoder,
        num_layers=4,
        vocab_size=len(vocabulary(words())),
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        rope_sections=(4, 6, 6),
        indexer=replace(base.model.decoder.indexer, top_k=16),
    )
    return replace(
        base,
        name="needle_dense",
        model=replace(base.model, decoder=decoder),
        data=DataConfig(
            samples=f"{FOLDER}/text.train.jsonl=2,{FOLDER}/frames.train.jsonl=1",
            # A sample has 30 to 125 tokens; a CPU's attention takes the square of a row's length.
            row_tokens=8192 if has_gpu else 128,
            tokenizer=f"{FOLDER}/tokenizer",
            validation=f"text={FOLDER}/text.held_out.jsonl,frames={FOLDER}/frames.held_out.jsonl",
            frames=replace(base.data.frames, min_tokens_per_frame=1, max_tokens_per_frame=1),
        ),
        training=replace(
            base.training,
            steps=1200,
            rows_per_step=1 if has_gpu else 8,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
            checkpoint=CheckpointConfig(interval_steps=600),
            validation=ValidationConfig(interval_steps=50),
            evaluation=EvaluationConfig(),
        ),
    )


def warmup(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run in which the indexers learn what dense attention attends to."""
    run = dense(num_ranks=num_ranks, has_gpu=has_gpu)
    optimizer = OptimizerConfig(learning_rate=4e-3, warmup_steps=20)
    training = replace(run.training, steps=250, phase="indexer_warmup", optimizer=optimizer)
    return replace(run, name="needle_warmup", training=training)


def sparse(*, num_ranks: int, has_gpu: bool) -> RunConfig:
    """Return the run in which everything learns and attends to 16 keys."""
    run = dense(num_ranks=num_ranks, has_gpu=has_gpu)
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=20)
    training = replace(
        run.training,
        steps=800,
        phase="sparse",
        optimizer=optimizer,
        validation=ValidationConfig(interval_steps=25),
    )
    return replace(run, name="needle_sparse", training=training)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
