"""Unseen co-players: Melting Pot's scenarios, with official or scripted bots.

A scenario is a substrate in which bots play some seats. `Scenarios` runs one or more scenarios in
parallel and has the interface of MeltingPot, but returns only the focal seats. The bots act inside
the worker processes, from their own observations. Focal players get neither the bots' views nor
their rewards; tiles.Episode has separate fields for the bots' returns.

Melting Pot defines the scenarios, the bots' configurations and the puppeteers, which set goals. The
puppet, which pursues these goals, is an official SavedModel or a rule of envs/meltingpot/bots.py:

    official   needs Melting Pot's assets and tensorflow
    scripted   needs neither; exists if every bot has a puppeteer and a scripted puppet
    auto       official if it is available, else scripted

    with Scenarios(["coins_0", "coins_3"], num_envs=8, bots="scripted") as envs:
        obs = envs.reset()           # obs.tile_ids: (8, 1, H, W); world b plays scenario b % 2
        step = envs.step(actions)    # (8, 1) ints, of the focal players

docs/scenarios.md lists scenarios and scripted bots' results. B: worlds, F: focal seats, M: bots.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import difflib
import functools
import importlib.util
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from envs.meltingpot import bots as scripted
from envs.meltingpot.episodes import (
    Player,
    Progress,
    Result,
    Video,
    ignore,
    play_all,
    play_pairs,
    random_player,
    summarise,
)
from envs.meltingpot.sprite_names import read_sprites
from envs.meltingpot.tiles import NoWorldError, Observation, Palette, Spec, WorldError
from envs.meltingpot.worlds import (
    Engine,
    MeltingPot,
    PlainEngines,
    build_lab,
    get_spec,
    import_meltingpot,
    quiet,
)

Kind = Literal["official", "scripted"]
Wanted = Literal["auto", "official", "scripted"]
# Names that a user's own Plan may give to a seat instead of a bot's name.
RANDOM = "random"  # plays every action with equal probability
GOAL = "goal:"  # "goal:CLEAN": a scripted puppet whose goal never changes

# The paper's 25: SC0-SC4 of each of these (Table 1).
PAPER = (
    "pure_coordination_in_the_matrix__repeated",
    "coop_mining",
    "chicken_in_the_matrix__repeated",
    "coins",
    "prisoners_dilemma_in_the_matrix__arena",
)


class Plan(NamedTuple):
    """A scenario: which seats are focal, and which bots may play the others."""

    name: str  # of the scenario, e.g. "coins_3"
    spec: Spec  # of all seats, those of bots included
    bots: tuple[tuple[str, ...], ...]  # per seat: bots to draw one from; (): a focal seat


def focal_seats(plan: Plan) -> list[int]:
    """Numbers, from 0, of the seats that no bot plays."""
    return [seat for seat, names in enumerate(plan.bots) if not names]


def bot_names(plans: Sequence[Plan]) -> list[str]:
    """Sorted names of all bots that may play a seat in one of the plans, without RANDOM."""
    return sorted({name for plan in plans for seat in plan.bots for name in seat} - {RANDOM})


# --- Which scenarios there are --------------------------------------------------------------------


def scenario_names(substrate: str) -> list[str]:
    """Names of all scenarios of a substrate, sorted by number; [] for an unknown substrate."""
    import_meltingpot()
    from meltingpot import scenario

    names = scenario.SCENARIOS_BY_SUBSTRATE.get(substrate, ())
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


def get_plan(name: str) -> Plan:
    """The Plan of Melting Pot's scenario `name`; ValueError, one sentence, for an unknown name."""
    import_meltingpot()
    from meltingpot import scenario

    if name not in scenario.SCENARIOS:
        own = scenario_names(name.rpartition("_")[0])
        near = own or difflib.get_close_matches(name, scenario.SCENARIOS, n=3, cutoff=0.6)
        hint = f"there are {', '.join(near)}." if near else "see docs/scenarios.md for the list."
        raise ValueError(f"Unknown scenario '{name}': {hint}")
    config = scenario.get_config(name)
    names = [tuple(sorted(config.bots_by_role.get(role, ()))) for role in config.roles]
    seats = tuple(() if focal else own for own, focal in zip(names, config.is_focal))
    return Plan(name, get_spec(name), seats)


def choose_scenarios(substrate: str, wanted: str, bots: Wanted = "auto") -> list[str]:
    """Names of the scenarios that `wanted` selects: "none", a list as "SC0,SC3", or "all": SC0-SC4
    of the paper's five substrates, elsewhere all that have bots. ValueError: no such scenario."""
    if wanted == "none":
        return []
    own = scenario_names(substrate)
    if wanted != "all":
        numbers = [part.strip() for part in wanted.split(",")]
        names = [f"{substrate}_{number.upper().removeprefix('SC')}" for number in numbers]
        for number, name in zip(numbers, names):
            if name not in own:
                have = ", ".join(short(known) for known in own) or "none"
                raise ValueError(f"{substrate} has no scenario {number}: it has {have}.")
        return list(dict.fromkeys(names))  # "SC0,SC0" is one scenario
    if substrate in PAPER:
        return own[:5]
    plans = [get_plan(name) for name in own]
    if bots == "official" or (bots == "auto" and not missing_assets(bot_names(plans))):
        return own
    return [plan.name for plan in plans if not unscripted(plan)]


def short(name: str) -> str:
    """The short name of a scenario within its substrate: "coins_3" -> "SC3"."""
    return "SC" + name.rpartition("_")[2]


def unscripted(plan: Plan) -> str:
    """The name of a bot of the plan without a scripted puppet; "" if every bot has one."""
    from meltingpot.configs import bots as configs

    for name in bot_names([plan]):
        config, substrate = configs.BOT_CONFIGS.get(name), plan.spec.substrate
        if not name.startswith(GOAL):
            if config is None or config.puppeteer_builder is None:
                return name
            substrate = config.substrate
        if scripted.puppet_kind(substrate) is None:
            return name
    return ""


def missing_assets(names: Sequence[str] = ()) -> str:
    """One sentence: why official bots `names` (default: any) are unavailable; "" if available."""
    import_meltingpot()
    from meltingpot.configs import bots as configs

    models = Path(configs.MODELS_ROOT)
    found = (configs.BOT_CONFIGS.get(name) for name in names)
    paths = [Path(config.model_path) for config in found if config]
    for path in (models, *paths):
        if not path.is_dir():
            return (
                f"Official bots need Melting Pot's assets, and {path} is not there: "
                "see docs/meltingpot.md, or take --bots scripted."
            )
    if importlib.util.find_spec("tensorflow") is None:
        return "Official bots need tensorflow: pip install -r requirements-bots.txt."
    return ""


def choose_bots(plans: Sequence[Plan], wanted: Wanted) -> Kind:
    """The kind of bots, the same for all plans; ValueError, one sentence, if it is unavailable."""
    missing = missing_assets(bot_names(plans)) if wanted != "scripted" else ""
    if wanted != "scripted" and not missing:
        return "official"
    if wanted == "official":
        raise ValueError(missing)
    for plan in plans:
        if name := unscripted(plan):
            raise ValueError(
                f"{plan.name} has no scripted bots: {name} is a network without a puppeteer."
            )
    return "scripted"


# --- A bot on its seat ----------------------------------------------------------------------------


@functools.cache
def official_bot(name: str) -> Any:
    """An official bot, loaded once per process: seats can share it, as they hold its state."""
    from meltingpot import bot

    return bot.build(name)


def goal_names(substrate: str) -> list[str]:
    """Names of the goals of a substrate's puppets; their order is the number of a goal."""
    import_meltingpot()
    from meltingpot.configs import bots as configs

    goals = configs._PUPPET_GOALS
    return list(goals.get(f"{substrate}_3_goals") or goals[substrate])  # clean_up has a second set


def new_puppeteer(name: str, spec: Spec) -> Any:
    """The puppeteer of the bot `name`, or for "goal:NAME" one that always sets this goal."""
    from meltingpot.configs import bots as configs
    from meltingpot.utils.puppeteers import fixed_goal

    if not name.startswith(GOAL):
        return configs.BOT_CONFIGS[name].puppeteer_builder()
    names = goal_names(spec.substrate)
    return fixed_goal.FixedGoal(np.eye(len(names), dtype=np.int32)[names.index(name[len(GOAL) :])])


class Bot:
    """A bot on its seat for one episode: an official bot, or a puppeteer with a scripted puppet."""

    def __init__(self, name: str, kind: Kind, engine: ScenarioEngine, seat: int, seed: int):
        self.name, self.engine, self.seat, self.seed = name, engine, seat, seed
        self.policy, self.state = None, None
        if name == RANDOM:
            self.rng = np.random.default_rng(seed)
            return
        if kind == "official":
            self.policy = official_bot(name)
        else:
            from meltingpot.utils.policies import puppet_policy

            puppet = engine.new_puppet(seat)
            self.policy = puppet_policy.PuppetPolicy(new_puppeteer(name, engine.spec), puppet)
        self.state = self.policy.initial_state()

    def act(self, first: bool, reward: float) -> int:
        """The bot's action, 0..A - 1; first: at an episode's start; reward: its own, last step."""
        if self.policy is None:
            return int(self.rng.integers(len(self.engine.spec.actions)))
        import dm_env

        kind = dm_env.StepType.FIRST if first else dm_env.StepType.MID
        seen = self.engine.seen(self.seat) | {"SEED": self.seed}
        timestep = dm_env.TimeStep(kind, reward, 0.0 if first else 1.0, seen)
        action, self.state = self.policy.step(timestep, self.state)
        return action


# --- The engine -----------------------------------------------------------------------------------


class ScenarioEngine(Engine):
    """One episode of a scenario; from outside it has only the F focal seats as players."""

    def __init__(self, plan: Plan, kind: Kind, seed: tuple[int, ...], palette: Palette):
        rng = np.random.default_rng(seed)
        found: list[Any] = []

        def change(settings: Any) -> None:
            for one in settings["simulation"]["gameObjects"]:
                if any(part["component"] == "Avatar" for part in one["components"]):
                    kwargs = {"objectIsAvatar": True, "alsoReportOrientation": True}
                    one["components"].append({"component": "LocationObserver", "kwargs": kwargs})
            found.append(settings)

        self.attach(plan.spec, build_lab(plan.spec, rng, change))
        with quiet():
            self.lab.start(0, seed=int(rng.integers(2**31)))
        self.plan, self.palette, self.settings = plan, palette, found[0]
        self.rewards_now = np.zeros(plan.spec.num_agents)
        self.kind, self.first, self.sight = kind, True, None
        self.keys = self.read_keys()
        random.seed(int(rng.integers(2**63)))  # some puppeteers draw from Python's own generator
        self.bots = []
        for seat, names in enumerate(plan.bots):
            if names:
                name = names[int(rng.integers(len(names)))]
                self.bots.append(Bot(name, kind, self, seat, int(rng.integers(2**31))))
        taken = [bot.seat for bot in self.bots]
        self.focal = [seat for seat in range(plan.spec.num_agents) if seat not in taken]
        self.order = [*self.focal, *taken]
        self.feature_names = [
            (self.focal.index(seat), *rest)
            for seat, *rest in self.feature_names
            if seat in self.focal
        ]

    def read_keys(self) -> list[str]:
        """Names of the observations that the engine has for a bot's seat, without the prefix."""
        from meltingpot.configs import substrates as configs

        own = configs.get_config(self.spec.substrate).individual_observation_names
        return [*own] if self.kind == "official" else [*own, "POSITION", "ORIENTATION"]

    def seen(self, seat: int) -> dict[str, Any]:
        """{name: array} of what the bot on this seat observes. Official bot: as in Melting Pot.
        Scripted bot: the seat's own observations, POSITION and ORIENTATION."""
        observe = self.lab.observation
        seen = {key: observe(f"{seat + 1}.{key}") for key in self.keys}
        if self.kind == "official":
            total = self.rewards_now.sum()
            seen |= {"WORLD.RGB": observe("WORLD.RGB"), "COLLECTIVE_REWARD": total}
        return seen

    def new_puppet(self, seat: int) -> scripted.Puppet:
        """A scripted puppet for a seat; an episode's puppets share a Sight, which caches tiles."""
        if self.sight is None:
            sprites = read_sprites(self.settings)
            self.sight = scripted.new_sight(self.spec, self.settings, sprites)
        kind = scripted.puppet_kind(self.spec.substrate).puppet
        return kind(self.spec, self.settings, self.sight, self.palette, seat)

    def step(self, actions: np.ndarray) -> bool:
        """Advance by one step with focal players' actions (F,) int; True if the episode goes on."""
        every = np.zeros(self.spec.num_agents, np.int64)
        every[self.focal] = actions
        for bot in self.bots:
            every[bot.seat] = bot.act(self.first, float(self.rewards_now[bot.seat]))
        self.first = False
        return super().step(every)

    def read_rewards(self, reward: np.ndarray, pick_ups: np.ndarray) -> None:
        """Write the last step's rewards and numbers of pick-ups, (F + M,) each, bots last."""
        counts = np.zeros(len(self.order), np.int64)
        super().read_rewards(self.rewards_now, counts)
        reward[:], pick_ups[:] = self.rewards_now[self.order], counts[self.order]

    def observe(self, palette: Palette, out: Observation) -> None:
        """Write to out: tile_ids (F, H, W) and features (F, .) of focal seats, and world_ids."""
        tile_ids, world_ids, features = out
        observe = self.lab.observation
        for player, seat in enumerate(self.focal):
            palette.encode(observe(self.rgb[seat]), tile_ids[player])
        palette.encode(observe("WORLD.RGB"), world_ids)
        for player, first, last, name in self.feature_names:
            features[player, first:last] = observe(name).ravel()

    def locate(self, places: np.ndarray) -> None:
        """Write row and column of each player (F + M, 2) int64, bots last."""
        for k, seat in enumerate(self.order):
            places[k] = self.lab.observation(f"{seat + 1}.POSITION")[::-1]


@dataclasses.dataclass(frozen=True)
class ScenarioEngines(PlainEngines):
    """A factory that runs in worker processes: world b gets engines of plan b % len(plans)."""

    plans: tuple[Plan, ...]
    kind: Kind

    def prepare(self) -> None:
        import_meltingpot(bots=self.kind == "official")
        if self.kind == "scripted":
            scripted.compile_kernels()

    def __call__(self, world: int, seed: tuple[int, ...], palette: Palette) -> Engine:
        return ScenarioEngine(self.plans[world % len(self.plans)], self.kind, seed, palette)


class Scenarios(MeltingPot):
    """num_envs worlds that play scenarios of one substrate with equally many focal seats.

    scenarios   names or Plans; world b plays scenarios[b % len(scenarios)]
    bots        "auto", "official" or "scripted"; the attribute `kind` is the kind that plays
    Options: of MeltingPot. ValueError: unknown scenario, no bots, unequal numbers of seats.
    """

    def __init__(
        self,
        scenarios: Sequence[str | Plan],
        num_envs: int,
        seed: int = 1,
        bots: Wanted = "auto",
        **options: Any,
    ):
        self.plans = [get_plan(one) if isinstance(one, str) else one for one in scenarios]
        self.kind = choose_bots(self.plans, bots)
        plans = [self.plans[b % len(self.plans)] for b in range(num_envs)]
        self.labels = tuple(plan.name for plan in plans)
        super().__init__(self.plans[0].spec.substrate, num_envs, seed, **options)
        self.seats = np.array([focal_seats(plan) for plan in plans])  # (B, F) seat numbers
        self.seat_roles = [plan.spec.roles for plan in plans]  # (B, F + M), of bots, too

    def plan(self, substrate: str) -> tuple[Spec, PlainEngines]:
        specs = [plan.spec for plan in self.plans]
        focal = [focal_seats(plan) for plan in self.plans]
        same = {(spec.substrate, len(seats)) for spec, seats in zip(specs, focal)}
        if len(same) > 1 or len({spec.num_agents for spec in specs}) > 1:
            raise ValueError("Scenarios that are played together must have the same seats.")
        roles = tuple(specs[0].roles[seat] for seat in focal[0])
        spec = dataclasses.replace(
            specs[0],
            roles=roles,
            is_focal=(True,) * len(roles),
            num_bots=specs[0].num_agents - len(roles),
        )
        return spec, ScenarioEngines(spec, tuple(self.plans), self.kind)


# --- Evaluation -----------------------------------------------------------------------------------


def play_scenarios(
    scenarios: Sequence[str],
    bots: Kind,
    new_player: Callable[[Scenarios], Player],
    episodes: int,
    num_envs: int,
    rng: np.random.Generator,
    id_roles: tuple[str, ...],
    shuffle_ids: bool = True,
    videos: Path | None = None,
    stem: str = "",
    progress: Progress = ignore,
    **options: Any,
) -> dict[str, list[Result]]:
    """Play `episodes` episodes of each scenario of a substrate, in about num_envs worlds at a time.

    Scenarios with equal numbers of seats and of focal seats share a Scenarios object `envs`, for
    which new_player(envs) makes the focal player. Returns {"SC0 scripted": results} in the order of
    `scenarios`. Other arguments: envs.meltingpot.episodes.play_all(); options: MeltingPot.
    """
    groups: dict[tuple, list[str]] = {}
    for name in scenarios:
        plan = get_plan(name)
        groups.setdefault((plan.spec.num_agents, len(focal_seats(plan))), []).append(name)
    results = {}
    for names in groups.values():
        worlds = len(names) * max(1, min(episodes, num_envs // len(names)))
        with Scenarios(names, worlds, int(rng.integers(2**31)), bots, **options) as envs:
            films = {name: Video() for name in names} if videos else {}
            played = play_all(
                envs,
                new_player(envs),
                None,
                num_focal=0,
                episodes=episodes,
                rng=rng,
                shuffle_ids=shuffle_ids,
                id_roles=id_roles,
                videos=films,
                progress=progress,
            )
        results |= {f"{short(name)} {bots}": played[name] for name in names}
        for name, film in films.items():
            film.save(videos / f"{stem}-{short(name)}-{bots}.mp4")
    order = [f"{short(name)} {bots}" for name in scenarios]
    return {name: results[name] for name in order}


def find_scenarios(args: Any) -> tuple[list[str], Kind | None]:
    """Names of the scenarios that args.eval_scenarios selects, and the kind of their bots (None: no
    scenarios). NoWorldError for an unknown scenario, unavailable bots or missing packages."""
    if args.substrate == "toy" or ":" in args.substrate:
        if args.eval_scenarios not in ("all", "none"):
            raise NoWorldError(f"--eval-scenarios: {args.substrate} has none.")
        return [], None
    try:
        names = choose_scenarios(args.substrate, args.eval_scenarios, args.bots)
        kind = choose_bots([get_plan(name) for name in names], args.bots) if names else None
    except (ValueError, ModuleNotFoundError) as error:
        raise NoWorldError(str(error)) from None
    return names, kind


def background_rows(
    args: Any,
    evaluation: Any,
    envs: Any,
    new_player: Callable[[Any], Player],
    partners: Mapping[str, Callable[[Any], Player]],
) -> dict[str, dict[str, float]]:
    """{row name: summarise()}: "self-play" of new_player(envs), "v NAME" for new_player(envs) with
    each NAME of --background, and "random v random" if random is one of these names. In a world for
    one agent nobody is beside it: no "v NAME".

    args: as for scenario_rows(), with background and num_focal. evaluation: harness.Evaluation.
    partners: {NAME: function that makes its player for envs}; a NAME without one is left out.
    NoWorldError, before anything is played, if scenario_rows() will raise it.
    """
    find_kept(args, evaluation, *find_scenarios(args))
    pairs: dict[str, tuple[Player, Player | None]] = {"self-play": (new_player(envs), None)}
    for name in args.background:
        if name == "random":
            them = random_player(envs.spec.num_actions, evaluation.rng)
            pairs["random v random"] = (them, them)
        elif name in partners:
            them = partners[name](envs)
        else:
            continue
        if envs.spec.num_agents > 1:
            pairs[f"v {name}"] = (new_player(envs), them)
    evaluation.expect(evaluation.episodes * len(pairs))
    return play_pairs(
        envs,
        pairs,
        num_focal=args.num_focal or max(1, envs.spec.num_agents - 1),
        episodes=evaluation.episodes,
        rng=evaluation.rng,
        shuffle_ids=args.eval_ids == "random",
        videos=evaluation.videos,
        stem=evaluation.stem,
        progress=evaluation.progress,
    )


def scenario_rows(
    args: Any,
    evaluation: Any,
    new_player: Callable[[Any], Player],
    id_roles: tuple[str, ...],
) -> dict[str, dict[str, float]]:
    """Play every scenario that args selects with new_player(envs); return {"SC0 scripted":
    envs.meltingpot.episodes.summarise()}, and write CSVs to evaluation.run_dir / "evaluation" in
    place of those that an evaluation after the same steps has left there (see find_kept()).

    args: of a script, with substrate, seed, num_envs, num_workers, worker_timeout, eval_ids,
    eval_scenarios, eval_only, run_dir and bots. evaluation: harness.Evaluation; a run_dir of None
    writes no files. id_roles: roles of the agent ids in training. NoWorldError as find_scenarios(),
    and as find_kept(); WorldError: cannot write.
    """
    names, bots = find_scenarios(args)
    kept = find_kept(args, evaluation, names, bots)
    played = {}
    if names:
        evaluation.expect(evaluation.episodes * len(names))
        played = play_scenarios(
            names,
            bots,
            new_player,
            episodes=evaluation.episodes,
            num_envs=args.num_envs,
            rng=evaluation.rng,
            id_roles=id_roles,
            shuffle_ids=args.eval_ids == "random",
            videos=evaluation.videos,
            stem=evaluation.stem,
            progress=evaluation.progress,
            num_workers=args.num_workers,
            timeout=args.worker_timeout,
        )
    if evaluation.run_dir:
        folder = evaluation.run_dir / "evaluation"
        new = {row: results for row, results in played.items() if row not in kept}
        if kept:
            print(f"{folder} keeps what it has of {', '.join(kept)}: for a copy name a --run-dir.")
        before = files_of(folder, evaluation)
        try:
            written = save_results(folder, evaluation, args.substrate, args.seed, new)
            if args.run_dir or not args.eval_only:  # it replaces an evaluation that was here
                for path in {*before}.difference(written):
                    path.unlink()
        except OSError as error:
            raise WorldError(f"{folder} cannot be written: {error.strerror or error}.") from None
    return {row: summarise(results) for row, results in played.items()}


def find_kept(args: Any, evaluation: Any, names: Sequence[str], bots: Kind) -> list[str]:
    """The rows whose files --eval-only without --run-dir must not replace, as the run has finished.
    NoWorldError, before anything is played, if it would replace better files, or write files of
    another policy or of other ids beside those that are there."""
    # Tables read these files as the run's final evaluation, of which summary.json has the figures:
    # a later look must not take its place. With fewer episodes or by another policy it is refused.
    run_dir = evaluation.run_dir
    if not args.eval_only or args.run_dir or not run_dir or not names:
        return []
    finished = (run_dir / "summary.json").exists()
    own: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # args.json is lost or damaged
        about = json.loads((run_dir / "args.json").read_text())
        for flags in (about, *about.get("resumed", ())):
            own |= flags
    other = [x for x in ("eval_ids", "randnet_test") if x in own and own[x] != getattr(args, x)]
    folder = run_dir / "evaluation"
    files = {f"{short(x)} {bots}": folder / file_of(evaluation, short(x), bots) for x in names}
    kept = {row: path for row, path in files.items() if path.exists()}
    for path in (*kept.values(), *(files_of(folder, evaluation) if other else ())):
        reasons = [f"--{x.replace('_', '-')} {own[x]}" for x in other]
        episodes = len(path.read_text().splitlines()) - 1
        if path in kept.values() and episodes > evaluation.episodes:
            reasons.append(f"{episodes} episodes")
        if reasons:
            text = f"{path} has {' and '.join(reasons)} and stays as it is"
            raise NoWorldError(f"{text}: name another directory by --run-dir.")
    return list(kept) if finished else []


COLUMNS = ("scenario", "bots", "seed", "timesteps", "episode", *Result._fields)


def file_of(evaluation: Any, scenario: str, bots: str) -> str:
    """The name of a scenario's file, as "final-1000000-SC0-scripted.csv"."""
    return f"{evaluation.kind}-{evaluation.timesteps}-{scenario}-{bots}.csv"


def files_of(folder: Path, evaluation: Any) -> list[Path]:
    """The files in `folder` of this kind of evaluation after these steps."""
    return sorted(folder.glob(file_of(evaluation, "*", "*")))


def save_results(
    folder: Path, evaluation: Any, substrate: str, seed: int, results: dict
) -> list[Path]:
    """Write a CSV per scenario, a line per episode, named by file_of(). Returns their paths."""
    paths = []
    for row, episodes in results.items():
        folder.mkdir(parents=True, exist_ok=True)
        scenario, _, bots = row.partition(" ")
        name = f"{substrate}_{scenario.removeprefix('SC')}"
        about = (name, bots, seed, evaluation.timesteps)
        paths.append(folder / file_of(evaluation, scenario, bots))
        part = paths[-1].with_name(f".{paths[-1].name}")
        with part.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([*about, k, *result] for k, result in enumerate(episodes))
        part.replace(paths[-1])
    return paths
