"""What distillation does over training: KL, preference shift and preferred actions.

    python experiments/preference_shift.py runs/RUN runs/RUN --out docs/data/preference_shift

Reads what bidist_mappo_meltingpot.py logged (RUN/metrics.jsonl) and draws, a column per run, four
scalars of every rollout, and before and after every phase of distillation. Writes OUT.png, OUT.csv
(a row per logged figure) and OUT.md (means over phases).
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from figures import (
    SCRIPT,
    Runs,
    UsageError,
    check_out,
    finish,
    markdown_table,
    one_line_errors,
    read_args,
    read_log,
)

SCALARS = {  # of every iteration, and before and after every phase
    "kl": "KL(π_θ ‖ π_φ)",
    "shift": "preference shift",
    "theta_prefers": "π_θ(a*_θ)",
    "phi_prefers": "π_φ(a*_θ)",
}
PHASES = {"forward": "tab:green", "reverse": "tab:red"}


@dataclasses.dataclass(frozen=True)
class Study:
    """KL, preference shift and preferred actions over training, before and after each phase."""

    runs: Runs  # of bidist_mappo_meltingpot.py
    out: Path = Path("preference_shift")  # writes OUT.png, OUT.csv and OUT.md


def read_rows(run: Path) -> list[dict[str, Any]]:
    """A row per logged figure; phase and when (before, after) are empty for the rollout's own."""
    read_args(run)
    log = read_log(run)
    if not any("kl" in scalars for scalars in log):
        raise UsageError(f"{run} logs no KL: it is not a run of {SCRIPT}.py, or has not begun.")
    rows = []
    for scalars in log:
        place = dict(run=run.resolve().name, timesteps=scalars["timesteps"])
        for name in SCALARS:
            if name in scalars:
                row = dict(scalar=name, phase="", when="", value=scalars[name])
                rows.append(place | row)
            for phase, when in itertools.product(PHASES, ("before", "after")):
                if (value := scalars.get(f"{phase}/{name}_{when}")) is not None:
                    rows.append(place | dict(scalar=name, phase=phase, when=when, value=value))
    return rows


def draw_scalar(axis: Any, rows: list[dict[str, Any]]) -> None:
    """One scalar of one run: a curve of the rollouts, and from before to after a stroke for each
    phase."""
    steps, values = zip(*((r["timesteps"] / 1000, r["value"]) for r in rows if not r["phase"]))
    axis.plot(steps, values, color="0.45", lw=0.8, label="every rollout")
    for phase, colour in PHASES.items():
        ends = {"before": {}, "after": {}}
        for r in rows:
            if r["phase"] == phase:
                ends[r["when"]][r["timesteps"] / 1000] = r["value"]
        for when, fill in (("before", "white"), ("after", colour)):
            style = {"ms": 4, "lw": 0, "mec": colour, "mfc": fill, "mew": 0.8, "zorder": 3}
            label = f"{when} a {phase} phase"
            axis.plot(ends[when].keys(), ends[when].values(), "o", label=label, **style)
        low, high = ([*ends[when].values()] for when in ("before", "after"))
        axis.vlines([*ends["before"]], low, high, color=colour, lw=0.8)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)


def draw(rows_of: dict[Path, list[dict[str, Any]]]) -> Any:
    """The figure: a column per run, a line per scalar, and one scale for all runs."""
    size = (max(6.0, 4.4 * len(rows_of) + 0.6), 8.2)
    figure, axes = plt.subplots(4, len(rows_of), figsize=size, squeeze=False, sharex="col")
    for column, (run, rows) in enumerate(rows_of.items()):
        for axis, name in zip(axes[:, column], SCALARS):
            draw_scalar(axis, [r for r in rows if r["scalar"] == name])
        axes[0][column].set_title(run.resolve().name, fontsize=10)
        axes[-1][column].set_xlabel("thousand environment steps", fontsize=9)
    for line, label in zip(axes, SCALARS.values()):
        line[0].set_ylabel(label, fontsize=9)
    rows = list(itertools.chain.from_iterable(rows_of.values()))
    marks = [r["value"] for r in rows if r["scalar"] == "kl" and r["phase"]]
    low, high = min(marks, default=0), max(r["value"] for r in rows if r["scalar"] == "kl")
    largest = max(r["value"] for r in rows if r["scalar"].endswith("prefers"))
    for kl, shift, *preferences in axes.T:
        if low > 0:  # at the very start theta and phi are alike: that would squeeze the rest
            kl.set(yscale="log", ylim=(low / 1.5, high * 1.5))
        shift.set_ylim(-0.03, 1.03)
        for axis in preferences:
            axis.set_ylim(0, min(1.03, 1.15 * largest))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def text_of(rows: list[dict[str, Any]]) -> str:
    """OUT.md: means over all phases of a kind, and over the last third of training's."""
    lines = []
    runs = dict.fromkeys(row["run"] for row in rows)
    for run, phase, part in itertools.product(runs, PHASES, ("all", "last third")):
        own = [r for r in rows if (r["run"], r["phase"]) == (run, phase)]
        begin = max(r["timesteps"] for r in rows if r["run"] == run) * 2 / 3
        own = [r for r in own if part == "all" or r["timesteps"] > begin]
        if not own:
            continue
        cells = {}
        for name, label in SCALARS.items():
            pair = (
                np.mean([r["value"] for r in own if (r["scalar"], r["when"]) == (name, when)])
                for when in ("before", "after")
            )
            cells[label] = " -> ".join(f"{x:.3g}" for x in pair)
        count = len({r["timesteps"] for r in own})
        lines.append({"run": run, "phases": f"{phase}, {part}", "count": count} | cells)
    text = "# Distillation over training\n\n"
    text += "Means over phases, before -> after; a*_θ is what θ prefers.\n\n"
    return text + (markdown_table(lines) if lines else "No phase was logged.\n")


def make(study: Study) -> None:
    """Read all runs, then write the three files."""
    if not study.runs:
        raise UsageError("Name at least one run directory.")
    check_out(study.out)
    rows_of = {run: read_rows(run) for run in study.runs}
    rows = list(itertools.chain.from_iterable(rows_of.values()))
    finish(study.out, text_of(rows), rows, draw(rows_of))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    study = tyro.cli(Study, args=argv, description=__doc__)
    return one_line_errors(lambda: make(study))


if __name__ == "__main__":
    sys.exit(main())
