"""Apache Beam: DaskRunner with worker processes gives the bytes of a run without an engine."""

import hashlib

import pytest

from lumos_jax.preparation import engines, plan, scan, settings
from tests.preparation import collections_of as made

pytest.importorskip("apache_beam")


@pytest.mark.filterwarnings("ignore")  # of Beam and Dask
def test_beam_on_a_dask_cluster_of_two_processes(tmp_path):
    photos = [made.photo(number) for number in range(4)]
    for number, data in enumerate(photos):
        (tmp_path / f"{number}.tar").write_bytes(made.tar([(f"{number}.jpg", data), ("broken.jpg", data[:700])]))
    source = settings.Source(kind="tars", path=str(tmp_path))
    digests = []
    for name, how in (("alone", engines.Execution()), ("dask", engines.Execution(workers=2, runner="DaskRunner"))):
        out = tmp_path / name
        planned = plan.make(str(out), settings.Prepare(sources=(source,), task_bytes=1), lambda _: None)
        engines.run(scan.run_task, str(out), scan.tasks(planned), how, lambda: 0, "scan")
        digests.append([one.sha256 for one in scan.finish(str(out))])
        assert digests[-1] == [
            hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("scan/*.parquet"))
        ]
    assert digests[0] == digests[1]


def test_flags_of_other_runners_reach_beam():
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    for runner in ("DataflowRunner", "FlinkRunner", "SparkRunner"):
        with engines.flags(engines.Execution(runner=runner, beam=("--region=us-east1", "--num_workers=7"))) as flags:
            options = PipelineOptions(flags)
        assert options.view_as(StandardOptions).runner == runner
        assert options.get_all_options()["region"] == "us-east1"
    for how, message in (
        ({"beam": ("--region=x",)}, "Beam's flags go with --runner"),
        ({"runner": "Dask"}, "is not one of DirectRunner, DaskRunner"),
        ({"runner": "SparkRunner", "processes": 2}, "leave out --processes"),
    ):
        with pytest.raises(ValueError, match=message):
            engines.Execution(**how)
