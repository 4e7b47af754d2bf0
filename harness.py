"""What a script needs around its method: a command line, a run directory, checkpoints, a log,
signals, processes, progress. Nothing in this file knows a method, a network or a world's rules.

    args = read_args(Args, argv, validate, resumable=RESUMABLE, presets=PRESETS)
    with Run(args, table, LINE) as run:
        run.restore(agent=agent)                   from --resume or --eval-only
        run.judge = judge
        if args.eval_only:
            return run.evaluate_only()
        run.begin(world, parts={"agent": agent}, own={"rng": rng, "envs": envs})
        while run.goes_on():                       until --total-timesteps or a signal
            ...                                    the script's: collect, learn
            run.advance(steps)
            run.log(scalars)
            if run.is_due(args.save_every):
                run.save()
            if run.is_due(args.eval_every):
                run.evaluate("eval")
        return run.finish()                        the final evaluation, summary.json

judge(evaluation) -> {row: {figure: number}} is the script's own evaluate(). Under torchrun all
processes do the same, each with its own worlds and generators; only the first one writes the log.
Saved are `parts`, which are equal in all processes, and each process's `own` objects and replays.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import math
import os
import re
import select
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import pydantic
    import tyro
    from annotated_types import Interval
except ModuleNotFoundError as missing:
    todo = "make setup, then source .venv/bin/activate"
    raise SystemExit(f"error: {missing.name} is not installed: {todo}") from None

ROOT = Path(__file__).resolve().parent


def started_script() -> Path | None:
    """The script of this project that Python was started with, or None."""
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
    is_ours = ROOT in path.parents and path.suffix == ".py" and path.name != "__main__.py"
    # Packages in .venv have scripts, too: Ray's workers need the SIGINT that Python gave them.
    return path if is_ours and "site-packages" not in path.parts else None


if started_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C while torch is imported, below, ends the script without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

Seed = Annotated[int, Interval(ge=0, lt=2**32)]
Count = Annotated[int, Interval(ge=0, le=10**12)]
Positive = Annotated[int, Interval(ge=1, le=10**12)]
Share = Annotated[float, Interval(ge=0, le=1)]
Amount = Annotated[float, Interval(ge=0, lt=math.inf)]
Above = Annotated[float, Interval(gt=0, lt=math.inf)]
Device = Annotated[str, pydantic.StringConstraints(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]

FINISHED, FAILED, WRONG_USAGE, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130  # exit codes
FORMAT = 2  # of checkpoints
OWN_FILE = re.compile(r"(checkpoint-\d+|replay-\d+(-\d+)?)\.pt(\.part)?")  # .part: killed in a save
STOPPING = b"\nStopping after this iteration; a second Ctrl-C ends it at once.\n"
SAME_SIGNAL = 3.0  # seconds in which several SIGTERMs or SIGHUPs are one request to stop


class RunError(Exception):
    """An error that ends the run; its message is one sentence."""

    code = FAILED


class UsageError(RunError):
    """An error in the command line, or in a file that it names."""

    code = WRONG_USAGE


# --- Command line ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RunArgs:
    """Flags that every script has and no method reads."""

    preset: Literal["paper", "cpu"] = "paper"  # named values of flags; other flags override it
    seed: Seed = 1  # fixes all that is drawn at random outside the game engines
    total_timesteps: Positive = 10_000_000  # environment steps, over all worlds and processes
    run_dir: str = ""  # default: runs/{world}__{script}__s{seed}__{UTC time}__{4 hex}
    resume: str = ""  # run directory to continue; its saved arguments hold
    eval_only: str = ""  # run directory or checkpoint to evaluate, without training
    log_every: Positive = 1  # environment steps between lines of metrics.jsonl (>= one iteration)
    eval_every: Count = 160_000  # environment steps between evaluations in training; 0: none
    eval_episodes: Positive = 2  # episodes per row of the table in evaluations during training
    final_episodes: Count = 50  # episodes per row, final evaluation or --eval-only; 0: none
    save_every: Count = 160_000  # environment steps between checkpoints (last two kept); 0: at end
    capture_video: bool = False  # save an MP4 with every evaluation
    track: bool = False  # log to Weights & Biases (wandb), too
    wandb_project: str = "unseen"  # project at Weights & Biases
    wandb_mode: Literal["online", "offline"] = "online"  # offline: upload later by `wandb sync`
    wandb_timeout: Above = 10.0  # seconds to wait for the wandb server; then logging is offline
    device: Device = "auto"  # auto, cpu, cuda or e.g. cuda:1; auto: cuda if there is one
    tf32: bool = False  # on a GPU: float32 products with 10 mantissa bits, not 23 (faster)
    onednn: bool = True  # on AMD's CPUs with AVX-512: products by oneDNN, as exact, but faster
    num_threads: Positive = 1  # CPU threads of torch; on a busy machine more are slower


FIXED = ("preset", "seed")  # flags of RunArgs that --resume may not change
Validate = Callable[[Any], list[tuple[Any, str]]]  # args -> [(whether it is wrong, sentence)]
Presets = dict[str, dict[str, Any]]  # name -> values of flags


def read_args(
    cls: type,
    argv: list[str],
    validate: Validate,
    resumable: tuple[str, ...] = (),
    presets: Presets | None = None,
) -> Any:
    """Read the command line on top of --preset, or with --resume or --eval-only on top of the run's
    saved arguments; of these only RunArgs' and `resumable` may change. UsageError for values
    out of bounds and combinations that validate() refuses; tyro itself exits with code 2."""
    args = read_flags(cls, argv)
    check(
        [
            (args.resume and args.eval_only, "--resume and --eval-only exclude each other"),
            (args.resume and args.run_dir, "--resume goes on in its own directory, not --run-dir"),
        ]
    )
    if args.resume or args.eval_only:
        args = read_resumed(cls, argv, args, resumable)
    elif args.preset != "paper":
        if args.preset not in (presets or {}):
            raise UsageError(f"--preset {args.preset}: this script has none of that name.")
        default = cls(**preset_flags(presets, args), preset=args.preset)
        args = read_flags(cls, argv, default)
    check(
        [
            (args.eval_only and not args.final_episodes, "--eval-only needs --final-episodes"),
            (
                args.eval_only and "--eval-episodes" in typed_flags(argv),
                "--eval-episodes is of evaluations in training: --eval-only plays --final-episodes",
            ),
            (args.eval_only and args.track, "--track logs training: it is not for --eval-only"),
        ]
    )
    check_run(args, argv)
    check(validate(args))
    return args


def typed_flags(words: list[str]) -> set[str]:
    """The flags among the words of a command line, with dashes: tyro takes underscores, too."""
    return {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}


def check_run(args: RunArgs, argv: list[str]) -> None:
    """UsageError for a run directory that reads as a checkpoint, --track without wandb, or flags of
    --track that are typed without it."""
    mode = "--wandb-mode" in typed_flags(argv)
    is_file = Path(args.run_dir).suffix == ".pt"
    check(
        [
            (mode and not args.track, "--wandb-mode needs --track"),
            (is_file, "--run-dir is a directory: .pt is for checkpoints"),
            (args.track and not has_wandb(), "--track needs requirements-wandb.txt installed"),
        ]
    )


def has_wandb() -> bool:
    return importlib.util.find_spec("wandb") is not None


def preset_flags(presets: Presets, args: Any) -> dict[str, Any]:
    """The flags of --preset, and those of each "PRESET FLAG VALUE" where FLAG has this VALUE."""
    flags = {}
    for name, more in presets.items():
        preset, *when = name.split()
        if preset == args.preset and (not when or str(getattr(args, when[0])) == when[1]):
            flags |= more
    return flags


def read_flags(cls: type, argv: list[str], default: Any = None) -> Any:
    """Parse the command line on top of `default`; UsageError for values empty or out of bounds."""
    for before, word in zip(["", *argv], argv):
        if not word:
            name = before if before.startswith("--") else "An argument"
            raise UsageError(f"{name} has an empty value (an unset variable?).")
        if re.fullmatch("--[^=]+=", word):
            raise UsageError(f"{word[:-1]} has an empty value (an unset variable?).")
    options = {} if default is None else {"default": default}
    script = Path(inspect.getfile(cls))
    if script.resolve() != Path(sys.argv[0]).resolve():  # a study's flags, read by a launcher
        options["prog"] = os.path.relpath(script)
    args = tyro.cli(cls, args=argv, **options)
    try:
        pydantic.TypeAdapter(cls).validate_python(dataclasses.asdict(args))
    except pydantic.ValidationError as error:
        wrong = error.errors()[0]
        flag = as_flag(str(wrong["loc"][0]))
        raise UsageError(f"{flag} {wrong['input']}: {wrong['msg'].lower()}.") from None
    return args


def read_resumed(cls: type, argv: list[str], given: Any, resumable: tuple[str, ...]) -> Any:
    """Parse the command line on top of a run's saved arguments; UsageError for a changed value that
    may not change. given: the command line on top of the script's defaults."""
    source, typed = given.resume or given.eval_only, typed_flags(argv)
    own = saved_args(source, cls, whole=bool(given.resume), typed=typed)
    track = own.track and not given.eval_only
    own = dataclasses.replace(own, run_dir="", resume="", eval_only="", track=track)
    free = {field.name for field in dataclasses.fields(RunArgs)} - set(FIXED) | set(resumable)
    saved, _ = load_checkpoint(source, quiet=True)
    kept = tuple(name for name in vars(own) if name not in free and name in saved["args"])
    changing = f"; {', '.join(map(as_flag, resumable))} may change" if resumable else ""
    return read_kept(cls, argv, own, kept, source, changing)


def read_kept(
    cls: type, argv: list[str], default: Any, kept: tuple[str, ...], source: str, more: str = ""
) -> Any:
    """Parse the command line on top of `default`; UsageError for another value of a flag in `kept`,
    which stays that of the run `source`, with `more` at the sentence's end."""
    args = read_flags(cls, argv, default)
    for name in kept:
        if getattr(args, name) != (value := getattr(default, name)):
            shown = "not set" if value in ("", (), None) else value
            raise UsageError(f"{as_flag(name)} is {shown} in {source} and stays so{more}.")
    check_run(args, argv)
    return args


def saved_args(
    source: str, cls: type, whole: bool = False, typed: set[str] | frozenset = frozenset()
) -> Any:
    """Load the arguments of a run or checkpoint; UsageError if it is another script's, or has flags
    that are gone. Flags that are newer than the run have their defaults. whole: to train on, so
    UsageError also for newer flags that are not typed, and for weights that play, as in zoo/."""
    saved, _ = load_checkpoint(source, quiet=True)
    script = script_of(cls).stem
    if saved["script"] != script:
        raise UsageError(f"{source} is a run of {saved['script']}.py, not of {script}.py.")
    if whole:
        refuse_weights_only(saved, source)
    # Flags of RunArgs that are newer than the run have their defaults.
    own = {field.name: field.default for field in dataclasses.fields(RunArgs)} | saved["args"]
    names = {field.name for field in dataclasses.fields(cls)}
    began = f"{source} was begun by a version of {script}.py that"
    if gone := ", ".join(as_flag(name) for name in sorted(own.keys() - names)):
        raise UsageError(f"{began} had {gone}, too.")
    newer = {as_flag(name) for name in names - own.keys()} if whole else set()
    newer -= {"--" + flag.removeprefix("--no-") for flag in typed} | typed
    if newer:
        raise UsageError(f"{began} had no {', '.join(sorted(newer))}: give a value to go on with.")
    return cls(**{name: tuple(x) if isinstance(x, list) else x for name, x in own.items()})


def refuse_weights_only(saved: dict[str, Any], source: str) -> None:
    """Raise UsageError for a checkpoint, as load_checkpoint() returns it, of an entry of zoo/."""
    if saved.get("weights_only", False):
        raise UsageError(f"{source} has the weights alone that play: nothing can learn on from it.")


def check(wrong: list[tuple[Any, str]]) -> None:
    """Raise UsageError with the first sentence whose condition holds, if there is one."""
    for condition, sentence in wrong:
        if condition:
            raise UsageError(f"{sentence}.")


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def script_of(cls: type) -> Path:
    """The script that defines this class Args."""
    return Path(inspect.getfile(cls))


def show_help(path: Path) -> None:
    """Print --help and exit before torch is imported. Of the script, only imports of the standard
    library, assignments and the class Args are executed; names of this file are at hand."""
    script = types.ModuleType("script_for_help")
    vars(script).update(globals(), __name__="script_for_help", __file__=str(path))
    sys.modules["script_for_help"] = script
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in getattr(node, "names", [])]
        is_import = isinstance(node, ast.Import) and set(names) <= sys.stdlib_module_names
        is_import |= isinstance(node, ast.ImportFrom) and node.module in sys.stdlib_module_names
        is_args = isinstance(node, ast.ClassDef) and node.name == "Args"
        if is_import or is_args or isinstance(node, ast.Assign):
            code = ast.Module([node], type_ignores=[])
            try:
                exec(compile(code, str(path), "exec", dont_inherit=False), vars(script))
            except Exception:  # it needs more: print the help later, after all imports
                if is_args:
                    return
    if inspect.isclass(vars(script).get("Args")):
        try:
            tyro.cli(script.Args, args=["--help"])
        except BrokenPipeError:
            if not reader_has_gone():
                raise
            sys.exit(FAILED)
        except OSError:  # a full disk: call() will say so
            return


def reader_has_gone() -> bool:
    """Whether nobody reads stdout any more, as in `--help | head`. If so, it becomes /dev/null:
    Python would write what is left when it exits, and print a traceback."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)  # 0: only whether the other end is closed
    gone = bool(pipe.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


if {"-h", "--help"} & set(sys.argv[1:]) and (path := started_script()):
    show_help(path)

# These imports take seconds; wandb and TensorBoard are imported where they are needed.
import collections  # noqa: E402
import contextlib  # noqa: E402
import datetime  # noqa: E402
import errno  # noqa: E402
import fcntl  # noqa: E402
import functools  # noqa: E402
import hashlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import secrets  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from importlib.metadata import distributions  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402


def call(function: Callable[[], int], *errors: type[Exception]) -> int:
    """Run function() and return its exit code; RunError and `errors` print one sentence."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this, as a daemon may
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL and started_script():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return function()
    except (RunError, *errors) as error:
        say_error(str(error))
        return getattr(error, "code", FAILED)
    except SystemExit as leaving:  # tyro, which has said why
        return int(leaving.code or FINISHED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemError as error:
        if not is_interrupt(error):
            raise
        return INTERRUPTED
    except PermissionError as error:
        say_error(f"{error.filename or first_line(error)}: permission denied.")
        return FAILED
    except BrokenPipeError:
        if not reader_has_gone():
            raise
        return FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        say_error(f"{error.filename or 'what this command writes'}: {error.strerror.lower()}.")
        flush_or_drop(sys.stdout)
        return FAILED
    except (MemoryError, OverflowError, RuntimeError, ValueError) as error:
        if "InvalidCxxCompiler" in str(error):
            say_error("--compile needs a C++ compiler, and none works here ($CXX, or g++).")
        elif is_about_memory(error):
            say_error(f"this does not fit into memory: {first_line(error)}.")
        else:
            raise
        return FAILED


def is_interrupt(error: BaseException | None) -> bool:
    """Whether an error comes of Ctrl-C, which is a SystemError once it has left numba."""
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__
    return error is not None


def is_about_memory(error: Exception) -> bool:
    """Whether the error says that an array of the requested size does not fit into memory."""
    text = str(error).lower()
    words = ("allocate", "out of memory", "calculation overflow", "multiplication overflow")
    words += ("array is too big", "maximum allowed dimension", "int too large")
    return isinstance(error, MemoryError) or any(word in text for word in words)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def say_error(sentence: str) -> None:
    tell(f"error: {sentence}", file=sys.stderr)


def tell(text: str, file: Any = None) -> None:
    """Print a line; a closed terminal or pipe does not end the run."""
    try:
        tqdm.write(text, file=file)
        (file or sys.stdout).flush()
    except BrokenPipeError:
        reader_has_gone()
    except OSError:  # a disk that is full now may not be later
        pass


def flush_or_drop(stream: Any) -> None:
    """Write what the stream still holds. Where nobody reads it or its disk is full, it becomes
    /dev/null, as Python would try again at exit, and print a traceback."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave(code: int) -> None:
    """Exit with this code; under torchrun at once, as gloo's threads sometimes crash at exit."""
    flush_or_drop(sys.stdout)
    flush_or_drop(sys.stderr)
    if dist.is_initialized():
        if code == FINISHED:  # else other processes may still wait for this one
            dist.destroy_process_group()
        os._exit(code)
    sys.exit(code)


# --- Processes ------------------------------------------------------------------------------------


def choose_products(onednn: bool) -> None:
    """On AMD's processors with AVX-512 let oneDNN multiply float32, if that loses no digits.

    MKL, torch's usual library, uses half of their width (AVX2). torch calls the switch "medium", as
    oneDNN may then round to bfloat16. It does where a processor has units for that (Intel's AMX).
    """
    torch.set_float32_matmul_precision("highest")
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    if onednn and "AMD" in cpu.get("cpu_name", "") and cpu.get("avx512_f"):
        torch.set_float32_matmul_precision("medium")
        if not all(product_is_exact(*shape) for shape in ((32, 64, 8), (512, 512, 512))):
            torch.set_float32_matmul_precision("highest")


def product_is_exact(M: int, K: int, N: int) -> bool:
    """Whether torch multiplies integers of 12 bits without an error, for (M, K) and (K, N)."""
    x = torch.arange(M * K).view(M, K) * 7919 % 8191 - 4095
    y = torch.arange(K * N).view(K, N) * 31 % 15 - 7  # sums stay below 2^24
    return torch.equal((x.float() @ y.float()).double(), x.double() @ y.double())


def start_processes(args: RunArgs) -> tuple[int, int, torch.device]:
    """Return rank, number of processes and device; join torchrun's process group, if any."""
    torch.set_num_threads(args.num_threads)
    choose_products(args.onednn)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {args.device}: there is no CUDA device here.")
    size = process_count()
    rank = int(os.environ.get("RANK", 0)) if size > 1 else 0  # some schedulers set RANK alone
    if size > 1 and ":" in args.device:
        raise UsageError("Under torchrun each process has its own device: --device cuda.")
    device = torch.device("cpu")
    if args.device != "cpu" and torch.cuda.is_available():
        _, _, number = args.device.partition(":")
        device = torch.device(f"cuda:{number or os.environ.get('LOCAL_RANK', 0)}")
        if device.index >= torch.cuda.device_count():
            raise UsageError(f"--device {device}: there are {torch.cuda.device_count()} here.")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = args.tf32  # its default is True
    if size > 1 and not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            raise UsageError("WORLD_SIZE is set, but not by torchrun, which sets MASTER_ADDR, too.")
        # Others wait while the first evaluates; torchrun itself notices a dead process.
        patience = datetime.timedelta(days=1)
        # gloo sums tensors that are on the CPU, e.g. numbers of episodes.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=patience)
    return rank, size, device


def process_count() -> int:
    """How many processes torchrun has started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def process_rank() -> int:
    """The rank of this process; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def own_generator(seed: int, stream: Literal[0, 1] = 0) -> torch.Generator:
    """A generator with two streams for each process; rank 0 has those of a run with one process."""
    seed = (seed + stream * 2**31) % 2**32  # torch uses 32 bits
    if rank := process_rank():
        seed = int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)


def has_bf16(device: torch.device) -> bool:
    """Whether the device has hardware for bf16, so that bf16 is fast."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy x to a device. To a GPU it goes from pinned memory without blocking, so that the CPU can
    prepare the next operations while the GPU is still busy."""
    here_to_there = x.device.type == "cpu" and device.type == "cuda"
    if here_to_there and not torch.compiler.is_compiling():  # the compiler cannot pin
        x = x.contiguous().pin_memory()  # contiguous(): what expand() makes cannot be pinned
    return x.to(device, non_blocking=here_to_there)


def stacked(numbers: list[Tensor]) -> Tensor:
    """One tensor of these numbers, where the last one is. (Scripts may note numbers of the CPU;
    those of a checkpoint come to the device.)"""
    return torch.stack([x.to(numbers[-1].device) for x in numbers])


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum x over all processes, in place; return x."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def total(number: int) -> int:
    """Sum a number over all processes."""
    return int(sum_over_processes(torch.tensor(number)))


def gather(x: Any) -> list[Any]:
    """Return x of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return [x]
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, x)
    return everybody


def moments(x: Tensor) -> Tensor:
    """1, mean and mean square of x over all processes -> (3,) float64."""
    x = x.double()
    sums = sum_over_processes(torch.stack([torch.ones_like(x).sum(), x.sum(), (x * x).sum()]))
    return sums / sums[0]


def mean_and_deviation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x over all processes -> () and ()."""
    if not dist.is_initialized():
        return x.mean(), x.std(correction=0)
    _, mean, square = moments(x)
    return mean.to(x.dtype), (square - mean**2).clamp(min=0).sqrt().to(x.dtype)


def average_gradients(net: nn.Module) -> list[nn.Parameter]:
    """Average gradients over processes, in place; return the parameters that have one."""
    parameters = [p for p in net.parameters() if p.grad is not None]
    if dist.is_initialized() and parameters:  # one flat all-reduce
        flat = sum_over_processes(torch.cat([p.grad.flatten() for p in parameters]))
        parts = (flat / dist.get_world_size()).split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts):
            p.grad.copy_(part.view_as(p))
    return parameters


def descend(
    loss: Tensor, net: nn.Module, optimiser: torch.optim.Optimizer, max_norm: float
) -> Tensor:
    """Step on gradients averaged over processes, then clipped; return their norm before that. Other
    networks that the loss passes through get no gradients."""
    optimiser.zero_grad()
    loss.backward(inputs=[p for p in net.parameters() if p.requires_grad])
    norm = nn.utils.clip_grad_norm_(average_gradients(net), max_norm)
    optimiser.step()
    return norm


def check_finite(**tensors: Tensor) -> None:
    """Raise RunError in all processes if tensors hold NaN or infinity; the message names them. All
    are tested with one wait for the GPU."""
    tensors = {name: x for name, x in tensors.items() if x.is_floating_point()}
    found = read([has_no_number(x.detach()) for x in tensors.values()])
    wrong = [name for name, is_wrong in zip(tensors, found) if is_wrong]
    if total(len(wrong)):  # processes may have found different ones
        names = next(filter(None, gather(wrong)))
        others = f", nor {', '.join(names[1:5])}" if names[1:] else ""
        others += f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise RunError(f"{names[0]} is not finite{others}; the last checkpoint is from before.")


def read(numbers: list[Tensor]) -> list[Any]:
    """Tensors () of one dtype as Python numbers, with one wait for the GPU if one is used."""
    if not numbers:
        return []
    there = next((x.device for x in numbers if x.is_cuda), torch.device("cpu"))
    return torch.stack([send(x, there) for x in numbers]).tolist()


def as_numbers(scalars: dict[str, Tensor | float]) -> dict[str, float]:
    """Convert tensors () and numbers to floats, with one wait for the GPU if one is used."""
    tensors = {name: x for name, x in scalars.items() if isinstance(x, Tensor)}
    found = read([x.detach().double().view(()) for x in tensors.values()])
    numbers = dict(zip(tensors, found))
    return {name: float(numbers.get(name, x)) for name, x in scalars.items()}


def has_no_number(x: Tensor) -> Tensor:
    """Whether x holds NaN or infinity -> () bool; in pieces, as replays are large."""
    pieces = x.flatten().split(2**18)
    return torch.stack([~torch.isfinite(piece).all() for piece in pieces]).any()


# --- Files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError in this context into a RunError that names path."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}.") from None


def write_file(path: Path, fill: Callable[[Any], Any]) -> None:
    """Replace a file by what fill(file) writes; if that fails, the old file stays as it was."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            with part.open("wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except (OSError, RuntimeError) as error:  # torch wraps a full disk into the latter
            with contextlib.suppress(OSError):
                part.unlink()
            raise error if isinstance(error, OSError) else OSError(first_line(error)) from None


def write(path: Path, data: bytes) -> None:
    """Replace a file by data; if that fails, the old file stays as it was."""
    write_file(path, lambda file: file.write(data))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal; "" if there is no such file. RunError if it cannot be
    read: it may be whole, so nothing older must take its place."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return ""
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}.") from None


def is_intact(run_dir: Path, entry: dict[str, Any]) -> bool:
    """Whether the file that an entry of the index names has the SHA-256 of the entry."""
    return sha256_of(run_dir / entry["name"]) == entry["sha256"]


def read_index(run_dir: Path) -> list[dict[str, Any]]:
    """The entries of checkpoints.json, newest first; none if it is missing or garbled."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        index = json.loads((run_dir / "checkpoints.json").read_text())
        names = ("name", "timesteps", "sha256", "replays")
        return [{name: entry[name] for name in names} for entry in index]
    return []


def load_checkpoint(
    path: str, quiet: bool = False, with_replays: bool = False, alike: bool = False
) -> tuple[dict[str, Any], Path]:
    """Load the newest intact checkpoint of a run directory, or one file; return its state and the
    directory. with_replays: replays must be intact, too. UsageError if there is none. alike: all
    processes load it, and it must be the same in all."""
    file = Path(path)
    run_dir = file if file.is_dir() and not file.name.endswith(".pt") else file.parent
    for entry in read_index(run_dir):
        if file not in (run_dir, run_dir / entry["name"]):
            continue
        needed = [entry, *(entry["replays"] if with_replays else [])]
        damaged = [part["name"] for part in needed if not is_intact(run_dir, part)]
        if not damaged:
            state = read_state(run_dir / entry["name"])
            if alike:
                check_alike(state["timesteps"])
            return state, run_dir
        if not quiet:
            part = run_dir / damaged[0]
            fault = "damaged: its sha256 differs" if part.exists() else "missing"
            tell(f"{part} is {fault}.", file=sys.stderr)
    if not file.exists():
        raise UsageError(f"There is no {path}: it should be a run directory or a checkpoint.")
    if file.is_dir() and not any((run_dir / x).exists() for x in ("args.json", "checkpoints.json")):
        raise UsageError(f"{path} is no run directory and holds no checkpoint.")
    if file.is_file() and file.name not in {entry["name"] for entry in read_index(run_dir)}:
        raise UsageError(f"{path} is not in {run_dir / 'checkpoints.json'}, which has its sha256.")
    raise UsageError(f"{path} holds no intact checkpoint.")


def check_alike(timesteps: int) -> None:
    """UsageError if processes have read checkpoints of different steps, as while that run goes on
    or on a file system that shows files late."""
    if len(steps := set(gather(timesteps))) > 1:
        raise UsageError(f"Processes read checkpoints of different steps: {sorted(steps)}.")


def read_state(path: Path) -> dict[str, Any]:
    """Load the state in a checkpoint file, without executing code in it; UsageError if it is no
    checkpoint or has an older format, RunError if it cannot be read now."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version, _ = state.get("format"), state["args"]
    except (OSError, MemoryError) as error:  # the file may be whole
        reason = getattr(error, "strerror", None) or error or "no memory"
        raise RunError(f"{path} cannot be read: {reason}.") from None
    except Exception:  # whatever the file holds
        raise UsageError(f"{path} is no checkpoint of these scripts.") from None
    if version != FORMAT:
        commit = "the commit in its args.json"
        raise UsageError(f"{path} has an older format; it needs the scripts of {commit}.")
    return state


def lock(run_dir: Path) -> Any:
    """Lock a run directory until the returned file is closed; UsageError if it stays locked for
    half a second: a launcher that looks whether it is locked holds the lock for an instant."""
    with writing(run_dir / "lock"):
        file = (run_dir / "lock").open("a")
    for tries_left in reversed(range(6)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not tries_left:
                raise UsageError(f"{run_dir} is being written by another process.") from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            break
    return file


def describe_run(args: RunArgs, resolved: dict[str, Any]) -> dict[str, Any]:
    """The content of args.json; resolved: values that defaults like auto stand for."""
    script = script_of(type(args))
    about = {"script": script.stem, "resolved": resolved}
    about["commit"] = os.environ.get("UNSEEN_COMMIT", "")  # of the Dockerfile
    with contextlib.suppress(OSError):  # no git
        git = functools.partial(subprocess.run, capture_output=True, text=True, cwd=script.parent)
        found = git(["git", "describe", "--always", "--dirty"]).stdout.strip()
        is_tracked = not git(["git", "ls-files", "--error-unmatch", script.name]).returncode
        if found and not is_tracked and not found.endswith("-dirty"):
            found += "-dirty"  # a copy of a script, which no commit has
        about["commit"] = found or about["commit"]
    about["script_sha256"] = sha256_of(script)
    about["packages"] = {d.metadata["Name"]: d.version for d in distributions()}
    return json.loads(json.dumps(dataclasses.asdict(args) | about))  # tuples become lists


def latest_args(about: dict[str, Any]) -> dict[str, Any]:
    """The arguments of args.json (about) with what changed whenever the run was resumed."""
    for changes in about.get("resumed", []):
        about = about | changes
    return about


def new_run_dir(args: RunArgs, world: str) -> Path:
    """Create the run's directory, which may exist; UsageError if it cannot be made."""
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    script = script_of(type(args)).stem
    name = f"{world}__{script}__s{args.seed}__{when}__{secrets.token_hex(2)}"
    run_dir = Path(args.run_dir or f"runs/{name}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--run-dir {run_dir} cannot be made: {error.strerror}.") from None
    return run_dir


def evaluated_in(run_dir: Path) -> str:
    """The run that --eval-only --run-dir has evaluated in this directory; "" if there is none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((run_dir / "args.json").read_text()).get("eval_only") or ""
    return ""


def has_evaluation(run_dir: Path) -> bool:
    """Whether a run has finished, and its summary.json has rows of a final evaluation."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return bool(json.loads((run_dir / "summary.json").read_text()).get("eval"))
    return False


def pack(x: Any) -> Any:
    """Return what a checkpoint stores of x: state_dict() of networks, optimisers, worlds; parts()
    of objects that have it, fields of dataclasses, states of generators, and all else as it is."""
    if hasattr(x, "parts"):
        x = x.parts()
    if dataclasses.is_dataclass(x):
        x = vars(x)
    if isinstance(x, dict):
        return {name: pack(part) for name, part in x.items()}
    if isinstance(x, torch.Generator):
        return x.get_state()
    if isinstance(x, Tensor):
        return x.detach().cpu()
    return x.state_dict() if hasattr(x, "state_dict") else x


class Parts:
    """An object of which a checkpoint stores the attributes that are networks or optimisers."""

    def parts(self) -> dict[str, Any]:
        """{name of the attribute: the network or optimiser}. RunError if an attribute, list, tuple
        or dict holds others: several networks are an nn.ModuleList, a weight of its own is in an
        nn.ParameterList."""
        found = {name: part for name, part in vars(self).items() if hasattr(part, "state_dict")}
        known = {id(part) for part in found.values()}
        for name, x in vars(self).items():
            members = x if isinstance(x, list | tuple) else [x]
            members = x.values() if isinstance(x, dict) else members
            for part in members:
                learns = isinstance(part, Tensor) and part.requires_grad
                if learns or (hasattr(part, "state_dict") and id(part) not in known):
                    kind = f"a {type(x).__name__} that is not in a module"
                    raise RunError(f"no checkpoint would hold {name}, {kind}.")
        return found


def restore(x: Any, saved: Any, source: str) -> None:
    """Put what pack() returned back into x, in place; UsageError if it does not fit. saved is None
    where a checkpoint of weights only has left x out."""
    if saved is None:
        leave_out(x)
        return
    if hasattr(x, "parts"):
        x = x.parts()
    if dataclasses.is_dataclass(x):
        x = vars(x)
    try:
        if isinstance(x, torch.Generator):
            x.set_state(saved)
        elif not isinstance(x, dict):
            x.load_state_dict(saved)
        for name in x if isinstance(x, dict) else ():
            if is_plain(x[name]):
                device = getattr(x[name], "device", None)
                x[name] = saved[name].to(device) if device is not None else saved[name]
            else:
                restore(x[name], saved[name], source)
    except KeyError as error:  # of a script as it was before it had this part
        raise UsageError(f"{source} does not fit: it has no part '{error.args[0]}'.") from None
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
        why = "; ".join(lines[1:] or lines)  # torch's first line of several is a heading
        why = why if len(why) <= 240 else f"{why[:240]} ..."
        raise UsageError(f"{source} does not fit this script's networks: {why}.") from None


def leave_out(x: Any) -> None:
    """Take the weights of all networks in x away, so that using a network is an error."""
    if hasattr(x, "parts"):
        x = x.parts()
    if isinstance(x, nn.Module):
        x.to_empty(device="meta")
    for part in x.values() if isinstance(x, dict) else ():
        leave_out(part)


def is_plain(x: Any) -> bool:
    """Whether a checkpoint stores x itself, not its parts."""
    has_parts = hasattr(x, "parts") or hasattr(x, "state_dict") or dataclasses.is_dataclass(x)
    return isinstance(x, Tensor) or not (has_parts or isinstance(x, (dict, torch.Generator)))


def tensors_in(x: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors in x, which pack() returned; `where` is the name of x."""
    if isinstance(x, Tensor):
        yield where, x
    for name, part in x.items() if isinstance(x, dict) else ():
        yield from tensors_in(part, f"{where}.{name}" if where else str(name))


# --- Log ------------------------------------------------------------------------------------------


class Logger:
    """Write scalars to metrics.jsonl, TensorBoard and, with --track, Weights & Biases."""

    def __init__(
        self,
        args: RunArgs,
        run_dir: Path,
        timesteps: int,
        line: tuple[str, ...],
        keep_whole: bool = False,
    ):
        """timesteps: of the checkpoint that the run continues. keep_whole: there are newer ones. As
        they can be resumed until the first new save, the old log is kept until then, too."""
        from torch.utils.tensorboard import SummaryWriter

        self.dir, self.path = run_dir, run_dir / "metrics.jsonl"
        self.whole = run_dir / "metrics-whole.jsonl"
        self.line = () if sys.stderr.isatty() else line  # a terminal has a progress bar
        self.wandb = start_wandb(args, run_dir) if args.track else None
        self.evaluated: set[int] = set()  # steps with an evaluation during training
        if self.whole.is_file():  # the last resumption ended before it saved anything
            self.whole.replace(self.path)
        if self.path.is_file():
            if keep_whole:
                write(self.whole, self.path.read_bytes())
            self.forget_after(timesteps)
        with writing(run_dir):
            self.board = SummaryWriter(run_dir, purge_step=timesteps + 1)

    def forget_after(self, timesteps: int) -> None:
        """Drop lines that will be written again, which are those after `timesteps` and those of the
        final evaluation. Also drop incomplete lines, as a crash of the machine leaves them."""
        kept = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                scalars = json.loads(line)
                is_past = scalars["timesteps"] <= timesteps
                is_final = any(name.startswith("final/") for name in scalars)
                if is_past and not is_final and line.endswith(b"\n"):
                    kept.append(line)
                    if any(name.startswith("eval/") for name in scalars):
                        self.evaluated.add(scalars["timesteps"])
        write(self.path, b"".join(kept))

    def log(self, timesteps: int, scalars: dict[str, float], media: Any = None) -> None:
        """Write these scalars to all logs, and self.line to standard output."""
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"timesteps": timesteps, **scalars}) + "\n")
        line = [f"{name} {scalars[name]:.4g}" for name in self.line if name in scalars]
        if line:
            tell(f"step {timesteps}  " + "  ".join(line))
        with writing(self.dir):
            for name, x in scalars.items():
                self.board.add_scalar(name, x, timesteps)
        if self.wandb:
            self.wandb.log({"timesteps": timesteps, **scalars, **(media or {})})

    def sync(self) -> None:
        """Put the log on the disk: no checkpoint may outlive the lines before it."""
        if self.path.is_file():  # there is none before the first line
            with writing(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())

    def log_results(
        self, timesteps: int, kind: str, results: dict[str, dict[str, float]], text: str
    ) -> None:
        """Log the figures of an evaluation ("eval" or "final"), to wandb table and videos, too."""
        media = {}
        if self.wandb:  # no wandb.Table, which would wait for the server
            import wandb

            media[f"{kind}/table"] = wandb.Html(f"<pre>{text}</pre>")
            for path in (self.dir / "videos").glob(f"{kind}-{timesteps}-*.mp4"):
                media[f"video/{path.stem}"] = wandb.Video(str(path), format="mp4")
        figures = {}
        for row, numbers in results.items():
            figures |= {f"{kind}/{row}/{name}": x for name, x in numbers.items()}
        self.log(timesteps, figures, media)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def wandb_id(run_dir: Path) -> str:
    """An id that no other run has, though its directory may have the same name; --resume keeps
    it."""
    path = run_dir / "wandb_id.txt"
    if not path.exists():
        write(path, f"{run_dir.name}-{secrets.token_hex(4)}".encode())
    return path.read_text()


def start_wandb(args: RunArgs, run_dir: Path) -> Any:
    """Start a wandb run; it is offline if the server does not answer within --wandb-timeout."""
    import http.client
    import urllib.error
    import urllib.request

    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else wandb waits past every timeout
    import wandb

    limit = args.wandb_timeout
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    options = {
        "project": args.wandb_project,
        "name": run_dir.name,
        "id": wandb_id(run_dir),
        "config": dataclasses.asdict(args),
        "dir": run_dir,
        "settings": {
            "console": "off",
            "silent": True,
            "init_timeout": limit,
            "finish_timeout": limit,
        },
    }
    try:
        if args.wandb_mode == "online":
            with contextlib.suppress(urllib.error.HTTPError):  # HTTP errors are answers, too
                urllib.request.urlopen(url, timeout=limit).close()
        run = wandb.init(mode=args.wandb_mode, resume="allow", **options)
    except (OSError, ValueError, http.client.HTTPException, wandb.Error) as error:
        text = f"wandb at {url}: {first_line(error)}; logging offline, for `wandb sync`."
        tell(text, file=sys.stderr)
        wandb.teardown()  # else its service still holds the run's name
        run = wandb.init(mode="offline", **options)
    run.define_metric("*", step_metric="timesteps")
    return run


# --- Evaluation -----------------------------------------------------------------------------------


class EvaluationStopped(Exception):
    """Raised by Evaluation.progress() when the run is asked to stop."""


class Evaluation:
    """What a script's evaluate() has to know, and a progress bar for it.

    kind       "eval" during training or "final"; these two play different episodes
    episodes   number of episodes for each row of the table
    rng        a generator, equal for the same seed, step and kind
    run_dir    where files of the evaluation go; None: nowhere
    videos     the folder for films, whose names begin with `stem`; None: no films
    """

    INTERVAL = 15.0  # seconds between lines where there is no terminal

    def __init__(
        self,
        args: RunArgs,
        kind: str,
        timesteps: int,
        run_dir: Path | None,
        is_stopped: Callable[[], bool] = lambda: False,
    ):
        self.kind, self.timesteps, self.run_dir = kind, timesteps, run_dir
        self.is_stopped = is_stopped
        self.final = kind == "final"
        self.episodes = args.final_episodes if self.final else args.eval_episodes
        self.rng = np.random.default_rng((args.seed, timesteps, int(self.final)))
        self.videos = run_dir / "videos" if run_dir and args.capture_video else None
        self.stem = f"{kind}-{timesteps}"
        self.said = time.monotonic()
        self.bar = tqdm(
            total=0, desc=f"{kind} evaluation", unit=" episodes", leave=False, disable=None
        )
        self.expected = self.played = 0

    def expect(self, episodes: int) -> None:
        """Announce this many more episodes that will be played."""
        self.expected += episodes
        self.bar.total = self.expected
        self.bar.refresh()

    def progress(self, episodes: int = 1) -> None:
        """Report a step in which this many episodes have ended. Raises EvaluationStopped if the run
        is to stop: a step is a place where nothing is half done, which a signal's is not."""
        if self.is_stopped():
            raise EvaluationStopped
        self.played += episodes
        self.bar.update(episodes)
        now = time.monotonic()
        if self.bar.disable and now > self.said + self.INTERVAL:
            tell(f"{self.kind} evaluation: {self.played} of {self.expected} episodes")
            self.said = now

    def close(self) -> None:
        self.bar.close()


Judge = Callable[[Evaluation], dict[str, dict[str, float]]]


# --- Run ------------------------------------------------------------------------------------------


class Run:
    """A run: its progress, what is due, its files and processes. The loop is the script's."""

    def __init__(
        self,
        args: RunArgs,
        table: Callable[[dict[str, dict[str, float]]], str],
        line: tuple[str, ...] = (),
    ):
        """table: makes Markdown of an evaluation's results. line: scalars for standard output."""
        self.args, self.table, self.line = args, table, line
        self.rank, self.size, self.device = start_processes(args)
        self.stack = contextlib.ExitStack()  # contexts that end with the run
        self.source = args.resume or args.eval_only
        self.saved: dict[str, Any] = {}  # the state in the checkpoint that the run continues
        self.dir = Path()
        self.known: list[dict[str, Any]] = []  # checkpoints of this run: index entries
        if args.resume and self.rank == 0 and Path(args.resume).exists():
            given = Path(args.resume)
            self.stack.enter_context(lock(given if given.is_dir() else given.parent))
        if self.source:
            resumes = bool(args.resume)
            self.saved, self.dir = load_checkpoint(self.source, with_replays=resumes)
        self.iteration = self.saved.get("iteration", 0)
        self.timesteps = self.saved.get("timesteps", 0)
        self.began = time.monotonic() - self.saved.get("wall_s", 0)
        self.before = self.logged = self.timesteps  # before this iteration; at the last log line
        self.saved_at = self.timesteps if self.saved else -1
        self.noted: dict[str, list[Tensor]] = collections.defaultdict(list)
        self.laps: dict[str, float] = collections.defaultdict(float)
        self.mark = self.busy = 0.0  # time of the last lap; seconds of iterations since a log line
        self.stopped = False
        self.judge: Judge | None = None  # the script's, set before begin()
        self.logger: Logger | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def close_at_end(self, worlds: Any) -> Any:
        """Enter a context manager, e.g. worlds, that is left when the run ends."""
        return self.stack.enter_context(worlds)

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.rank == 0:
            tell(text)

    def own_share(self, args: Any, *names: str) -> Any:
        """Return args with the named values, which count over all processes, divided by the number
        of processes; UsageError if a value is no multiple of that number."""
        shares = {}
        for name in names:
            shares[name], rest = divmod(value := getattr(args, name), self.size)
            check([(rest, f"{as_flag(name)} {value} is no multiple of {self.size} processes")])
        return dataclasses.replace(args, **shares)

    def in_first(self, function: Callable[[], Any]) -> Any:
        """Call function() in the first process; all processes wait for its result and return it."""
        return gather(function() if self.rank == 0 else None)[0]

    def restore(self, **parts: Any) -> None:
        """Restore objects that are equal in all processes, from --resume or --eval-only."""
        for name, part in parts.items() if self.saved else ():
            restore(part, self.saved[name], self.source)

    def restore_own(self, own: dict[str, Any]) -> None:
        """Restore the objects of this process from --resume or --eval-only, as begin() does."""
        if self.saved:
            number = self.rank if self.args.resume else 0  # the first one evaluates
            restore(own, self.saved["ranks"][number], self.source)

    def begin(
        self,
        world: str,
        parts: dict[str, Any],
        own: dict[str, Any],
        replays: dict[str, Any] | None = None,
        **resolved: Any,
    ) -> None:
        """Open directory and log. A new run saves its first checkpoint; a resumed one restores
        `own` and replays, and does a missed evaluation. parts: equal in all processes; own: not.
        replays: objects with filled(), which returns {name: rows in use}, and refill() of the same.
        resolved: for args.json, values that defaults stand for."""
        self.parts, self.own, self.replays = parts, own, replays or {}
        resolved = {"device": str(self.device), "processes": self.size} | resolved
        if self.saved:
            self.resume(resolved)
        elif self.rank == 0:
            self.make_dir(world, resolved)
        self.dir = gather(self.dir)[0]  # the first process has named it
        if self.rank == 0:
            newest = max((entry["timesteps"] for entry in read_index(self.dir)), default=0)
            is_older = self.timesteps < newest
            self.logger = Logger(self.args, self.dir, self.timesteps, self.line, is_older)
            self.stack.callback(self.logger.close)
        if not self.saved:
            self.save()
        self.bar = tqdm(
            total=self.args.total_timesteps,
            initial=self.timesteps,
            unit=" steps",
            disable=True if self.rank else None,  # None: where there is no terminal
        )
        self.stack.callback(self.bar.close)
        verb = "goes on" if self.saved else "begins"
        self.say(f"{self.dir}, step {self.timesteps}: training {verb}")
        self.catch_signals()
        if self.logger and self.saved and self.timesteps not in self.logger.evaluated:
            self.before = self.saved["before"]
            if self.is_due(self.args.eval_every):  # the run ended before or in this evaluation
                self.evaluate("eval")

    def make_dir(self, world: str, resolved: dict[str, Any]) -> None:
        """Create and lock the run's directory, write args.json; UsageError if it holds a run."""
        self.dir = new_run_dir(self.args, world)
        self.stack.enter_context(lock(self.dir))
        if (self.dir / "checkpoints.json").exists():
            raise UsageError(f"{self.dir} holds a run already: --resume it, or name another.")
        other = evaluated_in(self.dir)
        if other and Path(other).resolve() != Path(self.source).resolve():
            raise UsageError(f"{self.dir} holds an evaluation of {other}: name another directory.")
        files = [self.dir / name for name in ("summary.json", "metrics.jsonl")]
        results = [x.name for x in files if x.is_file() and x.stat().st_size]
        if results and not other:
            sentence = "of a run whose checkpoints are gone: name another directory"
            raise UsageError(f"{self.dir} holds {' and '.join(results)} {sentence}.")
        about = describe_run(self.args, resolved)
        write(self.dir / "args.json", json.dumps(about, indent=1).encode())

    def resume(self, resolved: dict[str, Any]) -> None:
        """Restore this process's objects and replays; UsageError for another number of ranks, or if
        they read different checkpoints."""
        check_alike(self.timesteps)
        if (ranks := len(self.saved["ranks"])) != self.size:
            raise UsageError(f"{ranks} processes began this run; {self.size} cannot go on.")
        self.restore_own(self.own)
        for name, x in self.saved["ranks"][self.rank]["noted"].items():
            self.noted[name] = list(x.to(self.device).unbind())
        if self.replays:
            path = self.dir / self.replay_name(self.timesteps)
            filled = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            for name, replay in self.replays.items():
                replay.refill(filled[name])
        for entry in read_index(self.dir):
            if entry["timesteps"] <= self.timesteps and is_intact(self.dir, entry):
                self.known.append(entry)
        if self.rank == 0:
            goes_on = self.timesteps < self.args.total_timesteps
            if not goes_on and not self.args.final_episodes and has_evaluation(self.dir):
                raise UsageError(f"{self.dir} has finished: --final-episodes 0 has nothing to do.")
            self.record_changes(resolved)
            if goes_on:
                (self.dir / "summary.json").unlink(missing_ok=True)

    def record_changes(self, resolved: dict[str, Any]) -> None:
        """Add to the list "resumed" in args.json what it says otherwise from here on."""
        path = self.dir / "args.json"
        with contextlib.suppress(OSError, ValueError):  # it is lost or damaged: the run goes on
            about = json.loads(path.read_text())
            before = latest_args(about)
            changed = {
                name: x
                for name, x in describe_run(self.args, resolved).items()
                if name not in ("resume", "run_dir") and before.get(name) != x
            }
            if "script_sha256" in before.keys() & changed.keys():
                tell(f"note: {script_of(type(self.args))} has changed since this run was trained")
            if changed:
                about.setdefault("resumed", []).append({"timesteps": self.timesteps} | changed)
                write(path, json.dumps(about, indent=1).encode())

    def catch_signals(self) -> None:
        """Let Ctrl-C, SIGTERM and SIGHUP stop the run after its iteration, an evaluation after its
        step. A second Ctrl-C, and any signal that comes SAME_SIGNAL after the first, has its usual
        effect (the latter not where there are several processes). Ignored ones stay so."""
        old, first = {}, math.inf  # first: when the first signal came
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                old[number] = handler

        def stop(number: int, frame: Any) -> None:
            nonlocal first
            # A launcher or torchrun and a cluster's manager may both send SIGTERM: one request.
            is_second = self.size == 1 and time.monotonic() - first > SAME_SIGNAL
            first = min(first, time.monotonic())
            if number == signal.SIGINT:  # somebody types: the next one is meant
                signal.signal(number, old[number])
            if is_second:
                for each, handler in old.items():
                    signal.signal(each, handler)
                signal.raise_signal(number)
            if self.rank == 0 and not self.stopped:
                # Not by print(), which a signal may interrupt; the terminal may be gone.
                with contextlib.suppress(OSError):
                    os.write(2, STOPPING)
            self.stopped = True

        for number, handler in old.items():
            signal.signal(number, stop)
            self.stack.callback(signal.signal, number, handler)

    def goes_on(self) -> bool:
        """Whether all processes do another iteration; if not, a checkpoint is saved."""
        stops = self.stopped  # a signal from here on counts the next time, in all processes
        if self.size > 1:
            stops = bool(sum_over_processes(torch.tensor(int(stops), device=self.device)))
        self.stopped |= stops
        if stops or self.timesteps >= self.args.total_timesteps:
            self.save()
            return False
        self.before, self.mark = self.timesteps, time.monotonic()
        return True

    def lap(self, name: str) -> None:
        """Log the seconds since the last lap, or since the iteration began, under this name."""
        now = time.monotonic()
        self.laps[name] += now - self.mark
        self.busy += now - self.mark
        self.mark = now

    def advance(self, steps: int) -> None:
        """End an iteration that took this many environment steps, summed over processes."""
        self.iteration += 1
        self.timesteps += steps
        now = time.monotonic()
        self.busy += now - self.mark
        self.mark = now
        self.bar.update(steps)

    def is_due(self, every: int) -> bool:
        """Whether the last iteration reached a multiple of `every` steps; never if it is 0."""
        return every > 0 and self.timesteps // every > self.before // every

    def note(self, scalars: dict[str, Tensor]) -> None:
        """Keep these scalars; the next line of the log gets their means."""
        for name, x in scalars.items():
            self.noted[name].append(x.detach())

    def log(self, scalars: dict[str, Tensor | float]) -> None:
        """Write a log line, with means of what was noted since the last line. sps: environment
        steps per second of iterations, without evaluations and checkpoints."""
        means = {name: stacked(x).mean() for name, x in self.noted.items()}
        seconds = dict(self.laps) | {"wall_s": time.monotonic() - self.began}
        seconds["sps"] = (self.timesteps - self.logged) / max(self.busy, 1e-9)
        if self.logger:
            figures = as_numbers(means | scalars)
            self.logger.log(self.timesteps, figures | seconds)
        self.logged, self.busy = self.timesteps, 0.0
        self.noted.clear()
        self.laps.clear()

    def replay_name(self, timesteps: int) -> str:
        rank = f"-{self.rank}" if self.size > 1 else ""
        return f"replay-{timesteps}{rank}.pt"

    def save(self) -> None:
        """Save a checkpoint unless this step has one; RunError if a number is not finite. All
        processes wait until it is written: who leaves or resumes before would end or miss it."""
        if self.timesteps == self.saved_at:
            return
        parts = pack(self.parts)
        noted = {name: stacked(x) for name, x in self.noted.items()}
        own = pack(self.own) | {"noted": pack(noted)}
        filled = {name: replay.filled() for name, replay in self.replays.items()}
        check_finite(**dict(tensors_in(parts | own | {"replay": filled}, "")))
        replay = [self.save_replay(filled)] if filled else []
        ranks, replays = gather(own), gather(replay)
        if self.rank == 0:
            state = parts | {"format": FORMAT, "ranks": ranks}
            state |= {"script": script_of(type(self.args)).stem}
            state |= {"args": dataclasses.asdict(self.args)}
            state |= {"iteration": self.iteration, "timesteps": self.timesteps}
            state |= {"before": self.before}
            state |= {"wall_s": time.monotonic() - self.began}
            self.save_state(state, [entry for replay in replays for entry in replay])
        gather(None)
        self.saved_at = self.timesteps

    def save_replay(self, filled: dict[str, dict[str, Tensor]]) -> dict[str, str]:
        """Write this process's replays without copying them; return the file's name and sha256."""
        exact = {
            # A tensor of its own storage: torch writes the whole storage of a view.
            name: {key: torch.from_numpy(x.cpu().numpy()) for key, x in tensors.items()}
            for name, tensors in filled.items()
        }
        path = self.dir / self.replay_name(self.timesteps)
        write_file(path, lambda file: torch.save(exact, file))
        return {"name": path.name, "sha256": sha256_of(path)}

    def save_state(self, state: dict[str, Any], replays: list[dict[str, str]]) -> None:
        """Write a checkpoint, then the index of the last two checkpoints; delete older files."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        entry = {
            "name": f"checkpoint-{self.timesteps}.pt",
            "timesteps": self.timesteps,
            "sha256": hashlib.sha256(data).hexdigest(),
            "replays": replays,
        }
        write(self.dir / entry["name"], data)
        self.logger.sync()
        if self.saved and self.saved_at == self.saved["timesteps"]:
            self.write_index()  # this forgets newer checkpoints, which the run has left behind
            self.logger.whole.unlink(missing_ok=True)
        others = [old for old in self.known if old["name"] != entry["name"]]
        self.known = [entry, *others[:1]]
        self.write_index()
        kept = {file["name"] for old in self.known for file in (old, *old["replays"])}
        for path in self.dir.iterdir():  # copies by other names stay
            if OWN_FILE.fullmatch(path.name) and path.name not in kept and path.is_file():
                path.unlink()

    def write_index(self) -> None:
        write(self.dir / "checkpoints.json", json.dumps(self.known, indent=1).encode())

    def evaluate(self, kind: str) -> dict[str, dict[str, float]]:
        """Call judge() in the first process; print, log and return its results. Returns {} in other
        processes, and if the run is stopped before or meanwhile."""
        if self.rank or self.stopped:
            return {}
        folder = None if self.keeps_out() else self.dir
        evaluation = Evaluation(self.args, kind, self.timesteps, folder, lambda: self.stopped)
        try:
            with contextlib.closing(evaluation):
                results = self.judge(evaluation)
        except EvaluationStopped:
            return {}
        except OSError as error:
            if "ffmpeg" not in str(error):  # envs/films.py
                raise
            raise RunError(f"{error}.") from None
        text = self.table(results)
        tell(f"{self.dir}, step {self.timesteps}\n{text}")
        if self.logger:
            self.logger.log_results(self.timesteps, kind, results, text)
        return results

    def keeps_out(self) -> bool:
        """Whether nothing may be written there, as it has weights only, which others read, too."""
        return bool(self.saved.get("weights_only") and not self.args.run_dir)

    def evaluate_only(self) -> int:
        """Do the final evaluation without training; return the exit code. With --run-dir, its
        files go there, with args.json and summary.json."""
        films = self.args.capture_video and self.keeps_out()
        check([(films, f"--capture-video: {self.source} stays as it is; name a --run-dir, too")])
        if self.args.run_dir and self.rank == 0:
            self.make_dir("", {})
        results = self.evaluate("final")
        if self.args.run_dir:
            self.write_summary(results)
        return FINISHED

    def finish(self) -> int:
        """Do the final evaluation and write summary.json, unless the run was stopped; return the
        exit code."""
        results = {}
        if self.args.final_episodes:
            results = self.evaluate("final")
        if self.stopped:
            self.say(f"{self.dir}, step {self.timesteps}: saved, --resume {self.dir} goes on")
            return STOPPED
        self.write_summary(results)
        return FINISHED

    def write_summary(self, results: dict[str, dict[str, float]]) -> None:
        """Write summary.json: environment steps, wall-clock seconds and the final evaluation."""
        if self.rank == 0:
            summary = {"timesteps": self.timesteps, "wall_s": time.monotonic() - self.began}
            data = json.dumps(summary | {"eval": results}, indent=1).encode()
            write(self.dir / "summary.json", data)
