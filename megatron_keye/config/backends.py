# SPDX-License-Identifier: Apache-2.0
"""Detects which optional GPU packages are completely installed, without importing them.

Importing does not show it: a partly installed Transformer Engine raises RuntimeError, for which
Megatron-Core is not prepared, and the package index has another `apex`. Standard library only.
"""

from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from megatron_keye.config.data import DecodeBackend
from megatron_keye.config.training import LinearLayers, TrainingConfig
from megatron_keye.errors import UserError

TRANSFORMER_ENGINE_INSTALL = (
    'pip install --no-build-isolation "transformer-engine[pytorch,core_cu13]==2.20.2"'
)
APEX_INSTALL = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation "
    "git+https://github.com/NVIDIA/apex"
)
DALI_INSTALL = 'pip install "nvidia-dali-cuda130==2.4.*"'
WANDB_INSTALL = 'pip install "wandb>=0.31"'
# One distribution per CUDA release.
DALI_NAMES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
# Transformer Engine's core library, one distribution per CUDA release.
_CORE_NAMES = ("transformer-engine-cu13", "transformer-engine-cu12")
_TORCH_NAME = "transformer-engine-torch"


def installed_version(name: str) -> str | None:
    """Return the version of the installed distribution `name`, or None when there is none."""
    found = _find(name)
    return found.version if found else None


def transformer_engine_version() -> str | None:
    """Return the version of Transformer Engine, or None when no part of it is installed.

    It consists of three packages: Python code, a core library per CUDA release, and the binding
    to torch. A build from source has all three in the first.

    Raises:
        RuntimeError: When a part is missing or the versions differ; Megatron-Core cannot be
            imported then.
    """
    front = _find("transformer-engine")
    parts = {name: installed_version(name) for name in (*_CORE_NAMES, _TORCH_NAME)}
    present = {name: version for name, version in parts.items() if version is not None}
    if front is None and not present:
        return None
    if front is not None and not present and _is_built_from_source(front):
        return front.version
    missing = []
    if front is None:
        missing.append("transformer-engine")
    else:
        present = {"transformer-engine": front.version, **present}
    if not any(parts[name] for name in _CORE_NAMES):
        missing.append(_CORE_NAMES[0])
    if parts[_TORCH_NAME] is None:
        missing.append(_TORCH_NAME)
    got = ", ".join(f"{name} {version}" for name, version in present.items())
    remedy = (
        f"Megatron-Core cannot be imported like this; complete it with "
        f"`{TRANSFORMER_ENGINE_INSTALL}` or remove it with "
        f"`pip uninstall -y {' '.join(present)}`"
    )
    if missing:
        raise RuntimeError(
            f"Transformer Engine is incomplete: got {got} without {', '.join(missing)}. {remedy}"
        )
    if len(set(present.values())) > 1:
        raise RuntimeError(
            f"the parts of Transformer Engine differ in version: got {got}, expected one version. "
            f"{remedy}"
        )
    return next(iter(present.values()))


def uses_transformer_engine(training: TrainingConfig, *, has_gpu: bool) -> bool:
    """Return whether a run uses Transformer Engine's linear layers.

    Args:
        training: The run's linear_layers and expert_layers.
        has_gpu: Whether the run is on GPUs.

    Raises:
        UserError: When Transformer Engine is requested but not available, or asked for experts
            alone.
        RuntimeError: When it is only partly installed.
    """
    has_linears = _has_engine_linears(training.linear_layers, has_gpu=has_gpu)
    if training.expert_layers == "transformer_engine" and not has_linears:
        raise UserError(
            "training.expert_layers: got 'transformer_engine' with Megatron-Core's linear layers, "
            "expected 'torch', or linear layers of Transformer Engine"
        )
    return has_linears


def has_engine_experts(training: TrainingConfig, *, uses_transformer_engine: bool) -> bool:
    """Return whether Transformer Engine multiplies the experts' weights, rather than torch.

    Args:
        training: The run's expert_layers.
        uses_transformer_engine: From `uses_transformer_engine`.
    """
    return uses_transformer_engine and training.expert_layers != "torch"


def _has_engine_linears(wanted: LinearLayers, *, has_gpu: bool) -> bool:
    if wanted == "megatron" or (wanted == "auto" and not has_gpu):
        return False
    version = transformer_engine_version()
    if wanted == "transformer_engine" and (version is None or not has_gpu):
        raise UserError(
            "training.linear_layers: got 'transformer_engine' "
            f"{'where it is not installed' if has_gpu else 'without a GPU'}, expected 'megatron' "
            f"or 'auto'; to install it: {TRANSFORMER_ENGINE_INSTALL}"
        )
    return version is not None


def decode_backend(wanted: DecodeBackend, *, has_gpu: bool) -> Literal["pyav", "dali"]:
    """Return the video decoder of a rank that encodes.

    Args:
        wanted: The run's data.decode.backend.
        has_gpu: Whether the run is on GPUs.

    Raises:
        UserError: When DALI is requested but not available.
    """
    is_installed = any(_find(name) is not None for name in DALI_NAMES)
    if wanted == "dali" and not (has_gpu and is_installed):
        raise UserError(
            f"data.decode.backend: got 'dali' "
            f"{'where DALI is not installed' if has_gpu else 'without a GPU'}, expected 'pyav' or "
            f"'auto'; to install it: {DALI_INSTALL}"
        )
    return "dali" if wanted != "pyav" and has_gpu and is_installed else "pyav"


def check_wandb(project: str) -> None:
    """Check that wandb is installed where a run asks for it.

    Args:
        project: The run's training.logging.wandb_project.

    Raises:
        UserError: When it is not.
    """
    if project and _find("wandb") is None:
        raise UserError(
            f"training.logging.wandb_project: got {project!r} where wandb is not installed, "
            f"expected ''; to install it: {WANDB_INSTALL}"
        )


def transformer_engine_cuda() -> int | None:
    """Return the CUDA major version of the installed Transformer Engine, None if unknown."""
    for name in _CORE_NAMES:
        if _find(name) is not None:
            return int(name.removeprefix("transformer-engine-cu"))
    return None


def apex_version() -> str | None:
    """Return the version of NVIDIA's apex, or None when no `apex` is installed.

    Raises:
        RuntimeError: When the installed `apex` is the unrelated one of the package index.
    """
    found = _find("apex")
    if found is None:
        return None
    folder = Path(str(found.locate_file("apex")))
    if not all((folder / part).is_dir() for part in ("optimizers", "normalization")):
        raise RuntimeError(
            f"the installed apex {found.version} is not NVIDIA's: it has no apex.optimizers or no "
            f"apex.normalization. Remove it with `pip uninstall -y apex`; NVIDIA's is built with "
            f"`{APEX_INSTALL}`"
        )
    return found.version


def has_weight_gradient_extension() -> bool:
    """Return whether apex's products that add weight gradients in place are built."""
    return find_spec("fused_weight_gradient_mlp_cuda") is not None


def _find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _is_built_from_source(front: Distribution) -> bool:
    """Return whether the package itself contains the compiled binding to torch."""
    return any(
        path.name.startswith("transformer_engine_torch") and path.suffix == ".so"
        for path in front.files or []
    )
