# SPDX-License-Identifier: Apache-2.0
"""Round trips are bit-exact, small in memory, complete or absent, and errors name their tensor."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_keye.checkpoint.convert.carried_files import CARRIED
from megatron_keye.checkpoint.convert.convert import Options, hf_to_native, native_to_hf
from megatron_keye.checkpoint.convert.synthetic import write_synthetic
from megatron_keye.checkpoint.convert.to_peft import native_to_peft
from megatron_keye.checkpoint.hf.parameter_shapes import ExpertLayout
from megatron_keye.checkpoint.hf.safetensors_index import INDEX, open_folder
from megatron_keye.checkpoint.manifest import write_manifest
from megatron_keye.errors import UserError
from megatron_keye.files.disk import DiskError
from tests.support.small_disk import small_disk
from tests.support.tiny import tiny_model, tiny_run

ROOT = Path(__file__).parents[3]
RUN = tiny_run()
NORM = "model.norm.weight"
GATE = "model.layers.2.mlp.gate.weight"


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: entry.read().clone() for name, entry in open_folder(folder).items()}


def assert_same(got: Path, expected: Path) -> None:
    mine, theirs = tensors(got), tensors(expected)
    assert mine.keys() == theirs.keys()
    different = [
        n for n, t in theirs.items() if t.dtype != mine[n].dtype or not torch.equal(t, mine[n])
    ]
    assert not different


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """Return a released checkpoint in several files, with a tokenizer."""
    write_synthetic(tmp_path / "hf", RUN.model, dtype=torch.float32, file_bytes=100_000)
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    return tmp_path / "hf"


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_round_trip_is_bit_exact(
    layout: ExpertLayout, dtype: torch.dtype, tmp_path: Path
) -> None:
    write_synthetic(tmp_path / "hf", RUN.model, layout=layout, dtype=dtype)
    hf_to_native(tmp_path / "hf", tmp_path / "native", RUN, Options())
    native_to_hf(tmp_path / "native", tmp_path / "back", Options(), layout=layout)
    assert_same(tmp_path / "back", tmp_path / "hf")


def test_the_layouts_convert_into_each_other(hf: Path, tmp_path: Path) -> None:
    hf_to_native(hf, tmp_path / "native", RUN, Options())
    native_to_hf(tmp_path / "native", tmp_path / "separate", Options(), layout="per-expert")
    hf_to_native(tmp_path / "separate", tmp_path / "native2", RUN, Options())
    native_to_hf(tmp_path / "native2", tmp_path / "back", Options())
    assert_same(tmp_path / "back", hf)
    fused = tensors(hf)["model.layers.1.mlp.experts.gate_up_proj"]
    gate = tensors(tmp_path / "separate")["model.layers.1.mlp.experts.3.gate_proj.weight"]
    assert torch.equal(gate, fused[3, :, : gate.shape[0]].T)


def test_several_processes_write_the_same(hf: Path, tmp_path: Path) -> None:
    hf_to_native(hf, tmp_path / "native", RUN, Options(num_workers=2))
    native_to_hf(tmp_path / "native", tmp_path / "back", Options(), file_bytes=60_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert_same(tmp_path / "back", hf)


def test_small_files_are_copied(hf: Path, tmp_path: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x"}}))
    hf_to_native(hf, tmp_path / "native", RUN, Options())
    native_to_hf(tmp_path / "native", tmp_path / "back", Options())
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["auto_map"]
    shutil.rmtree(tmp_path / "native" / CARRIED)
    write_manifest(tmp_path / "native", {})
    native_to_hf(tmp_path / "native", tmp_path / "again", Options(), files_from=hf)
    assert (tmp_path / "again" / "tokenizer.json").is_file()


def test_weights_are_rounded_to_a_requested_type(hf: Path, tmp_path: Path) -> None:
    hf_to_native(hf, tmp_path / "native", RUN, Options(dtype=torch.bfloat16))
    native_to_hf(tmp_path / "native", tmp_path / "back", Options())
    for name, tensor in tensors(hf).items():
        assert torch.equal(tensors(tmp_path / "back")[name], tensor.bfloat16()), name


def with_change(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Change or remove a tensor, keeping file and index in agreement."""
    index = json.loads((folder / INDEX).read_text())
    path = folder / index["weight_map"].get(name, index["weight_map"][NORM])
    held = load_file(path)
    changed = change(held.pop(name, torch.zeros(2)))
    index["weight_map"].pop(name, None)
    if changed is not None:
        held[name] = changed.contiguous()
        index["weight_map"][name] = path.name
    save_file(held, path)
    (folder / INDEX).write_text(json.dumps(index))


FAILURES: dict[str, tuple[str, Callable[[Tensor], Tensor | None], str]] = {
    "missing": (GATE, lambda t: None, f"{GATE}: got none in .*shape .4, 32.; .*--recipe or --set"),
    "missing indexer": (
        "model.layers.0.self_attn.sa_indexer.k_proj.weight",
        lambda t: None,
        "sa_indexer.k_proj.weight: got none .*use warm-start",
    ),
    "tied output layer": ("lm_head.weight", lambda t: None, "lm_head.weight: got none .*ties"),
    "surplus": (
        "visual.head.x",
        lambda t: t,
        r"visual.head.x: got shape .*--drop 'visual.head.x'",
    ),
    "packing table": (
        "visual.vision_model.embeddings.packing_position_embedding.weight",
        lambda t: torch.zeros(7, 16),
        "--set model.vision.num_packing_positions=7",
    ),
    "shape": (GATE, lambda t: t[:3], r"got shape \[3, 32\] in .*expected \[4, 32\]; .*--set"),
    "type": (GATE, lambda t: t.half(), "got type F16 in .*expected F32 .*--dtype"),
    "integers": (GATE, lambda t: t.char(), "got type I8 in .*quantised"),
    "nan": (GATE, lambda t: t / 0, "got 128 of 128 numbers that are NaN or Inf.*--check-finite"),
}


@pytest.mark.parametrize(("name", "change", "message"), FAILURES.values(), ids=FAILURES)
def test_a_wrong_tensor_is_named_and_nothing_is_left(
    name: str,
    change: Callable[[Tensor], Tensor | None],
    message: str,
    hf: Path,
    tmp_path: Path,
) -> None:
    with_change(hf, name, change)
    with pytest.raises(ValueError, match=message):
        hf_to_native(hf, tmp_path / "native", RUN, Options(checks_finite=True))
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_surplus_tensors_can_be_dropped(hf: Path, tmp_path: Path) -> None:
    with_change(hf, "visual.head.x", lambda t: t)
    hf_to_native(hf, tmp_path / "native", RUN, Options(dropped=("visual.head.*",)))
    assert (tmp_path / "native" / ".metadata").is_file()


def test_nan_is_refused_only_on_request(hf: Path, tmp_path: Path) -> None:
    with_change(hf, GATE, lambda t: t / 0)
    hf_to_native(hf, tmp_path / "native", RUN, Options())
    with pytest.raises(ValueError, match="router.weight at .2.: got 128 of 128"):
        native_to_hf(tmp_path / "native", tmp_path / "back", Options(checks_finite=True))
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "native"}


def test_a_recipe_of_other_sizes_is_refused(hf: Path, tmp_path: Path) -> None:
    run = tiny_run(model=tiny_model(num_layers=2))
    with pytest.raises(ValueError, match="num_hidden_layers = 4, expected 2"):
        hf_to_native(hf, tmp_path / "native", run, Options())
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"num_hidden_layers": None}))
    with pytest.raises(ValueError, match=r"tensor model.layers.2.*expected no such tensor"):
        hf_to_native(hf, tmp_path / "native", run, Options())
    (hf / "config.json").unlink()
    with pytest.raises(ValueError, match=r"got no config.json, expected one"):
        hf_to_native(hf, tmp_path / "native", run, Options())


def test_a_released_folder_is_not_taken_for_a_native_one(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got a Hugging Face folder, .*hf-to-native"):
        native_to_hf(hf, tmp_path / "out", Options())


def test_an_existing_folder_is_not_written_over(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--out: got .*which exists"):
        hf_to_native(hf, hf, RUN, Options())


@pytest.mark.parametrize(
    "victim", ["layer-00001.distcp", ".metadata", "run.json", "manifest.json"]
)
def test_a_damaged_native_checkpoint_is_refused(victim: str, hf: Path, tmp_path: Path) -> None:
    native = tmp_path / "native"
    hf_to_native(hf, native, RUN, Options())
    whole = bytearray((native / victim).read_bytes())
    whole[len(whole) // 2] ^= 1
    (native / victim).write_bytes(whole)
    for convert in (native_to_hf, native_to_peft):
        options = (Options(num_workers=2),) if convert is native_to_hf else ()
        with pytest.raises(UserError, match=f"{native}.*(checksum|got|cannot be read)"):
            convert(native, tmp_path / "back", *options)
    assert not (tmp_path / "back.partial").exists() and not (tmp_path / "back").exists()


@pytest.mark.parametrize("direction", ["to native", "to hf"])
def test_a_disk_that_does_not_take_a_checkpoint_keeps_nothing_of_it(
    direction: str, hf: Path, tmp_path: Path
) -> None:
    if direction == "to hf":
        hf_to_native(hf, tmp_path / "native", RUN, Options())
    with small_disk(tmp_path / "disk", 1) as disk:
        (disk / "filler").write_bytes(bytes(2**20 - 256 * 2**10))
        with pytest.raises(DiskError, match=r"out.*: got no space left on the device"):
            if direction == "to hf":
                native_to_hf(tmp_path / "native", disk / "out", Options())
            else:
                hf_to_native(hf, disk / "out", RUN, Options())
        assert [file.name for file in disk.iterdir()] == ["filler"]


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_keye.checkpoint.convert import convert, to_native
from megatron_keye.config import RunConfig
fill, calls = to_native.NativeMaker.fill, []
def dying(self, name, stream, advance):
    calls.append(name)
    if len(calls) == 3:
        stream.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return fill(self, name, stream, advance)
to_native.NativeMaker.fill = dying
run = RunConfig.from_json(Path(sys.argv[3]).read_text())
convert.hf_to_native(Path(sys.argv[1]), Path(sys.argv[2]), run, convert.Options())
"""


def test_a_killed_conversion_is_resumed(hf: Path, tmp_path: Path) -> None:
    native, settings = tmp_path / "native", tmp_path / "run.json"
    settings.write_text(RUN.to_json())
    command = [sys.executable, "-c", KILLED, str(hf), str(native), str(settings)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    partial = tmp_path / "native.partial"
    done = {path: path.stat().st_mtime_ns for path in partial.glob("*.distcp")}
    assert len(done) == 2 and not native.exists()
    hf_to_native(hf, native, RUN, Options())
    for path, written in done.items():
        assert (native / path.name).stat().st_mtime_ns == written, "written again"
    assert not partial.exists()
    native_to_hf(native, tmp_path / "back", Options())
    assert_same(tmp_path / "back", hf)


def test_a_changed_source_starts_over(hf: Path, tmp_path: Path) -> None:
    hf_to_native(hf, tmp_path / "native", RUN, Options())
    leftover = tmp_path / "again.partial" / ".records"
    leftover.mkdir(parents=True)
    (leftover / "fingerprint").write_text("another conversion")
    (leftover / "layer-00000.distcp").write_text("[]")
    hf_to_native(hf, tmp_path / "again", RUN, Options())
    native_to_hf(tmp_path / "again", tmp_path / "back", Options())
    assert_same(tmp_path / "back", hf)


MEMORY = """
import sys
from dataclasses import replace
from pathlib import Path
from megatron_keye.checkpoint.convert import convert
from megatron_keye.config import RunConfig
folder, run = Path(sys.argv[1]), RunConfig.from_json(Path(sys.argv[2]).read_text())
def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
few = replace(run.model.decoder, num_layers=1)
small = replace(run, model=replace(run.model, decoder=few))
def both(name, run):
    convert.hf_to_native(folder / name, folder / f"{name}-native", run, convert.Options())
    convert.native_to_hf(folder / f"{name}-native", folder / f"{name}-back", convert.Options())
both("small", small)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
both("large", run)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_stays_below_a_few_tensors(tmp_path: Path) -> None:
    model = tiny_model(num_layers=24, hidden_size=256, vocab_size=8192)
    run = tiny_run(model=model).with_overrides(
        ["model.decoder.experts.num_experts=16", "model.decoder.experts.intermediate_size=256"]
    )
    (tmp_path / "run.json").write_text(run.to_json())
    small = run.with_overrides(["model.decoder.num_layers=1"])
    write_synthetic(tmp_path / "small", small.model)
    size = write_synthetic(tmp_path / "large", run.model)
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(tmp_path / "run.json")]
    answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    largest = max(entry.size_bytes for entry in open_folder(tmp_path / "large").values())
    limit = 3 * largest + 16 * 2**20
    assert size > 4 * limit, f"{size} bytes prove nothing about {limit}"
    assert int(answer.stdout) < limit
    assert_same(tmp_path / "large-back", tmp_path / "large")
