"""Playing full episodes for evaluation: who sits where, what it earns, how it looks.

Policies enter as callables, so everything here is independent of any script. A player is called as
`player(obs, starts, ids) -> actions (B, N)` for all seats of all worlds at once, whichever of them
it really plays; `starts  # (B,) bool` says which worlds have just begun an episode (forget what you
remember of them) and `ids  # (B, N)` under which of the N agent ids each seat acts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from envs.meltingpot.tiles import Episode, Observation
from envs.statistics import aligned_table, draw_rows, ratio_interval, with_interval

Player = Callable[[Observation, np.ndarray, np.ndarray], np.ndarray]
Progress = Callable[[int], None]  # told how many more episodes are done


def ignore(episodes: int) -> None:
    """Nobody wants to know."""


class Result(NamedTuple):
    """One episode, per capita of the focal players (Eq. 2 of BiDist) and of the background."""

    focal_return: float
    background_return: float  # NaN if everyone is focal
    focal_pick_ups: float
    background_pick_ups: float
    length: int


def count_episodes(episodes: list[Episode]) -> dict[str, float]:
    """Scalars of the episodes that ended in a rollout, per capita of all players."""
    if not episodes:
        return {}
    length = float(np.mean([episode.length for episode in episodes]))
    pick_ups = float(np.mean([episode.pick_ups.mean() for episode in episodes]))
    return {
        "episode/return": float(np.mean([episode.returns.mean() for episode in episodes])),
        "episode/length": length,
        "episode/pick_ups_per_1000": 1000 * pick_ups / length,
    }


def random_player(num_actions: int, rng: np.random.Generator) -> Player:
    """Plays every action with the same probability."""
    return lambda obs, starts, ids: rng.integers(0, num_actions, ids.shape)


def in_turn(players: list[Player]) -> Player:
    """One player in each world: the first of these in the first, and so on, again and again."""

    def play(obs: Observation, starts: np.ndarray, ids: np.ndarray) -> np.ndarray:
        actions = np.stack([player(obs, starts, ids) for player in players])  # (., B, N)
        worlds = np.arange(len(starts))
        return actions[worlds % len(players), worlds]

    return play


def play(
    envs: Any,
    focal: Player,
    background: Player | None,
    num_focal: int,
    episodes: int,
    rng: np.random.Generator,
    shuffle_ids: bool = True,
    video: Video | None = None,
    progress: Progress = ignore,
) -> list[Result]:
    """Play `episodes` episodes to their end and return one Result each: play_all() for worlds that
    are all alike."""
    results = play_all(
        envs,
        focal,
        background,
        num_focal=num_focal,
        episodes=episodes,
        rng=rng,
        shuffle_ids=shuffle_ids,
        videos={"": video} if video is not None else {},
        progress=progress,
    )
    return results[""]


def play_all(
    envs: Any,
    focal: Player,
    background: Player | None,
    num_focal: int,
    episodes: int,
    rng: np.random.Generator,
    shuffle_ids: bool = True,
    num_ids: int = 0,
    videos: Mapping[str, Video] | None = None,
    progress: Progress = ignore,
) -> dict[str, list[Result]]:
    """Play `episodes` episodes with each label of envs.labels (worlds of one scenario have the same
    label; without labels it is "") to their end; returns one Result each, by label.

    progress(1) is called when an episode that counts is over; what it raises ends the play. videos
    has a film for some of the labels.

    With `background`, num_focal seats drawn anew for every episode are focal (in a scenario: those
    it names) and the others are played by it; with None everyone is focal but the bots that envs
    itself plays. Each seat gets one of num_ids ids (0: as many as seats), drawn without replacement
    for every episode, or the seat's own number with shuffle_ids=False. Every episode that begins
    counts until enough have begun, and those are all played to their end: counting the first to
    finish would favour short ones.
    """
    worlds, seats, bots = envs.num_envs, envs.spec.num_agents, envs.spec.num_bots
    labels = getattr(envs, "labels", ("",) * worlds)
    films = {labels.index(label): film for label, film in (videos or {}).items()}
    is_focal = np.ones((worlds, seats), bool)
    own = getattr(envs, "seats", np.tile(np.arange(seats), (worlds, 1)))  # of scenarios: not all
    ids = own.copy()

    def begin(world: int) -> None:
        if shuffle_ids:
            ids[world] = rng.permutation(num_ids or seats)[:seats]
        if background is not None:
            fixed = np.array(envs.spec.is_focal)
            is_focal[world] = rng.permutation(seats) < num_focal if fixed.all() else fixed

    results: dict[str, list[Result]] = {label: [] for label in labels}
    begun = dict.fromkeys(labels, 0)

    def counts(world: int) -> bool:
        """Whether the episode that begins in a world is one of those to be played."""
        begun[labels[world]] += 1
        return begun[labels[world]] <= episodes

    counted = np.array([counts(world) for world in range(worlds)])
    for world in range(worlds):
        begin(world)
    obs, starts = envs.reset(), np.ones(worlds, bool)
    for world in np.flatnonzero(~counted):
        envs.rest(world)
    while counted.any():
        for world, film in films.items():
            if film.open and counted[world]:
                image = envs.images(obs.world_ids[world])
                film.add(mark(image, envs.places(world), seats) if bots else image)
        actions = focal(obs, starts, ids)
        if background is not None:
            actions = np.where(is_focal, actions, background(obs, starts, ids))
        obs, _, terminated, truncated, _, ended = envs.step(actions)
        starts = terminated | truncated
        for episode in ended:
            world = episode.world
            if counted[world]:
                us = np.append(is_focal[world], np.zeros(bots, bool))
                means = [
                    figures[who].mean() if who.any() else math.nan
                    for figures in (
                        np.append(episode.returns, episode.bot_returns),
                        np.append(episode.pick_ups, episode.bot_pick_ups),
                    )
                    for who in (us, ~us)
                ]
                results[labels[world]].append(Result(*map(float, means), episode.length))
                progress(1)
                counted[world] = counts(world)
                if world in films:
                    films[world].stop()
                if not counted[world]:
                    envs.rest(world)
            begin(world)
    return results


FOCAL_COLOUR, BOT_COLOUR = (70, 140, 255), (255, 215, 0)  # blue and yellow, as in BiDist's Fig. 1


def mark(image: np.ndarray, places: np.ndarray, num_focal: int) -> np.ndarray:
    """A global view (8H, 8W, 3) with frames around players; places (N, 2): row and column of each,
    focal ones first; who is not on the map has none."""
    image = image.copy()
    for player, (row, column) in enumerate(places):
        cell = image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        if min(row, column) >= 0 and cell.shape[:2] == (8, 8):
            colour = FOCAL_COLOUR if player < num_focal else BOT_COLOUR
            cell[[0, -1]] = cell[:, [0, -1]] = colour
    return image


def play_pairs(
    envs: Any,
    pairs: dict[str, tuple[Player, Player | None]],
    num_focal: int,
    episodes: int,
    rng: np.random.Generator,
    shuffle_ids: bool = True,
    videos: Path | None = None,
    stem: str = "",
    progress: Progress = ignore,
) -> dict[str, dict[str, float]]:
    """play() and summarise() for each named (focal, background) pair, with films in `videos`."""
    summaries = {}
    for name, (focal, background) in pairs.items():
        video = Video() if videos else None
        results = play(
            envs,
            focal,
            background,
            num_focal=num_focal,
            episodes=episodes,
            rng=rng,
            shuffle_ids=shuffle_ids,
            video=video,
            progress=progress,
        )
        summaries[name] = summarise(results)
        if video:
            video.save(videos / f"{stem}-{re.sub('[^a-zA-Z0-9_.]+', '-', name)}.mp4")
    return summaries


def background_rows(
    args: Any,
    evaluation: Any,
    envs: Any,
    new_player: Callable[[Any], Player],
    partners: Mapping[str, Callable[[Any], Player]],
) -> dict[str, dict[str, float]]:
    """{"self-play": summarise()}, and "v NAME" of new_player(envs) beside each of --background,
    with "random v random" where random is one of them.

    args: a script's, with background, num_focal and eval_ids. evaluation: harness.Evaluation, with
    how much is played. partners: NAME to what makes its player for envs; who has none has no row.
    """
    pairs: dict[str, tuple[Player, Player | None]] = {"self-play": (new_player(envs), None)}
    for name in args.background:
        if name == "random":
            them = random_player(envs.spec.num_actions, evaluation.rng)
            pairs["random v random"] = (them, them)
        elif name in partners:
            them = partners[name](envs)
        else:
            continue
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


def summarise(results: list[Result], seed: int = 0) -> dict[str, float]:
    """Means of the focal players' figures, with 95 % intervals (percentile bootstrap of episodes).

    Rates per 1,000 steps are ratios of totals, so that long episodes weigh more.
    """
    data = np.array(results, float)  # (episodes, len(Result._fields))
    column = {name: data[:, i] for i, name in enumerate(Result._fields)}
    per_episode = np.ones(len(data))
    quantities = {
        "return": (column["focal_return"], per_episode),
        "return_per_1000": (1000 * column["focal_return"], column["length"]),
        "pick_ups_per_1000": (1000 * column["focal_pick_ups"], column["length"]),
        "background_return": (column["background_return"], per_episode),
        "length": (column["length"], per_episode),
    }
    rows = draw_rows(len(data), seed=seed)
    summary: dict[str, float] = {"episodes": len(data)}
    for name, (numerator, denominator) in quantities.items():
        if not np.isnan(numerator).any():
            summary[name] = float(numerator.sum() / denominator.sum())
            low, high = ratio_interval(numerator, denominator, rows)
            summary[f"{name}_low"], summary[f"{name}_high"] = low, high
    return summary


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown: one line per row name ("focal v co-player"), with intervals."""
    columns = {
        "return_per_1000": "focal return per 1,000 steps",
        "return": "per episode",
        "pick_ups_per_1000": "pick-ups per 1,000 steps",
        "length": "steps",
    }
    lines = [["focal v co-player", *columns.values(), "episodes"]]
    for name, row in rows.items():
        cells = [with_interval(row, key, digits=1) for key in columns]
        lines.append([name, *cells, str(int(row["episodes"]))])
    return aligned_table(lines)


class Video:
    """Frames of the first world's first episode, at most `limit`, saved as a small MP4."""

    def __init__(self, limit: int = 600, fps: int = 15):
        self.limit, self.fps, self.frames, self.open = limit, fps, [], True

    def add(self, image: np.ndarray) -> None:
        """Append a frame (8H, 8W, 3) uint8."""
        if self.open and len(self.frames) < self.limit:
            self.frames.append(image)

    def stop(self) -> None:
        """Take no more frames: the episode is over."""
        self.open = False

    def save(self, path: Path) -> None:
        """Write an MP4 (H.264), enlarged to about 480 pixels, with sides divisible by 16."""
        import imageio.v2 as imageio

        path.parent.mkdir(parents=True, exist_ok=True)
        scale = max(1, round(480 / max(self.frames[0].shape[:2])))
        enlarge = f"scale=iw*{scale}:ih*{scale}:flags=neighbor"
        pad = "pad=ceil(iw/16)*16:ceil(ih/16)*16"
        with imageio.get_writer(
            path,
            fps=self.fps,
            codec="libx264",
            quality=6,
            macro_block_size=1,
            output_params=["-vf", f"{enlarge},{pad}", "-preset", "veryfast"],
        ) as writer:
            for frame in self.frames:
                writer.append_data(frame)
