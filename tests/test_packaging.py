"""The wheel and the source distribution: what is in them, and that they work outside the clone."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import featcache

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
VERSION = featcache.__version__
BUILD = """
import os, sys
import hatchling.build
os.chdir(sys.argv[1])
print(getattr(hatchling.build, "build_" + sys.argv[2])(sys.argv[3]))
"""
# What a checkout of the library holds besides code that can be imported.
DATA = {
    "py.typed",
    *(f"reporting/{name}.html.j2" for name in ("page", "sheet", "errors", "neighbours")),
    "reporting/page.css",
    "reporting/map.js",
    *(
        f"serving/{name}"
        for name in ("page.html", "page.js", "page.css", "docs.html", "docs.js", "common.js")
    ),
    *(f"serving/label.{kind}" for kind in ("html", "js")),
    "serving/openapi.json",
    "backbones/resnet18-tinyimagenet32.safetensors",
}


def run(*command, **options):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(what, root, folder):
    """Build a wheel or an sdist of a tree with the backend that pyproject.toml names."""
    folder.mkdir(exist_ok=True)
    return folder / run(sys.executable, "-c", BUILD, root, what, folder).splitlines()[-1]


def contents(wheel):
    """Return the bytes of every file in a wheel but its own record."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if "RECORD" not in name}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    return build("wheel", ROOT, folder), build("sdist", ROOT, folder)


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    """The sdist as somebody who downloads it has it."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built[1]) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    return folder / f"featcache-{VERSION}"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An environment with the wheel in it, and this one's dependencies beside.

    The dependencies are lent by a path: gigabytes need not be installed again. A path that is added
    so has its own ``.pth`` files left alone, so that the clone is not found through them.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", built[0])
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    lent = [path for path in sys.path if path.endswith("site-packages")]
    Path(packages, "lent.pth").write_text("\n".join(lent) + "\n")
    return folder / "bin"


def test_a_wheel_holds_the_package_and_nothing_else(built):
    names = set(contents(built[0]))
    info = f"featcache-{VERSION}.dist-info/"
    package = {name[len("featcache/") :] for name in names if not name.startswith(info)}
    assert all(name.startswith(("featcache/", info)) for name in names)
    assert package >= DATA
    expected = {
        path.relative_to(ROOT / "featcache").as_posix()
        for path in (ROOT / "featcache").rglob("*.py")
    }
    assert {name for name in package if name.endswith(".py")} == expected
    odd = {name for name in package if name.endswith((".h5", ".pyc", ".part", ".npz"))}
    assert not odd
    assert f"{info}licenses/LICENSE" in names and f"{info}entry_points.txt" in names


def test_what_a_wheel_says_of_itself(built):
    facts = email.message_from_bytes(
        contents(built[0])[f"featcache-{VERSION}.dist-info/METADATA"],
    )
    assert (facts["Name"], facts["Version"]) == ("featcache", VERSION)
    assert facts["License-Expression"] == "Apache-2.0"
    assert set(facts["Requires-Python"].split(",")) == {">=3.10", "<3.14"}
    assert {*facts.get_all("Provides-Extra")} == {
        "oneflow", "int8", "torch", "ray", "s3", "parquet", "pandas", "report", "umap", "timm",
        "torchvision", "hf", "open-clip", "starter", "lora", "ship", "serve", "video",
    }  # fmt: skip
    base, extras = [], {}
    for line in facts.get_all("Requires-Dist"):
        requirement, _, extra = line.partition("extra == ")
        name = re.match(r"[\w-]+", requirement)[0]
        base.append(name) if not extra else extras.setdefault(extra.strip("'\""), []).append(name)
        # What exists for some platforms alone must not be asked for on another.
        if name in ("oneflow", "openvino") or name.startswith("nvidia"):
            assert "platform_system" in requirement and "platform_machine" in requirement
        if extra == "'oneflow'":
            assert "python_version < '3.11'" in requirement
    assert {"numpy", "h5py", "openvino"} <= {*base}
    assert {"oneflow", "numpy", "nvidia-cudnn-cu11", "nvidia-cublas-cu11"} == {*extras["oneflow"]}
    # No tool of the tests and no other engine comes along.
    assert len(base) == 13 and {*base}.isdisjoint({"oneflow", "flowvision", "torch", "pytest"})


def test_an_sdist_is_complete(built, unpacked):
    for name in ("README.md", "LICENSE", "Makefile", "pyproject.toml", "cli.py", ".ci/setup"):
        assert (unpacked / name).is_file(), name
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*.py")}
    assert {f"tests/{path.name}" for path in (unpacked / "tests").glob("*.py")} == ours
    assert not (unpacked / "cache").exists(), "13 MB that belong to a clone"
    assert not list(unpacked.rglob("*.pyc"))
    # Whoever builds from it gets the same package, to the byte.
    again = build("wheel", unpacked, unpacked.parent / "wheel")
    assert contents(again) == contents(built[0])


def test_tests_run_from_an_sdist(unpacked):
    """Without a clone around it: those of reading caches."""
    names = ("test_store.py", "test_starter_cache.py")
    # Not with the clone on the path, as an editable installation has it.
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    shown = run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("-m", "not slow and not oneflow", *(f"tests/{name}" for name in names)),
        cwd=unpacked,
        env=environment,
    )
    assert "passed" in shown and "which leaves the starter cache out" in shown


def test_the_wheel_works_outside_the_clone(installed, tmp_path):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "FEATCACHE_DIR")
    }

    def featcache_(*arguments):
        return run(installed / "featcache", *arguments, cwd=tmp_path, env=environment)

    # The weights must have come along, and the package must not be the clone's.
    code = (
        "import featcache; print(featcache.__file__)\n"
        "print(featcache.load_weights('tinyimagenet32').sha256)"
    )
    where, digest = run(installed / "python", "-c", code, cwd=tmp_path, env=environment).split()
    assert Path(where).is_relative_to(installed.parent) and len(digest) == 64
    assert featcache_("--version") == f"featcache {VERSION}\n"
    assert "Usage: featcache" in featcache_("--help")

    made = """
import numpy as np
from PIL import Image
for role, count in (("train", 8), ("test", 4)):
    for index, name in enumerate(("dark", "light")):
        for row in range(count):
            import pathlib
            folder = pathlib.Path("photos", role, name)
            folder.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng((index, row)).integers(0, 90, (32, 32, 3))
            Image.fromarray((noise + 150 * index).astype(np.uint8)).save(folder / f"{row}.png")
"""
    run(sys.executable, "-c", made, cwd=tmp_path)
    can_extract = (
        "from featcache.backbones.choice import choose_engine as c; print(c('auto', 'cpu').name)"
    )
    if subprocess.run(
        [str(installed / "python"), "-c", can_extract], cwd=tmp_path, env=environment
    ).returncode:
        cache = ROOT / "tests" / "data" / "format-1.h5"  # no engine here: reading is what there is
        assert "fingerprint" in featcache_("info", cache)
        return
    featcache_("extract", "photos", "--weights", "tinyimagenet32", "--size", 32)
    assert '"top1": 1.0' in featcache_("probe", "--C", 1, "--json")
    assert "whole" in featcache_("verify")
    featcache_("report", "--thumbnails", "none", "--no-health")
    assert list((tmp_path / "cache").glob("**/*.html"))
