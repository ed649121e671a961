"""From tars, archives, tables and folders to a training run: the verbs of preparation, its report, and steps on the result."""

import html.parser

import numpy as np
import pytest
from PIL import Image

from benchmarks import prepare_corpus, prepare_quality
from configs import i2i
from lumos_jax.config import io as config_io
from lumos_jax.data.manifest import read_manifest
from lumos_jax.train import loop
from tests.running import finish, metrics, on_one_device, start

COUNT = 160


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Seven layouts with planted duplicates, evaluation images and broken files; no photographs."""
    folder = tmp_path_factory.mktemp("corpus")
    prepare_corpus.build(folder, COUNT, file_images=12)
    return folder


@pytest.fixture(scope="module")
def prepared(corpus, program, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    file = out / "config.py"
    file.write_text(prepare_quality.config(corpus, 4))
    finish(start(program("lumos_jax.prepare", "all", f"--config={file}", f"--out={out}/set")))
    return out / "set"


def test_what_was_planted_has_its_outcome(corpus, prepared):
    quality = prepare_quality.measure(corpus, prepared)
    assert quality.unseen == 0
    assert sum(quality.total.values()) == COUNT
    for role in ("exact", "near", "evaluation", "broken", "scores", "shape", "distinct"):
        assert any(key[0] == role for key in quality.total)
        assert quality.share_wrong(role) == 0, "\n".join(quality.lines())


class Images(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.found.add(dict(attrs)["src"])


def test_the_report_shows_what_was_kept_and_why_not(prepared):
    page = (prepared / "report/index.html").read_text()
    manifest = read_manifest(str(prepared))
    assert f"{manifest.records:,}</b><span>kept" in page
    shown = Images(page).found
    assert len(shown) > 20
    for name in shown:
        with Image.open(prepared / "report" / name) as image:
            assert max(image.size) <= 192
            assert np.asarray(image).std() > 0
    for reason in ("undecodable", "ratio", "near duplicate"):
        assert reason in page


def test_a_run_trains_on_it(prepared, tmp_path):
    tree = i2i.get_config("test").to_dict()
    tree["data"] |= {"source": "prepared", "path": str(prepared), "holdout": 8}
    tree["train"]["steps"], tree["optimizer"]["warmup_steps"] = 2, 0
    tree["eval"]["every"] = 0
    with on_one_device():
        assert loop.train(loop.prepare(config_io.from_dict(tree), str(tmp_path))) == 0
    assert [line["corrupt_records"] for line in metrics(tmp_path)] == [0]
