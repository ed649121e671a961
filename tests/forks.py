"""Training processes without the seconds that each spends on its imports: a process that has imported everything and computed
nothing forks one for each line it reads. They are processes like any other, and are killed like any other."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent


class Fork:
    """A process that Forks started: its pid, and what it printed and how it ended, when it has."""

    def __init__(self, pid, output):
        self.pid, self.path = pid, output
        self._code = output.with_suffix(".code")

    def output(self):
        return self.path.read_text()

    def poll(self):
        """The exit code, negative for a signal; None while it runs."""
        return int(self._code.read_text()) if self._code.exists() else None

    def wait(self, timeout):
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(self.output())
            time.sleep(0.02)
        return code

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Forks:
    def __init__(self, environment, directory):
        self.directory, self.count = directory, 0
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"], env=environment, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, arguments):
        """python -m lumos_jax.main with these arguments."""
        self.count += 1
        output = self.directory / f"{self.count}.txt"
        print(json.dumps({"arguments": arguments, "output": str(output)}), file=self.server.stdin, flush=True)
        return Fork(int(self.server.stdout.readline()), output)

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


def keep_what_all_compile():
    """JAX lets process 0 alone write to the compilation cache. On CPU each process looks for entries of its own, as they hold
    its devices: process 1 would compile everything anew at each start."""
    from jax._src import compiler, distributed

    write, state = compiler._cache_write, distributed.global_state

    def write_own(*entry):
        own, state.process_id = state.process_id, 0
        try:
            write(*entry)
        finally:
            state.process_id = own

    compiler._cache_write = write_own


def serve():
    from lumos_jax import cli, main
    from lumos_jax.train import loop  # noqa: F401 (what main imports later)

    keep_what_all_compile()
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
            file = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.close(0)
            sys.argv = ["lumos_jax.main", *asked["arguments"]]  # config_flags reads them there
            cli.run(main.main, main.__doc__, required=("config", "workdir"))
        running[pid] = pathlib.Path(asked["output"])
        signal.signal(signal.SIGCHLD, ended)
        ended()
        print(pid, flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
