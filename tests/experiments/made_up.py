"""Made-up runs, and what commands leave."""

import contextlib
import csv
import dataclasses
import importlib
import io
import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HEADER = (
    "scenario,bots,seed,timesteps,episode,focal_return,background_return,focal_pick_ups,"
    "background_pick_ups,length"
)


def experiment(name):
    return importlib.import_module(f"experiments.{name}")


def command(name, *words):
    """An experiment's command line, in this process: exit code, standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = experiment(name).main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def rows(path):
    """A CSV's."""
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def is_png(path):
    return path.read_bytes()[:4] == b"\x89PNG"


def fake_run(path, name="bidist_mappo_meltingpot", seed=1, substrate="coins", **flags):
    """A run directory that has only its arguments."""
    flags |= {"substrate": substrate} if substrate else {}
    args = importlib.import_module(name).Args(seed=seed, **flags)
    path.mkdir(parents=True)
    script = {"script": name.rpartition(".")[2]}
    (path / "args.json").write_text(json.dumps(dataclasses.asdict(args) | script))
    return path


def fake_evaluation(run, scenario, returns, lengths=None, bots="scripted", timesteps=1000):
    """The file of one scenario, as the scripts write it."""
    args = json.loads((run / "args.json").read_text())
    lengths = np.full(len(returns), 500) if lengths is None else lengths
    name = f"{args['substrate']}_{scenario.removeprefix('SC')}"
    lines = [HEADER]
    for episode, (x, length) in enumerate(zip(returns, lengths)):
        begin = f"{name},{bots},{args['seed']},{timesteps},{episode}"
        lines.append(f"{begin},{x!r},1.0,2.0,3.0,{length}")
    path = run / "evaluation" / f"final-{timesteps}-{scenario}-{bots}.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path
