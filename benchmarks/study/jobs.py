"""The runs of a study in the order of what they need, several at a time, each on cores of its own."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence

from benchmarks.study.runs import Study
from benchmarks.study.spec import Evaluation, Figure, Run


@dataclasses.dataclass
class Job:
    """A run of one seed: training, then what is missing of its evaluations.

    Attributes:
      evaluations: that figures show.
      needs: jobs that must be done first.
      reused: whether its result and all scores are there.
      weights: whether a job that is not reused starts from it.
      state: waiting, running, done or failed.
    """

    run: Run
    seed: int
    evaluations: list[Evaluation] = dataclasses.field(default_factory=list)
    needs: list[Job] = dataclasses.field(default_factory=list)
    reused: bool = False
    weights: bool = False
    state: str = "waiting"

    @property
    def name(self) -> str:
        return f"{self.run.name}, seed {self.seed}"

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return self.reused and not self.weights


def plan(study: Study, figures: Iterable[Figure], seeds: Sequence[int]) -> list[Job]:
    """Every run that the figures show, once, after what it needs."""
    jobs: dict[tuple[Run, int], Job] = {}

    def add(run: Run, seed: int) -> Job:
        if (run, seed) not in jobs:
            trials = [] if run.rate is not None else [add(trial, 0) for trial in study.trials(run)]
            prior = [] if run.prior is None else [add(run.prior, seed)]
            jobs[run, seed] = Job(run, seed, needs=trials + prior)
        return jobs[run, seed]

    for figure in figures:  # one is complete before the next begins
        for seed in seeds:
            for cell in figure.cells():
                job = add(cell.run, seed)
                wanted = study.evaluations(cell.run, cell.guidance)
                job.evaluations += [one for one in wanted if one not in job.evaluations]
    for job in jobs.values():
        result = study.result(job.run, job.seed)
        job.reused = result is not None and all(study.scored(result, one) for one in job.evaluations)
    for job in reversed(jobs.values()):  # the later ones need the earlier
        if not job.idle and job.run.prior is not None:
            prior = jobs[job.run.prior, job.seed]
            prior.weights = not (prior.reused and study.trained(prior.run, prior.seed))
    return list(jobs.values())


@dataclasses.dataclass
class Pool:
    """Runs jobs on lanes of cores, and programs for them, each in a process that its lane's cores are left to.

    logs: where programs write what they print.
    """

    lanes: Sequence[Sequence[int]]
    logs: pathlib.Path
    _changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)
    _running: set[subprocess.Popen] = dataclasses.field(default_factory=set)
    _stopped: bool = False

    def run(self, jobs: Sequence[Job], work: Callable[[Job], None]) -> None:
        """Runs `work` for each job that is not idle, after what it needs. A job whose work raises has failed, and what needs it
        fails with it; others go on. KeyboardInterrupt and SIGTERM stop programs, which save, and are raised."""
        for job in jobs:
            job.state = "done" if job.idle else "waiting"

        def lane(cores: Sequence[int]) -> None:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, cores)  # of this thread, and of the processes that it starts
            while (job := self._take(jobs)) is not None:
                try:
                    work(job)
                    job.state = "done"
                except Exception as error:  # noqa: BLE001 (reported; other jobs go on)
                    job.state = "failed"
                    if not self._stopped:
                        print(f"FAILED {job.name}: {error or type(error).__name__}", flush=True)
                with self._changed:
                    self._changed.notify_all()

        threads = [threading.Thread(target=lane, args=(cores,)) for cores in self.lanes]
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            self._stop()
            for thread in threads:
                thread.join()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    def _take(self, jobs: Sequence[Job]) -> Job | None:
        """The first job that can start; None when none is left."""
        with self._changed:
            while not self._stopped:
                for job in jobs:
                    if job.state == "waiting" and any(need.state == "failed" for need in job.needs):
                        job.state = "failed"
                        print(f"LEFT OUT {job.name}: what it needs has failed", flush=True)
                ready = (j for j in jobs if j.state == "waiting" and all(need.state == "done" for need in j.needs))
                if (job := next(ready, None)) is not None:
                    job.state = "running"
                    return job
                if not any(job.state == "running" for job in jobs):
                    return None
                self._changed.wait()
        return None

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            for process in self._running:
                process.send_signal(signal.SIGTERM)
            self._changed.notify_all()

    def call(self, name: str, command: Sequence[str]) -> None:
        """Runs a program to its end. Raises RuntimeError, which names its log, if it fails."""
        log = self.logs / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            with self._changed:
                if self._stopped:
                    raise RuntimeError("stopped")
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
                self._running.add(process)
            code = process.wait()
        with self._changed:
            self._running.remove(process)
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
            raise RuntimeError(f"exit code {code}: {lines[-1]} ({log})")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def lanes(count: int) -> list[list[int]]:
    """The cores of this process, in `count` groups; more groups than cores share them. 0: a core a group, at most 16."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    count = count or min(len(cores), 16)
    if count > len(cores):
        return [[cores[i % len(cores)]] for i in range(count)]
    return [cores[i * len(cores) // count : (i + 1) * len(cores) // count] for i in range(count)]
