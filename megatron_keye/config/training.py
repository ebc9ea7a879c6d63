"""What a run does with the model: phase, steps, optimizer, precision, checkpoints."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_keye.config.check import check

Phase = Literal["dense", "indexer_warmup", "sparse"]
LinearLayers = Literal["auto", "megatron", "transformer_engine"]
Part = Literal["vision", "projector", "decoder", "indexer"]

PARTS: tuple[Part, ...] = ("vision", "projector", "decoder", "indexer")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: int = 0
    """Steps of linear growth from 0."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    clip_gradient_norm: float = 1.0
    """Largest norm of the gradient over decoder and vision together; 0 turns clipping off."""
    distributed: bool = False
    """Whether replicas share the optimizer (Megatron's distributed optimizer, ZeRO-1): each rank
    keeps moments and master weights of one part and updates it, and the weights are gathered.
    Otherwise each keeps all. Checkpoints are the same for both; fp64 runs never share."""

    def __post_init__(self) -> None:
        rate, low = self.learning_rate, self.min_learning_rate
        check(rate > 0, "training.optimizer.learning_rate", rate, "a number above 0")
        check(0 <= low <= rate, "training.optimizer.min_learning_rate", low, f"0 to {rate}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When and where the state is saved, and what a run starts from."""

    interval_steps: int = 0
    """Save after every so many steps; 0: only after the last."""
    saves_last: bool = True
    """Whether the last step is saved whatever the interval; measurements need no checkpoint."""
    keep: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    resume: str = "none"
    """"auto" continues from the newest checkpoint of this run when there is one, "none" starts
    afresh, anything else is the folder of one checkpoint to continue from."""
    weights: str = ""
    """Folder of a native checkpoint whose weights a fresh run begins with, for example one made by
    megatron-keye convert; "" draws them at random. A resumed run takes its own."""

    def __post_init__(self) -> None:
        for name in ("interval_steps", "keep"):
            number = getattr(self, name)
            check(number >= 0, f"training.checkpoint.{name}", number, "0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Steps, phase, precision, and what learns."""

    steps: int
    """Optimizer steps of the whole run; the learning-rate schedule spans them."""
    stop_after_step: int = 0
    """Save and stop after this step, leaving the schedule as it is; 0 goes to the end."""
    rows_per_step: int = 1
    """Packed rows of one step over all replicas (the global batch)."""
    phase: Phase = "sparse"
    """"dense": plain attention, no indexer. "indexer_warmup": plain attention, only the indexer
    learns, from all keys. "sparse": attention over the selected keys, everything learns."""
    dense_up_to: int = 0
    """In the sparse phase, rows whose longest document has at most so many tokens (padding counts
    as a document) attend densely and do not train the indexer; 0 for none, since only the user
    knows whether enough longer rows are left to train it."""
    indexer_loss_weight: float = 1.0
    """Weight lambda of the indexer's KL loss, a mean over queries and a sum over layers and
    key-value groups, beside the mean language loss. Only the indexer gets gradients from it."""
    frozen: tuple[Part, ...] = ()
    """Parts that do not learn, of vision, projector, decoder, indexer."""
    recompute_layers: bool = False
    """Whether decoder layers are recomputed in the backward pass instead of kept."""
    precision: Literal["fp64", "fp32", "bf16"] = "bf16"
    """Type of weights and activations; bf16 keeps fp32 master weights and gradients. fp64 is for
    comparing with other implementations, without the router's balancing loss."""
    linear_layers: LinearLayers = "auto"
    """Whose linear layers and experts the decoder uses. "auto" takes Transformer Engine's on a GPU
    where it is installed, Megatron-Core's own otherwise; checkpoints are the same for both."""
    seed: int = 1234
    """Seeds weights, sample order and everything else that is random."""
    records_timeline: bool = False
    """Whether every rank records when each part of each step ran, in timeline/ of the run's
    folder; megatron-keye profile draws it. It adds a barrier before each step."""
    device_peak_tflops: float = 0.0
    """Peak speed of one device in this precision, in 1e12 operations per second, for the model
    FLOPs utilization (MFU); 0 looks NVIDIA's bf16 peak up by the device's name."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""

    def __post_init__(self) -> None:
        check(self.steps > 0, "training.steps", self.steps, "1 or more")
        check(self.rows_per_step > 0, "training.rows_per_step", self.rows_per_step, "1 or more")
        phases = ("dense", "indexer_warmup", "sparse")
        check(self.phase in phases, "training.phase", self.phase, f"one of {phases}")
        check(self.dense_up_to >= 0, "training.dense_up_to", self.dense_up_to, "0 or more")
        check(
            self.dense_up_to == 0 or self.phase == "sparse",
            "training.dense_up_to",
            self.dense_up_to,
            '0 unless training.phase is "sparse"',
        )
        peak = self.device_peak_tflops
        check(peak >= 0, "training.device_peak_tflops", peak, "0 or more")
        precisions = ("fp64", "fp32", "bf16")
        check(self.precision in precisions, "training.precision", self.precision, f"{precisions}")
        unknown = [part for part in self.frozen if part not in PARTS]
        check(not unknown, "training.frozen", self.frozen, f"parts out of {PARTS}")
        check(bool(self.trained_parts), "training.frozen", self.frozen, "a part that still learns")

    def row_phase(self, longest_document: int) -> Phase:
        """Return the phase in which a row runs.

        Args:
            longest_document: Tokens of the row's longest document, 1 or more.
        """
        return "dense" if longest_document <= self.dense_up_to else self.phase

    @property
    def trained_parts(self) -> tuple[Part, ...]:
        """The parts that learn in this phase and are not frozen."""
        of_phase: dict[str, tuple[Part, ...]] = {
            "dense": ("vision", "projector", "decoder"),
            "indexer_warmup": ("indexer",),
            "sparse": PARTS,
        }
        return tuple(part for part in of_phase[self.phase] if part not in self.frozen)

    @property
    def distributes_optimizer(self) -> bool:
        """Whether replicas share the optimizer; Megatron's knows nothing of float64."""
        return self.optimizer.distributed and self.precision != "fp64"

    @property
    def only_indexers_learn(self) -> bool:
        """Whether nothing but the indexers learns, each from its own layer's loss."""
        return self.trained_parts == ("indexer",)
