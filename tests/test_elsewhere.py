"""Every script on a GPU that is not there (elsewhere.py): nothing mixes devices or does there what
CUDA cannot, the CPU goes on with what was trained there, and waits are counted and bounded."""

import dataclasses
import hashlib
import importlib
import json
import re
import zipfile
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import harness

import pytest
import torch
import tracked
from all_scripts import (
    MELTINGPOT,
    OFF_POLICY,
    ON_POLICY,
    PARTICLE,
    SCRIPTS,
    command,
    longer,
    weights,
)
from elsewhere import Elsewhere, pretended_gpu
from runs import BIDIST, MAPPO, index, script

from envs.particle import worlds

ROOT = Path(__file__).resolve().parents[1]
MRA = "mra_maddpg_particle"
MADDPG, MAAC, RL2, EPC = (f"baselines.{name}_particle" for name in ("maddpg", "maac", "rl2", "epc"))
REFIL = "baselines.refil_smac"
# Evaluations of few steps: 5 of 20, and with two z of six.
SHORT = dict.fromkeys((MADDPG, MAAC), ("--max-episode-steps", 5))
SHORT[MRA] = (*SHORT[MADDPG], "--latent-size", 2)


@pytest.fixture(autouse=True)
def no_list_of_packages(monkeypatch):
    """It takes longer than a tiny run."""
    monkeypatch.setattr(harness, "distributions", lambda: [])


# --- The pretence ---------------------------------------------------------------------------------


def test_it_refuses_what_a_gpu_refuses(monkeypatch):
    with pretended_gpu(monkeypatch):
        there = torch.arange(4.0, device="cuda")
        assert isinstance(there, Elsewhere) and there.device == torch.device("cuda:0")
        with pytest.raises(RuntimeError, match="tensors of the CPU"):
            there + torch.ones(4)
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
        ids = torch.zeros(4, dtype=torch.uint16).to("cuda")
        assert ids[1:].view(3, 1).cpu().shape == (3, 1)
        for operation in (lambda: ids[torch.tensor([0, 1])], lambda: torch.stack([ids, ids])):
            with pytest.raises(NotImplementedError, match="not implemented"):
                operation()


def test_it_computes_what_the_cpu_computes(monkeypatch):
    """Layers, a recurrent one too, gradients, views, in-place writes, and an optimiser."""
    torch.manual_seed(0)
    nets = [torch.nn.GRU(3, 4) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(5, 2, 3)

    def learn(net, x):
        optimiser = torch.optim.Adam(net.parameters(), 0.1, fused=True)
        for _ in range(3):
            y = net(x)[0].clone()
            y[:, 1] *= 2
            y[y < 0] = 0
            optimiser.zero_grad()
            y.square().sum().backward()
            optimiser.step()
        return [p.detach().cpu() for p in net.parameters()]

    expected = learn(nets[0], x)
    with pretended_gpu(monkeypatch):
        found = learn(nets[1].to("cuda"), x.to("cuda"))
    for one, other in zip(found, expected):
        assert not isinstance(one, Elsewhere) and torch.allclose(one, other, atol=1e-5)


def test_it_indexes_as_the_cpu_does(monkeypatch):
    """By tensors of either device, lists and masks, read and written."""
    here = torch.arange(12.0).view(3, 4)
    rows, mask = torch.tensor([0, 2]), torch.tensor([True, False, True])
    with pretended_gpu(monkeypatch):
        there = here.to("cuda")
        for index in (
            rows,
            [0, 2],
            mask,
            (slice(None), rows),
            (rows, [1, 3]),
            (rows[:, None], rows),
        ):
            assert torch.equal(there[index].cpu(), here[index])
            one, other = there.clone(), here.clone()
            one[index] = other[index] = -1.0
            assert torch.equal(one.cpu(), other)
        assert torch.equal(there[rows.to("cuda")].cpu(), here[rows])


def test_it_counts_waits(monkeypatch):
    with pretended_gpu(monkeypatch) as gpu:
        x = torch.arange(4.0, device="cuda")
        x.add_(1).view(2, 2)[0] = 5.0
        there = torch.arange(2, device="cuda")
        x = x[there] * torch.ones((), device="cuda")
        assert gpu.waits.total() == 0
        looks = (x.sum().item, x.nonzero, x.cpu, lambda: x[x > 1], x.tolist)
        here = torch.tensor([0, 1])
        sends = (lambda: here.to("cuda"), lambda: x[here], lambda: x[[0, 1]])
        sends += (lambda: torch.tensor([1.0], device="cuda"), lambda: x.new_tensor([1.0]))
        sends += (lambda: x.copy_(here), lambda: here.to("cuda", non_blocking=True))
        sends += (lambda: here.pin_memory().to("cuda"),)
        for wait in (*looks, *sends):
            before = gpu.waits.total()
            wait()
            assert gpu.waits.total() == before + 1
        before = gpu.waits.total()
        assert harness.send(here, torch.device("cuda")).tolist() == [0, 1]
        assert gpu.waits.total() == before + 1, "of reading it"
        assert gpu.places == {"tests": gpu.waits.total()}


# --- The harness ----------------------------------------------------------------------------------


def test_several_numbers_are_read_with_one_wait(monkeypatch):
    with pretended_gpu(monkeypatch) as gpu:
        scalars = {"a": torch.tensor(0.1), "b": 2, "c": torch.ones((), device="cuda")}
        scalars |= {"d": torch.full((), 3, device="cuda")}
        found = harness.as_numbers(scalars)
        assert found == {"a": float(torch.tensor(0.1)), "b": 2.0, "c": 1.0, "d": 3.0}
        assert list(found) == [*"abcd"] and gpu.waits.total() == 1
        harness.check_finite(a=scalars["a"], c=scalars["c"])
        assert gpu.waits.total() == 2
        with pytest.raises(harness.RunError, match="c is not finite"):
            harness.check_finite(a=scalars["a"], c=scalars["c"] / 0)


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_not_used_where_it_is_emulated(fast, monkeypatch):
    asked = []

    def is_supported(including_emulation=True):
        asked.append(including_emulation)
        return fast or including_emulation

    with pretended_gpu(monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
        assert harness.has_bf16(torch.device("cuda")) == fast
    assert asked == [False]


def test_tf32_is_a_flag(monkeypatch):
    """Off by default, also in cuDNN, which has it on. Both ways the compiler can ask for it."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        with pretended_gpu(monkeypatch):
            for tf32 in (False, True):
                harness.start_processes(harness.RunArgs(device="cuda", tf32=tf32))
                assert torch.backends.cuda.matmul.allow_tf32 == tf32
                assert torch.backends.cudnn.allow_tf32 == tf32
                assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_which_device(monkeypatch):
    """auto is CUDA where there is a GPU; cuda:1 is the second, and becomes what "cuda" means."""
    chosen = []
    with pretended_gpu(monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
        for asked in ("auto", "cuda", "cuda:1", "cpu"):
            chosen.append(str(harness.start_processes(harness.RunArgs(device=asked))[2]))
        with pytest.raises(harness.UsageError, match="cuda:2: there are 2 here"):
            harness.start_processes(harness.RunArgs(device="cuda:2"))
    assert chosen == [*["cuda:0"] * 4, *["cuda:1"] * 2, "cpu"]


def test_files_are_loaded_to_the_cpu():
    """Whatever device they were written on, by everything that is not a test."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")]
    files += [*ROOT.glob("envs/**/*.py"), *ROOT.glob("experiments/**/*.py")]
    calls = [x for file in files for x in re.findall(r"torch\.load\([^)]*\)", file.read_text())]
    assert len(calls) >= 2
    assert [x for x in calls if 'map_location="cpu", weights_only=True' not in x] == []


def as_a_gpu_writes(path):
    """Let a file say that its tensors were on a GPU. torch does not load it without CUDA, unless
    it is told where to."""
    with zipfile.ZipFile(path) as old:
        parts = {part.filename: old.read(part) for part in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, data in parts.items():
            if name.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in data
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(name, data)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be loaded to the GPU")
@pytest.mark.parametrize("name", [MADDPG, pytest.param(REFIL, marks=pytest.mark.long)])
def test_a_gpus_checkpoint_and_replay_resume_on_a_cpu(name, tmp_path):
    """To the same bits as those of a CPU."""
    found = []
    for where in ("cpu", "gpu"):
        run_dir = tmp_path / where
        assert script(name).main(command(name, run_dir, "--device", "cpu")) == 0
        if where == "gpu":
            entries = index(run_dir)
            files = [file for entry in entries for file in (entry, *entry["replays"])]
            for file in files:
                path = run_dir / file["name"]
                as_a_gpu_writes(path)
                file["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
                with pytest.raises(RuntimeError, match="CUDA"):
                    torch.load(path, weights_only=True)
            assert len(files) == 2 * len(entries)
            (run_dir / "checkpoints.json").write_text(json.dumps(entries))
        assert script(name).main(longer(run_dir)) == 0
        found.append(weights(run_dir))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- The scripts ----------------------------------------------------------------------------------


def test_no_script_is_missing():
    files = tracked.files("*.py", "baselines/*.py")
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    assert names - {"harness"} == set(SCRIPTS) == {case.split()[0] for case in HOW}
    assert set(WAITS) == set(HOW)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_there_and_here(name, tmp_path, monkeypatch):
    """Trains, evaluates, saves; a CPU resumes it, and it a CPU's. The first steps are those of a
    CPU, but for rounding (in Melting Pot a CPU has kernels of its own)."""
    script = importlib.import_module(name)
    worlds._constant.cache_clear()
    short = SHORT.get(name, ())
    with monkeypatch.context() as patch, pretended_gpu(patch) as gpu:
        assert script.main(command(name, tmp_path / "there", "--device", "cuda", *short)) == 0
    print(f"{name}: {gpu.waits.total()} waits {dict(gpu.waits)}, {dict(gpu.places)}")
    assert gpu.waits.total() > 0
    assert script.main(command(name, tmp_path / "here", "--device", "cpu", *short)) == 0
    for one, other in zip(weights(tmp_path / "there"), weights(tmp_path / "here"), strict=True):
        assert one.shape == other.shape and (one - other).abs().mean() < 1e-3
    assert script.main(longer(tmp_path / "there")) == 0
    with pretended_gpu(monkeypatch):
        assert script.main(longer(tmp_path / "here", "cuda")) == 0


# Of no account for a device, or not for this one.
ELSEWHERE = {"preset", "scenario", "enemy_ai", "backend", "bots", "track", "wandb_mode"}
ELSEWHERE |= {"capture_video", "tf32", "compile"}
NEEDS = {  # flags that are refused alone
    "--rescale": "--scenario resource",
    "--egocentric": "--scenario resource",
    "--rollout windows": "--no-recurrent",
    "--policy greedy": "--regularizer none",
    "--no-share-parameters": "--populations 3 --eval-populations",
    "--latent-prior told": "--latent-size 2",
}
OF_NUMBERS = {  # flags with numbers that choose other code
    BIDIST: [
        *(f"--k-d 1 {x}" for x in ("", "--distilled-width 0.5", "--reverse-mode entropy")),
        *(f"--k-d 1 --reverse-mode {x}" for x in ("random", "noise")),
        "--copy-every 1",
        "--weight-cap 2 --advantages-per-population",
    ],
    MRA: ["--latent-size 1 --phi-gradient actor", "--value-layers 1", "--reptile-step 0.5"],
    "mipi_refil_smac": ["--policy exact --ba-iterations 4", "--replay-window 4", "--alpha-i 0.1"],
    REFIL: ["--replay-window 4", "--final-share 0.1"],
    "baselines.collaq_smac": ["--replay-window 4"],
}


def one_by_one(script, name):
    """Each switch and choice of a script that is not its default, and those of numbers."""
    hints = get_type_hints(script.Args)
    for field in dataclasses.fields(script.Args):
        flag, kind = field.name.replace("_", "-"), hints[field.name]
        if field.name in ELSEWHERE:
            continue
        if kind is bool:
            yield f"--no-{flag}" if field.default else f"--{flag}"
        elif get_origin(kind) is Literal:
            yield from (f"--{flag} {x}" for x in get_args(kind) if x != field.default)
    yield from OF_NUMBERS.get(name, ())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a run per flag
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_there(name, tmp_path, monkeypatch):
    """No branch of a script mixes devices."""
    script = importlib.import_module(name)
    cases = [f"{x} {NEEDS.get(x, '')}" for x in one_by_one(script, name)]
    assert len(cases) > 2
    for number, case in enumerate(cases):
        worlds._constant.cache_clear()
        flags = (*SHORT.get(name, ()), *case.split())
        argv = command(name, tmp_path / str(number), "--device", "cuda", *flags)
        with monkeypatch.context() as patch, pretended_gpu(patch):
            assert script.main(argv) == 0, case


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")  # as it should
def test_an_adapted_run_there(tmp_path, monkeypatch):
    """What a CPU has trained."""
    for name, flags in ((MRA, SHORT[MRA]), (RL2, ())):
        script, source = importlib.import_module(name), tmp_path / name
        assert script.main(command(name, source, "--device", "cpu", *flags)) == 0
        short = ("--total-timesteps", 60, "--final-episodes", 2, *SHORT[MADDPG])
        argv = ("--adapt", source, "--population", 4, "--run-dir", f"{source}-4", *short)
        with monkeypatch.context() as patch, pretended_gpu(patch):
            assert script.main([*map(str, argv), "--device", "cuda"]) == 0


class Counted(NamedTuple):
    """How a run is made longer, by steps of the worlds, and harder, by minibatches."""

    base: str
    longer: str
    steps: int
    harder: str
    minibatches: int


# A case is a script and flags of its runs.
COLLECTING = [f"{name} --scenario resource" for name in (*ON_POLICY, *OFF_POLICY)]
DISTILLING = f"{BIDIST} --forward"
# In Melting Pot minibatches are so large that networks use tables of tiles: 3 waits each.
IN_ROUNDS = {"base": "--total-timesteps 16", "steps": 8}
IN_ROUNDS["longer"] = "--max-episode-steps 16 --total-timesteps 32"
LIKE_MADDPG = Counted(
    base="--total-timesteps 80 --update-every 80",
    longer="--total-timesteps 160 --update-every 160",
    steps=20,
    harder="--inner-steps 3",
    minibatches=2,
)
HOW = {
    **dict.fromkeys(
        MELTINGPOT,
        Counted(
            base="--rollout-steps 80 --total-timesteps 160",
            longer="--rollout-steps 160 --total-timesteps 320",
            steps=80,
            harder="--epochs 3",
            minibatches=4,
        ),
    ),
    **dict.fromkeys(PARTICLE, LIKE_MADDPG),
    **dict.fromkeys(
        OFF_POLICY, Counted(**IN_ROUNDS, harder="--updates-per-iteration 3", minibatches=2)
    ),
    **dict.fromkeys(
        ON_POLICY, Counted(**IN_ROUNDS, harder="--minibatches 2 --epochs 10", minibatches=10)
    ),
    MAAC: LIKE_MADDPG._replace(harder="--num-updates 3"),
    # Longer games: the other population's turn comes after one, and would have another replay.
    MRA: LIKE_MADDPG._replace(longer=f"--max-episode-steps 40 {LIKE_MADDPG.longer}"),
    # An iteration: two orders of two games.
    RL2: Counted(
        base="--total-timesteps 80",
        longer="--max-episode-steps 10 --total-timesteps 160",
        steps=20,
        harder="--epochs 3",
        minibatches=4,
    ),
    # A stage, so that the replay has enough for an update.
    EPC: LIKE_MADDPG._replace(base=f"--populations 3 --sets 1 --parents 1 {LIKE_MADDPG.base}"),
}
HOW[BIDIST] = HOW[MAPPO]._replace(base=f"{HOW[MAPPO].base} --no-forward --no-reverse")
HOW[DISTILLING] = HOW[MAPPO]._replace(harder="--forward-epochs 6", minibatches=10)
HOW |= {case: HOW[case.split()[0]] for case in COLLECTING}
WAITS = {  # a step of all worlds, a minibatch; as many as were counted, rounded up
    BIDIST: (2, 8),
    MAPPO: (2, 8),
    "baselines.randnet_meltingpot": (3, 14),
    "baselines.opre_meltingpot": (2, 12),
    "baselines.pp_meltingpot": (3, 11),
    "baselines.rpm_meltingpot": (3, 11),
    **dict.fromkeys((MADDPG, MRA, MAAC, EPC), (0.5, 0.5)),
    RL2: (0.5, 1),  # in which steps agents act
    "baselines.mappo_smac": (2.5, 0.5),
    REFIL: (1.5, 0.5),
    "baselines.collaq_smac": (1.5, 0.5),
    "baselines.mipi_mappo_smac": (2.5, 0.5),
    "mipi_refil_smac": (1.5, 1),  # which agents are alive
}
WAITS[DISTILLING] = (2, 8)  # 3 for tables; after each epoch one a chunk, for phi's memories
WAITS |= {case: WAITS[case.split()[0]] for case in COLLECTING}


def count_waits(case, run_dir, monkeypatch, flags):
    """A tiny run of a case; the pretended GPU that has counted its waits."""
    worlds._constant.cache_clear()  # each run sends its own
    name, _, own = case.partition(" ")
    flags = f"{own} {flags}"
    argv = command(name, run_dir, "--final-episodes", 0, "--device", "cuda", *flags.split())
    with monkeypatch.context() as patch, pretended_gpu(patch) as gpu:
        assert script(name).main(argv) == 0
    return gpu


@pytest.mark.parametrize("case", HOW)
def test_waits_are_bounded(case, tmp_path, monkeypatch, record_property):
    how, found = HOW[case], {}
    flags = {"base": how.base, "step": how.longer, "minibatch": how.harder}
    for what, more in flags.items():
        found[what] = count_waits(case, tmp_path / what, monkeypatch, f"{how.base} {more}")
    base = found.pop("base")
    each = {}
    for (what, longer_run), number in zip(found.items(), (how.steps, how.minibatches)):
        each[what] = (longer_run.waits.total() - base.waits.total()) / number
        places, fewer = longer_run.places - base.places, base.places - longer_run.places
        print(f"{case}: {each[what]:.2f} waits a {what}, {places}, fewer {fewer}")
    record_property("waits", [case, *each.values()])  # conftest.py prints them
    for waits, most in zip(each.values(), WAITS[case], strict=True):
        assert 0 <= waits <= most
