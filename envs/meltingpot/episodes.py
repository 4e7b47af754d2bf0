"""Play full episodes for evaluation: assign seats and agent ids, sum up returns, save films.

Policies are callables, so this file is independent of any script. A player is called as
`player(obs, starts, ids) -> actions  # (B, N) int` for all seats of all B worlds at once, also for
seats that another player plays. `starts  # (B,) bool` is True where a world has just begun an
episode: the player resets its hidden state there. `ids  # (B, N) int` are the seats' agent ids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from envs import films
from envs.meltingpot.tiles import Episode, Observation
from envs.statistics import aligned_table, draw_rows, ratio_interval, with_interval

Player = Callable[[Observation, np.ndarray, np.ndarray], np.ndarray]
Progress = Callable[[int], None]  # is called with the number of episodes that are newly done


def ignore(episodes: int) -> None:
    """The Progress that does nothing."""


class Result(NamedTuple):
    """One episode: means over its focal players (Eq. 2 of BiDist) and over its background."""

    focal_return: float  # undiscounted return per focal player
    background_return: float  # NaN if all players are focal
    focal_pick_ups: float
    background_pick_ups: float  # NaN if all players are focal
    length: int  # in steps


def count_episodes(episodes: list[Episode]) -> dict[str, float]:
    """Log entries of training episodes: means over episodes and players."""
    if not episodes:
        return {}
    length = float(np.mean([episode.length for episode in episodes]))
    pick_ups = float(np.mean([episode.pick_ups.mean() for episode in episodes]))
    return {
        "episode/return": float(np.mean([episode.returns.mean() for episode in episodes])),
        "episode/length": length,
        "episode/pick_ups_per_1000": 1000 * pick_ups / length,
    }


class EpisodeLog:
    """Collects training episodes (append to `episodes`) until means() writes them to the log."""

    def __init__(self, gather: Callable[[list[Episode]], list[list[Episode]]]):
        """gather: from this process's list to the lists of all processes."""
        self.gather, self.episodes = gather, []

    def means(self) -> dict[str, float]:
        """count_episodes() of all processes' episodes. Empties the log."""
        every = [episode for own in self.gather(self.episodes) for episode in own]
        self.episodes = []
        return count_episodes(every)

    def state_dict(self) -> dict[str, Any]:
        return {"episodes": [[np.asarray(x).tolist() for x in one] for one in self.episodes]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.episodes = [Episode(*map(plain_or_array, one)) for one in saved["episodes"]]


def plain_or_array(x: Any) -> Any:
    """A list as an array; a number as it is."""
    return np.array(x) if isinstance(x, list) else x


def random_player(num_actions: int, rng: np.random.Generator) -> Player:
    """A player that draws every action with the same probability."""
    return lambda obs, starts, ids: rng.integers(0, num_actions, ids.shape)


def in_turn(players: list[Player]) -> Player:
    """A player that plays world b with players[b % len(players)]."""

    def play(obs: Observation, starts: np.ndarray, ids: np.ndarray) -> np.ndarray:
        actions = np.stack([player(obs, starts, ids) for player in players])  # (., B, N)
        worlds = np.arange(len(starts))
        return actions[worlds % len(players), worlds]

    return play


def seat_ids(
    order: Sequence[int], id_roles: Sequence[str], seat_roles: Sequence[str]
) -> np.ndarray:
    """Agent ids (N,) int of seats with the roles `seat_roles`: each has the next id in `order` that
    had its role in training (id_roles: the role of each id). What is left goes to seats whose role
    training did not have, or had on fewer seats."""
    free = list(order)
    ids = np.full(len(seat_roles), -1)
    for seat, role in enumerate(seat_roles):
        same = [x for x in free if id_roles[x] == role]
        if same:
            ids[seat] = same[0]
            free.remove(same[0])
    for seat in np.flatnonzero(ids < 0):
        ids[seat] = free.pop(0)
    return ids


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
    """Play `episodes` episodes to their end and return one Result each. play_all() explains the
    arguments. ValueError for worlds with several labels, as of several scenarios."""
    label, *others = set(getattr(envs, "labels", ("",)))
    if others:
        raise ValueError("These worlds have several labels: play_all() has results of each.")
    results = play_all(
        envs,
        focal,
        background,
        num_focal=num_focal,
        episodes=episodes,
        rng=rng,
        shuffle_ids=shuffle_ids,
        videos={label: video} if video is not None else {},
        progress=progress,
    )
    return results[label]


def play_all(
    envs: Any,
    focal: Player,
    background: Player | None,
    num_focal: int,
    episodes: int,
    rng: np.random.Generator,
    shuffle_ids: bool = True,
    id_roles: tuple[str, ...] = (),
    videos: Mapping[str, Video] | None = None,
    progress: Progress = ignore,
) -> dict[str, list[Result]]:
    """Play `episodes` episodes per label to their end; return {label: one Result per episode}.

    envs         envs.labels has a label per world, one for each scenario (no labels: all "")
    focal        plays the focal seats: num_focal seats, drawn for every episode, or those that the
                 scenario names, or all seats if `background` is None
    background   plays the other seats; bots are played by envs itself
    id_roles     role that each agent id had in training (default: the roles of envs.spec). Every
                 episode draws the ids of its seats among those of their roles, without replacement;
                 with shuffle_ids=False the k-th seat of a role has the k-th id of this role
    videos       {label: film that records the first world of this label}
    progress     progress(n) is called after each step, in which n counted episodes have ended; its
                 exceptions end the play
    The first `episodes` that begin are counted, and played to their end. To count the first that
    finish would favour short episodes.
    """
    worlds, seats, bots = envs.num_envs, envs.spec.num_agents, envs.spec.num_bots
    labels = getattr(envs, "labels", ("",) * worlds)
    films = {labels.index(label): film for label, film in (videos or {}).items()}
    is_focal = np.ones((worlds, seats), bool)
    own = getattr(envs, "seats", np.tile(np.arange(seats), (worlds, 1)))  # scenarios: focal seats
    id_roles = id_roles or envs.spec.roles
    seat_roles = getattr(envs, "seat_roles", [envs.spec.roles] * worlds)  # with bots' seats
    ids = own.copy()

    def begin(world: int) -> None:
        roles = seat_roles[world]
        if shuffle_ids:
            roles = [roles[seat] for seat in own[world]]
            ids[world] = seat_ids(rng.permutation(len(id_roles)), id_roles, roles)
        else:
            ids[world] = seat_ids(range(len(id_roles)), id_roles, roles)[own[world]]
        if background is not None:
            fixed = np.array(envs.spec.is_focal)
            is_focal[world] = rng.permutation(seats) < num_focal if fixed.all() else fixed

    results: dict[str, list[Result]] = {label: [] for label in labels}
    begun = dict.fromkeys(labels, 0)

    def counts(world: int) -> bool:
        """True if the episode that begins in this world is one of the first `episodes`."""
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
        progress(sum(bool(counted[episode.world]) for episode in ended))
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
                counted[world] = counts(world)
                if world in films:
                    films[world].stop()
                if not counted[world]:
                    envs.rest(world)
            begin(world)
    return results


FOCAL_COLOUR, BOT_COLOUR = (70, 140, 255), (255, 215, 0)  # blue and yellow, as in BiDist's Fig. 1


def mark(image: np.ndarray, places: np.ndarray, num_focal: int) -> np.ndarray:
    """A copy of a global view (8H, 8W, 3) uint8 with frames around players. places (N, 2) int: row
    and column of each player, focal players first; a player off the map gets no frame."""
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
    """{name: summarise(play())} for (focal, background) pairs; films go to the folder `videos`."""
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


def summarise(results: list[Result], seed: int = 0) -> dict[str, float]:
    """{name: mean over episodes}, with name_low and name_high: a 95 % percentile bootstrap interval
    over episodes, drawn with `seed`. A quantity that is NaN in an episode is left out. Rates per
    1,000 steps are ratios of totals: long episodes have a larger weight."""
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
    """A Markdown table with a line per name ("focal v co-player") of summaries, with intervals."""
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
    """At most `limit` frames of one episode, saved as an MP4 with `fps` frames per second."""

    def __init__(self, limit: int = 600, fps: int = 15):
        self.limit, self.fps, self.frames, self.open = limit, fps, [], True

    def add(self, image: np.ndarray) -> None:
        """Append a frame (8H, 8W, 3) uint8, unless it has `limit` frames or is stopped."""
        if self.open and len(self.frames) < self.limit:
            self.frames.append(image)

    def stop(self) -> None:
        """Ignore further frames, because the episode is over."""
        self.open = False

    def save(self, path: Path) -> None:
        """Write an MP4 (H.264): longer side about 480 pixels, sides padded to multiples of 16."""
        scale = max(1, round(480 / max(self.frames[0].shape[:2])))
        enlarge = f"scale=iw*{scale}:ih*{scale}:flags=neighbor"
        pad = "pad=ceil(iw/16)*16:ceil(ih/16)*16"
        look = ["-vf", f"{enlarge},{pad}", "-preset", "veryfast"]
        with films.writing(path, self.fps, macro_block_size=1, output_params=look) as writer:
            for frame in self.frames:
                writer.append_data(frame)
