"""`nexus convert`: what it says, what it refuses, what it leaves when it is killed, and how much memory it takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import call
from gpt_oss_checkpoints import rewrite_tensors, write_tiny_checkpoint

import nexus_core
from nexus_core.select import LayerSelection, Selection, write_selection

LAYERS, EXPERTS = 2, 8
SELECTION = Selection(
    strategy="pca",
    top_k="auto",
    layers=(LayerSelection(layer=0, experts=(5, 2, 7)), LayerSelection(layer=1, experts=(0, 3))),
)


def write_for_command(tmp_path: Path) -> tuple[Path, Path]:
    """A base checkpoint of its own and a selection for it."""
    (tmp_path / "chosen").mkdir()
    folder = write_tiny_checkpoint(tmp_path / "base", layers=LAYERS, experts=EXPERTS)
    return folder, write_selection(SELECTION, tmp_path / "chosen")


def test_the_command_converts_and_says_sizes_and_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = write_for_command(tmp_path)

    assert call("convert", folder, "--selection", file, "--start", "0.5", "--out", tmp_path / "out") == 0

    said = capsys.readouterr().out
    report = json.loads((tmp_path / "out/convert_report.json").read_text())
    assert "before" in said
    assert "after" in said
    assert f"{report['trainable_parameters']:,} parameters" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--merge", "meen"], "did you mean 'mean'"),
        (["--start", "half"], "zero"),
        (["--width", "128"], "width is 128, 4 blocks of one expert's 32 neurons, but merge 'mean' has only 2 selected"),
        (["--merge", "neurons"], "needs neuron saliency"),
        (["--set", "alpha=1"], "alpha"),
    ],
)
def test_the_command_refuses_bad_options_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    folder, file = write_for_command(tmp_path)

    assert call("convert", folder, "--selection", file, *options, "--out", tmp_path / "out") == 2

    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_never_writes_into_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = write_for_command(tmp_path)
    before = sorted(folder.iterdir())

    for out in (folder, folder / "converted", folder / "a" / ".." / "b"):
        assert call("convert", folder, "--selection", file, "--out", out) == 2
        assert "lies in the model's own folder" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_a_truncated_shard_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = write_for_command(tmp_path)
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)

    assert call("convert", folder, "--selection", file, "--out", tmp_path / "out") == 2

    assert "truncated" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "chosen"]


def test_a_missing_expert_tensor_is_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = write_for_command(tmp_path)
    rewrite_tensors(folder, drop="model.layers.1.mlp.experts.down_proj_scales")

    assert call("convert", folder, "--selection", file, "--out", tmp_path / "out") == 2

    assert "'model.layers.1.mlp.experts.down_proj_scales' (layer 1, expert 0) is in no shard" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_killed_conversion_is_not_there_and_can_be_done_again(tmp_path: Path) -> None:
    folder, file = write_for_command(tmp_path)
    arguments = ["convert", str(folder), "--selection", str(file), "--out", str(tmp_path / "out")]
    program = (
        "import os, signal\nimport nexus_core.stages.convert as stage\nfrom nexus_core.cli import main\n"
        "stage.write_index = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"main({arguments!r})"
    )

    killed = subprocess.run([sys.executable, "-c", program], capture_output=True)

    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert call(*arguments) == 0
    assert nexus_core.load(tmp_path / "out").config.shared_expert_width == 32


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = write_for_command(tmp_path)
    (tmp_path / "locked").mkdir(0o555)

    assert call("convert", folder, "--selection", file, "--out", tmp_path / "locked" / "out") == 2
    assert "cannot be written: Permission denied" in capsys.readouterr().err


PEAK_OF_CONVERT = """
import sys, threading, time
from pathlib import Path
import torch
from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.recipe.schema import Convert
from nexus_core.select import LayerSelection, Selection
from nexus_core.stages.convert import convert
import nexus_gpt_oss.mxfp4, scipy.optimize

torch.set_num_threads(1)
# The first large decode imports a compiler, where there is one.
nexus_gpt_oss.mxfp4.decode(torch.zeros(64, 64, 16, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.uint8))
checkpoint = open_checkpoint(sys.argv[1])
layers = tuple(LayerSelection(layer=layer, experts=(0, 1, 2)) for layer in checkpoint.description.layers)

def anonymous_kb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

before, peak, is_done = anonymous_kb(), 0, False
def watch():
    global peak
    while not is_done:
        peak = max(peak, anonymous_kb())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
convert(checkpoint, Selection(strategy="x", top_k=3, layers=layers), Convert(merge=sys.argv[3]), Path(sys.argv[2]))
is_done = True
thread.join()
print(peak - before)
"""


DEEP_LAYERS, DEEP_HIDDEN = 24, 640


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many layers of few experts: 4.9 MB each in float32."""
    folder = tmp_path_factory.mktemp("deep") / "base"
    return write_tiny_checkpoint(folder, layers=DEEP_LAYERS, experts=3, hidden=DEEP_HIDDEN, width=DEEP_HIDDEN)


@pytest.mark.parametrize("merge", ["mean", "aligned"])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_number_of_layers(deep_base: Path, tmp_path: Path, merge: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", PEAK_OF_CONVERT, str(deep_base), str(out), merge]
    peak_kb = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # A few experts, and what the allocator keeps of them. In bfloat16 the results of all layers are twice as much.
    expert_kb = 3 * DEEP_HIDDEN**2 * 4 // 1024
    assert 0 < peak_kb < DEEP_LAYERS * expert_kb // 4
