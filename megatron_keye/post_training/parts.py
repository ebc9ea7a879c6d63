"""What a run that learns from its answers is made of on one rank."""

from functools import partial

from megatron_keye.config.fused_kernels import Fusions
from megatron_keye.config.run import RunConfig
from megatron_keye.data.tokens import END_OF_TEXT, load_tokenizer
from megatron_keye.data.video.probe_cache import node_cache
from megatron_keye.model import KeyeModel, build_model
from megatron_keye.optim.optimizer import JointOptimizer
from megatron_keye.parallel.grid import Grid, build_grid
from megatron_keye.parallel.process import Process
from megatron_keye.parallel.random import seed_rank
from megatron_keye.post_training.learning import Learning
from megatron_keye.post_training.prompts import Prompts
from megatron_keye.post_training.reward_pool import RewardPool
from megatron_keye.post_training.rollouts import Rollouts
from megatron_keye.rollout.embedded import EmbeddedEngine
from megatron_keye.rollout.grid import generating_run
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
        device = process.device
        grid = build_grid(run.parallel)
        seed_rank(run.training.seed, grid)
        tokenizer, probe_video = load_tokenizer(run.data.tokenizer), node_cache().probe
        self.prompts = Prompts(run, tokenizer, probe_video)
        """The questions."""
        model = build_model(
            run, grid, device, uses_transformer_engine=uses_transformer_engine, fusions=fusions
        )
        optimizer = JointOptimizer(run, model, grid)
        self.trained: tuple[KeyeModel, JointOptimizer, Grid] = (model, optimizer, grid)
        """What a checkpoint holds, and the groups of this rank."""
        log_video_decoder(run, grid, device)
        open_patches = partial(open_patch_source, run, model, device, probe_video)
        generating = generating_run(run, process.num_ranks)
        to_generate = open_patch_source(generating, model, device, probe_video)
        to_train = open_patches()
        self.health = RunHealth(run, *self.trained)
        """Judges updates."""
        self.saving = Saving(run, clock, self.health.note_saved)
        """Saves checkpoints."""
        step = TrainingStep(
            run,
            grid,
            model,
            optimizer,
            source=to_train,
            open_source=open_patches,
            judge=self.health.judge,
            stop=stop,
            saving=self.saving,
            clock=clock,
            device=device,
        )
        self.learning = Learning(
            run,
            grid,
            model,
            step,
            pad_token_id=tokenizer.control_id(END_OF_TEXT),
            open_source=open_patches,
            device=device,
        )
        """Learns from answers."""
        self.engine = EmbeddedEngine(
            generating,
            grid,
            model,
            source=to_generate,
            device=device,
            heartbeat=process.heartbeat,
        )
        """Answers."""
        pool = RewardPool(run.post_training) if process.rank == 0 else None
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
        self._closed = [part for part in (to_generate, to_train, pool) if part is not None]

    def close(self) -> None:
        """Let go of processes, threads and devices; a save at work may become complete."""
        self.saving.close()
        for part in self._closed:
            part.close()
