"""docs/IDEA.md as a reader follows it: the diff applies, what it adds is right; the study."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import BIDIST, differences, exact, tiny
from scipy.spatial.distance import jensenshannon

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/IDEA.md"
SCRIPT = ROOT / "bidist_mappo_meltingpot.py"


def block(text: str) -> str:
    """The page's block of code that has this in it."""
    blocks = re.findall(r"(?:^    .*\n|^\n)+", PAGE.read_text(), re.M)
    (found,) = (x for x in blocks if text in x)
    return re.sub(r"^    ", "", found, flags=re.M).strip("\n") + "\n"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The fork, imported from a directory of its own."""
    shutil.copy(SCRIPT, tmp_path / "mine.py")
    command = ["patch", "mine.py"]
    done = subprocess.run(command, input=block("@@"), cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fuzz" not in done.stdout, done.stdout
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("mine")
    sys.modules.pop("mine")


def test_what_it_adds_is_scipys(mine):
    logits = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta, phi, far = (10 * logits).log_softmax(-1)
    expected = jensenshannon(theta.exp().numpy(), phi.exp().numpy(), axis=-1) ** 2
    found = mine.js_divergence(theta, phi)
    assert np.isclose(float(found), expected.mean(), rtol=1e-9)
    assert float(mine.distillation_loss("js", theta, phi)) == -float(found)
    # Bounded, and finite where a policy is certain.
    sure = torch.tensor([[0.0, -np.inf], [-1000.0, 0.0]], dtype=torch.float64).log_softmax(-1)
    assert float(mine.js_divergence(sure[:1].clamp(min=-2000), sure[1:])) <= np.log(2) + 1e-12
    assert float(mine.js_divergence(far, far)) < 1e-12


@pytest.mark.long
def test_switched_off_it_is_its_parent(mine, tmp_path):
    """--reverse-mode kl trains the parent's bits; without, others."""
    parent = importlib.import_module(BIDIST)
    flags = ("--k-d", 1, "--reverse-lr", 1e-2)
    for script, name, more in (
        (parent, "parent", ()),
        (mine, "off", ("--reverse-mode", "kl")),
        (mine, "js", ()),
    ):
        assert script.main([*tiny(BIDIST, tmp_path / name, 3, *flags), *more]) == 0
    parents, off, js = (exact(tmp_path / name) for name in ("parent", "off", "js"))
    assert differences(parents, off) == ["/script"]
    assert differences(parents["agent"], js["agent"])


def test_its_study_is_one():
    study = tomllib.loads(block('dir = "runs/js"'))
    assert set(study["runs"].values()) == {"mine.py", SCRIPT.name}


@pytest.mark.long
def test_its_commands_train_and_compare(tmp_path):
    """In a clone, by two seeds and two fifths of the steps: runs, table and figure of the page."""
    subprocess.run(["git", "clone", "-q", ROOT, tmp_path / "clone"], check=True)
    clone = tmp_path / "clone"
    shutil.copy(clone / SCRIPT.name, clone / "mine.py")
    subprocess.run(["patch", "mine.py"], input=block("@@"), cwd=clone, text=True, check=True)
    study = (
        block('dir = "runs/js"').replace("[1, 2, 3, 4, 5]", "[1, 2]").replace("40_000", "16_000")
    )
    assert "seeds = [1, 2]\ntimesteps = 16_000\n" in study
    (clone / "mine.toml").write_text(study)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    commands = ["bash", "-ec", block("experiments/launch.py mine.toml")]
    done = subprocess.run(
        commands, cwd=clone, env={**os.environ, "PATH": path}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    finished = [x.parent.name for x in (clone / "runs/js").glob("*/summary.json")]
    assert sorted(finished) == ["js-s1", "js-s2", "kl-s1", "kl-s2"]
    table = (clone / "js.md").read_text()
    assert "v random" in table and "js" in table and (clone / "js.png").stat().st_size > 10_000
