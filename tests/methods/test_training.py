"""The scripts as a whole: the method against its parent, one from the other, flags, learning."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from pathlib import Path

from harness import Evaluation, RunArgs

import numpy as np
import pytest
import torch
import tracked
from toolbox import (
    BIDIST,
    MAPPO,
    OPRE,
    UNLIKE_DEFAULTS,
    bidist,
    collect,
    load_script,
    mappo,
    setting,
    sharpen,
    update,
    weights,
)

SCRIPTS = [
    path
    for path in tracked.files("*.py", "baselines/*.py")
    if "class Args(RunArgs)" in path.read_text()
]
MELTINGPOT = [path for path in SCRIPTS if path.stem.endswith("_meltingpot")]
TINY = ["--substrate", "toy", "--num-envs", "4", "--rollout-steps", "20", "--final-episodes", "4"]
PARENTS = ("mappo_meltingpot", "maddpg_particle", "refil_smac")  # have no section 5
PAPER = [
    "pure_coordination_in_the_matrix__repeated",
    "coop_mining",
    "chicken_in_the_matrix__repeated",
    "coins",
    "prisoners_dilemma_in_the_matrix__arena",
]


def run(script, run_dir: Path, *flags: str) -> dict:
    """main() on the toy world; returns the newest checkpoint's state."""
    argv = [*TINY, "--total-timesteps", "240", *(["--k-d", "1"] if script is bidist else [])]
    code = script.main([*argv, *flags, "--run-dir", str(run_dir)])
    assert code == 0
    return script.load_checkpoint(str(run_dir))[0]


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def same(a, b) -> bool:
    """Equal to the last bit, also in nested dictionaries."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# --- The diff is the paper ------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], UNLIKE_DEFAULTS], ids=["defaults", "others"])
def test_without_its_method_bidist_is_mappo_bit_for_bit(flags, tmp_path):
    """p = 0 and no distillation: networks and optimisers after three updates."""
    off = ["--p", "0", "--no-forward", "--no-reverse"]
    child = run(bidist, tmp_path / "child", *off, *flags)["agent"]
    parent = run(mappo, tmp_path / "parent", *flags)["agent"]
    assert parent["actor_optimiser"]["state"][0]["step"] == 3 * 25
    for name, part in parent.items():
        assert same(part, child[name]), name
    assert set(child) - set(parent) == {"distilled"}
    on = run(bidist, tmp_path / "on", *flags)["agent"]
    assert not same(on["actor"], parent["actor"]), "with the method they must differ"


@pytest.mark.parametrize("script", [BIDIST, OPRE], ids=lambda path: path.stem)
def test_diff_of_the_two_files_is_the_method(script):
    parent, child = (path.read_text().splitlines() for path in (MAPPO, script))
    added = gone = 0
    for line in difflib.unified_diff(parent, child, n=0, lineterm=""):
        added += line.startswith("+") and not line.startswith("+++")
        gone += line.startswith("-") and not line.startswith("---")
    assert added <= 0.45 * len(child), f"{added} of {len(child)} lines are added"
    assert gone <= 0.20 * len(parent), f"{gone} of the parent's {len(parent)} are changed or gone"


def shared_blocks(path: Path) -> dict[str, str]:
    """The text of each block "[shared: NAME]" by its name; no mark without its end, none twice."""
    text = path.read_text()
    block = r"^ *# \[shared: (\w+)\] begin\n(.*?)^ *# \[shared: \1\] end\n"
    blocks = re.findall(block, text, re.S | re.M)
    marks = [(f"# [shared: {name}] begin", f"# [shared: {name}] end") for name, _ in blocks]
    found = [line.strip() for line in text.splitlines() if "[shared" in line]
    assert found == [mark for pair in marks for mark in pair], path.name
    assert len(dict(blocks)) == len(blocks), f"{path.name}: a name twice"
    return dict(blocks)


def test_shared_blocks_are_identical_in_all_scripts():
    """Method code that several scripts repeat has not drifted apart."""
    blocks = {path.name: shared_blocks(path) for path in SCRIPTS}
    for name in {name for own in blocks.values() for name in own}:
        texts = {script: own[name] for script, own in blocks.items() if name in own}
        assert len(texts) > 1, f"[shared: {name}] is in {min(texts)} alone"
        assert len(set(texts.values())) == 1, f"[shared: {name}] differs in {', '.join(texts)}"
    ours = {"worlds", "networks", "data", "players"}
    for path in (BIDIST, MAPPO, OPRE):
        assert {f"meltingpot_{name}" for name in ours} <= blocks[path.name].keys()


def test_sections_and_lengths():
    """The order of DESIGN's anatomy; functions under 80 lines."""
    import ast

    assert {BIDIST, MAPPO} <= set(SCRIPTS)
    for path in SCRIPTS:
        text = path.read_text()
        numbers = [int(x) for x in re.findall(r"^# --- (\d+)\. ", text, re.M)]
        expected = [2, 3, 4, 5, 6, 7, 8, 9]
        assert numbers == [n for n in expected if n != 5 or path.stem not in PARENTS], path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name}"


# --- Flags ----------------------------------------------------------------------------------------
# Every flag of these scripts changes the quantity that it names. Each entry: flags, what to measure
# on a run with and one without them, and how the two must relate. Flags of the method's equations
# are in test_equations.py, those of every script in tests/harness, worlds in test_meltingpot.py.


def lr(name):
    return lambda state, run_dir: state["agent"][f"{name}_optimiser"]["param_groups"][0]["lr"]


def last(name):
    return lambda state, run_dir: [m for m in metrics(run_dir) if "sps" in m][-1][name]


def updates(state, run_dir):
    return float(state["agent"]["actor_optimiser"]["state"][0]["step"])


def changed(part):
    return lambda state, run_dir: {k: v.clone() for k, v in state["agent"][part].items()}


def files(pattern):
    return lambda state, run_dir: len(list(run_dir.glob(pattern)))


def result(*keys):
    def measure(state, run_dir):
        value = json.loads((run_dir / "summary.json").read_text())["eval"]
        for key in keys:
            value = value.get(key)
        return value

    return measure


EFFECTS = {
    "capture_video": (["--capture-video"], files("videos/*.mp4"), (0, 4)),
    "num_envs": (["--num-envs", "12"], lambda s, d: s["iteration"], (3, 1)),
    "rollout_steps": (["--rollout-steps", "60"], lambda s, d: s["iteration"], (3, 1)),
    "chunk_length": (["--chunk-length", "5"], changed("actor"), None),
    "epochs": (["--epochs", "3"], updates, (12, 18)),
    "minibatches": (["--minibatches", "3"], updates, (12, 18)),
    "actor_lr": (["--actor-lr", "0.01"], lr("actor"), (5e-4, 0.01)),
    "critic_lr": (["--critic-lr", "0.01"], lr("critic"), (5e-4, 0.01)),
    "adam_eps": (["--adam-eps", "0.1"], changed("actor"), None),
    "gamma": (["--gamma", "0.5"], changed("critic"), None),
    "gae_lambda": (["--gae-lambda", "0.5"], changed("critic"), None),
    "clip": (["--clip", "0.0001"], last("clipped/trained"), "up"),
    "value_clip": (["--value-clip", "0.0001"], changed("critic"), None),
    "huber_delta": (["--huber-delta", "0.01"], last("value_loss"), "down"),
    "entropy_coef": (["--entropy-coef", "5"], changed("actor"), None),
    "max_grad_norm": (["--max-grad-norm", "0.00001"], changed("actor"), None),
    "max_episode_steps": (["--max-episode-steps", "3"], last("episode/length"), "down"),
    "team_reward": (["--team-reward"], last("reward_per_1000/all"), "up"),
    "background": (["--background", "distilled"], result("v random"), None),
    "p": (["--p", "0.9"], changed("actor"), None),
    "v_redraw": (["--v-redraw", "episode"], changed("actor"), None),
    "all_fictitious": (["--all-fictitious"], lambda s, d: set(metrics(d)[0]), "fewer"),
    "mask_fictitious": (["--mask-fictitious"], changed("actor"), None),
    "clip_centre": (["--clip-centre", "printed", "--p", "0.9"], changed("actor"), None),
    "advantages_per_population": (["--advantages-per-population"], changed("actor"), None),
    "k_d": (["--k-d", "2"], changed("distilled"), None),
    "distilled_width": (
        ["--distilled-width", "0.5"],
        lambda s, d: s["agent"]["distilled"]["gru.weight_hh_l0"].shape[1],
        (128, 64),
    ),
    "amp": (["--amp"], changed("critic"), None),
}
# Measured elsewhere, or on a machine that has what they need.
ELSEWHERE = {
    **dict.fromkeys(("weight_cap", "copy_every"), "test_clip_centre.py"),
    "plain": "test_plain_flag_gives_the_same",
    "substrate": "test_one_iteration_on_the_papers_substrates",
    "num_workers": "test_flags_of_the_real_worlds",
    "worker_timeout": "test_flags_of_the_real_worlds",
    "eval_ids": "test_eval_ids",
    "num_focal": "test_num_focal",
    **dict.fromkeys(("eval_scenarios", "bots"), "test_scenarios.py"),
    **dict.fromkeys(("forward_lr", "reverse_lr"), "test_distillation_rates_and_epochs_matter"),
    **dict.fromkeys(("forward_epochs", "reverse_epochs"), "the same"),
    **dict.fromkeys(("forward", "reverse"), "test_schedule"),
    **dict.fromkeys(("reverse_mode", "noise_std"), "test_reverse_modes_of_figure_6"),
}


def test_every_flag_is_tested():
    general, fields, parent = (
        {field.name for field in dataclasses.fields(cls)}
        for cls in (RunArgs, bidist.Args, mappo.Args)
    )
    assert fields - general == (set(EFFECTS) | set(ELSEWHERE)) - {"capture_video"}
    assert parent < fields


SHORT = ["--epochs", "2", "--minibatches", "2", "--forward-epochs", "2", "--reverse-epochs", "2"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    return run(bidist, run_dir, *SHORT), run_dir


@pytest.mark.parametrize("name", EFFECTS)
def test_flag_changes_what_it_names(name, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(bidist, "has_bf16", lambda device: True)
    flags, measure, relation = EFFECTS[name]
    state = run(bidist, tmp_path / "run", *SHORT, *flags)
    without, with_flag = measure(*plain), measure(state, tmp_path / "run")
    if relation is None:
        assert not same(without, with_flag)
    elif relation in ("up", "down"):
        assert (with_flag > without) == (relation == "up") and with_flag != without
    elif relation == "fewer":
        assert with_flag < without
    else:
        assert (without, with_flag) == relation


@pytest.mark.parametrize("flags, seats", [([], 1), (["--num-focal", "2"], 2)])
def test_num_focal(flags, seats, monkeypatch):
    """How many seats are ours; what play_pairs makes of it: test_episodes.py."""
    s, seen = setting(*flags), []

    def watch(envs, pairs, num_focal, **rest):
        seen.append(num_focal)
        return {}

    monkeypatch.setattr("envs.meltingpot.scenarios.play_pairs", watch)
    bidist.evaluate(s.args, s.agent, {}, Evaluation(s.args, "eval", 0, Path()))
    assert seen == [seats]


@pytest.mark.parametrize("ids", ["random", "slot"])
def test_eval_ids(ids, monkeypatch):
    """An actor that plays its agent id: seat n chooses colour n + 1 for sure with ids by slot."""
    s = setting("--eval-ids", ids, "--background", "random")
    actor = s.agent.actor
    for p in actor.parameters():
        p.data.zero_()
    actor.norm.weight.data.fill_(1.0)
    units, colours = slice(256, 258), torch.tensor([[60.0, -60.0], [-60.0, 60.0]])
    actor.gru.weight_ih_l0.data[units, -2:] = colours  # the new state's first two units: the id
    actor.gru.bias_ih_l0.data[128:256] = -60.0  # no memory
    actor.head.weight.data[:2, :2] = torch.eye(2)
    actor.out.weight.data[:2, :2] = 60 * torch.eye(2)
    seen = []

    def watch(envs, pairs, shuffle_ids, **rest):
        focal, _ = pairs["self-play"]
        for k in range(20):
            order = [0, 1] if ids == "slot" or k % 2 else [1, 0]
            actions = focal(envs.reset(), np.ones(4, bool), np.tile(order, (4, 1)))
            assert (actions == order).all()
        seen.append(shuffle_ids)
        return {}

    monkeypatch.setattr("envs.meltingpot.scenarios.play_pairs", watch)
    bidist.evaluate(s.args, s.agent, {}, Evaluation(s.args, "final", 0, Path()))
    assert seen == [ids == "random"], "play_pairs shuffles ids, or not (test_episodes.py)"


@pytest.mark.parametrize("path", MELTINGPOT, ids=lambda path: path.stem)
def test_who_plays_beside_us(path, monkeypatch):
    """Row by row both players, by their weights: a co-player is the one that the row names."""
    script, seen = load_script(path), {}
    own = ["distilled"] if script is bidist else []
    clean = ["--randnet-test", "clean"] if "randnet" in path.stem else []
    s = setting("--background", "x", *own, *clean, script=script)
    other = s.agent.new_actor()
    sharpen(other, seed=1)
    memory = {"memory": script.new_memory(s.args)} if hasattr(script, "new_memory") else {}

    def watch(envs, pairs, **rest):
        seen.update(pairs)
        return {}

    monkeypatch.setattr("envs.meltingpot.scenarios.play_pairs", watch)
    evaluation = Evaluation(s.args, "eval", 0, Path())
    script.evaluate(s.args, s.agent, others={"x": other}, evaluation=evaluation, **memory)
    partners = {"v x": other} | ({"v distilled": s.agent.distilled} if own else {})
    assert seen.keys() == {"self-play", *partners} and seen["self-play"][1] is None
    for row, (focal, partner) in seen.items():
        assert torch.equal(weights(focal.net), weights(s.agent.actor)), row
        if row in partners:
            assert torch.equal(weights(partner.net), weights(partners[row])), row


@pytest.mark.parametrize("script", [bidist, mappo], ids=["bidist", "mappo"])
def test_an_evaluation_says_how_far_it_is(script):
    """All episodes of all rows are announced, and reported when they are over."""
    s = setting("--eval-episodes", "3", script=script)
    evaluation = Evaluation(s.args, "eval", 0, Path())
    rows = script.evaluate(s.args, s.agent, {}, evaluation)
    assert evaluation.played == evaluation.expected == 3 * len(rows) >= 9
    assert all(row["episodes"] == 3 for row in rows.values())


def test_load_player(plain):
    """The policies of a run, as players of the episodes module, in other worlds than its own."""
    state, run_dir = plain
    s = setting("--num-envs", "6")
    starts, ids = np.ones(6, bool), np.tile([1, 0], (6, 1))
    for network in ("actor", "distilled"):
        player = bidist.load_player(str(run_dir), s.envs, seed=3, network=network)
        assert same({**player.net.state_dict()}, {**state["agent"][network]})
        again = bidist.NetPlayer(player.net, s.agent.sprites, seed=3)
        for _ in range(3):
            actions = player(s.envs.obs, starts, ids)
            assert (actions == again(s.envs.obs, starts, ids)).all()
            s.envs.step(actions)
            starts = np.zeros(6, bool)


def test_flags_of_the_real_worlds():
    args = bidist.parse(["--num-workers", "3", "--worker-timeout", "2.5", "--substrate", "coins"])
    with bidist.make_envs(args, 6, 1) as envs:
        assert (envs.num_workers, envs.timeout, envs.spec.substrate) == (3, 2.5, "coins")


def test_phis_memory_after_a_distillation_is_the_new_phis(tmp_path, monkeypatch):
    """What a run takes to its next rollout: phi, as distilled, stepped through the last one."""
    distill, given = bidist.distill, []

    def watched(args, agent, batch, state, **more):
        given.append((agent, batch, state.distilled_hidden))
        return distill(args, agent, batch, state, **more)

    monkeypatch.setattr(bidist, "distill", watched)
    far = ["--reverse-mode", "noise", "--noise-std", "0.5"]
    state = run(bidist, tmp_path / "run", *SHORT, *far, "--total-timesteps", "160")
    agent, batch, old = given[-1]
    assert len(given) == 2
    hidden = batch.distilled_hidden[0]
    for step in zip(*batch.actor_views()):
        _, hidden = bidist.act(agent.distilled, bidist.Views(*step), hidden, agent.sprites)
    found = state["ranks"][0]["state"]["distilled_hidden"]
    assert torch.allclose(found, hidden, atol=1e-3)
    assert (found - old).abs().max() > 0.1


def test_log_of_a_run(tmp_path, capsys):
    run(bidist, tmp_path / "run", "--k-d", "1")
    iterations = [m for m in metrics(tmp_path / "run") if "sps" in m]
    assert [m["timesteps"] for m in iterations] == [80, 160, 240]
    for number, m in enumerate(iterations):
        phase = ("forward", "reverse")[number % 2]
        for quantity in ("kl", "shift", "theta_prefers", "phi_prefers"):
            assert quantity in m
            assert {f"{phase}/{quantity}_before", f"{phase}/{quantity}_after"} <= set(m)
        for population in ("trained", "fictitious"):
            for quantity in ("clipped", "ratio_max"):
                assert f"{quantity}/{population}" in m
        assert {"weight_max", "effective_samples"} <= set(m)
    output = capsys.readouterr()
    assert "self-play" in output.out and "v random" in output.out, "the final table"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["timesteps"] == 240 and summary["wall_s"] > 0
    assert list((tmp_path / "run").glob("events.*")), "TensorBoard, always"


# --- Learning -------------------------------------------------------------------------------------

QUICK = "--num-envs 32 --rollout-steps 20 --epochs 4 --minibatches 2 --total-timesteps 24000"
QUICK = [*QUICK.split(), "--actor-lr", "2e-3", "--critic-lr", "2e-3", "--final-episodes", "100"]
QUICK += ["--eval-every", "4000", "--eval-episodes", "50"]


LEARNERS = [
    *(pytest.param(x, 1, marks=pytest.mark.long) for x in (bidist, mappo)),
    *(pytest.param(x, k, marks=pytest.mark.slow) for x in (bidist, mappo) for k in range(2, 6)),
]


@pytest.mark.parametrize("script, seed", LEARNERS)
def test_the_optimum_of_the_toy_is_reached(script, seed, tmp_path):
    """Best is 1 per step; random play earns 2/9. Playing against itself, actions sampled, in the
    best of the evaluations: at a rate that learns this in seconds a policy may stumble again, and
    where it stands at which step is a matter of rounding."""
    run(script, tmp_path / "run", *QUICK, "--seed", str(seed))
    name = "self-play/return_per_1000"
    found = [m.get(f"eval/{name}", m.get(f"final/{name}")) for m in metrics(tmp_path / "run")]
    found = [x for x in found if x is not None]
    assert len(found) == 6 + 1
    assert max(found) > 950
    assert metrics(tmp_path / "run")[-1]["final/random v random/return_per_1000"] < 300


@pytest.mark.parametrize(
    "substrate",
    [
        pytest.param(
            name,
            marks=[pytest.mark.long] * (name not in ("chicken_in_the_matrix__repeated", "coins")),
        )
        for name in PAPER
    ],
)
def test_one_iteration_on_the_papers_substrates(substrate, tmp_path):
    """Collecting, updating, distilling and evaluating with truncated episodes, two worlds."""
    flags = ["--substrate", substrate, "--num-envs", "2", "--rollout-steps", "20", "--k-d", "1"]
    flags += ["--total-timesteps", "40", "--final-episodes", "0", "--max-episode-steps", "15"]
    flags += ["--minibatches", "2", "--worker-timeout", "60"]
    assert bidist.main([*flags, "--run-dir", str(tmp_path / "run")]) == 0
    (m,) = (m for m in metrics(tmp_path / "run"))
    assert m["timesteps"] == 40 and "forward/kl_after" in m
    state, _ = bidist.load_checkpoint(str(tmp_path / "run"))
    assert state["ranks"][0]["envs"]["palette"].shape[1:] == (8, 8, 3)


def test_update_improves_what_it_optimises():
    """After an update the taken actions with high advantage are likelier, values fit better."""
    s = setting("--num-envs", "16", "--actor-lr", "2e-3", "--critic-lr", "2e-3")
    batch = collect(s)
    before = weights(s.agent.actor)
    update(s, batch)
    batch, nets, sprites = s.batch, s.agent, s.agent.sprites
    hidden = batch.actor_hidden[0]
    logits, _, _ = bidist.replay(s.args, nets.actor, batch.actor_views(), hidden, sprites)
    log_prob = logits.log_softmax(-1).gather(-1, batch.actions[..., None])[..., 0]
    gain = (
        (log_prob.exp() - batch.theta.gather(-1, batch.actions[..., None])[..., 0].exp())
        * batch.advantages
    ).mean()
    assert gain > 0
    hidden = batch.critic_hidden[0]
    values, _, _ = bidist.replay(s.args, nets.critic, batch.critic_views(), hidden, sprites)
    errors = [(x - batch.targets).square().mean() for x in (values[:-1], batch.values)]
    assert errors[0] < errors[1]
    assert not torch.equal(before, weights(s.agent.actor))
