"""A stand-in for SLURM's sbatch and scontrol, one machine and one job at a time, under their names.

    python stand_in_slurm.py sbatch --array=0-2 --requeue --signal=B:TERM@120 --wrap "exec ..."
    python stand_in_slurm.py scontrol requeue 101

sbatch takes the options that docs/slurm.md prints and refuses others. As SLURM does, it writes
--wrap into a script, starts that with sh in the folder of the submission, gives each task a job's
number, the first one the array's own, signals the script alone (B:), and queues again what asked
for it: under the array's number that is all of it. Unlike SLURM it waits for all, and the first
task's time is up when the file at $TIME_IS_UP_AT is there.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

FIRST = 100  # the array's own number
BOOKS = Path(os.environ["BOOKS"])  # the folder of what SLURM knows


def read(name):
    path = BOOKS / name
    return json.loads(path.read_text()) if path.exists() else []


def sbatch(argv):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--array", required=True)
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("--time", required=True)
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("--signal", required=True)
    parser.add_argument("--wrap", required=True)
    asked = parser.parse_args(argv)
    first, last = map(int, re.fullmatch(r"(\d+)-(\d+)", asked.array).groups())
    name, before = re.fullmatch(r"B:([A-Z]+)@(\d+)", asked.signal).groups()
    assert re.fullmatch(r"\d+:\d\d:\d\d", asked.time) and int(before) > 0
    script = BOOKS / "script"
    script.write_text(f"#!/bin/sh\n{asked.wrap}\n")
    print(f"Submitted batch job {FIRST}", flush=True)
    queue, starts = list(range(first, last + 1)), {}
    while queue:
        index = queue.pop(0)
        starts[index] = starts.get(index, -1) + 1
        job = FIRST + index
        slurm = {"SLURM_JOB_ID": job, "SLURM_ARRAY_JOB_ID": FIRST, "SLURM_ARRAY_TASK_ID": index}
        slurm["SLURM_RESTART_COUNT"] = starts[index]
        environment = os.environ | {key: str(x) for key, x in slurm.items()}
        with (BOOKS / f"slurm-{FIRST}_{index}.out").open("a") as output:
            process = subprocess.Popen(
                ["sh", str(script)], env=environment, stdout=output, stderr=output
            )
            if index == first and not starts[index]:
                while not Path(os.environ["TIME_IS_UP_AT"]).exists():
                    assert process.poll() is None, "it has ended before its time"
                    time.sleep(0.05)
                process.send_signal(signal.Signals[f"SIG{name}"])
            code = process.wait()
        wanted = read("requeued") if asked.requeue else []
        again = range(first, last + 1) if str(FIRST) in wanted else []
        again = again or [x for x in range(first, last + 1) if f"{FIRST}_{x}" in wanted]
        ended = [*read("ended"), {"job": job, "code": code, "again": index in again}]
        (BOOKS / "ended").write_text(json.dumps(ended))
        (BOOKS / "requeued").write_text(json.dumps([]))
        queue += [x for x in again if x not in queue]


def scontrol(argv):
    what, job = argv
    assert what == "requeue"
    (BOOKS / "requeued").write_text(json.dumps([*read("requeued"), job]))


if __name__ == "__main__":
    {"sbatch": sbatch, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:])
