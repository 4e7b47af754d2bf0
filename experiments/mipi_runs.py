"""The training runs behind MIPI's tables: one command per table starts what it needs.

    python experiments/mipi_runs.py table1 --tasks sz --seeds 1 2 3 --total-timesteps 500000
    python experiments/mipi_runs.py table2 table3 collection --dry-run

Runs go to DIR/{task}-{method}-s{seed}; a finished one is kept, one that was stopped is resumed.
What each table compares, trained in teams of 3 to 5 and evaluated in those, 6, 7 and 8:

    table1      MIPI, REFIL and AQMIX
    table2      MIPI, Value (no regulariser) and Entropy
    table3      MIPI with each alpha of the paper's table
    d3          MIPI with the alpha of the note in appendix D.3
    collection  MIPI, REFIL and AQMIX in Resource Collection

experiments/mipi_tables.py prints the tables. Evaluations are those that the tables' final figure,
the mean of the last five, needs: ten in a run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from figures import Positive, Seed, check_bounds, one_line_errors, train_all

MIPI, REFIL = "mipi_refil_smac.py", "baselines/refil_smac.py"
METHODS = {  # but for --scenario
    "mipi": MIPI,
    "refil": REFIL,
    "aqmix": f"{REFIL} --no-imagine",
    "value": f"{MIPI} --regularizer none",
    "entropy": f"{MIPI} --regularizer entropy",
}
ALPHAS = {  # of Table 3, but for the default and 0, which is Value
    "sz": ("0.01", "0.05", "0.1", "0.5", "inf"),
    "csz": ("0.01", "0.05", "0.1", "inf"),
    "mmm": ("0.05", "0.5", "inf"),
}
ALPHAS_D3 = {"sz": "0.01", "csz": "0.015", "mmm": "0.05"}
Table = Literal["table1", "table2", "table3", "d3", "collection"]
Task = Literal["sz", "csz", "mmm"]


@dataclasses.dataclass(frozen=True)
class Study:
    """Which runs, and how long."""

    tables: Annotated[tuple[Table, ...], tyro.conf.Positional]
    tasks: tuple[Task, ...] = ("sz", "csz", "mmm")  # of the battles
    seeds: tuple[Seed, ...] = (1, 2, 3)
    total_timesteps: Positive = 500_000  # of every run
    preset: Literal["cpu", "paper"] = "cpu"
    eval_episodes: Positive = 160  # of each size in each of the ten evaluations
    jobs: Positive = 1  # runs at a time
    dir: Path = Path("runs")
    flags: str = ""  # for every run, as --flags="--save-every 100000"
    dry_run: bool = False  # print the commands only


def commands(table: str, study: Study) -> dict[str, str]:
    """{name: command} of a table's runs."""
    if table == "collection":
        return {
            f"resource-{method}": f"{METHODS[method]} --scenario resource"
            for method in ("mipi", "refil", "aqmix")
        }
    found = {}
    for task in study.tasks:
        methods = {name: METHODS[name] for name in ("mipi", "refil", "aqmix")}
        if table == "table2":
            methods = {name: METHODS[name] for name in ("mipi", "value", "entropy")}
        if table in ("table3", "d3"):
            alphas = ALPHAS[task] if table == "table3" else (ALPHAS_D3[task],)
            methods = {f"mipi-alpha-{x}": f"{MIPI} --alpha {x}" for x in alphas}
            base = ("mipi", "value") if table == "table3" else ("mipi",)
            methods = {name: METHODS[name] for name in base} | methods
        found |= {f"{task}-{name}": f"{x} --scenario {task}" for name, x in methods.items()}
    return found


def main(study: Study) -> None:
    """All runs of the tables, seed by seed."""
    check_bounds(study)
    every = max(1, study.total_timesteps // 10)
    flags = f"--preset {study.preset} --eval-every {every} --eval-episodes {study.eval_episodes}"
    runs = {}
    for table in study.tables:
        runs |= commands(table, study)
    train_all(
        {k: f"{v} {flags} {study.flags}" for k, v in runs.items()}, study, study.total_timesteps
    )


if __name__ == "__main__":
    raise SystemExit(one_line_errors(lambda: main(tyro.cli(Study))))
