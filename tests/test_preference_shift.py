"""The curves of what distillation does, on runs of the toy world."""

import csv
import importlib
import itertools
import json
import shutil
import sys

import numpy as np
import pytest
from runs import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
shift = importlib.import_module("preference_shift")


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def is_png(path):
    return path.read_bytes()[:4] == b"\x89PNG"


def test_shift_is_what_was_logged(trained, tmp_path, capsys):
    run = shutil.copytree(trained[0], tmp_path / "begun-s1")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"timesteps": 99')  # being written
    paths = (trained[1], run)
    assert shift.main([*map(str, paths), "--out", str(tmp_path / "x")]) == 0
    text, found = capsys.readouterr().out, rows(tmp_path / "x.csv")
    count = 0
    for path, source in ((trained[1], trained[1]), (run, trained[0])):
        log = [json.loads(x) for x in (source / "metrics.jsonl").read_text().splitlines()]
        for name in ("kl", "shift", "theta_prefers", "phi_prefers"):
            for phase, when in (
                ("", ""),
                *itertools.product(("forward", "reverse"), ("before", "after")),
            ):
                key = f"{phase}/{name}_{when}" if phase else name
                expected = [(m["timesteps"], m[key]) for m in log if key in m]
                assert len(expected) == (4 if phase else 8)
                where = (path.name, name, phase, when)
                own = [r for r in found if (r["run"], r["scalar"], r["phase"], r["when"]) == where]
                assert [int(r["timesteps"]) for r in own] == [t for t, _ in expected]
                values = [float(r["value"]) for r in own]
                assert values == pytest.approx([x for _, x in expected], rel=1e-5)
                count += len(own)
        before = np.mean([m["reverse/kl_before"] for m in log if "reverse/kl_before" in m])
        after = np.mean([m["reverse/kl_after"] for m in log if "reverse/kl_after" in m])
        assert f"| {path.name} | reverse, all | 4 | {before:.3g} -> {after:.3g} |" in text
    assert count == len(found)
    assert is_png(tmp_path / "x.png")
    assert shift.main([str(trained[2])]) == 2
    assert "logs no KL: it is not a run of bidist_mappo_meltingpot.py" in capsys.readouterr().err


def test_errors_are_one_sentence(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    for argv, sentence in (
        ([], "Name at least one run directory."),
        ([tmp_path / "nowhere"], f"{tmp_path}/nowhere is no run directory."),
        (
            [trained[0], "--out", tmp_path / "file/x"],
            f"--out {tmp_path}/file/x cannot be written: File exists.",
        ),
    ):
        assert shift.main(["--out", str(tmp_path / "x"), *map(str, argv)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"error: {sentence}"
