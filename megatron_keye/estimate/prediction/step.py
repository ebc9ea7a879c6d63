# SPDX-License-Identifier: Apache-2.0
"""The time of a step, in closed form: decoder, pipeline, vision, exchanges and the update."""

from dataclasses import dataclass, replace

from megatron_keye.config.run import RunConfig
from megatron_keye.estimate.account.decoder import output_works
from megatron_keye.estimate.account.optimizer import optimizer_work
from megatron_keye.estimate.account.vision import count_patches, vision_works
from megatron_keye.estimate.account.work import total_executed_flops
from megatron_keye.estimate.parameters import decoder_parameters, vision_parameters
from megatron_keye.estimate.prediction import operators
from megatron_keye.estimate.prediction.exchanges import Group, gradient_seconds, message_seconds
from megatron_keye.estimate.prediction.layer import Seconds, layer_seconds
from megatron_keye.estimate.prediction.machine import Machine
from megatron_keye.estimate.prediction.machines import H100
from megatron_keye.estimate.prediction.mix import RowMix
from megatron_keye.estimate.state import BYTES, host_bytes

_TERA = 1e12


@dataclass(frozen=True)
class StepTime:
    """The predicted time of a step, and what it is made of."""

    seconds: float
    """Of the whole step."""
    parts: dict[str, float]
    """Seconds of a rank of the busiest stage, by what it does or waits for; together the step."""
    vision_seconds: float
    """Of one vision rank."""
    decoder_seconds: float
    """Of the decoder's passes on such a rank, without waiting."""

    @property
    def idle_share(self) -> float:
        """Share of the step in which such a rank waits for others."""
        return sum(self.parts.get(name, 0.0) for name in WAITS) / self.seconds

    def reason(self, num_parts: int = 2) -> str:
        """Return the longest parts with their shares of the step, in words."""
        longest = sorted(self.parts.items(), key=lambda part: -part[1])[:num_parts]
        return ", ".join(f"{name} {seconds / self.seconds:.0%}" for name, seconds in longest)


WAITS = ("pipeline idle", "unlike rows", "waits for vision")
"""Parts in which a rank of the decoder does nothing."""


class Predictor:
    """Predicts steps of one batch of rows on one kind of GPU, for many degrees and settings."""

    def __init__(self, mix: RowMix, machine: Machine) -> None:
        """Take the rows and the GPU."""
        self.mix, self.machine = mix, machine
        self._layers: dict[tuple[object, ...], dict[str, Seconds]] = {}
        self._vision: dict[tuple[object, ...], float] = {}
        self._outputs: dict[tuple[object, ...], float] = {}
        self._updates: dict[tuple[object, ...], tuple[float, float]] = {}

    def predict(self, run: RunConfig) -> StepTime:
        """Return the time of a run's step."""
        degrees, num_layers = run.parallel.decoder, run.model.decoder.num_layers
        layer, logits = self.layer(run), self._logits(run)
        layers = max(degrees.layers_per_stage(num_layers))
        num_rows = run.training.rows_per_step // degrees.data
        parts = {name: each.total * layers * num_rows for name, each in layer.items()}
        parts["logits"] = logits * num_rows
        parts["stage messages"] = self._message_seconds(run) * num_rows
        passes = sum(parts.values())
        num_stages = degrees.pipeline if degrees.virtual_stages == 1 else 1
        unlike = self.mix.imbalance(degrees.data, num_stages)
        parts["unlike rows"] = passes * (unlike - 1)
        bubble = (degrees.pipeline - 1) / degrees.virtual_stages / num_rows
        parts["pipeline idle"] = bubble * passes
        vision = self.vision_seconds(run)
        decoder = sum(parts.values())
        if not run.parallel.vision.num_ranks:
            parts["vision"] = vision
        else:
            # Its first features come before the decoder, its last gradients after it; where vision
            # takes longer, it waits for the last row's gradients alone.
            ends = vision / num_rows * (1 if degrees.virtual_stages == 1 else degrees.pipeline)
            longer = max(decoder + min(ends, vision), vision + decoder / num_rows)
            parts["waits for vision"] = longer - decoder
        parts["update"], parts["gradients"] = self._update(run)
        return StepTime(sum(parts.values()), parts, vision, passes)

    def _message_seconds(self, run: RunConfig) -> float:
        """Return the time of a row's messages between pipeline stages, there and back."""
        degrees = run.parallel.decoder
        within_stage = degrees.num_ranks // degrees.pipeline
        tokens = run.data.row_tokens / degrees.context / degrees.tensor
        sent = BYTES[run.training.precision] * run.model.decoder.hidden_size * tokens
        group = Group(degrees.pipeline, within_stage)
        return 2 * degrees.virtual_stages * message_seconds(sent, group, self.machine)

    def layer(self, run: RunConfig) -> dict[str, Seconds]:
        """Return the time of one layer, as `layer_seconds` does."""
        degrees = run.parallel.decoder
        key = degrees.tensor, degrees.context, degrees.expert, run.training.recompute
        if key not in self._layers:
            self._layers[key] = layer_seconds(run, self.mix, self.machine)
        return self._layers[key]

    def vision_seconds(self, run: RunConfig) -> float:
        """Return the time of a vision rank, which decodes, encodes and runs backward."""
        vision = run.parallel.vision
        key = vision.chunk_patches, vision.recompute
        if key not in self._vision:
            self._vision[key] = self._all_vision(run)
        num_ranks = vision.num_ranks or run.parallel.decoder.num_ranks
        frames = self.mix.frames_per_picture * self.mix.num_pictures
        decoding = frames / self.machine.decoded_frames_per_second
        return max(self._vision[key], decoding) / num_ranks

    def _all_vision(self, run: RunConfig) -> float:
        patches = [count for row in self.mix.rows for count in row.patches]
        works = vision_works(run, count_patches(patches, run))
        forward = sum(work.executed_flops.forward for work in works)
        again = sum(work.executed_flops.total for work in works) - forward
        scale = self.machine.matmul_tflops / H100.matmul_tflops * _TERA
        size = run.parallel.vision.chunk_patches
        encoding = float(operators.VISION_FORWARD.at([size])[0])
        learning = float(operators.VISION_LEARNING.at([size])[0])
        return forward / (encoding * scale) + again / (learning * scale)

    def _logits(self, run: RunConfig) -> float:
        """Return the mean time of a row's logits, forward and backward."""
        degrees = run.parallel.decoder
        key = degrees.tensor, degrees.context
        if key not in self._outputs:
            flops = total_executed_flops(output_works(run, self.mix.counts(degrees.context)))
            rate = self.machine.matmul_tflops * operators.PRODUCT_SHARE * _TERA
            self._outputs[key] = flops / rate / len(self.mix.rows)
        return self._outputs[key]

    def _update(self, run: RunConfig) -> tuple[float, float]:
        """Return the time of the update, and of summing gradients, on the fullest stage."""
        degrees = replace(run.parallel.decoder, virtual_stages=1)
        key = degrees, run.parallel.vision.num_ranks, run.training.optimizer
        if key not in self._updates:
            stages = {0, degrees.pipeline - 1}
            seconds = [self._update_of(run, stage) for stage in stages]
            self._updates[key] = max(update for update, _ in seconds), max(s for _, s in seconds)
        return self._updates[key]

    def _update_of(self, run: RunConfig, stage: int) -> tuple[float, float]:
        machine = self.machine
        of_vision = [] if run.parallel.vision.num_ranks else vision_parameters(run)
        held = decoder_parameters(run, stage) + of_vision
        moved = optimizer_work(run, held).moved_bytes.total
        rate = machine.copy_gigabytes_per_second * operators.UPDATE_SHARE
        away = 2 * host_bytes(run, held) / machine.host_gigabytes_per_second
        return (moved / rate + away) / 1e9, gradient_seconds(run, held, machine)
