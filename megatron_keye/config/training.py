# SPDX-License-Identifier: Apache-2.0
"""Settings of training: phase, steps, optimizer, precision, checkpoints."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_keye.config.check import check, check_numbers
from megatron_keye.config.evaluation import EvaluationConfig
from megatron_keye.config.fusions import FusionsConfig
from megatron_keye.config.health import HealthConfig
from megatron_keye.config.lora import TARGETS, LoraConfig
from megatron_keye.config.optimizer import OptimizerConfig
from megatron_keye.config.parts import PARTS, Part
from megatron_keye.config.profiler import ProfilerConfig

Phase = Literal["dense", "indexer_warmup", "sparse"]
LinearLayers = Literal["auto", "megatron", "transformer_engine"]
ExpertLayers = Literal["auto", "torch", "transformer_engine"]
Recompute = Literal["none", "experts", "selective", "full"]

RECOMPUTE: tuple[Recompute, ...] = ("none", "experts", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved, and which one a run starts from."""

    interval_steps: int = 0
    """Steps from one checkpoint to the next; 0: save only after the last step."""
    saves_last: bool = True
    """Whether the last step is always saved; benchmarks need no checkpoint."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written, after a pause for a copy in main
    memory, which takes as many bytes as the rank writes and is kept. false: training waits."""
    checks_sums: bool = True
    """Whether a checkpoint's files are compared with their checksums before a run continues it or
    starts from its weights. The ranks share the reading; sizes are compared anyway."""
    keep: int = 2
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every_steps: int = 0
    """Checkpoints after multiples of this many steps are kept for good; 0: none is."""
    export_every: int = 0
    """Every this many checkpoints of interval_steps, and after the last step, the checkpoint is
    also exported as a Hugging Face folder, exports/step-N in the run's folder; 0: never. All ranks
    write it, and training waits for it. A run that a signal stops does not export."""
    keep_exports: int = 2
    """Newest exports to keep; 0 keeps all."""
    resume: str = "none"
    """"auto" continues from the newest checkpoint of this run if there is one, "none" starts a new
    run, any other value is the folder of a checkpoint to continue from."""
    job: str = ""
    """Name of the queue's job that this process belongs to, which launch/slurm.sbatch sets. A job
    that is started again continues the newest checkpoint if it has saved one itself, whatever
    `resume` says. If it was lost before its first save, `resume` decides as at its first start, so
    that it does not take an earlier run of its name for its own."""
    weights: str = ""
    """Folder of a native checkpoint, for example of megatron-keye convert, whose weights a new run
    starts with, moments at 0; "" for random weights. They are rounded to this run's precision, and
    master weights begin as the rounded ones. A resumed run ignores it."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "training.checkpoint",
            zero_or_more="interval_steps keep keep_every_steps export_every keep_exports",
        )

    def keeps_for_good(self, step: int) -> bool:
        """Return whether the checkpoint after a step stays whatever its age."""
        return self.keep_every_steps > 0 and step % self.keep_every_steps == 0

    def exports(self, step: int, *, is_last: bool) -> bool:
        """Return whether the checkpoint after a step is exported.

        Args:
            step: Steps done.
            is_last: Whether no step follows.
        """
        if not self.export_every:
            return False
        interval = self.interval_steps * self.export_every
        return is_last or (interval > 0 and step % interval == 0)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run tells beside its steps, and where its figures go."""

    straggler_steps: int = 100
    """Every this many steps the times of ranks with the same role are compared, and the console
    and the figures name one that is slower than its peers; 0: never. Such a step waits for its
    device once more."""
    wandb_project: str = ""
    """Project of Weights & Biases that gets the run's curves; "": none. A resumed run continues
    its wandb run."""
    wandb_entity: str = ""
    """User or team that owns the project; "" for the default of the login."""
    wandb_mode: Literal["online", "offline"] = "online"
    """"offline" writes to wandb/ in the run's folder, for `wandb sync`; for nodes without
    internet."""

    def __post_init__(self) -> None:
        check_numbers(self, "training.logging", zero_or_more="straggler_steps")
        modes, mode, entity = ("online", "offline"), self.wandb_mode, self.wandb_entity
        check(mode in modes, "training.logging.wandb_mode", mode, f"one of {modes}")
        check(
            bool(self.wandb_project) or not entity,
            "training.logging.wandb_entity",
            entity,
            "'' without training.logging.wandb_project",
        )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """When the loss of data.validation is computed, and when it ends the run."""

    interval_steps: int = 0
    """Steps from one validation to the next; 0: only after the last step of the run."""
    num_rows: int = 0
    """Most packed rows of each source in one validation, always the same ones; 0: all."""
    patience: int = 0
    """Validations in a row without progress after which the run ends, with a checkpoint; 0: never.
    Progress is measured by the loss over all sources, in an indexer warm-up by the indexer's KL.
    With it, each best step so far is saved, and kept beside the newest checkpoints."""
    min_delta: float = 0.0
    """Progress is a loss that is lower than the best one before by more than this, in nats."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "training.validation",
            zero_or_more="interval_steps num_rows patience min_delta",
        )
        check(
            self.patience == 0 or self.interval_steps > 0,
            "training.validation.interval_steps",
            self.interval_steps,
            f"1 or more with training.validation.patience = {self.patience}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Steps, phase, precision, and which parts of the model learn."""

    steps: int = 0
    """Optimizer steps of the whole run, over which the learning-rate schedule extends; 0 where
    training.epochs says when it ends."""
    epochs: float = 0.0
    """Ends the run when the samples were drawn this many times, in place of training.steps: each
    sample of a single source so often, and of a blend as many samples as all sources hold, by
    their weights. The last step may have fewer rows. The learning-rate schedule extends over the
    samples drawn."""
    stop_after_step: int = 0
    """Save and stop after this step, without changing the schedule; 0: run to the end."""
    rows_per_step: int = 1
    """Global batch size in packed rows, over all replicas."""
    phase: Phase = "sparse"
    """"dense": dense attention without the indexer. "indexer_warmup": dense attention; only the
    indexer learns, from the attention weights of all keys. "sparse": attention to the keys that
    the indexer selects; everything learns."""
    dense_up_to: int = 0
    """In the sparse phase, rows whose documents (samples, and padding) all have at most this many
    tokens use dense attention and do not train the indexer. 0: no row does. Longer rows must
    remain to train the indexer."""
    indexer_loss_weight: float = 1.0
    """Weight of the indexer's KL loss (mean over queries, sum over layers and key-value heads)
    relative to the mean language loss. Only the indexer gets gradients from it."""
    frozen: tuple[Part, ...] = ()
    """Parts of the model that do not learn. With training.lora all weights but the indexers' are
    frozen anyway."""
    checks_hand_over: bool = True
    """Whether a new run refuses weights (training.checkpoint.weights) that its phase makes no
    sense after: sparse training needs indexers that were warmed up, and dense training or a
    warm-up does not follow it. Their training_history.json tells what trained them."""
    recompute: Recompute = "none"
    """What the backward pass of a decoder layer computes again instead of keeping it: "none";
    "experts": router and experts; "selective": all but the attention's outputs and the selected
    keys, that is, linears, norms and experts; "full": all but the selected keys. The arithmetic is
    the same, and so is every bit where kernels add in a fixed order."""
    keeps_in_host_memory: bool = False
    """With recompute "selective" or "full", whether what is kept beside a layer's input, the
    selected keys and the attention's outputs, waits in the machine's main memory for the backward
    pass. They are copied out beside the computation; it waits for them to come back."""
    precision: Literal["fp64", "fp32", "bf16"] = "bf16"
    """Type of weights and activations; bf16 has fp32 master weights and gradients. fp64 is for
    comparison with other implementations and needs model.decoder.experts.balance_loss_weight=0."""
    linear_layers: LinearLayers = "auto"
    """Implementation of the attention's linear layers. "auto" is Transformer Engine on a GPU if it
    is installed, else Megatron-Core; checkpoints are the same for both."""
    expert_layers: ExpertLayers = "auto"
    """What multiplies the experts' weights: "torch" those of a rank by one grouped product,
    "transformer_engine" each by its own, beside its linear layers, "auto" the latter where these
    are; checkpoints are the same."""
    seed: int = 1234
    """Seed of initial weights, sample order and all other random numbers."""
    hang_minutes: float = 10.0
    """Minutes without progress on any rank after which the run ends, naming the rank that holds it
    up, with the stack of each rank in hangs/ of the run's folder; three times as many in the first
    step, while building, loading, decoding, saving and validating. Exchanges between ranks wait
    for four times as many. 0: for ever."""
    records_timeline: bool = False
    """Whether every rank records the start and end of each part of a step, in timeline/ of the
    run's folder, for megatron-keye profile. Adds a barrier before each step."""
    device_peak_tflops: float = 0.0
    """Peak TFLOP/s of one device in this precision, for the model FLOPs utilization (MFU); 0 uses
    NVIDIA's bf16 peak, by the device's name."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Figures beside the console."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The loss of samples that are not trained on."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Answers to questions, and their scores."""
    fusions: FusionsConfig = field(default_factory=FusionsConfig)
    """Fused kernels of the decoder."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """Numbers that are not finite, and spikes."""
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    """Traces of given steps."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters that learn instead of the weights."""

    def __post_init__(self) -> None:
        weight, epochs = self.indexer_loss_weight, self.epochs
        check_numbers(
            self,
            "training",
            above_zero="rows_per_step",
            zero_or_more="steps epochs stop_after_step dense_up_to indexer_loss_weight seed "
            "hang_minutes device_peak_tflops",
        )
        check(self.seed < 2**32, "training.seed", self.seed, f"at most {2**32 - 1}")
        expected = (
            f"0, since training.epochs = {epochs:g} says when the run ends"
            if epochs
            else "1 or more, or training.epochs above 0"
        )
        check((self.steps > 0) != (epochs > 0), "training.steps", self.steps, expected)
        phases = ("dense", "indexer_warmup", "sparse")
        check(self.phase in phases, "training.phase", self.phase, f"one of {phases}")
        check(
            self.dense_up_to == 0 or self.phase == "sparse",
            "training.dense_up_to",
            self.dense_up_to,
            '0 unless training.phase is "sparse"',
        )
        precisions = ("fp64", "fp32", "bf16")
        check(self.precision in precisions, "training.precision", self.precision, f"{precisions}")
        unknown = [part for part in self.frozen if part not in PARTS]
        check(not unknown, "training.frozen", self.frozen, f"parts out of {PARTS}")
        check(self.recompute in RECOMPUTE, "training.recompute", self.recompute, f"{RECOMPUTE}")
        check(
            not self.keeps_in_host_memory or self.recompute in ("selective", "full"),
            "training.keeps_in_host_memory",
            self.keeps_in_host_memory,
            f"false with training.recompute = {self.recompute!r}, which keeps no such tensors",
        )
        check(
            self.precision != "fp64" or not self.optimizer.is_staged,
            "training.precision",
            self.precision,
            "fp32 or bf16 with training.optimizer.moments in bf16 or training.optimizer.offload",
        )
        self.lora.check_learns(self.phase, self.frozen)
        check(bool(self.trained_parts), "training.frozen", self.frozen, "a part that still learns")
        check(
            weight > 0 or not self.only_indexers_learn,
            "training.indexer_loss_weight",
            weight,
            "a number above 0, since only the indexer learns, and from this loss alone",
        )

    def row_phase(self, longest_document: int) -> Phase:
        """Return the phase of a row.

        Args:
            longest_document: Tokens of the row's longest document, 1 or more.
        """
        return "dense" if longest_document <= self.dense_up_to else self.phase

    @property
    def trained_parts(self) -> tuple[Part, ...]:
        """Parts that learn, or whose adapters do: those of the phase that are not frozen."""
        of_phase: dict[str, tuple[Part, ...]] = {
            "dense": ("vision", "projector", "decoder"),
            "indexer_warmup": ("indexer",),
            "sparse": PARTS,
        }
        parts = tuple(part for part in of_phase[self.phase] if part not in self.frozen)
        if not self.lora.is_on:
            return parts
        adapted = {TARGETS[target] for target in self.lora.targets}
        return tuple(part for part in parts if part in adapted or part == "indexer")

    def is_trained(self, part: Part, *, is_adapter: bool) -> bool:
        """Return whether the weights of a part learn, or its adapters.

        Args:
            part: Part of the model.
            is_adapter: Whether its adapters are meant.
        """
        return part in self.trained_parts and (
            is_adapter or part == "indexer" or not self.lora.is_on
        )

    @property
    def distributes_optimizer(self) -> bool:
        """Whether replicas share the optimizer; Megatron's does not support float64."""
        return self.optimizer.distributed and self.precision != "fp64"

    @property
    def only_indexers_learn(self) -> bool:
        """Whether nothing but the indexers learns, each from its own layer's loss."""
        return self.trained_parts == ("indexer",)
