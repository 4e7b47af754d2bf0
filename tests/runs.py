"""Short runs of the scripts for tests: in this process, or in processes that can be killed.

Importing a script takes seconds, a tiny run on the toy world tenths of one. So `start` forks its
processes from a host that has imported the script and done nothing else with it: real processes
with signals, limits and exits of their own. `command` is the plain command line.
"""

import atexit
import contextlib
import functools
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BIDIST, MAPPO = "bidist_mappo_meltingpot", "baselines.mappo_meltingpot"
OPRE = "baselines.opre_meltingpot"
BOTH = (BIDIST, MAPPO)
STEPS = 40  # environment steps of a tiny run's iteration
PATIENCE = 120  # seconds until a test gives up; far more than a busy machine needs


def script(name):
    return importlib.import_module(name)


def command(name):
    return [sys.executable, str(ROOT / f"{name.replace('.', '/')}.py")]


def tiny(name, run_dir, iterations, *flags):
    """The command line of a run of a few iterations, with distillation in each of BiDist's."""
    argv = ["--substrate", "toy", "--num-envs", 2, "--rollout-steps", 20, "--minibatches", 2]
    argv += ["--epochs", 1, "--final-episodes", 0, "--total-timesteps", iterations * STEPS]
    if name == BIDIST and "--copy-every" not in flags:
        argv += ["--k-d", 1, "--forward-epochs", 1, "--reverse-epochs", 1]
    return [str(x) for x in (*argv, "--run-dir", run_dir, *flags)]


def resume(run_dir, iterations, *flags):
    return [str(x) for x in ("--resume", run_dir, "--total-timesteps", iterations * STEPS, *flags)]


def change_newest(run_dir, change):
    """Let change(state) edit the newest checkpoint, which stays intact for its readers."""
    known = index(run_dir)
    path = Path(run_dir) / known[0]["name"]
    state = torch.load(path, map_location="cpu", weights_only=True)
    change(state)
    torch.save(state, path)
    known[0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (Path(run_dir) / "checkpoints.json").write_text(json.dumps(known))


def some_long(modes, *beginnings):
    """Parameters, of which those that begin so run with `make test-long` only."""
    marks = {mode: [pytest.mark.long] * mode.startswith(beginnings) for mode in modes}
    return [pytest.param(mode, marks=marks[mode]) for mode in modes]


# What a run leaves ------------------------------------------------------------------------------


def index(run_dir):
    """checkpoints.json, which is always whole or not there yet."""
    path = Path(run_dir) / "checkpoints.json"
    return json.loads(path.read_text()) if path.exists() else []


def states(run_dir):
    """The checkpoints, newest first, each held against its sha256."""
    found = []
    for entry in index(run_dir):
        data = (Path(run_dir) / entry["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], entry["name"]
        state = torch.load(Path(run_dir) / entry["name"], map_location="cpu", weights_only=True)
        assert state["timesteps"] == entry["timesteps"]
        found.append(state)
    return found


def exact(run_dir):
    """All of the newest checkpoint that must be the same in a run that repeats it."""
    return {k: x for k, x in states(run_dir)[0].items() if k not in ("args", "wall_s")}


def metrics(run_dir):
    """The lines of metrics.jsonl without times and speeds."""
    lines = map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
    return [{k: x for k, x in m.items() if not k.endswith("_s") and k != "sps"} for m in lines]


def leaves(x, where=""):
    """A nested structure of tensors and numbers as {where: exactly what is there}."""
    if isinstance(x, (dict, list, tuple)):
        parts = x.items() if isinstance(x, dict) else enumerate(x)
        return {k: leaf for name, y in parts for k, leaf in leaves(y, f"{where}/{name}").items()}
    if isinstance(x, torch.Tensor):
        return {where: (x.dtype, x.shape, x.detach().contiguous().numpy().tobytes())}
    return {where: repr(x)}


def differences(a, b):
    """Where two structures are not the same, bit for bit."""
    a, b = leaves(a), leaves(b)
    assert a and b
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


def not_finite(state):
    """Names of the networks' weights that hold NaN or infinity."""
    nets = {k: x for k, x in state["agent"].items() if "optim" not in k}
    names = [f"{k}.{n}" for k, net in nets.items() for n in net if not net[n].isfinite().all()]
    assert len(nets) >= 3
    return names


def sentences(stderr):
    """The lines of stderr but for the progress bar's."""
    text = re.sub(r"\x1b\[\w", "", stderr.replace("\r", "\n"))
    text = re.sub(r"[^\n]*\d+%\|[^\n]*?\] *", "\n", text)
    return [line.strip() for line in text.splitlines() if line.strip()]


def only_error(stderr):
    """The one sentence that says why a run ended; fails if there is anything else."""
    lines = sentences(stderr)
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert lines[0].endswith((".", "?")), lines[0]
    return lines[0]


# Processes --------------------------------------------------------------------------------------

HOST = """
import atexit, importlib, json, os, resource, signal, sys, threading
sys.path.insert(0, {root!r})
main = importlib.import_module({name!r}).main
import torch, wandb, envs.meltingpot.toy
# What a process does for seconds when it does it for the first time:
torch.optim.Adam([torch.zeros(1, requires_grad=True)])
envs.meltingpot.toy.TileGame(1)
for line in sys.stdin:
    order = json.loads(line)
    if order["do"] == "start":
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.chdir(order["cwd"])
            os.environ.update(order["env"])
            for path, fd in ((os.devnull, 0), (order["out"], 1), (order["err"], 2)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), fd)
            if order["file_size"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_size"],) * 2)
            # wandb's temporary folder was made on import; each process deletes it when it ends.
            os.makedirs(sys.modules["wandb.sdk.data_types._private"].MEDIA_TMP.name, exist_ok=True)
            code = main(order["argv"])
            threading._shutdown(), atexit._run_exitfuncs()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)  # taking a forked interpreter apart takes seconds
        answer = pid
    else:
        done, status = os.waitpid(order["pid"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if done else None
    print(json.dumps(answer), flush=True)
"""


@functools.cache
def host(name):
    code = HOST.format(root=str(ROOT), name=name)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)

    def close():
        process.stdin.close()
        process.wait()

    atexit.register(close)
    return process


class Run:
    """A run of a script in a process of its own, started in `cwd`."""

    def __init__(self, name, argv, cwd, env=None, file_size=0):
        self.host = host(name)
        self.out, self.err = Path(cwd) / "stdout.txt", Path(cwd) / "stderr.txt"
        order = {"argv": argv, "cwd": str(cwd), "env": env or {}, "file_size": file_size}
        self.pid = self._ask(do="start", out=str(self.out), err=str(self.err), **order)
        self.code = None

    def _ask(self, **order):
        self.host.stdin.write(json.dumps(order) + "\n")
        self.host.stdin.flush()
        return json.loads(self.host.stdout.readline())

    def poll(self):
        if self.code is None:
            self.code = self._ask(do="poll", pid=self.pid)
        return self.code

    def wait(self):
        """Its exit code, negative for a signal; a run that does not end is killed."""
        until(lambda: self.poll() is not None, self)
        return self.code

    def send(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def stop(self):
        self.send(signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.01)

    def stderr(self):
        return self.err.read_text()

    def __repr__(self):
        """What pytest prints where an exit code is not the expected one: how the run ended."""
        return f"<Run: {' / '.join(sentences(self.stderr()))[-160:]}>"


@contextlib.contextmanager
def start(name, argv, cwd, **options):
    """A Run that is over when the block ends, whatever happens in it."""
    run = Run(name, argv, cwd, **options)
    try:
        yield run
    finally:
        run.stop()


def finish(name, argv, cwd, **options):
    """A whole Run."""
    with start(name, argv, cwd, **options) as run:
        run.wait()
    return run


def children(pid):
    """Processes below `pid`: {their ids: their command lines}."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            line = (path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if parent == pid:
            found |= {int(path.parent.name): line} | children(int(path.parent.name))
    return found


@contextlib.contextmanager
def opened(command, **options):
    """A Popen that is killed with all below it when the block ends, whatever happens there: a run
    without end that a failing test leaves would be waited for, and for ever."""
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                for pid in (*children(process.pid), process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def until(condition, run=None, pause=0.01):
    """Wait for a condition; fail if it does not come, or if `run` ends before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        over = run is not None and run.poll() is not None and not condition()
        assert not over, f"ended early with {run.code}: {run.stderr()[-2000:]}"
        assert time.monotonic() < deadline, f"waited in vain: {run and run.stderr()[-2000:]}"
        time.sleep(pause)
