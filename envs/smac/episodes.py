"""Scripted agents for battles, evaluation of policies, and the log of training episodes.

A policy is a function policy(battles) -> actions (B, A) int64, called after reset() or step(). The
scripted ones read battles.obs and battles.snapshot alone, learned ones also time, over and
num_battles, so all play the simulator as well as the real game.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.smac.combat import (
    BIOLOGICAL,
    FIRST_MOVE,
    FIRST_TARGET,
    FLYING,
    HEALTH,
    HITS_AIR,
    MEDIVAC,
    MOVES,
    RADIUS,
    RANGE,
    SHIELD,
    SIDE,
    SLOTS,
    STOP,
    Episode,
)
from envs.smac.views import film as film  # re-exported: worlds.playing() has all functions here
from envs.statistics import aligned_table, share_interval, with_interval

Policy = Callable[[Any], Tensor]
HURT = 0.35  # retreat(): a unit with a smaller share of its hit points and shields walks away


def random_policy(seed: int) -> Policy:
    """A policy that draws every available action with the same probability; own generator."""
    rng = torch.Generator().manual_seed(seed)

    def play(battles: Any) -> Tensor:
        avail = battles.obs.avail.float().cpu()
        return torch.multinomial(avail.flatten(0, 1), 1, generator=rng).view(avail.shape[:2])

    return play


class _Sight:
    """What scripted agents decide by: arrays (B, ...) made from one moment of all battles."""

    def __init__(self, battles: Any):
        snap = battles.snapshot
        self.kind = np.maximum(np.asarray(snap.type), 0)  # (B, A+E)
        self.alive, self.tag = np.asarray(snap.alive), np.asarray(snap.tag)
        self.x, self.y = np.asarray(snap.x), np.asarray(snap.y)
        self.avail = np.asarray(battles.obs.avail)  # (B, A, n_actions)
        health, shield = np.asarray(snap.health), np.asarray(snap.shield)
        self.left, self.full = health + shield, (HEALTH + SHIELD)[self.kind]
        self.hurt = np.where(BIOLOGICAL[self.kind], health / HEALTH[self.kind], 1.0)
        dx, dy = (v[:, None, :] - v[:, :SIDE, None] for v in (self.x, self.y))
        self.dx, self.dy, self.far = dx, dy, np.hypot(dx, dy)  # (B, A, A+E), from agents
        radius = RADIUS[self.kind]
        self.gap = self.far - radius[:, :SIDE, None] - radius[:, None]
        foe, mine = np.arange(SLOTS) >= SIDE, self.kind[:, :SIDE, None]
        reachable = ~FLYING[self.kind][:, None] | HITS_AIR[mine]
        heals = mine == MEDIVAC
        patient = ~foe & BIOLOGICAL[self.kind][:, None] & (self.hurt < 1.0)[:, None]
        self.wanted = self.alive[:, None] & np.where(heals, patient, foe & reachable)
        self.action = np.minimum(FIRST_TARGET + self.tag, self.avail.shape[-1] - 1)
        index = np.broadcast_to(self.action[:, None], self.far.shape)
        self.able = self.wanted & np.take_along_axis(self.avail, index, -1)
        self.friends = self.alive[:, None] & ~foe & ~FLYING[self.kind][:, None]
        self.foes, self.heals = self.alive[:, None] & foe, heals[..., 0]

    def towards(self, whom: np.ndarray, sign: int = 1) -> np.ndarray:
        """(B, A): the available move that points most towards (sign -1: away from) the nearest unit
        in whom (B, A, A+E) bool; STOP if there is no such unit or no move."""
        nearest = np.where(whom, self.far, np.inf).argmin(-1)[..., None]
        dx, dy = (np.take_along_axis(d, nearest, -1) for d in (self.dx, self.dy))
        gain = sign * np.concatenate([mx * dx + my * dy for mx, my in MOVES], -1)
        gain[~self.avail[..., FIRST_MOVE : FIRST_MOVE + len(MOVES)]] = -np.inf
        may = whom.any(-1) & (gain.max(-1) > -np.inf)
        return np.where(may, FIRST_MOVE + gain.argmax(-1), STOP)

    def actions(self, key: np.ndarray) -> Tensor:
        """(B, A) int64: act on the target in `able` with the smallest key (B, A, A+E), Medivacs
        last. Without one, walk to the nearest enemy; Medivacs walk to the nearest ground friend."""
        key = key + 1e9 * (self.kind == MEDIVAC)[:, None]
        chosen = np.where(self.able, key, np.inf).argmin(-1)
        attack = np.take_along_axis(self.action, chosen, -1)
        whom = np.where(self.heals[..., None], self.friends, self.wanted)
        # An agent whose weapon can hit none of the enemies left walks to them all the same.
        whom = np.where(whom.any(-1, keepdims=True), whom, self.foes)
        actions = np.where(self.able.any(-1), attack, self.towards(whom))
        return torch.from_numpy(np.where(self.alive[:, :SIDE], actions, 0))


def nearest(battles: Any) -> Tensor:
    """A policy: each agent attacks the nearest enemy; Medivacs heal the friend hurt most."""
    sight = _Sight(battles)
    return sight.actions(np.where(sight.heals[..., None], sight.hurt[:, None], sight.far))


def _focus(sight: _Sight) -> np.ndarray:
    within = sight.gap <= RANGE[sight.kind[:, :SIDE, None]]
    key = np.where(within, sight.left[:, None], 1e6 + sight.far)
    return np.where(sight.heals[..., None], sight.hurt[:, None], key)


def focus(battles: Any) -> Tensor:
    """A policy: each agent attacks the weakest enemy in its weapon's range, else the nearest."""
    sight = _Sight(battles)
    return sight.actions(_focus(sight))


def retreat(battles: Any) -> Tensor:
    """A policy: focus(), but agents below HURT walk away from the nearest enemy within 6."""
    sight = _Sight(battles)
    actions = sight.actions(_focus(sight)).numpy()
    weak = (sight.left / sight.full)[:, :SIDE] < HURT
    near = sight.foes & (sight.far < 6.0)
    away = sight.towards(near, -1)
    runs = weak & near.any(-1) & sight.alive[:, :SIDE]
    return torch.from_numpy(np.where(runs, away, actions))


def scripted_policies(seed: int) -> dict[str, Policy]:
    """{name: policy} with which tables compare learned policies; seed: of the random one."""
    named = {"nearest": nearest, "focus": focus, "retreat": retreat}
    return {"random": random_policy(seed), **named}


def tell_nobody(episodes: int) -> None:
    """The default of play()'s `progress`: does nothing."""


def play(battles: Any, policy: Policy, progress: Callable[[int], None] = tell_nobody) -> list[Any]:
    """Play one episode in every battle (made with once=True). Returns a battles.Episode of each, in
    the order of battles. progress(n) is called after each step, in which n episodes have ended."""
    battles.reset()
    episodes: list[Any] = []
    while len(episodes) < battles.num_battles:
        ended = battles.step(policy(battles)).episodes
        progress(len(ended))
        episodes += ended
    return sorted(episodes, key=lambda episode: episode.battle)


def summarise(episodes: list[Episode]) -> dict[str, float]:
    """Win rate with its 95 % Wilson interval ("win_low", "win_high"), mean return and length."""
    won = sum(episode.won for episode in episodes)
    low, high = share_interval(won, len(episodes))
    return {
        "episodes": len(episodes),
        "win": won / len(episodes),
        "win_low": low,
        "win_high": high,
        "return": float(np.mean([episode.reward for episode in episodes])),
        "length": float(np.mean([episode.length for episode in episodes])),
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table of summarise()'s results: one line for each {name: result}."""
    lines = [["who", "win rate", "return", "steps", "episodes"]]
    for name, row in rows.items():
        rest = f"{row['return']:.2f}", f"{row['length']:.0f}", f"{int(row['episodes'])}"
        lines.append([name, with_interval(row, "win", digits=3), *rest])
    return aligned_table(lines)


def alone(episodes: list[Any]) -> list[list[Any]]:
    """The default of EpisodeLog's `gather`: the only process's episodes in a list."""
    return [episodes]


class EpisodeLog:
    """Collects training episodes (append to `episodes`) until means() writes them to the log."""

    def __init__(self, kind: Any, gather: Callable[[list[Any]], list[list[Any]]] = alone):
        """kind: battles.Episode. gather: from this process's list to the lists of all processes."""
        self.kind, self.gather, self.episodes = kind, gather, []

    def means(self) -> dict[str, float]:
        """Means over all processes' episodes: "return", "win" and "length", and by team size
        "return/5", "win/5"; "episodes" is their number. Then empties the log."""
        every = [episode for own in self.gather(self.episodes) for episode in own]
        by_size = defaultdict(list)
        for episode in every:
            by_size[""].append(episode)
            by_size[f"/{sum(episode.team)}"].append(episode)
        scalars = {"episodes": len(every)}
        for size, played in sorted(by_size.items()):
            scalars[f"return{size}"] = sum(episode.reward for episode in played) / len(played)
            if hasattr(played[0], "won"):
                scalars[f"win{size}"] = sum(episode.won for episode in played) / len(played)
        if every:
            scalars["length"] = sum(episode.length for episode in every) / len(every)
        self.episodes = []
        return scalars

    def state_dict(self) -> dict[str, Any]:
        return {"episodes": [tuple(episode) for episode in self.episodes]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.episodes = [self.kind._make(episode) for episode in saved["episodes"]]
