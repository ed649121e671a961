"""Programs of ours without the seconds that each spends on its imports: a process that has imported what they need and computed
nothing forks one for each line that it reads. They are processes like any other, and are killed like any other."""

import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import time

from tests import compiled

ROOT = pathlib.Path(__file__).parent.parent


class Fork:
    """A process that a server started, with the methods of Popen that tests use; stdout and stderr are one."""

    def __init__(self, pid, output):
        self.pid, self.path = pid, output
        self._code = output.with_suffix(".code")

    def output(self):
        return self.path.read_text()

    def poll(self):
        """The exit code, negative for a signal; None while it runs."""
        return int(self._code.read_text()) if self._code.exists() else None

    returncode = property(poll)

    def wait(self, timeout=None):
        until = time.monotonic() + (timeout or 900)
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, self.output())
            time.sleep(0.02)
        return code

    def communicate(self, timeout=None):
        self.wait(timeout)
        return self.output(), None

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Server:
    """Starts `python -m module arguments` in forks; the environment is that of the server but for _OWN."""

    def __init__(self, environment):
        self.environment, self.count = environment, 0
        self.directory = tempfile.TemporaryDirectory(prefix="lumos_jax_forks_")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"], env=environment, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, module, arguments, own):
        self.count += 1
        output = pathlib.Path(self.directory.name) / f"{self.count}.txt"
        output.touch()
        asked = {"module": module, "arguments": arguments, "environment": own, "output": str(output)}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return Fork(int(self.process.stdout.readline()), output)

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.directory.cleanup()


_servers = []
_OWN = ("XLA_FLAGS", "PYTHONPATH", "TMPDIR")  # read after the fork; XLA_FLAGS when JAX looks for devices


def start(args, env, cwd):
    """A Fork for `python -m ...` in the repository, of a server for its environment; None for other commands."""
    if list(args[:2]) != [sys.executable, "-m"] or pathlib.Path(cwd) != ROOT:
        return None
    server = next((server for server in _servers if _of_run(env) == _of_run(server.environment)), None)
    if server is None:
        server = Server(env)
        _servers.append(server)
    return server.start(args[2], args[3:], {name: env[name] for name in _OWN if name in env})


def _of_run(environment):
    return {name: value for name, value in environment.items() if not name.startswith((*_OWN, "PYTEST_"))}


def close():
    while _servers:
        _servers.pop().close()


def run(asked):
    """In the fork: what `python -m` does."""
    file = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(0)
    os.environ.update(asked["environment"])
    tempfile.tempdir = None  # it is looked for again
    sys.path += os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = [asked["module"], *asked["arguments"]]
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)


def serve():
    # All that the programs import, but not those that define flags: they do so again as __main__.
    from lumos_jax import cli, evaluation  # noqa: F401
    from lumos_jax.preparation import cache  # noqa: F401
    from lumos_jax.train import loop  # noqa: F401

    compiled.write_whole()
    compiled.keep_what_all_compile()
    compiled.collect_rarely()
    running = {}

    def ended(*_):
        while running:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:  # a signal came in between, and all is done
                return
            if not pid:
                return
            partial = running[pid].with_suffix(".partial")
            partial.write_text(str(os.waitstatus_to_exitcode(status)))
            partial.rename(running.pop(pid).with_suffix(".code"))

    for line in sys.stdin:
        asked = json.loads(line)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pid = os.fork()
        if not pid:
            run(asked)
            sys.exit(0)
        running[pid] = pathlib.Path(asked["output"])
        signal.signal(signal.SIGCHLD, ended)
        ended()
        print(pid, flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
