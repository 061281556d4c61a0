"""The command line as a whole: quick help, one sentence per error, the right exit code."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest
from command_line import call

from nexus_core import __version__, plugins
from nexus_core.cli import COMMANDS, nexus
from nexus_core.errors import StageError
from nexus_core.hookspecs import hookimpl

HEAVY = (
    "torch",
    "transformers",
    "deepspeed",
    "mlflow",
    "sklearn",
    "datasets",
    "pydantic",
    "numpy",
    "matplotlib",
    "yaml",
)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["check", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom nexus_core.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_answers_in_half_a_second() -> None:
    """In seconds of computing, so that a busy machine makes no difference."""

    def seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = seconds()
    subprocess.run([sys.executable, "-m", "nexus_core", "--help"], capture_output=True, check=True)
    assert seconds() - before < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_module_and_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = nexus.get_command(click.Context(nexus), name)
    assert isinstance(command, click.Command)
    assert command.name == name
    assert call(name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"Usage: nexus {name} ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert __version__ in capsys.readouterr().out


def test_a_misspelt_command_is_met_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("colect") == 2
    assert "Error: there is no command 'colect'; did you mean 'collect'?" in capsys.readouterr().err


def test_a_misspelt_flag_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "recipe.yaml", "--untli", "train") == 2
    assert "--until" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("plugins", "new", "mine"), ("select", "statistics")])
def test_a_place_that_cannot_be_written_is_misuse(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert call(*words, "--out", str(tmp_path / "file" / "out")) == 2
    assert capsys.readouterr().err.startswith(f"Error: {tmp_path}/file: cannot be written: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class BringsCommands:
    """A plugin with commands that end in every way a command can."""

    error: BaseException = ValueError("first line\nsecond line")

    @hookimpl
    def nexus_cli_commands(self) -> list[click.Command]:
        @click.command("hello")
        def hello() -> None:
            click.echo("hello from a plugin")

        @click.command("fail")
        def fail() -> None:
            raise self.error

        return [hello, fail]


@pytest.fixture
def brings(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    plugin = BringsCommands()
    plugins.installed().register(plugin, "brings", "test")
    yield plugin
    plugins.installed().unregister("brings")


def test_a_plugins_command_is_found(brings: BringsCommands, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("hello") == 0
    assert capsys.readouterr().out == "hello from a plugin\n"
    assert call("helo") == 2
    assert "did you mean 'hello'" in capsys.readouterr().err


def test_an_expected_error_is_its_sentence(brings: BringsCommands, capsys: pytest.CaptureFixture[str]) -> None:
    brings.error = StageError("layer 7 has no expert 32")
    assert call("fail") == 1
    captured = capsys.readouterr()
    assert captured.err == "Error: layer 7 has no expert 32\n"
    assert captured.out == ""


def test_an_unexpected_error_is_one_sentence_and_a_traceback_only_with_debug(
    brings: BringsCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("fail") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("Error: ValueError: first line; this is not expected, run again with --debug")
    assert call("fail", "--debug") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(brings: BringsCommands, capsys: pytest.CaptureFixture[str]) -> None:
    brings.error = KeyboardInterrupt()
    assert call("fail") == 130
    assert capsys.readouterr().err.strip() == "Error: interrupted"


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m nexus_core plugins | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_output_that_nobody_reads_is_no_failure() -> None:
    command = f"{sys.executable} -m nexus_core --version >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to a full device")
def test_a_full_disk_is_one_sentence_wherever_it_shows() -> None:
    command = f"{sys.executable} -m nexus_core plugins --json > /dev/full"
    # Where it would not show: Python keeps what is printed until the end, and tries once more then.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=buffered)
    assert done.returncode == 1
    assert done.stderr == "Error: what is printed: the disk is full; free some space and type the same command again\n"


def test_plugins_are_listed_with_what_they_bring(
    brings: BringsCommands, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [plugins.BrokenPlugin("lame", "lame 0.1", "ImportError: no leg")]
    monkeypatch.setattr(plugins.installed(), "broken", broken)
    assert call("plugins", "--json") == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["plugins"]["brings"]["brings"]["commands"] == ["fail", "hello"]
    assert answer["plugins"]["gpt_oss"]["is_family"]
    assert not answer["plugins"]["brings"]["is_family"]
    assert "pca" in answer["plugins"]["nexus_core"]["brings"]["selection"]
    assert answer["broken"] == [{"name": "lame", "source": "lame 0.1", "reason": "ImportError: no leg"}]
    assert call("plugins") == 0
    said = capsys.readouterr().out
    assert "lame  lame 0.1  broken\n  ImportError: no leg" in said
    assert "commands   fail, hello" in said


def test_python_m_is_the_same(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nexus_core", "--version"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert __version__ in done.stdout


def test_warnings_begin_as_all_other_lines_do() -> None:
    script = "from nexus_core.cli.output import quieten; quieten(); import logging; "
    script += "logging.getLogger('nexus_core.data').warning('%s is left out', 'x'); logging.getLogger('y').warning('z')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "warning: x is left out\n"
