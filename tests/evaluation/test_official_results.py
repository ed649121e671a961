"""Results of official scorers."""

import json

import numpy as np
import pytest

from lumos_jax.evaluation import official_results
from lumos_jax.evaluation.lists import Item, make_list


def write(path, items, correct):
    lines = [
        json.dumps(
            {"filename": f"out/{item.group}/samples/{item.id[-4:]}.png", "tag": item.extra["tag"], "correct": bool(c)}
        )
        for item, c in zip(items, correct, strict=True)
    ]
    path.write_text("\n".join(lines[::-1]) + "\n")  # in any order
    return path


def test_geneval_is_the_mean_of_its_categories(tmp_path):
    items = make_list("scenes-geneval").items
    tags = np.array([item.extra["tag"] for item in items])
    correct = np.random.default_rng(0).random(len(items)) < np.where(tags == "position", 0.1, 0.8)
    estimate = official_results.geneval(write(tmp_path / "results.jsonl", items, correct), items)
    assert estimate.value == pytest.approx(np.mean([correct[tags == tag].mean() for tag in set(tags)]))
    assert estimate.low < estimate.value < estimate.high < estimate.low + 0.06


DPG = """out/a.png, 1.0, 0.5, 0.0, 0.25, 0.4375
out/b, c.png, 0.75, 1.0, 1.0, 8.3e-05, 0.68752075
Model: out
L1 category scores:
\tentity: 71.2, 3
DPG-Bench score: 56.251
"""


def test_dpg_is_the_mean_of_its_prompts(tmp_path):
    items = [Item(f"{prompt}/{k:04d}", group=prompt) for prompt in ("b, c", "a") for k in range(4)]
    (tmp_path / "results.txt").write_text(DPG)
    estimate = official_results.dpg(tmp_path / "results.txt", items)
    assert estimate.value == pytest.approx(56.251, abs=1e-3)  # as the file says
    assert estimate.kind == "clusters"
    np.testing.assert_allclose(estimate.basis["values"], [75, 100, 100, 0.0083, 100, 50, 0, 25])
    with pytest.raises(ValueError, match="4 are in one of the two alone, as a/0000"):
        official_results.dpg(tmp_path / "results.txt", items[:4])
    (tmp_path / "results.txt").write_text("out/a.png, 1.0, 1.0\n")
    with pytest.raises(ValueError, match="run it with --pic-num=4"):
        official_results.dpg(tmp_path / "results.txt", items)


def test_results_of_other_samples_are_refused(tmp_path):
    items = make_list("scenes-geneval").items[:8]
    path = write(tmp_path / "results.jsonl", items[:-1], np.ones(7))
    with pytest.raises(ValueError, match="1 are in one of the two alone, as 00001/0003"):
        official_results.geneval(path, items)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"no results\.jsonl of GenEval: KeyError: 'filename'"):
        official_results.geneval(path, items)
