# SPDX-License-Identifier: Apache-2.0
"""Encodes the pictures of prompts and runs the decoder on their rows, as a step of training does.

Plan, chunks of the ViT and the transport of features are those of training; nothing goes back.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_keye.config.megatron import weight_dtype
from megatron_keye.config.run import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.model import KeyeModel
from megatron_keye.observe.heartbeat import Heartbeat
from megatron_keye.observe.recorder import Recorder
from megatron_keye.parallel.grid import Grid
from megatron_keye.parallel.schedule import run_step
from megatron_keye.parallel.transport import FeatureTransport
from megatron_keye.training.chunk_encoder import ChunkEncoder, PatchSource
from megatron_keye.training.microbatch import plan_rows


class Prefill:
    """Runs one row of each replica with its pictures; the same code on every kind of rank."""

    def __init__(
        self,
        run: RunConfig,
        grid: Grid,
        model: KeyeModel,
        source: PatchSource | None,
        device: torch.device,
        heartbeat: Heartbeat,
    ) -> None:
        """Prepare for all rows.

        Args:
            run: Sizes and degrees.
            grid: Groups of this rank.
            model: This rank's modules.
            source: Supplies the patches of pictures, on ranks that encode; None on others.
            device: Where this rank computes.
            heartbeat: Told of each part.
        """
        self._recorder = Recorder(heartbeat)
        self._run, self._grid, self._device = run, grid, device
        self._encoder: ChunkEncoder | None = None
        if model.vision is not None:
            assert source is not None, "a rank that encodes needs a source"
            self._encoder = ChunkEncoder(
                run, model.vision, source, device, grid.rank, learns=False
            )

    @property
    def vision_seconds(self) -> float:
        """Seconds of the last rows that went into patches and the ViT; 0 on a rank without it."""
        return self._encoder.seconds if self._encoder is not None else 0.0

    def __call__(
        self, rows: list[PackedRow], run_decoder: Callable[[Tensor], Tensor] | None
    ) -> list[Tensor]:
        """Encode the rows' pictures and run the decoder. Collective over all ranks.

        Args:
            rows: A row of each replica, all of one length.
            run_decoder: Takes the features [M, D] of this rank's placeholders; None on a
                dedicated vision rank.

        Returns:
            What `run_decoder` returned; nothing on a dedicated vision rank.

        Raises:
            UserError: For media that cannot be read.
        """
        data = replace(self._run.data, row_tokens=len(rows[0].token_ids))
        plan = plan_rows(rows, replace(self._run, data=data), returns_gradients=False)
        transport = FeatureTransport(
            plan,
            self._grid,
            self._recorder,
            width=self._run.model.decoder.hidden_size,
            dtype=weight_dtype(self._run),
            device=self._device,
        )
        if self._encoder is not None:
            self._encoder.announce(plan, rows)
            self._encoder.start_step(plan, rows, self._recorder)
        found = []

        def decode() -> None:
            assert run_decoder is not None, "only decoder ranks run the decoder"
            found.append(run_decoder(transport.take_features(0)))

        run_step(
            plan,
            self._grid,
            transport,
            encoder=self._encoder,
            run_decoder=decode,
            returns_gradients=False,
        )
        return found
