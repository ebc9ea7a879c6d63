"""What a run that learns from its answers is made of on one rank."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from megatron_keye.config.fused_kernels import Fusions
from megatron_keye.config.post_training import PostTrainingConfig
from megatron_keye.config.run import RunConfig
from megatron_keye.data.tokens import END_OF_TEXT, load_tokenizer
from megatron_keye.data.video.probe_cache import node_cache
from megatron_keye.model import build_model
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.parallel.grid import build_grid
from megatron_keye.parallel.process import Process
from megatron_keye.parallel.random import seed_rank
from megatron_keye.post_training.judge import check_judge
from megatron_keye.post_training.learning import Learning
from megatron_keye.post_training.prompts import Prompts
from megatron_keye.post_training.reward_pool import RewardPool
from megatron_keye.post_training.rollouts import Rollouts
from megatron_keye.rollout.embedded import EmbeddedEngine
from megatron_keye.rollout.grid import generating_run
from megatron_keye.training.chunk_encoder import PatchSource
from megatron_keye.training.health.run_health import RunHealth
from megatron_keye.training.patch_source import log_video_decoder, open_patch_source
from megatron_keye.training.saving import Saving
from megatron_keye.training.step import TrainingStep
from megatron_keye.training.step_clock import StepClock
from megatron_keye.training.stop import StopRequest


class Parts:
    """The model, what generates with it and what trains it: the same weights for both."""

    def __init__(
        self,
        run: RunConfig,
        process: Process,
        stop: StopRequest,
        clock: StepClock,
        *,
        uses_transformer_engine: bool,
        fusions: Fusions,
    ) -> None:
        """Build all parts. Collective: all ranks must call it.

        Args:
            run: The run.
            process: This rank.
            stop: Read once per update, and while answers are generated.
            clock: Measures updates.
            uses_transformer_engine: Whether linear layers and experts are Transformer Engine's.
            fusions: The fused kernels that run.

        Raises:
            UserError: For questions that are malformed.
        """
        self._run, self._process = run, process
        device, probe_video = process.device, node_cache().probe
        grid = build_grid(run.parallel)
        seed_rank(run.training.seed, grid)
        tokenizer = load_tokenizer(run.data.tokenizer)
        self.prompts = Prompts(run, tokenizer, probe_video)
        """The questions."""
        model = build_model(
            run, grid, device, uses_transformer_engine=uses_transformer_engine, fusions=fusions
        )
        self.trained = (model, JointOptimizer(run, model, grid), grid)
        """What a checkpoint holds, and the groups of this rank."""
        log_video_decoder(run, grid, device)
        generating = generating_run(run, process.num_ranks)
        to_generate = open_patch_source(generating, model, device, probe_video)
        open_patches = partial(open_patch_source, run, model, device, probe_video)
        to_train = open_patches()
        pool = RewardPool(_scoring(run)) if process.rank == 0 else None
        self._closed = [part for part in (to_generate, to_train, pool) if part is not None]
        self.health = RunHealth(run, *self.trained)
        """Judges updates."""
        self.saving = Saving(run, clock, self.health.note_saved)
        """Saves checkpoints."""
        self.learning = self._learning(
            stop, clock, to_train, open_patches, tokenizer.control_id(END_OF_TEXT)
        )
        """Learns from answers."""
        heartbeat = process.heartbeat
        self.engine = EmbeddedEngine(
            generating, grid, model, source=to_generate, device=device, heartbeat=heartbeat
        )
        """Answers."""
        self.rollouts = Rollouts(
            run,
            self.engine,
            self.prompts,
            tokenizer,
            pool=pool,
            is_asked_to_stop=lambda: bool(stop.name),
            device=device,
        )
        """Has questions answered and scored."""

    def _learning(
        self,
        stop: StopRequest,
        clock: StepClock,
        source: PatchSource | None,
        open_source: Callable[[], PatchSource | None],
        pad_token_id: int,
    ) -> Learning:
        """Return what makes updates, and what has them made of answers."""
        (model, optimizer, grid), device = self.trained, self._process.device
        step = TrainingStep(
            self._run,
            grid,
            model,
            optimizer,
            source=source,
            open_source=open_source,
            judge=self.health.judge,
            stop=stop,
            saving=self.saving,
            clock=clock,
            device=device,
        )
        return Learning(
            self._run,
            grid,
            model,
            step,
            pad_token_id=pad_token_id,
            open_source=open_source,
            device=device,
        )

    def close(self) -> None:
        """Let go of processes, threads and devices; a save at work may become complete."""
        self.saving.close()
        for part in self._closed:
            part.close()


def _scoring(run: RunConfig) -> PostTrainingConfig:
    """Return the settings of rewards, with a folder for judgements."""
    settings = run.post_training
    check_judge(settings.judge)
    folder = settings.judge.cache_folder or str(run.folder / "judgements")
    return replace(settings, judge=replace(settings.judge, cache_folder=folder))
