# SPDX-License-Identifier: Apache-2.0
"""The files beside weights travel whole, can be replaced, and what a server misses is said."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_keye.checkpoint.convert.carried_files import (
    CARRIED,
    carry_on,
    find_files,
    find_missing,
)
from megatron_keye.checkpoint.convert.convert import Options, hf_to_native, native_to_hf
from megatron_keye.checkpoint.convert.synthetic import write_synthetic
from megatron_keye.checkpoint.manifest import write_manifest
from megatron_keye.errors import UserError
from tests.support.hf_checkpoint import UNREAD_FIELDS, write_small_files
from tests.support.tiny import tiny_run

RUN = tiny_run()


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_synthetic(tmp_path / "hf", RUN.model)
    write_small_files(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def native(hf: Path, tmp_path: Path) -> Path:
    hf_to_native(hf, tmp_path / "native", RUN, Options())
    return tmp_path / "native"


def change(folder: Path, name: str, **fields: object) -> None:
    content = json.loads((folder / name).read_text()) | fields
    (folder / name).write_text(json.dumps(content))


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


MISSING: dict[str, tuple[Callable[[Path], None], str]] = {
    "tokenizer": (without("tokenizer.json"), "tokenizer.json (text"),
    "its config": (without("tokenizer_config.json"), "tokenizer_config.json (special"),
    "generation": (without("generation_config.json"), "generation_config.json (sampling"),
    "processor": (without("preprocessor_config.json"), "preprocessor_config.json or processor"),
    "code": (without("configuration_keye_vl_2.py"), "configuration_keye_vl_2.py (auto_map"),
    "code of the processor": (
        lambda folder: change(
            folder, "preprocessor_config.json", auto_map={"AutoProcessor": ["a.B", None]}
        ),
        "a.py (auto_map",
    ),
    "auto_map": (lambda folder: change(folder, "config.json", auto_map=None), "auto_map in conf"),
}


@pytest.mark.parametrize(("remove", "phrase"), MISSING.values(), ids=MISSING)
def test_each_file_that_a_server_needs_is_missed_by_name(
    remove: Callable[[Path], None], phrase: str, hf: Path
) -> None:
    assert find_missing(find_files(hf), json.loads((hf / "config.json").read_text())) == []
    remove(hf)
    (missing,) = find_missing(find_files(hf), json.loads((hf / "config.json").read_text()))
    assert missing.startswith(phrase)


def test_a_template_and_an_end_may_stand_in_several_files(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "chat_template.jinja").unlink()
    (hf / "additional_chat_templates" / "plain.jinja").unlink()
    (missing,) = find_missing(find_files(hf), config)
    assert missing.startswith("chat_template.jinja (")
    change(hf, "tokenizer_config.json", chat_template="{{ messages }}")
    change(hf, "generation_config.json", eos_token_id=0)
    assert find_missing(find_files(hf), config | {"eos_token_id": None}) == []
    (hf / "generation_config.json").write_text("{}")
    missing = find_missing(find_files(hf), config | {"eos_token_id": None})
    assert any(phrase.startswith("eos_token_id in") for phrase in missing), missing


def test_what_an_export_lacks_is_listed_or_refused(
    hf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (hf / name).unlink()
    hf_to_native(hf, tmp_path / "native", RUN, Options())
    assert "config.json: not read: made_up" in caplog.text
    caplog.clear()
    with pytest.raises(UserError, match=r"tokenizer\.json .*preprocessor_config.*--files-from"):
        native_to_hf(tmp_path / "native", tmp_path / "out", Options(), needs_all_files=True)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "native"}
    native_to_hf(tmp_path / "native", tmp_path / "out", Options())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.message.count("\n  ") == 2
    assert "preprocessor_config.json" in record.message and "--files-from" in record.message


def test_files_from_a_folder_are_added_and_replace(
    native: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "LICENSE").write_text("MIT")
    (other / "video_preprocessor_config.json").write_text("{}")
    (other / ".hidden").write_text("")
    (other / "model.gguf").write_text("")
    (other / "assets").mkdir()
    config = UNREAD_FIELDS | {"rope_theta": 5.0, "quantization_config": {"quant_method": "fp8"}}
    (other / "config.json").write_text(json.dumps(config | {"new": 1}))
    native_to_hf(native, tmp_path / "out", Options(), files_from=other)
    out = tmp_path / "out"
    assert (out / "LICENSE").read_text() == "MIT" and (out / "tokenizer.json").is_file()
    assert (out / "video_preprocessor_config.json").is_file()
    assert not (out / ".hidden").exists() and not (out / "model.gguf").exists()
    written = json.loads((out / "config.json").read_text())
    assert written["new"] == 1 and written["rope_theta"] == 10_000.0
    assert "quantization_config" not in written
    told = [record.message for record in caplog.records]
    assert len(told) == 3 and "not carried along: assets" in told[0]
    assert "rope_theta is 10000.0, as trained" in told[1] and "quantization" in told[2]


@pytest.mark.parametrize("name", ["absent", "empty", "hf/LICENSE"])
def test_a_folder_without_files_is_refused(name: str, native: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model.safetensors").write_text("")
    with pytest.raises(UserError, match=r"--files-from: got no .*expected the folder"):
        native_to_hf(native, tmp_path / "out", Options(), files_from=tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_files_of_a_model_of_other_sizes_are_refused(native: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"got num_hidden_layers = 3, expected 4"):
        native_to_hf(native, tmp_path / "out", Options(), files_from=other)
    assert not (tmp_path / "out.partial").exists()


def test_a_broken_small_file_is_named(native: Path, tmp_path: Path) -> None:
    (native / CARRIED / "tokenizer_config.json").write_text("{")
    write_manifest(native, {})
    with pytest.raises(UserError, match=r"tokenizer_config\.json: got .*expected a JSON file"):
        native_to_hf(native, tmp_path / "out", Options())


def test_files_are_carried_on_in_place_of_older_ones(native: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for names in (("old", "LICENSE"), ()):
        (run / CARRIED).mkdir(parents=True, exist_ok=True)
        for name in names:
            (run / CARRIED / name).write_text("old")
        carry_on(native, run)
        assert find_files(run / CARRIED).keys() == find_files(native / CARRIED).keys()
        assert (run / CARRIED / "LICENSE").read_text() == "Apache-2.0"
    carry_on(tmp_path / "nothing", run)
    assert (run / CARRIED / "LICENSE").is_file()
    assert {path.name for path in run.iterdir()} == {CARRIED}
