"""Figures 5 and 7 of the BiDist paper: what a run's policies do on a rollout of their own.

    python experiments/policies.py fig7 runs/RUN
    python experiments/policies.py fig5 runs/BIDIST runs/MAPPO

Both load the newest checkpoint, play as in training and write OUT.png, OUT.csv and OUT.md;
`fig7 --help` and `fig5 --help` have their options.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from annotated_types import Interval
from figures import (
    SCRIPT,
    Above,
    Amount,
    Count,
    Positive,
    Runs,
    Seed,
    UsageError,
    check_bounds,
    check_out,
    finish,
    load_script,
    markdown_table,
    method_of,
    one_line_errors,
    read_args,
    without_seed,
)

from envs.meltingpot.tiles import WorldError

Several = Annotated[int, Interval(ge=2)]


@dataclasses.dataclass(frozen=True)
class Fig7:
    """Fig. 7: the joint probabilities pi_phi x pi_theta after one reverse phase of each kind."""

    run: Annotated[Path, tyro.conf.Positional]  # of bidist_mappo_meltingpot.py
    observation: int | None = None  # of the rollout's T B N; default: where theta is surest
    start: Literal["lagged", "near"] = "lagged"  # phi as saved, or after a forward phase
    reverse_lr: Above | None = None  # default: the run's own
    reverse_epochs: Count | None = None  # default: the run's own
    noise_std: Amount | None = None  # default: the run's own
    num_envs: Positive = 16  # worlds of the rollout
    warm_up: Count = 1  # rollouts before it, so that worlds are not at their starts
    seed: Seed = 1  # of worlds, actions, shuffling, noise and new weights
    out: Path = Path("fig7")  # writes OUT.png, OUT.csv and OUT.md


@dataclasses.dataclass(frozen=True)
class Fig5:
    """Fig. 5: t-SNE of the joint action distributions that a training population plays."""

    runs: Runs  # of any script, all on one substrate
    samples: Several = 500  # of each run
    rollouts: Positive = 4  # that they are drawn from; BiDist draws v anew for each
    num_envs: Positive = 16  # worlds of a rollout
    warm_up: Count = 1  # rollouts before them, so that worlds are not at their starts
    perplexity: Above = 30.0  # of t-SNE
    seed: Seed = 1  # of worlds, actions, samples and t-SNE
    group_by: Literal["method", "name"] = "method"  # name: of the directory, without -s1, -s2, ...
    out: Path = Path("fig5")  # writes OUT.png, OUT.csv and OUT.md


# --- Networks on a rollout ------------------------------------------------------------------------


@contextlib.contextmanager
def loaded(run: Path, num_envs: int, seed: int) -> Iterator[tuple]:
    """A run's script, arguments and agent, fresh worlds, and what collect() needs."""
    args = read_args(run)
    script = load_script(args["script"])
    try:
        saved, _ = script.load_checkpoint(str(run))
        known = {field.name for field in dataclasses.fields(script.Args)}
        own = {k: tuple(x) if isinstance(x, list) else x for k, x in saved["args"].items()}
        own = {k: x for k, x in own.items() if k in known}  # an older run may have others
        args = dataclasses.replace(script.Args(**own), num_envs=num_envs, device="cpu")
        with script.make_envs(args, num_envs, seed + 10**6) as envs:
            agent = script.Agent(args, envs.spec, torch.device("cpu"))
            script.restore(agent.parts(), saved["agent"], str(run))
            rngs = [torch.Generator().manual_seed(seed + k) for k in (0, 1)]
            carry = script.new_carry(agent, num_envs)
            envs.reset()
            yield script, args, envs, agent, carry, script.Sprites(envs, agent.device), rngs
    except (script.RunError, WorldError) as error:
        raise UsageError(str(error)) from None


def play(script: Any, args: Any, envs, agent, carry, sprites, rngs) -> Any:
    """One rollout of the training population; a parent's script has one generator."""
    own = [name for name in script.new_generators(0, 0)]
    return script.collect(args, envs, agent, carry, sprites, *rngs[: len(own)])


@torch.no_grad()
def policy(script: Any, net: Any, batch: Any, hidden: torch.Tensor, length: int, sprites: Any):
    """Probabilities (T, B, N, A) of a network that lives through a rollout from its stored state
    (C, B, N, S)."""
    views = (batch.tile_ids, batch.actor_features, batch.starts[:-1])
    return script.replay(net, views, hidden[0], length, sprites)[0].softmax(-1)


def trained_steps(run: Path) -> int:
    """Environment steps of a run's newest checkpoint."""
    return json.loads((run / "checkpoints.json").read_text())[0]["timesteps"]


# --- Figure 7 -------------------------------------------------------------------------------------

MODES = ("before", "kl", "entropy", "random", "noise")


class Phases(NamedTuple):
    """One reverse phase of each kind, each applied to the same phi."""

    about: dict[str, Any]  # the run and the phases' options
    theta: np.ndarray  # (S, A) probabilities on the rollout's S = T B N observations
    phis: dict[str, np.ndarray]  # the same of phi, by MODES
    scalars: dict[str, dict[str, float]]  # what each phase logs: KL, ... before and after


def reverse_phases(study: Fig7) -> Phases:
    """Play a rollout, then apply the phases to copies of phi."""
    if read_args(study.run)["script"] != SCRIPT:
        raise UsageError(f"{study.run} is not a run of {SCRIPT}.py, and has no phi.")
    with loaded(study.run, study.num_envs, study.seed) as (script, args, envs, agent, *rest):
        carry, sprites, rngs = rest
        for _ in range(study.warm_up + 1):
            batch = play(script, args, envs, agent, carry, sprites, rngs)
        options = {"no_forward": False, "no_reverse": False}
        for name in ("reverse_lr", "reverse_epochs", "noise_std"):
            if getattr(study, name) is not None:
                options[name] = getattr(study, name)
        args = dataclasses.replace(args, **options)
        script.validate(args)  # in few worlds a rollout may have fewer chunks than minibatches
        what = (batch, carry, sprites)
        if study.start == "near":
            rng = torch.Generator().manual_seed(study.seed)
            script.distill(args, "forward", agent, *what, rng, lambda: None)
        look = functools.partial(policy, script, batch=batch, length=args.chunk_length)
        look = functools.partial(look, sprites=sprites)
        theta = look(agent.actor, hidden=batch.actor_hidden)
        start, phis, scalars = agent.distilled, {}, {}
        phis["before"] = look(start, hidden=batch.distilled_hidden)
        for mode in MODES[1:]:
            agent.distilled = copy.deepcopy(start)
            agent.args = phase = dataclasses.replace(args, reverse_mode=mode)
            rng = torch.Generator().manual_seed(study.seed)
            found = script.distill(phase, "reverse", agent, *what, rng, lambda: None)
            scalars[mode] = {k.removeprefix("reverse/"): float(x) for k, x in found.items()}
            phis[mode] = look(agent.distilled, hidden=batch.distilled_hidden)
        about = {"actions": envs.spec.actions, "timesteps": trained_steps(study.run)}
        about |= {name: getattr(args, name) for name in ("reverse_lr", "reverse_epochs")}
        about |= {"noise_std": args.noise_std, "substrate": args.substrate}
    flat = {mode: x.flatten(0, -2).double().numpy() for mode, x in phis.items()}
    return Phases(about, theta.flatten(0, -2).double().numpy(), flat, scalars)


def logged(phases: Phases, mode: str) -> dict[str, float]:
    """Means over the rollout after a phase; before, they are the same for all of them."""
    found, when = (phases.scalars["kl"], "before")
    if mode != "before":
        found, when = phases.scalars[mode], "after"
    return {name: found[f"{name}_{when}"] for name in ("kl", "shift", "phi_prefers", "phi_peak")}


def joint(theta: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """Mean over observations of pi_theta x pi_phi, both (S, A) -> (A, A), theta's actions down."""
    return np.einsum("sa,sb->ab", theta, phi) / len(theta)


def min_max(x: np.ndarray) -> np.ndarray:
    """Into [0, 1]; zeros where all are alike."""
    return (x - x.min()) / (np.ptp(x) or 1)


class HeatMap(NamedTuple):
    """One panel."""

    mode: str  # of MODES
    of: str  # "mean", or "observation 7"
    title: str
    joint: np.ndarray  # (A, A), theta's actions down


def heat_maps(phases: Phases, chosen: int) -> list[HeatMap]:
    """For every mode that of the chosen observation and the mean over all."""
    maps, theta = [], phases.theta
    for mode, phi in phases.phis.items():
        best, means = phi[chosen].argmax(), logged(phases, mode)
        kl = float((theta[chosen] * np.log(theta[chosen] / phi[chosen])).sum())
        title = f"{mode}\nφ prefers {best + 1} ({phi[chosen, best]:.2f}), KL {kl:.3g}"
        one = joint(theta[[chosen]], phi[[chosen]])
        maps.append(HeatMap(mode, f"observation {chosen}", title, one))
        title = f"shift {means['shift']:.2f}, KL {means['kl']:.3g}"
        maps.append(HeatMap(mode, "mean", title, joint(theta, phi)))
    return maps


def rows_of_maps(maps: list[HeatMap]) -> list[dict[str, Any]]:
    """A row of the CSV for every cell."""
    rows = []
    for x in maps:
        scaled = min_max(x.joint)
        for (a, b), p in np.ndenumerate(x.joint):
            row = dict(phi=x.mode, of=x.of, theta_action=a + 1, phi_action=b + 1)
            rows.append(row | dict(probability=float(p), normalised=float(scaled[a, b])))
    return rows


def preference(probs: np.ndarray) -> str:
    """ "θ prefers 3 (0.91)" """
    return f"θ prefers {probs.argmax() + 1} ({probs.max():.2f})"


def options_of(study: Fig7, phases: Phases) -> str:
    """How the phases were made."""
    text = "rate {reverse_lr:g}, {reverse_epochs} epochs, noise {noise_std:g}"
    return f"{text.format(**phases.about)}, φ {study.start}"


def draw_heat_maps(study: Fig7, phases: Phases, maps: list[HeatMap], chosen: int) -> Any:
    """A column per mode: above, the chosen observation; below, the mean over all."""
    count, actions = phases.theta.shape
    figure, axes = plt.subplots(2, len(MODES), figsize=(2.5 * len(MODES) + 0.6, 6.3))
    for x in maps:
        axis = axes[int(x.of == "mean"), MODES.index(x.mode)]
        image = axis.imshow(min_max(x.joint), cmap="viridis", vmin=0, vmax=1)
        axis.set_title(x.title, fontsize=9)
        ticks = range(0, actions, 1 if actions <= 10 else 4)
        axis.set_xticks(ticks, [t + 1 for t in ticks], fontsize=8)
        axis.set_yticks(ticks, [t + 1 for t in ticks], fontsize=8)
    label = f"observation {chosen}: {preference(phases.theta[chosen])}"
    axes[0, 0].set_ylabel(f"{label}\nactions of π_θ", fontsize=9)
    axes[1, 0].set_ylabel(f"mean of {count:,} observations\nactions of π_θ", fontsize=9)
    for axis in axes[1]:
        axis.set_xlabel("actions of π_φ", fontsize=9)
    how, steps = options_of(study, phases), phases.about["timesteps"]
    title = f"π_φ x π_θ after one reverse phase, min-max normalised ({how})"
    figure.suptitle(f"{title}\n{study.run.resolve().name}, {steps:,} steps", fontsize=10)
    figure.tight_layout(rect=(0, 0, 0.94, 1))
    bar = figure.add_axes((0.95, 0.15, 0.012, 0.65))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=8)
    return figure


def describe(action: dict[str, int]) -> str:
    """What an action sends to the engine, without zeros: "turn -1"."""
    return ", ".join(f"{name} {x}" for name, x in action.items() if x) or "nothing"


def text_of_phases(study: Fig7, phases: Phases, chosen: int) -> str:
    """OUT.md: a line per mode."""
    about, theta, lines = phases.about, phases.theta, []
    for mode, phi in phases.phis.items():
        means = logged(phases, mode)
        names = ("KL(θ‖φ)", "shift", "π_φ(a*_θ)", "π_φ(a*_φ)")
        cells = {name: f"{x:.4g}" for name, x in zip(names, means.values())}
        here = f"{phi[chosen].argmax() + 1} ({phi[chosen].max():.3f})"
        lines.append({"φ": mode} | cells | {f"φ prefers in observation {chosen}": here})
    surest = ", surest of all" if chosen == theta.max(1).argmax() else ""
    key = "; ".join(f"{i}: {describe(action)}" for i, action in enumerate(about["actions"], 1))
    text = (
        f"# Fig. 7: π_φ x π_θ after one reverse phase, {study.run.resolve().name}\n\n"
        f"{about['substrate']}, {about['timesteps']:,} steps; {options_of(study, phases)}. The "
        f"first four figures are means over the rollout's {len(theta):,} observations; in "
        f"observation {chosen} {preference(theta[chosen])}{surest}. Actions: {key}.\n\n"
    )
    return text + markdown_table(lines)


def fig7(study: Fig7) -> None:
    """The phases, for one observation and for the mean over all."""
    check_bounds(study)
    check_out(study.out)
    phases = reverse_phases(study)
    surest, count = int(phases.theta.max(1).argmax()), len(phases.theta)
    chosen = surest if study.observation is None else study.observation
    if not 0 <= chosen < count:
        raise UsageError(f"--observation {chosen}: the rollout has 0 to {count - 1}.")
    maps = heat_maps(phases, chosen)
    figure = draw_heat_maps(study, phases, maps, chosen)
    finish(study.out, text_of_phases(study, phases, chosen), rows_of_maps(maps), figure)


# --- Figure 5 -------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """What a run's training population does."""

    run: Path
    method: str
    seed: int
    timesteps: int
    points: np.ndarray  # (S, N A) the agents' probabilities side by side
    fictitious: np.ndarray  # (S,) how many agents act with phi
    agents: int  # N


def sample_population(run: Path, study: Fig5) -> Sample:
    """Roll out a run as in training and keep the policies that acted."""
    args = read_args(run)
    method = method_of(args) if study.group_by == "method" else without_seed(run)
    acting, fictitious = [], []
    with loaded(run, study.num_envs, study.seed) as (script, own, envs, agent, *rest):
        for number in range(study.warm_up + study.rollouts):
            batch = play(script, own, envs, agent, *rest)
            if number < study.warm_up:
                continue
            if hasattr(batch, "trained"):  # BiDist: theta or phi, as drawn
                probs = torch.where(batch.trained[..., None], batch.theta, batch.phi).exp()
                fictitious.append((~batch.trained).sum(-1).flatten())
            else:
                hidden, sprites = batch.actor_hidden, rest[1]
                probs = policy(script, agent.actor, batch, hidden, own.chunk_length, sprites)
                fictitious.append(torch.zeros(probs.shape[:2], dtype=torch.int64).flatten())
            acting.append(probs.flatten(2).flatten(0, 1))
    points, count = torch.cat(acting).double().numpy(), torch.cat(fictitious).numpy()
    if len(points) < study.samples:
        raise UsageError(f"--samples {study.samples}: the rollouts of {run} have {len(points)}.")
    rows = np.random.default_rng(study.seed).permutation(len(points))[: study.samples]
    about = (run, method, args["seed"], trained_steps(run))
    return Sample(*about, points[rows], count[rows], probs.shape[2])


def spread(points: np.ndarray, agents: int) -> dict[str, float]:
    """How far apart samples (S, N A) are, over all pairs: the mean Euclidean distance and, between
    two agents' policies, the mean total variation, from 0 to 1."""
    from scipy.spatial.distance import pdist

    total = pdist(points, "cityblock") / (2 * agents)
    return {"distance": float(pdist(points).mean()), "total_variation": float(total.mean())}


def embed(samples: list[Sample], perplexity: float, seed: int) -> list[np.ndarray]:
    """t-SNE of scikit-learn, standard but for the seed: places (S, 2) of every run's samples."""
    from sklearn.manifold import TSNE

    points = np.concatenate([s.points for s in samples]).astype(np.float32)
    flat = TSNE(perplexity=perplexity, random_state=seed).fit_transform(points)
    return np.split(flat, np.cumsum([len(s.points) for s in samples])[:-1])


def rows_of_samples(samples: list[Sample], places: list[np.ndarray]) -> list[dict[str, Any]]:
    """A row of the CSV for every sample."""
    rows = []
    for s, xy in zip(samples, places):
        about = dict(run=s.run.resolve().name, method=s.method, seed=s.seed)
        for at, count in zip(xy.tolist(), s.fictitious.tolist()):
            rows.append(about | dict(x=at[0], y=at[1], fictitious=count))
    return rows


def draw_samples(samples: list[Sample], places: list[np.ndarray], title: str) -> Any:
    """A panel with all methods and one for each, where the others are grey."""
    methods = list(dict.fromkeys(s.method for s in samples))
    figure, axes = plt.subplots(1, 1 + len(methods), figsize=(3.4 * (1 + len(methods)), 4.1))
    for axis, shown in zip(axes, [methods, *([m] for m in methods)]):
        for s, xy in zip(samples, places):
            colour = f"C{methods.index(s.method)}" if s.method in shown else "0.85"
            mixed, order = s.fictitious > 0, 2 if s.method in shown else 1
            style = {"color": colour, "lw": 0, "zorder": order}
            axis.plot(*xy[~mixed].T, "o", ms=2, **style)
            axis.plot(*xy[mixed].T, "x", ms=2.5, mew=0.6, **style)
        axis.set(xticks=[], yticks=[])
        axis.set_title("all" if shown is methods else textwrap.fill(shown[0], 40), fontsize=9)
    marks = [plt.Line2D([], [], color=f"C{i}", marker="o", lw=0) for i in range(len(methods))]
    if any(s.fictitious.any() for s in samples):
        marks.append(plt.Line2D([], [], color="grey", marker="x", lw=0))
    labels = [*methods, "with fictitious agents"]
    figure.legend(marks, labels, loc="lower center", ncols=min(3, len(marks)), fontsize=8)
    figure.suptitle(f"{title}\nareas and distances mean nothing; spread: see the table", fontsize=9)
    figure.tight_layout(rect=(0, 0.04 + 0.05 * -(-len(marks) // 3), 1, 1))
    return figure


def text_of_samples(samples: list[Sample], world: str) -> str:
    """OUT.md: a line per run."""
    lines = []
    for s in samples:
        spreads = spread(s.points, s.agents)
        trained = s.points[s.fictitious == 0]
        alone = f"{spread(trained, s.agents)['distance']:.4f}" if len(trained) > 1 else ""
        lines.append(
            {"run": s.run.resolve().name, "method": s.method, "seed": s.seed}
            | {"steps": f"{s.timesteps:,}", "samples": len(s.points)}
            | {"mean distance": f"{spreads['distance']:.4f}"}
            | {"mean total variation": f"{spreads['total_variation']:.4f}"}
            | {"fictitious": f"{s.fictitious.mean() / s.agents:.0%}"}
            | {"mean distance, all trained": alone}
        )
    text = (
        f"# Fig. 5: joint action distributions, {world}\n\n"
        "A sample is what the policies that acted in one step of one world give to every action, "
        "for all agents side by side. Mean distance: Euclidean, over all pairs of a run's samples; "
        "mean total variation: between the same agent's policies in two samples, from 0 to 1. Both "
        "are in probability space, and both grow with how much a policy depends on what it sees, "
        "not only with the number of policies. Distances in the t-SNE itself mean nothing.\n\n"
    )
    return text + markdown_table(lines)


def fig5(study: Fig5) -> None:
    """The samples' places, and their spread in figures."""
    check_bounds(study)
    check_out(study.out)
    if not study.runs:
        raise UsageError("fig5 needs at least one run directory.")
    worlds = {read_args(run)["substrate"] for run in study.runs}
    if len(worlds) > 1:
        raise UsageError("fig5 compares runs on one substrate, and these are on several.")
    if study.perplexity >= (count := study.samples * len(study.runs)):
        raise UsageError(f"--perplexity {study.perplexity:g} is not less than {count} samples.")
    (world,) = worlds
    samples = [sample_population(run, study) for run in study.runs]
    places = embed(samples, study.perplexity, study.seed)
    title = f"t-SNE of joint action distributions, {world}, {study.samples} samples of each run"
    figure = draw_samples(samples, places, title)
    finish(study.out, text_of_samples(samples, world), rows_of_samples(samples, places), figure)


# --- Main -----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    kinds = {"fig7": Fig7, "fig5": Fig5}
    study = tyro.extras.subcommand_cli_from_dict(kinds, args=argv, description=__doc__)
    torch.set_num_threads(1)
    return one_line_errors(lambda: {Fig7: fig7, Fig5: fig5}[type(study)](study))


if __name__ == "__main__":
    sys.exit(main())
