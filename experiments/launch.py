"""Train what a study names, on two cores, on several GPUs, as a SLURM array or on Ray.

    python experiments/launch.py experiments/studies/chicken_clip.toml --jobs 2
    python experiments/launch.py STUDY.toml --jobs 8 --gpus 4       two jobs share a GPU
    python experiments/launch.py STUDY.toml --index 7               one run, as in a job array
    python experiments/launch.py STUDY.toml --engine ray --gpu 0.5  here or where RAY_ADDRESS says

A study is a TOML file:

    dir = "runs/chicken-clip"          # of the runs, seen from the repository
    seeds = [11, 12, 13]
    timesteps = 1_000_000
    flags = "--eval-every 0"           # of every run
    [runs]
    mappo = "baselines/mappo_meltingpot.py"
    printed = "bidist_mappo_meltingpot.py --clip-centre printed"

{seed} in a command is the run's seed, and paths are seen from the repository. The first seed of
everything comes first, so that a study that is stopped is a complete table of fewer seeds. A
finished run is kept, one that has a checkpoint goes on, one that fails is tried again, one that
somebody else writes is waited for. The same command goes on with what was stopped.
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import functools
import json
import os
import platform
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

from harness import FAILED, FINISHED, STOPPED, WRONG_USAGE, UsageError

import pydantic
import tyro
from pydantic import Field
from tqdm import tqdm

from envs.statistics import markdown_table
from experiments.runs import (
    ROOT,
    Job,
    StoppedError,
    Trainer,
    beside,
    check_codes,
    run_command,
    train_all,
)

LOOK_EVERY = 2.0  # seconds between looks at a run that somebody else writes, and at logs


@dataclasses.dataclass(frozen=True)
class Launch:
    """Train what a study names."""

    study: tyro.conf.Positional[Path]  # a TOML file
    jobs: Annotated[int, Field(ge=0)] = 0  # runs at a time; 0: one, or as many as GPUs
    gpus: Annotated[int, Field(ge=0)] = 0  # that are dealt out to jobs, in turn; 0: not
    attempts: Annotated[int, Field(ge=1)] = 3  # of a run that fails
    index: int | None = None  # train this run alone; SLURM_ARRAY_TASK_ID, where it is set
    engine: Literal["local", "ray"] = "local"  # processes of this machine, or of Ray's
    gpu: Annotated[float, Field(ge=0)] = 0.0  # ray: the share of a GPU that a run takes
    only: tuple[str, ...] = ()  # names of runs
    seeds: tuple[int, ...] = ()  # in the place of the study's
    extra: str = ""  # further flags of every run: --extra="--num-threads 4"
    dry_run: bool = False  # print the commands


# --- Studies --------------------------------------------------------------------------------------


class Study(pydantic.BaseModel):
    """What a study's file says."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    dir: str = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    timesteps: int = Field(ge=1)
    flags: str = ""
    processes: int = Field(default=1, ge=1)  # of one run, under torchrun
    about: str = ""  # what the study decides
    runs: dict[str, str] = Field(min_length=1)


def read_study_file(path: Path) -> Study:
    """UsageError if it is none."""
    try:
        return Study.model_validate(tomllib.loads(path.read_text()))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}.") from None
    except pydantic.ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(str(x) for x in wrong["loc"])
        raise UsageError(f"{path}: {where}: {wrong['msg'].lower()}.") from None


def jobs_of(study: Study, launch: Launch) -> list[Job]:
    """All runs, seed by seed; UsageError if --only names none of them."""
    if unknown := sorted(set(launch.only) - set(study.runs)):
        have = ", ".join(study.runs)
        raise UsageError(f"--only {unknown[0]} is not in {launch.study}, which has {have}.")
    root = ROOT / study.dir
    jobs = []
    for seed in dict.fromkeys(launch.seeds or study.seeds):
        for name, command in study.runs.items():
            if launch.only and name not in launch.only:
                continue
            script, *flags = shlex.split(command.replace("{seed}", str(seed))) or [""]
            if not script:
                raise UsageError(f"{launch.study}: {name}: names no script.")
            if not (ROOT / script).is_file():
                raise UsageError(f"{launch.study}: {name}: there is no {script}.")
            jobs.append(
                Job(
                    run=root / f"{name}-s{seed}",
                    script=script,
                    flags=(*flags, *shlex.split(study.flags), *shlex.split(launch.extra)),
                    seed=seed,
                    timesteps=study.timesteps,
                    processes=study.processes,
                )
            )
    return jobs


def index_of(launch: Launch, count: int) -> int | None:
    """Which run this process trains; None: all of them."""
    index = launch.index
    if index is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        index = int(os.environ["SLURM_ARRAY_TASK_ID"])
    if index is not None and not 0 <= index < count:
        raise UsageError(f"--index {index}: the study has runs 0 to {count - 1}.")
    return index


# --- This machine ---------------------------------------------------------------------------------


def is_locked(run: Path) -> bool:
    """Whether a process writes into a run's directory."""
    try:
        with (run / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    return False


@dataclasses.dataclass
class Record:
    """What became of a run, as study.json has it."""

    command: str
    host: str
    began: str  # UTC
    starts: int = 0
    code: int | None = None  # of the last attempt
    minutes: float = 0.0
    timesteps: int = 0


class Launcher(Trainer):
    """Trains jobs: tries again what fails, waits for what somebody else writes, deals out GPUs.
    What a study's commands name is seen from the repository."""

    def __init__(self, root: Path, attempts: int, slots: list[dict[str, str]]):
        super().__init__()
        self.folder = ROOT
        self.tell = functools.partial(tqdm.write, file=sys.stdout)
        self.root, self.attempts = root, attempts
        self.slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for slot in slots:
            self.slots.put(slot)
        self.running: dict[Path, Job] = {}
        self.records: dict[str, Record] = {}

    def train(self, job: Job) -> int:
        """The exit code of one run: of its last attempt."""
        environment, clock = self.slots.get(), time.monotonic()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = Record(command=job.text(), host=platform.node(), began=now)
        self.running[job.run] = job
        try:
            record.code = self.try_often(job, record, environment)
        finally:
            del self.running[job.run]
            self.slots.put(environment)
        record.minutes = (time.monotonic() - clock) / 60
        record.timesteps = last_line(job.run).get("timesteps", 0)
        if record.starts:
            save_record(self.root, job.run.name, record)
        with self.lock:
            self.records[job.run.name] = record
        return record.code

    def try_often(self, job: Job, record: Record, environment: dict[str, str]) -> int:
        """Until it ends, is stopped, refuses its flags, or has failed too often."""
        failures = 0
        while True:
            if not self.wait_for_writer(job):
                return STOPPED
            if job.is_finished():
                return FINISHED
            record.starts += 1
            code = self.try_once(job, environment)
            if code in (FINISHED, STOPPED):
                return code
            if is_locked(job.run) or job.is_finished():
                continue  # somebody else was quicker
            failures += 1
            if code == WRONG_USAGE or failures == self.attempts:
                return code
            log = beside(job.run, ".log")
            self.tell(f"{job.run.name} ended with code {code}, once more: see {log}")

    def wait_for_writer(self, job: Job) -> bool:
        """Wait while somebody else trains the run; False if this is stopped."""
        if is_locked(job.run):
            self.tell(f"{job.run.name} is being trained by another process: waiting for it")
        while is_locked(job.run) and not self.stopped:
            time.sleep(LOOK_EVERY / 4)
        return not self.stopped


def last_line(run: Path) -> dict[str, Any]:
    """The newest whole line of a run's log; empty if there is none yet."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 100_000))
            lines = [x for x in file.read().splitlines(True) if x.endswith(b"\n")]
        return json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return {}


def read_records(root: Path) -> dict[str, Record]:
    """What study.json says of earlier starts."""
    try:
        found = json.loads((root / "study.json").read_text())
        return {name: Record(**x) for name, x in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError):
        raise UsageError(f"{root / 'study.json'} is damaged.") from None


def save_record(root: Path, name: str, record: Record) -> None:
    """Add a run to study.json; of several launchers none loses what another wrote. Starts and
    minutes add up."""
    with (root / "study.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = read_records(root)
        if before := known.get(name):
            starts, minutes = before.starts + record.starts, before.minutes + record.minutes
            began = before.began
            record = dataclasses.replace(record, starts=starts, minutes=minutes, began=began)
        known[name] = dataclasses.replace(record, minutes=round(record.minutes, 2))
        text = json.dumps({key: vars(x) for key, x in sorted(known.items())}, indent=1)
        part = root / "study.json.part"
        part.write_text(text + "\n")
        part.replace(root / "study.json")


class Bars(threading.Thread):
    """On a terminal a line for each run that is being trained: steps, steps per second, time
    left."""

    def __init__(self, launcher: Launcher):
        super().__init__(daemon=True)
        self.launcher, self.ended = launcher, threading.Event()
        self.bars: dict[Path, tqdm] = {}

    def run(self) -> None:
        while not self.ended.wait(LOOK_EVERY):
            self.look()

    def look(self) -> None:
        running = dict(self.launcher.running)
        for path in set(self.bars) - set(running):
            self.bars.pop(path).close()
        for path, job in running.items():
            steps = last_line(path).get("timesteps", 0)
            if path not in self.bars:
                bar = tqdm(total=job.timesteps, initial=steps, desc=path.name, leave=False)
                bar.unit, bar.unit_scale = " steps", True
                self.bars[path] = bar
            bar = self.bars[path]
            bar.update(max(0, steps - bar.n))

    def close(self) -> None:
        self.ended.set()
        self.join()
        for bar in self.bars.values():
            bar.close()


def slots_of(launch: Launch) -> list[dict[str, str]]:
    """A slot per run at a time: the variables that give it its GPU."""
    jobs = launch.jobs or max(1, launch.gpus)
    if not launch.gpus:
        return [{} for _ in range(jobs)]
    known = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = known.split(",") if known else [str(x) for x in range(launch.gpus)]
    if len(gpus) < launch.gpus:
        raise UsageError(f"--gpus {launch.gpus}: CUDA_VISIBLE_DEVICES names {len(gpus)}.")
    return [{"CUDA_VISIBLE_DEVICES": gpus[i % launch.gpus]} for i in range(jobs)]


def train_here(jobs: list[Job], root: Path, launch: Launch) -> None:
    """By processes of this machine; prints what became of the runs."""
    slots = slots_of(launch)
    launcher = Launcher(root, launch.attempts, slots)
    bars = Bars(launcher)
    if sys.stderr.isatty():
        bars.start()
    try:
        train_all(jobs, len(slots), trainer=launcher)
    finally:
        if bars.is_alive():
            bars.close()
        report(jobs, root, launcher.records)


def report(jobs: list[Job], root: Path, records: dict[str, Record]) -> None:
    """The table at the end."""
    names = {FINISHED: "finished", STOPPED: "stopped", None: "not begun"}
    records = records | read_records(root)  # which has earlier starts, too
    rows = []
    for job in jobs:
        record = records.get(job.run.name, Record("", host="", began=""))
        rows.append(
            {
                "run": job.run.name,
                "what": names.get(record.code, f"failed with code {record.code}"),
                "steps": f"{record.timesteps:,}",
                "minutes": f"{record.minutes:.1f}",
                "starts": str(record.starts),
                "where": record.host,
            }
        )
    print(markdown_table(rows), flush=True)


# --- Ray ------------------------------------------------------------------------------------------


def train_one(job: Job, root: Path, attempts: int) -> Record:
    """A task of Ray. ray.cancel() interrupts it: the run is saved before it ends."""
    launcher = Launcher(root, attempts, [{}])
    try:
        launcher.train(job)
    except KeyboardInterrupt:
        launcher.stop(signal.SIGTERM, None)
        for child in launcher.children:
            child.wait()
        raise
    return launcher.records[job.run.name]


def train_on_ray(jobs: list[Job], root: Path, launch: Launch) -> None:
    """By tasks of Ray, on this machine or on those of RAY_ADDRESS, which must all have this
    repository under this path. Where a worker dies, Ray starts its task again: that waits for the
    run while an orphan trains it, then goes on with it."""
    try:
        import ray
    except ModuleNotFoundError:
        raise UsageError("--engine ray needs requirements-ray.txt.") from None
    from experiments import launch as module  # tasks find their function there, not in __main__

    options = {"num_cpus": jobs[0].processes, "num_gpus": launch.gpu}
    options["max_retries"] = launch.attempts - 1
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    ray.init(address=os.environ.get("RAY_ADDRESS"), runtime_env=environment)
    train = ray.remote(module.train_one).options(**options)
    stopped = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(number, lambda *_: stopped.set()) for number in numbers]
    tasks = {train.remote(job, root, launch.attempts): job for job in jobs}
    records: dict[str, Record] = {}
    codes = {job.run: STOPPED for job in jobs}
    try:
        while tasks:
            if stopped.is_set():
                for task in tasks:
                    ray.cancel(task)
                stopped.clear()
            done, _ = ray.wait(list(tasks), timeout=LOOK_EVERY / 4)
            for task in done:
                job = tasks.pop(task)
                try:
                    records[job.run.name] = ray.get(task)
                    codes[job.run] = records[job.run.name].code
                except ray.exceptions.TaskCancelledError:
                    pass
                except ray.exceptions.RayError as error:
                    print(f"{job.run.name}: {type(error).__name__}", flush=True)
                    codes[job.run] = FAILED
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        ray.shutdown()
        report(jobs, root, records)
    check_codes(jobs, list(codes.values()))


# --- Main -----------------------------------------------------------------------------------------


def requeue() -> None:
    """Ask SLURM to start this job again, later."""
    if job := os.environ.get("SLURM_JOB_ID"):
        try:
            subprocess.run(["scontrol", "requeue", job], check=False)
        except OSError as error:
            print(f"scontrol cannot be started, queue job {job} again: {error.strerror}")


def launch(options: Launch) -> None:
    """Train a study's runs; StoppedError (75) if some were stopped, UsageError if some failed."""
    study = read_study_file(options.study)
    jobs = jobs_of(study, options)
    index = index_of(options, len(jobs))
    if index is not None:
        jobs = [jobs[index]]
    if options.dry_run:
        train_all(jobs, dry_run=True)
        return
    engine = train_on_ray if options.engine == "ray" else train_here
    try:
        engine(jobs, ROOT / study.dir, options)
    except StoppedError:
        if index is not None:
            requeue()
        raise


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    return run_command(launch, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
