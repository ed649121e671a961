"""What a job does: it trains its run, keeps what was measured on the way, and scores samples of the end."""

from __future__ import annotations

import datetime
import fcntl
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from benchmarks.study.jobs import Job, Pool
from benchmarks.study.results import Result
from benchmarks.study.runs import Study, key_of, uses
from benchmarks.study.spec import Evaluation
from lumos_jax import config, fileio
from lumos_jax.config import io as config_io

_MEASURED = ("held_out_", "score_")  # names in metrics.jsonl that are kept


class Worker:
    """Does the jobs of a study. See `__call__`."""

    def __init__(self, study: Study, pool: Pool):
        self.study, self.pool = study, pool
        self._references: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def __call__(self, job: Job) -> None:
        """Trains and scores what is missing. Raises RuntimeError if a program fails."""
        study, run, seed = self.study, job.run, job.seed
        result = study.result(run, seed)
        missing = [one for one in job.evaluations if not study.scored(result, one)]
        if not study.trained(run, seed) and (result is None or missing or job.weights):
            print(f"trains   {job.name}: {run.steps} steps, learning rate {study.rate(run):g}", flush=True)
            self._train(job)
        if result is None:
            result = self._result(job)
            study.results.save(result)
        if missing:
            print(f"scores   {job.name}: {', '.join(map(key_of, missing))}", flush=True)
            self._score(job, result, missing)
        loss = result["curve"][str(run.steps)].get("held_out_loss")
        print(f"finished {job.name}: held-out loss {loss:.4f}", flush=True)

    def _train(self, job: Job) -> None:
        """Trains or continues; `seconds.txt` has the sum, also of a run that was stopped."""
        study, run, seed = self.study, job.run, job.seed
        _wait_for(study.directory(run, seed) / "lock")
        path, began = study.directory(run, seed) / "seconds.txt", time.monotonic()
        before = float(path.read_text()) if path.exists() else 0.0
        try:
            self.pool.call(f"{run.name}-seed{seed}", study.training(run, seed))
        finally:
            fileio.write_whole(path, f"{before + time.monotonic() - began}\n")

    def _result(self, job: Job) -> Result:
        """What is kept of a trained run, without scores of samples.

        name, title (of Run), seed, size; digest, settings, prior (of Study.identity); steps, rate (learning rate); curve
        (step -> what was measured of held-out records); evaluations (name -> protocol, scores, seconds); step_seconds
        (median), seconds (of the program), machine, cores, versions, date.
        """
        study, directory = self.study, self.study.directory(job.run, job.seed)
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        curve: dict[str, dict[str, float]] = {}
        for line in lines:
            measured = {name: round(value, 6) for name, value in line.items() if name.startswith(_MEASURED)}
            if measured:
                curve.setdefault(str(line["step"]), {}).update(measured)
        identity = study.identity(job.run, job.seed)
        steps = [line["step_seconds"] for line in lines if "step_seconds" in line]
        seconds = directory / "seconds.txt"
        return {
            "name": job.run.name, "title": job.run.title, "seed": job.seed, "size": study.scale.size, **identity,
            "steps": job.run.steps,
            "curve": curve, "evaluations": {}, "step_seconds": round(statistics.median(steps), 4),
            "seconds": round(float(seconds.read_text())) if seconds.exists() else None,
            "machine": machine(), "cores": len(self.pool.lanes[0]), "versions": versions(),
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip

    def _score(self, job: Job, result: Result, missing: list[Evaluation]) -> None:
        """Adds these evaluations to the result, and saves it. One process makes them all: it starts and compiles once."""
        study, directory = self.study, self.study.directory(job.run, job.seed)
        data = config_io.load(directory / "config.json").data
        outs = {one: directory / "evaluations" / key_of(one).replace(", ", "-").replace(" ", "-") for one in missing}
        commands = []
        for evaluation, out in outs.items():
            shutil.rmtree(out, ignore_errors=True)  # of another protocol, or incomplete
            commands += [self._sample(directory, evaluation, out), self._metrics(evaluation, out, data)]
        began = time.monotonic()
        scoring = [sys.executable, "-m", "benchmarks.study.scoring", json.dumps(commands)]
        self.pool.call(f"{job.run.name}-seed{job.seed}", scoring)
        seconds = (time.monotonic() - began) / len(missing)
        for evaluation, out in outs.items():
            found = json.loads((out / "scores.json").read_text(encoding="utf-8"))["scores"]
            result["evaluations"][key_of(evaluation)] = {
                "protocol": study.protocol(evaluation),
                "scores": {entry["metric"]: _kept(entry) for entry in found.values()},
                "seconds": round(seconds),
            }
        study.results.save(result)

    def _sample(self, directory: pathlib.Path, evaluation: Evaluation, out: pathlib.Path) -> list[str]:
        chosen = evaluation.items if evaluation.num else str(self.study.prompts(evaluation))
        command = ["sample", f"--workdir={directory}", f"--set={chosen}", f"--out={out}"]
        command += [f"--num={evaluation.num}"] if evaluation.num else []
        command += [f"--frames={evaluation.frames}", f"--stride={evaluation.stride}"] if evaluation.frames else []
        return command + ([] if evaluation.guidance is None else [f"--guidance={evaluation.guidance:g}"])

    def _metrics(self, evaluation: Evaluation, out: pathlib.Path, data: config.Data) -> list[str]:
        command = ["score", f"--samples={out}", f"--metrics={','.join(evaluation.metrics)}"]
        networks = [network for network in self.study.scale.references if uses(evaluation, network)]
        return command + [f"--reference={self._reference(network, evaluation, data)}" for network in networks]

    def _reference(self, network: str, evaluation: Evaluation, data: config.Data) -> pathlib.Path:
        """Statistics of true scenes, made once for all runs."""
        num = self.study.scale.references[network]
        clips = {"frames": evaluation.frames, "stride": evaluation.stride, "motion": data.scenes.motion}
        chosen = {"num": num, "image-size": data.image_size, "network": network} | (clips if evaluation.frames else {})
        path = self.study.workdir / "references" / f"{'-'.join(map(str, chosen.values()))}.npz"
        with self._guard:
            lock = self._references.setdefault(str(path), threading.Lock())
        with lock:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                print(f"makes    {path}", flush=True)
                flags = [f"--{name}={value}" for name, value in (chosen | {"out": path}).items()]
                command = ["statistics", "--source=scenes", *flags]
                self.pool.call(path.stem, [sys.executable, "-m", "lumos_jax.evaluate", *command])
        return path


def _wait_for(lock: pathlib.Path) -> None:
    """Until no other process trains there: a study that was killed leaves its programs running."""
    while lock.exists():
        with open(lock, "rb+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                time.sleep(1.0)


def _kept(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("value", "corrected", "low", "high", "num", "categories") if name in entry}


@functools.cache
def machine() -> str:
    """The make of the processor, or the accelerator, that programs compute on."""
    if os.environ.get("JAX_PLATFORMS", "cpu") != "cpu":
        # Another process, as one that has seen an accelerator may keep it from others.
        probe = [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"]
        return subprocess.check_output(probe, text=True).splitlines()[-1]
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide numbers."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"python": platform.python_version()} | found
