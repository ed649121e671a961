"""README and docs/ against the code: links, paths, settings and commands that they name exist."""

import dataclasses
import pathlib
import re
import tomllib

import pytest

from lumos_jax import config
from lumos_jax.config import documentation

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUPS = [field.name for field in dataclasses.fields(config.Settings)]
# Paths below these folders are meant to exist; others (runs/desk, /data/photos) are examples.
FOLDERS = ("lumos_jax", "configs", "launch", "benchmarks", "tests", "docs")


SETTINGS = documentation.settings()


def names_setting(dotted: str) -> bool:
    """Whether it is a setting, `group.field`, or a group."""
    return any(f"{name}.".startswith(f"{dotted}.") for name in SETTINGS)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_readme_links_every_page_of_docs():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    pattern = rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w*]"
    missing = [path for path in re.findall(pattern, page.read_text()) if not any(ROOT.glob(path))]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_exist(page):
    names = re.findall(r"python -m ((?:lumos_jax|benchmarks)[\w.]+)", page.read_text())
    paths = {name: ROOT / name.replace(".", "/") for name in names}
    assert not [
        n for n, path in paths.items() if not any(p.is_file() for p in (path.with_suffix(".py"), path / "__main__.py"))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_exist(page):
    text = page.read_text()
    named = re.findall(r"--config\.([a-z_]+(?:\.\w+)*)", text)
    # Also `group.field` without the flag, as in `data.crop` or `optimizer.name=muon`.
    named += re.findall(rf"`((?:{'|'.join(GROUPS)})\.[a-z]\w*(?:\.\w+)*)(?=[`= ])", text)
    unknown = {name for name in named if not names_setting(name) and not (ROOT / "configs" / name).exists()}
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_extras_exist(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"pip install '\.\[(\w[\w-]*)\]'", page.read_text())
    assert set(named) <= set(extras)


def test_the_tests_install_the_extra_video():
    """Stated twice: pip cannot read an extra of pyproject.toml into a requirements file without installing the package."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = {line.split("#")[0].strip() for line in (ROOT / "requirements-test.txt").read_text().splitlines()}
    assert set(extras["video"]) <= lines
