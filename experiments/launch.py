"""Train the runs of a study: on one machine, on several GPUs, as a SLURM job array or on Ray.

    python experiments/launch.py experiments/studies/chicken_clip.toml --jobs 2
    python experiments/launch.py STUDY.toml --jobs 8 --gpus 4       two jobs share a GPU
    python experiments/launch.py STUDY.toml --index 7               one run, as in a job array
    python experiments/launch.py STUDY.toml --engine ray --gpu 0.5  cluster: set RAY_ADDRESS

A study is a TOML file:

    dir = "runs/chicken-clip"          # of the runs, seen from the repository
    seeds = [11, 12, 13]
    timesteps = 1_000_000
    flags = "--eval-every 0"           # of every run
    own_seeds = {printed = [14, 15]}   # of runs whose seeds are others (optional)
    [runs]
    mappo = "baselines/mappo_meltingpot.py"
    printed = "bidist_mappo_meltingpot.py --clip-centre printed"

{seed} in a command becomes the run's seed. Paths are relative to the repository. All runs of the
first seed come first, so a study that is stopped early has all its runs for fewer seeds. A finished
run is kept. A run with a checkpoint is resumed, and a run that fails is started again. If another
process trains a run, the launcher does all others first, then waits for it. The same command
resumes a stopped study.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import fcntl
import fnmatch
import itertools
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the scripts, harness, envs

from harness import (
    FAILED,
    FINISHED,
    STOPPED,
    WRONG_USAGE,
    RunError,
    UsageError,
    check,
    leave,
    tell,
    write,
    writing,
)

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
    catch_signals,
    check_all,
    check_codes,
    first_fault,
    read_toml,
    run_command,
    split_words,
    train_all,
)

LOOK_EVERY = 2.0  # seconds between updates of the progress bars; other polls take a quarter of it


@dataclasses.dataclass(frozen=True)
class Launch:
    """Options of this command."""

    study: tyro.conf.Positional[Path]  # the study's TOML file
    jobs: Annotated[int, Field(ge=0)] = 0  # runs at a time; 0: the number of --gpus, or one
    gpus: Annotated[int, Field(ge=0)] = 0  # GPUs to assign to runs in turn; 0: assign none
    attempts: Annotated[int, Field(ge=1)] = 3  # how often to start a run that fails, in all
    index: int | None = None  # train only this run, from 0; default: $SLURM_ARRAY_TASK_ID if set
    engine: Literal["local", "ray"] = "local"  # local: processes of this machine; ray: Ray tasks
    gpu: Annotated[float, Field(ge=0)] = 0.0  # with --engine ray: GPUs per run, e.g. 0.5
    only: tuple[str, ...] = ()  # train only these names in the study's [runs], or "pure-*" of them
    seeds: tuple[int, ...] = ()  # use these seeds instead of the study's
    extra: str = ""  # more flags for every run, as --extra="--num-threads 4"
    dry_run: bool = False  # print the commands and train nothing


# --- Studies --------------------------------------------------------------------------------------


Name = Annotated[str, Field(pattern=r"^[\w.+-]+$")]  # of a directory beside the others


class Study(pydantic.BaseModel):
    """The contents of a study's TOML file."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    dir: str = Field(min_length=1)  # parent directory of the runs, relative to the repository
    seeds: tuple[int, ...] = Field(min_length=1)
    own_seeds: dict[str, Annotated[tuple[int, ...], Field(min_length=1)]] = {}  # {name: its seeds}
    timesteps: int = Field(ge=1)  # environment steps of every run
    flags: str = ""  # flags of every run
    processes: int = Field(default=1, ge=1)  # processes per run; more than one use torchrun
    about: str = ""  # what the study is for; only for the reader
    runs: dict[Name, str] = Field(min_length=1)  # {name: script and flags}

    @pydantic.model_validator(mode="after")
    def own_seeds_are_of_runs(self) -> Study:
        if unknown := sorted(set(self.own_seeds) - set(self.runs)):
            raise ValueError(f"own_seeds names {unknown[0]}, which is not in runs")
        return self


def read_study_file(path: Path) -> Study:
    """The study in a TOML file. UsageError if the file cannot be read or is not a study."""
    try:
        return Study.model_validate(read_toml(path))
    except pydantic.ValidationError as error:
        raise UsageError(f"{path}: {first_fault(error)}.") from None


def jobs_of(study: Study, launch: Launch) -> list[Job]:
    """All runs, seed by seed. UsageError for unknown names in --only or a missing script."""
    found = [fnmatch.filter(study.runs, pattern) for pattern in launch.only]
    if [] in found:
        unknown, have = launch.only[found.index([])], ", ".join(study.runs)
        raise UsageError(f"--only {unknown} is not in {launch.study}, which has {have}.")
    chosen = list(itertools.chain(*found)) if found else study.runs
    root = ROOT / study.dir
    shared = split_words(study.flags, f"{launch.study}: flags")
    shared += split_words(launch.extra, "--extra")
    jobs = []
    seeds_of = {
        name: list(dict.fromkeys(launch.seeds or study.own_seeds.get(name, study.seeds)))
        for name in study.runs
        if name in chosen
    }
    for turn in range(max(len(seeds) for seeds in seeds_of.values())):
        for name, seeds in seeds_of.items():
            if turn >= len(seeds):
                continue
            seed, command = seeds[turn], study.runs[name]
            where = f"{launch.study}: {name}"
            script, *flags = split_words(command.replace("{seed}", str(seed)), where) or [""]
            if not script:
                raise UsageError(f"{where}: names no script.")
            if not (ROOT / script).is_file():
                raise UsageError(f"{where}: there is no {script}.")
            flags += shared
            check_words(flags, where)
            names_device = any(word.partition("=")[0] == "--device" for word in flags)
            if (launch.gpus or launch.gpu) and not names_device:
                flags += ["--device", "cuda"]  # a run whose GPU is not there fails, and says so
            jobs.append(
                Job(
                    run=root / f"{name}-s{seed}",
                    script=script,
                    flags=tuple(flags),
                    seed=seed,
                    timesteps=study.timesteps,
                    processes=study.processes,
                )
            )
    return jobs


def check_words(words: list[str], where: str) -> None:
    """Raise UsageError for a flag that the study itself gives to each run."""
    ours = {"--run-dir": "dir", "--seed": "seeds", "--total-timesteps": "timesteps"}
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag in ours:
            raise UsageError(f"{where}: {flag} is the study's {ours[flag]}.")
        if flag in ("--resume", "--eval-only"):
            raise UsageError(f"{where}: {flag} is not for a study, which names runs to train.")


def index_of(launch: Launch, count: int) -> int | None:
    """The number of the only run to train, or None for all. UsageError if there is no such run."""
    index = launch.index
    if index is None and (task := os.environ.get("SLURM_ARRAY_TASK_ID")):
        if not task.isdecimal():
            raise UsageError(f"SLURM_ARRAY_TASK_ID is {task}, which is no number of a run.")
        index = int(task)
    if index is not None and not 0 <= index < count:
        raise UsageError(f"--index {index}: the study has runs 0 to {count - 1}.")
    return index


# --- This machine ---------------------------------------------------------------------------------


def is_locked(run: Path) -> bool:
    """Whether some process holds the lock of a run's directory, that is, trains the run."""
    try:
        with (run / "lock").open() as file:
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
    """A run's entry in study.json: where it ran, how often it was started, how it ended."""

    command: str
    host: str
    began: str  # UTC
    starts: int = 0
    code: int | None = None  # exit code of the last attempt
    minutes: float = 0.0  # wall time of all attempts
    timesteps: int = 0  # environment steps in the last line of the log


class Launcher(Trainer):
    """Trains jobs: starts failed runs again, puts off runs that another process trains, and gives
    each job a slot (a GPU). Scripts start in the repository: a study's paths are relative to it."""

    def __init__(self, root: Path, attempts: int, slots: list[dict[str, str]]):
        super().__init__()
        self.folder = ROOT
        self.root, self.attempts = root, attempts
        self.slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for slot in slots:
            self.slots.put(slot)
        self.running: dict[Path, Job] = {}
        self.put_off: set[Path] = set()
        self.records: dict[str, Record] = {}

    def train(self, job: Job) -> int | None:
        """Train one run and return the exit code of its last attempt; None, after a short pause, if
        another process trains it."""
        if is_locked(job.run) and not self.stopped:
            if job.run not in self.put_off:
                self.tell(f"{job.run.name} is being trained by another process: waiting for it")
            self.put_off.add(job.run)
            time.sleep(LOOK_EVERY / 4)
            return None
        if job.has_changed():
            verb = "is kept" if job.is_finished() else "goes on"
            self.tell(f"note: {job.run.name} {verb}, though {job.script} has changed since it ran")
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
        with self.lock:
            self.records[job.run.name] = record
        try:
            known = read_records(self.root).get(job.run.name, record)
            if record.starts or (record.code == FINISHED and known.code != FINISHED):
                save_record(self.root, job.run.name, record)
        except RunError as error:  # the run has ended as it has
            self.tell(f"{job.run.name} is not in study.json: {error}")
        return record.code

    def try_often(self, job: Job, record: Record, environment: dict[str, str]) -> int | None:
        """Start a run until it ends or fails too often. Returns its code, None if another process
        took it first; record counts starts."""
        failures = 0
        while not job.is_finished():
            if self.stopped:
                return STOPPED
            record.starts += 1
            code = self.try_once(job, environment)
            if code in (FINISHED, STOPPED):
                return code
            if is_locked(job.run):
                return None
            if job.is_finished():
                break
            failures += 1
            ended = f"{job.run.name} ended with code {code}"
            why = f"{beside(job.run, '.log')} has {last_error(job)}"
            if code == WRONG_USAGE or failures == self.attempts:
                self.tell(f"{ended}: {why}")
                return code
            self.tell(f"{ended}, once more: {why}")
        return FINISHED


def last_error(job: Job) -> str:
    """The last line of a run's output that tells of an error, or where there is none "no error"."""
    with contextlib.suppress(OSError):
        lines = beside(job.run, ".log").read_text(errors="replace").splitlines()
        return next((x for x in reversed(lines) if "error" in x.lower()), "no error")[:300]
    return "no error"


def last_line(run: Path) -> dict[str, Any]:
    """The scalars in the last complete line of a run's log; {} if there is none yet."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 100_000))
            lines = [x for x in file.read().splitlines(True) if x.endswith(b"\n")]
        return json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return {}


def read_records(root: Path) -> dict[str, Record]:
    """{run: record} from study.json, {} if there is none. UsageError if the file is damaged."""
    try:
        found = json.loads((root / "study.json").read_text())
        return {name: Record(**x) for name, x in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError):
        raise UsageError(f"{root / 'study.json'} is damaged.") from None


def save_record(root: Path, name: str, record: Record) -> None:
    """Write a run's record into study.json and add up starts and minutes with its earlier record.
    A lock keeps several launchers from overwriting each other's records."""
    with writing(root / "study.lock"):
        lock = (root / "study.lock").open("a")
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        known = read_records(root)
        if before := known.get(name):
            starts, minutes = before.starts + record.starts, before.minutes + record.minutes
            host = record.host if record.starts else before.host  # it was finished elsewhere
            sums = {"starts": starts, "minutes": minutes}
            record = dataclasses.replace(record, **sums, began=before.began, host=host)
        known[name] = dataclasses.replace(record, minutes=round(record.minutes, 2))
        text = json.dumps({key: vars(x) for key, x in sorted(known.items())}, indent=1)
        write(root / "study.json", f"{text}\n".encode())


class Bars(threading.Thread):
    """A thread that draws a progress bar for each run in training: environment steps, steps per
    second, time left."""

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


def slots_of(launch: Launch, processes: int) -> list[dict[str, str]]:
    """The environment variables of each of --jobs slots. A slot has a GPU for each of a run's
    processes. UsageError if there are too few GPUs."""
    if not launch.gpus:
        return [{} for _ in range(launch.jobs or 1)]
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(x) for x in range(launch.gpus)]
    if known is not None:  # "" hides all
        gpus = [x for x in known.split(",") if x]
    if len(gpus) < launch.gpus:
        raise UsageError(f"--gpus {launch.gpus}: CUDA_VISIBLE_DEVICES names {len(gpus)}.")
    sets = launch.gpus // processes
    if not sets:
        raise UsageError(f"--gpus {launch.gpus}: a run of this study has {processes} processes.")
    slots = []
    for i in range(launch.jobs or sets):
        first = i % sets * processes
        slots.append({"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + processes])})
    return slots


def wrong_engine(launch: Launch) -> list[tuple[Any, str]]:
    """(whether it is wrong, message) for options that the other engine has."""
    ray = launch.engine == "ray"
    return [
        (launch.gpu and not ray, "--gpu is for --engine ray; --gpus gives GPUs to runs here"),
        (launch.gpus and ray, "--gpus is for this machine; --gpu is a run's share with Ray"),
        (launch.jobs and ray, "--jobs is for this machine; Ray runs as many as it has CPUs for"),
    ]


def train_here(jobs: list[Job], root: Path, launch: Launch) -> None:
    """Train jobs with processes of this machine, then print how the runs ended."""
    slots = slots_of(launch, jobs[0].processes)
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
    """Print a table of how each run ended now; study.json adds the figures of earlier starts."""
    names = {FINISHED: "finished", STOPPED: "stopped", None: "not begun"}
    try:
        known = read_records(root)
    except UsageError as error:  # it must not take the place of how the runs ended
        print(f"{error} Figures of earlier starts are missing here.")
        known = records
    rows = []
    for job in jobs:
        now = records.get(job.run.name, Record("", host="", began=""))
        record = known.get(job.run.name, now)
        if now.code is not None:
            record = dataclasses.replace(record, code=now.code)
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
    tell(markdown_table(rows))


# --- Ray ------------------------------------------------------------------------------------------

RAY_HERE = {  # settings of the Ray that starts here where RAY_ADDRESS names none
    "RAY_USAGE_STATS_ENABLED": "0",  # it tells nobody that it is used
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "100000000",  # else .3 of all; records are small
    "RAY_worker_niceness": "0",  # else 15: beside other work runs would all but stand still
}


def train_one(job: Job, root: Path, attempts: int) -> Record:
    """Train one run in a Ray task. ray.cancel() raises KeyboardInterrupt here, between two steps of
    Python: so a thread waits for the script, and this one, which sleeps shortly, lets it save."""
    launcher = Launcher(root, attempts, [{}])

    def work() -> None:
        while launcher.train(job) is None:
            pass  # it has paused

    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # leaving it waits for the thread
        training = pool.submit(work)
        try:
            while not training.done():
                time.sleep(LOOK_EVERY / 4)
        except KeyboardInterrupt:
            launcher.stop(signal.SIGTERM, None)
            raise
    training.result()
    return launcher.records[job.run.name]


def train_on_ray(jobs: list[Job], root: Path, launch: Launch) -> None:
    """Train jobs as Ray tasks, on this machine or on the cluster at RAY_ADDRESS, whose machines
    need this repository under this path. If a worker dies, Ray starts its task again; the new task
    waits until the script that the worker had started has ended, then resumes the run."""
    processes = jobs[0].processes
    if processes > 1 and 0 < launch.gpu < processes:
        raise UsageError(f"--gpu {launch.gpu:g}: a run of this study has {processes} processes.")
    for name, x in RAY_HERE.items():
        os.environ.setdefault(name, x)
    try:
        import ray
    except ModuleNotFoundError:
        raise UsageError("--engine ray needs requirements-ray.txt.") from None
    from experiments import launch as module  # workers import this module; they lack __main__

    check_all(jobs)
    options = {"num_cpus": processes, "num_gpus": launch.gpu}
    options["max_retries"] = launch.attempts - 1
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    ray.init(address=os.environ.get("RAY_ADDRESS"), runtime_env=environment)
    train = ray.remote(module.train_one).options(**options)
    stopped = threading.Event()
    restore_signals = catch_signals(lambda *_: stopped.set())
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
                except ray.exceptions.RayError as error:
                    if not isinstance(error, ray.exceptions.TaskCancelledError):
                        cause = getattr(error, "cause", None)  # what the task raised
                        reason = cause if isinstance(cause, RunError) else type(error).__name__
                        print(f"{job.run.name}: {reason}", flush=True)
                        codes[job.run] = FAILED
                    lost = Record(job.text(), host="", began="", code=codes[job.run])
                    records[job.run.name] = lost
    finally:
        restore_signals()
        ray.shutdown()
        report(jobs, root, records)
    check_codes(jobs, list(codes.values()))


# --- Main -----------------------------------------------------------------------------------------


def requeue() -> None:
    """Ask SLURM to queue this job again (does nothing outside SLURM)."""
    job = os.environ.get("SLURM_JOB_ID")
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array and (task := os.environ.get("SLURM_ARRAY_TASK_ID")):
        # One task of every array has the array's own number, under which all would be requeued.
        job = f"{array}_{task}"
    if job:
        try:
            subprocess.run(["scontrol", "requeue", job], check=False)
        except OSError as error:
            print(f"scontrol cannot be started, queue job {job} again: {error.strerror}")


def launch(options: Launch) -> None:
    """Train a study's runs. StoppedError (75) if any was stopped, UsageError (2) if any failed."""
    study = read_study_file(options.study)
    check(wrong_engine(options))
    jobs = jobs_of(study, options)
    index = index_of(options, len(jobs))
    if index is not None:
        jobs = [jobs[index]]
    if options.dry_run:
        train_all(jobs, dry_run=True)
        if index is None:
            print(f"# runs 0 to {len(jobs) - 1}, in this order: --index, --array=0-{len(jobs) - 1}")
        return
    read_records(ROOT / study.dir)  # a damaged study.json is told before the first run has trained
    engine = train_on_ray if options.engine == "ray" else train_here
    try:
        engine(jobs, ROOT / study.dir, options)
    except StoppedError:
        if index is not None:
            requeue()
        raise


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(launch, argv, __doc__)


if __name__ == "__main__":
    leave(main())
