"""The wheel: what is in it, and that it works where there is no checkout."""

import email
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bpfree

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not importlib.util.find_spec("hatchling"), reason="no hatchling: make env"),
]

# one recipe of minutes made one of a second; torch is loaded once
SESSION = """
import dataclasses, sys
import bpfree
from bpfree.experiments.cli import main
short = dataclasses.replace(bpfree.recipes.get("mnist-fc-fa"), data="digits", epochs=1,
                            milestones=(), network=("mlp", (64, 16, 10), {}))
bpfree.recipes.RECIPES["short"] = dataclasses.replace(short, name="short")
print(bpfree.__file__, flush=True)
for command in (["list"], ["report", "mnist-fc-fa"],
                ["run", "short", "--seeds", "0", "--jobs", "1", "--quiet"], ["report", "short"]):
    assert main(command) == 0, command
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.iterdir()
    return zipfile.ZipFile(file)


def test_wheel_holds_the_library_its_records_and_its_licence(wheel):
    args = ["git", "ls-files", "bpfree", "figures/results"]
    listed = subprocess.run(args, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    wanted = {name.replace("figures/", "bpfree/figures/", 1) for name in listed.split()}
    info = f"bpfree-{bpfree.__version__}.dist-info/"
    assert {n for n in wheel.namelist() if not n.startswith(info)} == wanted
    assert wheel.read(f"{info}licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    about = email.message_from_bytes(wheel.read(f"{info}METADATA"))
    assert about["License-Expression"] == "MIT AND CC-BY-4.0"
    assert about["Version"] == bpfree.__version__
    assert "torch>=2.6" in about.get_all("Requires-Dist")
    assert b"bpfree = bpfree.experiments.cli:main" in wheel.read(f"{info}entry_points.txt")


def test_wheel_reads_its_records_and_writes_new_ones_to_the_working_folder(wheel, tmp_path):
    site, here = tmp_path / "site", tmp_path / "here"
    wheel.extractall(site)
    here.mkdir()
    before = {p: p.stat().st_mtime_ns for p in site.rglob("*") if "__pycache__" not in p.parts}
    done = subprocess.run(
        [sys.executable, "-c", SESSION], cwd=here, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(site / "bpfree" / "__init__.py")
    (recorded,) = (line for line in lines if line.startswith("mnist-fc-fa "))
    assert "seeds 0" in recorded
    assert f"results go to {here / 'figures' / 'results'}" in lines
    assert [str(p.relative_to(here)) for p in here.rglob("*.*")] == ["figures/results/short.json"]
    assert sum("| digits |" in line for line in lines) == 1
    after = {p: p.stat().st_mtime_ns for p in site.rglob("*") if "__pycache__" not in p.parts}
    assert after == before
