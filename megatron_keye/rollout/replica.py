# SPDX-License-Identifier: Apache-2.0
"""What one replica's rank runs in a tick: new tokens through the decoder, then draws."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_keye.config.megatron import weight_dtype
from megatron_keye.config.run import RunConfig
from megatron_keye.data.row import PackedRow
from megatron_keye.decoder.router_choices import RouterChoices
from megatron_keye.decoder.row import RowMeter
from megatron_keye.decoder.virtual_stage import VirtualStage
from megatron_keye.rollout.cache import copy_pages, forget
from megatron_keye.rollout.new_tokens import (
    NewTokens,
    RankCache,
    tokens_of_answers,
    tokens_of_pieces,
)
from megatron_keye.rollout.pieces import Piece
from megatron_keye.rollout.replayed import ReplayedTicks
from megatron_keye.rollout.sampling import draw_tokens, uniform
from megatron_keye.rollout.scheduler import ReplicaTick
from megatron_keye.rollout.sequence import Answer


class Replica:
    """This rank's share of one replica: the decoder, its cache, and draws."""

    def __init__(
        self,
        run: RunConfig,
        stage: VirtualStage,
        cache: RankCache,
        tp_group: dist.ProcessGroup,
        meter: RowMeter,
        *,
        notes_routes: bool = False,
    ) -> None:
        """Prepare for all ticks.

        Args:
            run: Sizes and phase.
            stage: The whole decoder.
            cache: This rank's pages.
            tp_group: Tensor-parallel group.
            meter: Receives the layers' measurements.
            notes_routes: Whether the experts of all tokens are kept.
        """
        self._run, self._stage, self._group, self._meter = run, stage, tp_group, meter
        self.cache = cache
        """This rank's pages."""
        self._is_sparse = run.training.phase == "sparse"
        self._choices = RouterChoices(stage) if notes_routes else None
        self._experts: list[Tensor] = []
        self._replayed: ReplayedTicks | None = None
        if run.rollout.uses_cuda_graphs:
            self._replayed = ReplayedTicks(cache.device)

    def copy_pages(self, tick: ReplicaTick) -> None:
        """Copy the pages of which two sequences go on differently."""
        copy_pages(list(self.cache.layers), tick.copies)

    def forget(self) -> None:
        """Forget the keys of other weights."""
        forget(list(self.cache.layers))
        self.release()

    def release(self) -> None:
        """Let go of what was captured, which holds weights and cache."""
        if self._replayed is not None:
            self._replayed.forget()

    def close(self) -> None:
        """Let go of the stage and of what was captured."""
        self.release()
        if self._choices is not None:
            self._choices.close()

    def take_experts(self) -> Tensor:
        """Return where the tokens went that ran since the last call, in their order.

        Returns:
            uint8 [tokens, layers, experts of a token], the same on all tensor ranks.
        """
        experts = torch.cat(self._experts)
        self._experts.clear()
        return experts

    def run_pieces(self, pieces: Sequence[Piece], row: PackedRow, features_MD: Tensor) -> Tensor:
        """Run pieces of prompts and answers.

        Args:
            pieces: The pieces; may be none.
            row: From `packed_pieces`.
            features_MD: [M, D] features of this rank's placeholders.

        Returns:
            float64 [A, 2]: token and log-probability of each answer that the pieces draw.
        """
        tokens = tokens_of_pieces(pieces, row, self.cache, self._run.model.vision_token_ids)
        where = ", ".join(row.sample_names) or "padding"
        hidden_LBD = self._final_states(tokens, features_MD, where)
        self._note_experts(row.num_real_tokens)
        drawn = [answer for piece in pieces for answer in piece.drawn]
        logits_LV = self._stage.logits(hidden_LBD).squeeze(1) if drawn else hidden_LBD
        return self._draw(logits_LV, drawn)

    def run_answers(self, answers: Sequence[Answer]) -> Tensor:
        """Run the newest token of each answer, of which there may be none; as `run_pieces`."""
        tokens = tokens_of_answers(
            answers,
            self.cache,
            gathers_keys=not self._is_sparse,
            rounds_up=self._replayed is not None,
        )
        if self._replayed is not None:
            logits_LV = self._replayed(self._decode, tokens)
        else:
            logits_LV = self._decode(tokens)
        self._note_experts(len(answers))
        return self._draw(logits_LV[: len(answers)], answers)

    def _decode(self, tokens: NewTokens) -> Tensor:
        """Return the logits [L, V/TP] behind the newest tokens of answers."""
        width, device = self._run.model.decoder.hidden_size, self.cache.device
        nothing_MD = torch.empty(0, width, dtype=weight_dtype(self._run), device=device)
        return self._stage.logits(self._final_states(tokens, nothing_MD, "answers")).squeeze(1)

    def _final_states(self, tokens: NewTokens, features_MD: Tensor, where: str) -> Tensor:
        return self._stage.final_states(
            tokens.batch,
            features_MD,
            tokens.cache,
            meter=self._meter,
            where=f"generation, {where}",
            phase="sparse" if self._is_sparse else "dense",
        )

    def _note_experts(self, num_tokens: int) -> None:
        """Keep where the first tokens of the row that has run went; the others are padding."""
        if self._choices is None:
            return
        # Each tensor rank routes its part of the row.
        own = self._choices.take()
        parts = [torch.empty_like(own) for _ in range(self._group.size())]
        dist.all_gather(parts, own, group=self._group)
        self._experts.append(torch.cat(parts)[:num_tokens])

    def _draw(self, logits_LV: Tensor, answers: Sequence[Answer]) -> Tensor:
        """Return token and log-probability of each answer, float64 [A, 2]."""
        if not answers:
            return torch.zeros(0, 2, dtype=torch.float64, device=self.cache.device)
        requests = [answer.group.request for answer in answers]
        uniforms = [
            uniform(request.seed, request.key, answer.number, len(answer.token_ids))
            for request, answer in zip(requests, answers, strict=True)
        ]
        laws = [request.law for request in requests]
        token_L, log_prob_L = draw_tokens(logits_LV, laws, uniforms, self._group)
        return torch.stack([token_L.double(), log_prob_L.double()], dim=1)
