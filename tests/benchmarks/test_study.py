"""The study of the paper's claims: its plan, its digests, intervals, and its page from results alone. Nothing is trained."""

import dataclasses
import json
import os
import pathlib
import re
import sys

import pytest

from benchmarks.study import __main__ as program
from benchmarks.study import figures, jobs, report
from benchmarks.study.results import Interval, Results, difference, interval, verdict
from benchmarks.study.runs import Study
from benchmarks.study.spec import Run

DECLARED = figures.declare(figures.QUICK)
NVS = DECLARED["5"].panels[0]


@pytest.fixture
def study(tmp_path):
    return Study(figures.QUICK, tmp_path, Results(tmp_path / "results"))


def result_of(study, run, seed, loss, scores=None):
    """Saves a result as a finished run leaves it."""
    entries = {
        name: {"value": value, "corrected": None, "low": value, "high": value, "num": 40}
        for name, value in (scores or {}).items()
    }
    made = {
        "name": run.name,
        "title": run.title,
        "seed": seed,
        "size": "test",
        **study.identity(run, seed),
        "steps": run.steps,
    }
    made |= {
        "curve": {str(run.steps): {"held_out_loss": loss}},
        "evaluations": {},
        "step_seconds": 0.1,
        "machine": "a chip",
    }
    if scores:
        (evaluation,) = study.evaluations(run, None)
        made["evaluations"][evaluation.items] = {
            "protocol": study.protocol(evaluation),
            "scores": entries,
            "seconds": 1,
        }
    study.results.save(made)


def tune(study, run):
    """Results of the trials of a run and of its priors; the second learning rate is the best."""
    if run.prior is not None:
        tune(study, run.prior)
    for trial, loss in zip(study.trials(run), (0.3, 0.2), strict=True):
        result_of(study, trial, 0, loss)


def test_every_run_is_planned_once_and_after_what_it_needs(study):
    planned = jobs.plan(study, DECLARED.values(), range(2))
    keys = [(job.run, job.seed) for job in planned]
    assert len(set(keys)) == len(keys) == len({(run.name, seed) for run, seed in keys})
    for place, job in enumerate(planned):
        needed = [(need.run, need.seed) for need in job.needs]
        assert all(keys.index(key) < place for key in needed)
        assert (job.run.prior is None) or (job.run.prior, job.seed) in needed
        assert {trial.rate for trial, _ in needed if trial.rate} == (set() if job.run.rate else set(study.scale.rates))
    of_5 = jobs.plan(study, [DECLARED["5"]], range(2))
    assert {(job.run, job.seed) for job in of_5} < set(keys)
    assert not any(job.reused for job in planned)


def test_no_two_runs_are_the_same_and_all_settings_are_valid(tmp_path):
    study = Study(figures.DESK, tmp_path, Results(tmp_path))
    runs = {cell.run for figure in figures.declare(figures.DESK).values() for cell in figure.cells()}
    runs |= {run.prior for run in runs if run.prior}
    made = {run: study.identity(dataclasses.replace(run, rate=1e-3, prior=None), 0) for run in runs}
    starts = {(made[run]["digest"], run.prior) for run in runs}
    assert len(starts) == len(runs) > 40


def test_the_digest_is_of_what_matters(study):
    nvs, i2i = NVS.cell(("I2I prior", None)).run, NVS.cell(("I2I prior", None)).run.prior
    assert study.identity(nvs, 0) is None  # no learning rate is chosen
    tune(study, nvs)
    chosen = study.identity(nvs, 0)
    assert chosen["rate"] == figures.QUICK.rates[1]
    assert chosen["prior"] == study.identity(i2i, 0)["digest"]
    assert chosen["settings"]["optimizer.learning_rate"] == figures.QUICK.rates[1]
    assert not any(name.startswith(("checkpoint.", "init_from")) for name in chosen["settings"])
    short = dataclasses.replace(i2i, steps=2, rate=1e-3)
    changed = [{"rate": 2e-3}, {"rate": 1e-3}, {"rate": 2e-3, "steps": 8}, {"rate": 2e-3, "prior": short}]
    made = [study.identity(dataclasses.replace(nvs, **fields), 0)["digest"] for fields in changed]
    assert len({*made, chosen["digest"], study.identity(nvs, 1)["digest"]}) == 6
    command = study.training(nvs, 1)
    assert f"--config.init_from={study.directory(i2i, 1)}" in command
    assert "--config.train.seed=1" in command


def test_a_result_of_other_settings_is_named_and_left_out(study):
    run = NVS.cell(("scratch", None)).run
    tune(study, run)
    result_of(study, run, 0, 0.1)
    path = study.results.path(run.name, 0)
    assert study.result(run, 0)["curve"] == {"4": {"held_out_loss": 0.1}}
    assert study.results.left_out == {}
    changed = json.loads(path.read_text())
    changed["settings"]["model.size"], changed["digest"] = "64x2x2", "0"
    path.write_text(json.dumps(changed))
    assert study.result(run, 0) is None
    assert study.results.left_out == {path.name: "model.size '64x2x2' then, '32x2x2' now"}
    assert study.results.undeclared({run.name}) == [study.results.path(t.name, 0).name for t in study.trials(run)]
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        study.result(run, 0)


def test_a_finished_run_is_reused_until_its_scores_are_of_another_protocol(study):
    run = NVS.cell(("scratch", None)).run
    tune(study, run)
    result_of(study, run, 0, 0.1, {"psnr": 17.0})
    panel = dataclasses.replace(NVS, cells=NVS.cells[:1])
    figure = dataclasses.replace(DECLARED["5"], panels=(panel,))
    assert all(job.idle for job in jobs.plan(study, [figure], [0]))
    assert [job.seed for job in jobs.plan(study, [figure], [0, 1]) if not job.idle] == [1]
    (evaluation,) = study.evaluations(run, None)
    more = dataclasses.replace(evaluation, num=48)
    other = dataclasses.replace(study, scale=dataclasses.replace(study.scale, evaluations={"nvs": (more,)}))
    assert [job.name for job in jobs.plan(other, [figure], [0]) if not job.idle] == ["nvs-from-scratch-4, seed 0"]


def test_a_prior_without_its_run_is_trained_again_for_what_starts_from_it(study):
    run = NVS.cell(("I2I prior", None)).run
    tune(study, run)
    result_of(study, run.prior, 0, 0.1)
    figure = dataclasses.replace(DECLARED["5"], panels=(dataclasses.replace(NVS, cells=NVS.cells[1:2]),))
    left = [(job.run, job.reused) for job in jobs.plan(study, [figure], [0]) if not job.idle]
    assert left == [(run.prior, True), (run, False)]
    (study.directory(run.prior, 0) / "checkpoints" / str(run.prior.steps)).mkdir(parents=True)
    assert [job.run for job in jobs.plan(study, [figure], [0]) if not job.idle] == [run]


def test_intervals_are_students():
    assert interval([1.0, 2.0, 3.0]) == Interval(
        2.0, pytest.approx(-0.4841, abs=1e-4), pytest.approx(4.4841, abs=1e-4), 3
    )
    assert interval([5.0]).mean == 5.0
    assert [str(interval(values)) for values in ([5.0], [1.0, 2.0, 3.0], [100.0, 300.0])] == [
        "5",
        "2.0 ± 2.5",
        "200 ± 1271",
    ]
    gain = difference({0: 1.0, 1: 5.0, 2: 9.0, 7: 0.0}, {0: 0.9, 1: 4.8, 2: 8.9})
    assert gain.mean == pytest.approx(0.4 / 3)
    assert gain.seeds == 3
    assert gain.high - gain.low < 0.3  # the spread over seeds cancels
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_verdicts_know_which_way_is_better():
    up, around = Interval(2.0, 1.0, 3.0, 3), Interval(0.5, -1.0, 2.0, 3)
    assert verdict("psnr", up) == verdict("caption_all", up) == "holds"
    assert verdict("lpips", up) == verdict("held_out_loss", up) == verdict("fd_vgg16", up) == "the opposite holds"
    assert verdict("psnr", around) == "undecided"
    assert verdict("psnr", interval([3.0])) == "one seed: undecided"


def test_the_page_is_written_from_results_alone(study, tmp_path):
    worth = {"scratch": 16.0, "I2I prior": 18.0, "T2I prior": 17.0}
    for cell in NVS.cells:
        tune(study, cell.run)
        for seed, noise in enumerate((0.0, 0.25, -0.25)):
            psnr = worth[cell.line] + noise
            loss = 1 / worth[cell.line]
            result_of(study, cell.run, seed, loss, {"psnr": psnr, "ssim": 0.3, "lpips": 0.3 if seed else 0.2})
    page, out = pathlib.Path(program._PAGE), tmp_path / "page" / "study.md"
    out.parent.mkdir()
    report.write(study, DECLARED, range(3), page, out)
    text = out.read_text()
    assert "| I2I prior | 18.00 ± 0.62 | 0.3000 ± 0.0000 |" in text
    assert "| I2I prior | 2.0000 ± 0.0000 | 0.0000 ± 0.0000 | 0.0000 ± 0.0000 |" in text  # minus scratch, paired
    assert "| views from the I2I prior are better than from scratch | PSNR, dB | 2.0000 ± 0.0000 | holds |" in text
    assert (
        "| views from the I2I prior are better than from the T2I prior | LPIPS | 0.0000 ± 0.0000 | undecided |" in text
    )
    assert "| held-out loss | after 4 steps |" in text
    assert "| views from the I2I prior are better than from scratch | -0.0069 ± 0.0000: holds |" in text
    assert "nvs from scratch 0.001: 0.3000, 0.002: 0.2000 (taken: 0.002)" in text
    assert text.count("Not run yet.") == len(DECLARED) - 1
    again = tmp_path / "page" / "again.md"
    report.write(study, DECLARED, range(3), out, again)
    assert again.read_text() == text
    with pytest.raises(ValueError, match="has no place for figure 5"):
        report.write(study, DECLARED, range(3), _empty(tmp_path / "empty.md"), out)


def _empty(path):
    path.write_text("")
    return path


def test_a_failed_run_leaves_out_what_needs_it_and_others_go_on(tmp_path, capfd):
    first, second = (Run(title, "", "", 1, rate=1.0) for title in ("bad", "good"))
    bad, good = jobs.Job(first, 0), jobs.Job(second, 0)
    after = jobs.Job(dataclasses.replace(second, title="after"), 0, needs=[bad, good])
    pool, cores = jobs.Pool(jobs.lanes(2), tmp_path), []

    def work(job):
        code = "import os, sys; print(len(os.sched_getaffinity(0))); sys.exit({})"
        pool.call(job.run.title, [sys.executable, "-c", code.format(3 if job is bad else 0)])
        cores.append((tmp_path / f"{job.run.title}.log").read_text())

    pool.run([bad, good, after], work)
    assert [job.state for job in (bad, good, after)] == ["failed", "done", "failed"]
    printed = capfd.readouterr().out
    assert f"FAILED bad-1-rate-1, seed 0: exit code 3: 1 ({tmp_path / 'bad.log'})" in printed
    assert "LEFT OUT after-1-rate-1, seed 0" in printed
    assert cores == ["1\n"]


def test_lanes_share_the_cores_out():
    own = sorted(os.sched_getaffinity(0))
    assert [core for cores in jobs.lanes(0) for core in cores] == own
    assert jobs.lanes(1) == [own]
    assert [len(cores) for cores in jobs.lanes(len(own) + 2)] == [1] * (len(own) + 2)


def test_the_command_prints_its_plan(tmp_path, capsys):
    assert program.main(["--figure=2d", f"--workdir={tmp_path}", "--quick", "--plan", "--seeds=1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^nvs-from-t2i-4 +4 +1 +[\d.]+  0$", printed, re.MULTILINE)
    assert "0 reused" in printed
    assert program.main(["--figure=3", "--plan"]) == 2
