# SPDX-License-Identifier: Apache-2.0
"""Runs the decoder's micro-batches through Megatron's pipeline schedule.

The first stage waits for the features of each micro-batch when it starts it, and returns their
gradients after its backward pass, so that the schedule does not depend on vision.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_keye.config.run import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.decoder.batch import Batch
from megatron_keye.decoder.row import RowMeter
from megatron_keye.decoder.virtual_stage import VirtualStage
from megatron_keye.observe.recorder import Recorder
from megatron_keye.parallel.grid import Grid
from megatron_keye.parallel.transport import FeatureTransport
from megatron_keye.plan.slots import vision_learns
from megatron_keye.training.microbatch import cut_row


class DecoderPass:
    """Forward and backward of the decoder on this rank, or forward only."""

    def __init__(
        self,
        run: RunConfig,
        grid: Grid,
        stages: list[DistributedDataParallel],
        device: torch.device,
        *,
        is_forward_only: bool = False,
    ) -> None:
        """Prepare for all steps.

        Args:
            run: Sizes, phase and degrees.
            grid: Groups of this rank.
            stages: Virtual stages of this rank, wrapped.
            device: Where they run.
            is_forward_only: Whether there is no backward pass; stages are in evaluation mode then.
        """
        assert grid.decoder is not None, "only decoder ranks run the decoder"
        self._run, self._groups, self._stages, self._device = run, grid.decoder, stages, device
        self._place, self._rank = grid.place(), grid.rank
        self._is_forward_only = is_forward_only
        self._returns_gradients = vision_learns(run) and not is_forward_only
        self._config = get_model_config(stages[0])
        if any(stage.ddp_config.overlap_grad_reduce for stage in stages):
            # So that gradients are summed in the last micro-batch alone.
            holding_back = [stage.no_sync for stage in stages]
            self._config.no_sync_func = holding_back if len(stages) > 1 else holding_back[0]
        self._schedule = get_forward_backward_func(
            pp_size=run.parallel.decoder.pipeline,
            vp_size=self._config.virtual_pipeline_model_parallel_size,
        )

    def __call__(
        self,
        rows: list[PackedRow],
        transport: FeatureTransport,
        meter: RowMeter,
        recorder: Recorder,
        *,
        indexer_loss_weight: float,
        balance_loss_scale: float,
    ) -> None:
        """Run the passes of this replica's rows; gradients are not reduced yet.

        Args:
            rows: All rows of the global batch.
            transport: Receives features and returns their gradients.
            meter: Accumulates "language_loss" and what layers report.
            recorder: Records when passes run.
            indexer_loss_weight: Weight of one query's KL relative to one token's language loss.
            balance_loss_scale: Factor on the router's balancing loss, which Megatron sums over
                the tokens of all micro-batches.
        """
        own_rows = rows[self._place.data :: self._run.parallel.decoder.data]
        scale = torch.tensor([balance_loss_scale], device=self._device)
        self._config.moe_grad_scale_func = lambda: scale
        forward = partial(
            self._forward,
            transport=transport,
            meter=meter,
            recorder=recorder,
            indexer_loss_weight=indexer_loss_weight,
        )
        with torch.set_grad_enabled(not self._is_forward_only):
            self._schedule(
                forward_step_func=forward,
                data_iterator=[self._batches(own_rows) for _ in self._stages],
                model=self._stages,
                num_microbatches=len(own_rows),
                # Megatron divides it by the context and tensor degrees itself.
                seq_length=self._run.data.row_tokens,
                micro_batch_size=1,
                forward_only=self._is_forward_only,
                p2p_communicator=_Neighbours(self._groups.pp, self._config, recorder),
                pg_collection=self._groups,
            )

    def _batches(self, rows: list[PackedRow]) -> Iterator[tuple[int, PackedRow, Batch]]:
        for micro_batch, row in enumerate(rows):
            yield micro_batch, row, cut_row(row, self._run, self._place).to(self._device)

    def _forward(
        self,
        batches: Iterator[tuple[int, PackedRow, Batch]],
        wrapped: DistributedDataParallel,
        *,
        transport: FeatureTransport,
        meter: RowMeter,
        recorder: Recorder,
        indexer_loss_weight: float,
    ) -> tuple[Tensor, Any]:
        """Run one virtual stage on one micro-batch; called by Megatron's schedule."""
        micro_batch, row, batch = next(batches)
        stage: VirtualStage = wrapped.module
        features_MD = self._features(transport, micro_batch) if stage.pre_process else None
        label = f"micro-batch {micro_batch}, virtual stage {self._stages.index(wrapped)}"
        with recorder.span("forward", label):
            output = wrapped(
                batch,
                features_MD,
                indexer_loss_weight=indexer_loss_weight,
                meter=meter,
                where=f"rank {self._rank}, row of {', '.join(row.sample_names) or 'padding'}",
                phase=self._run.training.row_phase(row.longest_document),
            )
        recorder.backward_of(output, label)
        return output, partial(self._report, meter=meter)

    def _features(self, transport: FeatureTransport, micro_batch: int) -> Tensor:
        features_MD = transport.take_features(micro_batch)
        if self._returns_gradients:
            # Without rows too: the exchange of gradients needs this rank, and others wait for it.
            features_MD.requires_grad_()

            def send(leaf: Tensor) -> None:
                assert leaf.grad is not None, "the hook runs after accumulation"
                transport.return_gradients(micro_batch, leaf.grad)
                leaf.grad = None

            features_MD.register_post_accumulate_grad_hook(send)
        return features_MD

    def _report(self, loss_sum: Tensor, *, meter: RowMeter) -> tuple[Tensor, Tensor, None]:
        """Return the loss as the schedule expects it: 0 tokens, since division comes later."""
        if self._place.tensor == 0:
            meter.accumulate("language_loss", loss_sum)
        return loss_sum, torch.zeros((), dtype=torch.int, device=loss_sum.device), None


class _Neighbours(P2PCommunicator):
    """Exchanges activations with the neighbouring pipeline stages, and tells of it."""

    def __init__(
        self, group: dist.ProcessGroup, config: ModelParallelConfig, recorder: Recorder
    ) -> None:
        super().__init__(pp_group=group, config=config)
        self._recorder = recorder

    def _communicate(self, **arguments: Any) -> Any:
        with self._recorder.exchange("a neighbouring pipeline stage"):
            return super()._communicate(**arguments)
