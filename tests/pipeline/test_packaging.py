"""The wheel and the source archive hold what mxq needs, and the wheel works without the clone."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def known_files(*folders):
    """Names of the files that git knows and that are there."""
    git = ["git", "ls-files", *folders]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source archive, made in a copy of the files that git knows."""
    copy, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in known_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    for kind in ("build_wheel", "build_sdist"):
        build = f"from setuptools.build_meta import {kind}; {kind}({str(dist)!r})"
        subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, check=True)
    return next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))


def test_wheel_and_archive_hold_every_file_of_the_package(built):
    wheel, archive = built
    wanted = known_files("mxq")
    assert len(wanted) > 150
    with zipfile.ZipFile(wheel) as file:
        assert wanted <= set(file.namelist())
        assert not [name for name in file.namelist() if name.startswith(("tests", "benchmarks"))]
    with tarfile.open(archive) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert wanted | {"README.md", "LICENSE", "pyproject.toml"} <= inside


def test_the_wheel_alone_gives_a_working_command(built, tmp_path):
    target = tmp_path / "site"
    install = [*("-m", "pip", "install", "--no-deps", "--no-index"), "--target", target, built[0]]
    subprocess.run([sys.executable, *install], capture_output=True, check=True)

    def python(*arguments, status=0):
        run = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(target)},
            capture_output=True,
            text=True,
        )
        assert run.returncode == status, run.stderr[-2000:]
        return run.stdout

    assert python("-c", "import mxq; print(mxq.__file__)").startswith(str(target))
    mxq, plan = target / "bin" / "mxq", "uniform:w4a16_g64_sym"
    small = ("--samples", "8", "--seqlen", "32")
    assert "Written to" in python(mxq, "quantize", "demo", "--plan", plan, *small, "-o", "out")
    # What is no Python in the package: the rules of an engine, the parts of a page.
    assert "Nothing was run in" in python(mxq, "check", "out", "--engine", "vllm", status=1)
    python(mxq, "report", "out")
    assert (tmp_path / "out" / "report.html").stat().st_size > 1_000_000
