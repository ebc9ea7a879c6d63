"""Transformer Engine gets torch's own cuDNN, unless the user names another."""

import os
from importlib.metadata import distribution
from pathlib import Path

import pytest

from megatron_keye.config import backends


def test_cudnn_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDNN_HOME", "CUDNN_PATH"):
        monkeypatch.delenv(name, raising=False)
    backends.share_torchs_cudnn()
    assert list((Path(os.environ["CUDNN_HOME"]) / "lib").glob("libcudnn.so*"))
    assert any(name.startswith("nvidia-cudnn") for name in distribution("torch").requires or ()), (
        "torch no longer brings it"
    )


@pytest.mark.parametrize("name", ["CUDNN_HOME", "CUDNN_PATH"])
def test_a_users_cudnn_is_kept(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ("CUDNN_HOME", "CUDNN_PATH"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "/opt/cudnn")
    backends.share_torchs_cudnn()
    assert {key: os.environ[key] for key in os.environ if key.startswith("CUDNN_")} == {
        name: "/opt/cudnn"
    }


def test_without_a_package_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDNN_HOME", "CUDNN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backends, "_find", lambda name: None)
    backends.share_torchs_cudnn()
    assert "CUDNN_HOME" not in os.environ
