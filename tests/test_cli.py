"""Mistakes on the command line: one line on stderr and exit code 2, whatever the program."""

import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from lumos_jax import cli, convert, sample

BROKEN = {
    "name.py": "def get_config(size=''):\n    return nothing\n",
    "syntax.py": "def get_config(:\n",
    "absent.py": "x = 1\n",
    "none.py": "def get_config(size=''):\n    pass\n",
}
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
GOOD = ["--config=configs/i2i.py:test", "--workdir=x"]


@pytest.fixture
def run(monkeypatch, capsys):
    """(main, *arguments) -> (exit code, lines on stderr) of cli.run."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(cli.cluster, "end", sys.exit)
    monkeypatch.chdir(pathlib.Path(__file__).parent.parent)

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.run(main, "What it does.", required=("config", "workdir"))
        return stop.value.code, capsys.readouterr().err.splitlines()

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*GOOD, "--confg=x"], "confg"),
        ([*GOOD, "--config.data.pth=x"], "unknown field pth in --config.data.pth=x"),
        ([*GOOD, "--config.data.records=40"], "this field is config.data.scenes.num_scenes now"),
        ([*GOOD, "--config.video.sample_fps=4"], "this field is gone: give `lumos_jax.sample --fps`"),
        ([*GOOD, "--config.data.threads=2"], "this field is gone: it follows from data.workers; see docs/settings.md"),
        ([*GOOD, "--config.model.width=64"], "this field is config.model.size now"),
        ([*GOOD, "--config.dat.path=x"], "unknown field dat in --config.dat.path=x"),
        ([*GOOD, "--config.train.steps=1e3"], "--config.train.steps=1e3"),
        ([*GOOD, "--config.train.steps"], "--config.train.steps"),
        ([*GOOD, "--config.data=1"], "--config.data=1"),
        (["--config=configs/i2i.py:tes", "--workdir=x"], "there is no size 'tes'"),
        (["--config=configs/nope.py", "--workdir=x"], "No such file or directory: 'configs/nope.py'"),
        (["--config=configs", "--workdir=x"], "Is a directory"),
        (["--workdir=x"], "missing --config"),
        (GOOD[:1], "missing --workdir"),
        *((["--config={broken}/" + name, "--workdir=x"], name.removesuffix(".py")) for name in BROKEN),
    ],
)
def test_wrong_flags_are_one_line_and_code_2(run, tmp_path, arguments, message):
    for name, text in BROKEN.items():
        (tmp_path / name).write_text(text)
    code, lines = run(lambda: pytest.fail("the flags are wrong"), *(a.format(broken=tmp_path) for a in arguments))
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("error: ")
    if message not in ("name", "absent", "none"):
        assert message in lines[0]


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("what"), 2), (OSError(5, "what"), 1), (LookupError("what"), 1), (KeyboardInterrupt(), 130)],
)
def test_errors_of_a_program_are_one_line(run, error, code):
    def main():
        with cli.errors(LookupError):
            raise error

    got, lines = run(main, *GOOD)
    assert (got, len(lines)) == (code, 1)


# Ctrl-C in a callback of the garbage collector, where Python ignores what is raised. JAX has such a callback.
_LOST = """
import gc, signal, sys, time
from lumos_jax import cli

def callback(phase, info):
    gc.callbacks.remove(callback)
    signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored

def work():
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(60)

sys.exit(cli.call(work))
"""


def test_an_interrupt_in_a_callback_is_not_lost():
    ended = subprocess.run([sys.executable, "-c", _LOST], capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stderr) == (130, "error: interrupted\n")


def test_faults_keep_their_traceback_and_codes_pass(run):
    def fault():
        raise ValueError("a fault of ours")  # not within cli.errors

    code, lines = run(fault, *GOOD)
    assert code == 1
    assert lines[0].startswith("Traceback")
    assert run(lambda: 3, *GOOD) == (3, [])
    assert run(lambda: None, *GOOD) == (0, [])


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (sample.main, []),
        (sample.main, ["--workdir=/nowhere", "--nonsense"]),
        (sample.main, ["--workdir=/nowhere", "--num=many"]),
        (convert.main, []),
        (convert.main, ["transmogrify"]),
        (convert.main, ["export", "--workdir=/nowhere"]),
    ],
)
def test_other_programs_say_it_in_one_line_too(capsys, main, arguments):
    assert cli.call(lambda: main(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
