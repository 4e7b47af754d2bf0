"""envs/meltingpot/episodes.py: which episodes count, who sits where, what is reported. On the toy,
whose episodes last 6 to 10 steps, and on a substrate of eight players."""

import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest
import scipy.stats

from envs.meltingpot.episodes import (
    EpisodeLog,
    Result,
    Video,
    count_episodes,
    play,
    play_pairs,
    random_player,
    seat_ids,
    summarise,
    table,
)
from envs.meltingpot.tiles import Episode
from envs.meltingpot.toy import TileGame
from envs.meltingpot.worlds import Engine, MeltingPot, get_spec

ARENA = "prisoners_dilemma_in_the_matrix__arena"


class Recorded:
    """Worlds that note down everything that passes through reset() and step()."""

    def __init__(self, envs):
        self.envs, self.actions, self.steps, self.resets = envs, [], [], 0

    def __getattr__(self, name):
        return getattr(self.envs, name)

    def reset(self):
        self.first = self.envs.reset()
        self.actions, self.steps, self.resets = [], [], self.resets + 1
        return self.first

    def step(self, actions):
        self.actions.append(np.array(actions))
        self.steps.append(self.envs.step(actions))
        return self.steps[-1]

    def episodes(self):
        """(first step, world, steps past the last) of the episodes that are over, as they began."""
        begun, over = [0] * self.num_envs, []
        for t, step in enumerate(self.steps):
            for b in np.flatnonzero(step.terminated | step.truncated).tolist():
                over.append((begun[b], b, t + 1))
                begun[b] = t + 1
        return sorted(over)

    def returns(self, first, world, last):
        """(N,) summed rewards of an episode."""
        return sum(step.reward[world] for step in self.steps[first:last])


class Noted:
    """A player that always chooses one action, or what a function of the observation says, and
    notes down how it is called."""

    def __init__(self, choose):
        self.choose, self.calls = choose, []

    def __call__(self, obs, starts, ids):
        self.calls.append((obs, starts.copy(), ids.copy()))
        actions = self.choose(obs) if callable(self.choose) else self.choose
        return np.broadcast_to(actions, ids.shape)


def right(obs):
    """Toy: the colour that pays; the global view shows it throughout."""
    return obs.world_ids[:, :1, 0].astype(int) - 1


def wrong(obs):
    return (right(obs) + 1) % 3


def rng(seed=0):
    return np.random.default_rng(seed)


# --- Which episodes count ------------------------------------------------------------------------


@pytest.mark.parametrize("worlds", [1, 2, 3, 8])
@pytest.mark.parametrize("episodes", [1, 2, 3, 7, 20])
def test_the_episodes_that_began_first_count_each_to_its_end(worlds, episodes):
    envs = Recorded(TileGame(worlds, seed=3))
    results = play(envs, random_player(3, rng(1)), None, 2, episodes, rng(2))
    assert len(results) == episodes
    counted = envs.episodes()[:episodes]
    counted.sort(key=lambda episode: (episode[2], episode[1]))  # results come as they end
    for result, (first, world, last) in zip(results, counted, strict=True):
        assert result.length == last - first
        assert result.focal_return == pytest.approx(envs.returns(first, world, last).mean())
        assert math.isnan(result.background_return)
    assert len(envs.steps) == counted[-1][2], "played on, or stopped, before the last was over"


def test_short_episodes_are_not_favoured():
    """Lengths 6 to 10 are equally likely; the first to finish are too short on average."""
    worlds, episodes = 16, 24
    lengths, first_to_finish = [], []
    for seed in range(80):
        envs = Recorded(TileGame(worlds, seed))
        results = play(envs, Noted(0), None, 2, episodes, rng(seed))
        lengths += [result.length for result in results]
        by_end = sorted(envs.episodes(), key=lambda episode: episode[2])
        first_to_finish += [last - first for first, _, last in by_end[:episodes]]

    def judge(sample):  # deviations of the mean from 8, and the odds of such frequencies
        deviation = (np.mean(sample) - 8) / (math.sqrt(2) / math.sqrt(len(sample)))
        return deviation, scipy.stats.chisquare(np.bincount(sample)[6:]).pvalue

    deviation, odds = judge(lengths)
    assert abs(deviation) < 3 and odds > 0.01, (deviation, odds)
    deviation, odds = judge(first_to_finish)
    assert deviation < -6 and odds < 1e-6, "this test would not notice a bias"


def test_truncated_episodes_count():
    envs = Recorded(TileGame(3, max_episode_steps=7))
    results = play(envs, Noted(0), None, 2, 10, rng())
    assert len(results) == 10
    assert {result.length for result in results} == {6, 7}


def test_the_same_seeds_give_the_same_results():
    def results():
        players = random_player(3, rng(5)), random_player(3, rng(6))
        return play(TileGame(4, seed=2), *players, 1, 9, rng(7))

    assert results() == results()


# --- Who sits where ------------------------------------------------------------------------------


def seats_of(envs, marked):
    """For every episode that is over: who played `marked`, (N,) bool; it must be one set of
    players from beginning to end."""
    seats = []
    for first, world, last in envs.episodes():
        played = np.array([actions[world] == marked for actions in envs.actions[first:last]])
        assert (played == played[0]).all(), "seats change in mid-episode"
        seats.append(played[0])
    return np.array(seats)


def test_focal_seats_are_drawn_for_every_episode():
    envs = Recorded(TileGame(4, seed=1))
    play(envs, Noted(1), Noted(2), 1, 200, rng(3))
    seats = seats_of(envs, 1)
    assert (seats.sum(1) == 1).all()
    first = seats[:, 0]
    assert 75 <= first[:200].sum() <= 125, "one seat is preferred"  # 3.5 deviations
    repeated = (first[1:200] == first[:199]).sum()
    assert 75 <= repeated <= 125, "seats depend on the episode before"


def test_a_scenarios_seats_are_fixed():
    for focal in ((True, False), (False, True)):
        envs = Recorded(TileGame(3))
        envs.envs.spec = dataclasses.replace(envs.spec, is_focal=focal)
        play(envs, Noted(1), Noted(2), 2, 12, rng(4))  # whatever num_focal says
        assert (seats_of(envs, 1) == focal).all()


def test_without_background_everyone_is_focal():
    envs = Recorded(TileGame(3))
    results = play(envs, Noted(1), None, 1, 12, rng(4))
    assert seats_of(envs, 1).all()
    assert all(math.isnan(r.background_return + r.background_pick_ups) for r in results)


@pytest.mark.parametrize("shuffle", [True, False])
def test_ids_are_drawn_for_every_episode_or_are_the_seats(shuffle):
    envs, focal, background = Recorded(TileGame(4, seed=1)), Noted(1), Noted(2)
    play(envs, focal, background, 1, 100, rng(5), shuffle_ids=shuffle)
    drawn = []
    for first, world, last in envs.episodes():
        ids = np.array([call[2][world] for call in focal.calls[first:last]])
        assert (ids == ids[0]).all(), "ids change in mid-episode"
        assert sorted(ids[0]) == [0, 1], "not a permutation"
        drawn.append(ids[0, 0])
    if shuffle:
        assert 30 <= sum(drawn[:100]) <= 70, "ids are not drawn evenly"
        seats = seats_of(envs, 1)[:100, 0]
        assert 30 <= (seats == drawn[:100]).sum() <= 70, "ids depend on the seats"
    else:
        assert not any(drawn)
    assert len(focal.calls) == len(background.calls) == len(envs.steps)
    for ours, theirs in zip(focal.calls, background.calls):
        assert ours[0] is theirs[0]
        assert all(np.array_equal(a, b) for a, b in zip(ours[1:], theirs[1:]))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("background", [None, Noted(2)])
def test_players_of_different_roles_keep_their_ids(shuffle, background):
    """What a trained policy does with an id is what this role did with it."""
    envs, focal = TileGame(4, seed=1), Noted(1)
    envs.spec = dataclasses.replace(envs.spec, roles=("adversary", "agent"))
    play(envs, focal, background, 1, 20, rng(5), shuffle_ids=shuffle)
    assert all((ids == [0, 1]).all() for _, _, ids in focal.calls)


def test_ids_of_one_role_are_the_first_that_are_drawn():
    order = rng(3).permutation(7)
    assert seat_ids(order, ("default",) * 7, ("default",) * 4).tolist() == order[:4].tolist()


@pytest.mark.parametrize(
    ("seat_roles", "ids"),
    [
        ("aabb", [3, 0, 4, 1]),
        ("bbaa", [4, 1, 3, 0]),
        ("caab", [2, 3, 0, 4]),  # training has no c
        ("bbba", [4, 1, 0, 3]),  # nor a third b
        ("aaaa", [3, 0, 4, 2]),
    ],
)
def test_ids_by_role(seat_roles, ids):
    assert seat_ids([3, 4, 0, 2, 1], "abcab", seat_roles.replace("c", "z")).tolist() == ids


def test_players_hear_of_every_start_and_see_the_present():
    envs, player = Recorded(TileGame(5, seed=1, max_episode_steps=8)), Noted(0)
    for _ in range(2):  # a second time, in mid-episode of the worlds that are not counted
        player.calls.clear()
        play(envs, player, None, 2, 12, rng(6))
        begins = [np.ones(5, bool), *(step.terminated | step.truncated for step in envs.steps)]
        present = [envs.first, *(step.obs for step in envs.steps)]
        assert len(player.calls) == len(envs.steps)
        for t, (obs, starts, _) in enumerate(player.calls):
            assert np.array_equal(starts, begins[t]), t
            assert obs is present[t], t
    assert envs.resets == 2


# --- Who earns -----------------------------------------------------------------------------------


def test_returns_are_the_focal_players_alone():
    """On the toy the right colour pays 1/2, and as much again if both choose it."""
    episodes = 20
    for us, them, ours, theirs in ((right, wrong, 0.5, 0), (wrong, right, 0, 0.5)):
        results = play(TileGame(3), Noted(us), Noted(them), 1, episodes, rng(7))
        for result in results:
            assert result.focal_return == ours * result.length
            assert result.background_return == theirs * result.length
            assert result.focal_pick_ups == 2 * ours * result.length
            assert result.background_pick_ups == 2 * theirs * result.length
    for result in play(TileGame(3), Noted(right), Noted(right), 1, episodes, rng(7)):
        assert result.focal_return == result.background_return == result.length
    for result in play(TileGame(3), Noted(right), None, 1, episodes, rng(7)):
        assert result.focal_return == result.focal_pick_ups == result.length


@pytest.fixture(scope="module")
def arena():
    """Two worlds of eight players; episodes end after ten steps."""
    with MeltingPot(ARENA, 2, num_workers=1, max_episode_steps=10) as envs:
        yield envs


def test_seats_ids_and_returns_of_eight_players(arena):
    envs, focal = Recorded(arena), Noted(1)
    generator = rng(8)

    def them(obs):  # turns and steps, whichever, but never what the focal players do
        return generator.integers(2, arena.spec.num_actions, (2, 8))

    results = play(envs, focal, Noted(them), 3, 5, rng(9))
    assert len(results) == 5
    seats = seats_of(envs, 1)
    assert (seats.sum(1) == 3).all(), "not three focal players"
    assert len({tuple(who) for who in seats.tolist()}) > 1, "seats are not drawn anew"
    for first, world, last in envs.episodes():
        ids = np.array([call[2][world] for call in focal.calls[first:last]])
        assert (ids == ids[0]).all() and sorted(ids[0]) == list(range(8))
    expected = []
    for (first, world, last), who in list(zip(envs.episodes(), seats))[:5]:
        returns = envs.returns(first, world, last)
        expected.append((returns[who].mean(), returns[~who].mean(), last - first))
    actual = [(r.focal_return, r.background_return, r.length) for r in results]
    np.testing.assert_allclose(sorted(actual), sorted(expected))


def test_a_real_scenario():
    with MeltingPot(f"{ARENA}_2", 1, max_episode_steps=10) as real:  # six of eight are focal
        envs = Recorded(real)
        assert len(play(envs, Noted(1), Noted(2), 1, 2, rng(10))) == 2
        seats = seats_of(envs, 1)
        assert seats.sum(1).tolist() == [6, 6] and (seats == real.spec.is_focal).all()


def test_random_player_is_even():
    player = random_player(5, rng(11))
    actions = np.array([player(None, None, np.zeros((4, 3), int)) for _ in range(500)])
    assert actions.shape == (500, 4, 3)
    counts = np.bincount(actions.ravel(), minlength=5)
    assert len(counts) == 5 and scipy.stats.chisquare(counts).pvalue > 0.001


# --- What is reported ----------------------------------------------------------------------------


def draw_results(number, seed):
    """Skewed returns that grow with the length."""
    generator = rng(seed)
    length = generator.integers(100, 900, number)
    focal = generator.gamma(1.0, length / 50)
    return [
        Result(f, b, p, q, int(n))
        for f, b, p, q, n in zip(
            focal,
            generator.normal(0, 3, number),
            generator.poisson(length / 20),
            generator.poisson(5, number),
            length,
        )
    ]


def test_intervals_are_scipys():
    """Of means and of ratios of totals; 2,000 resamples put an interval's ends 0.06 standard
    errors off."""
    results = draw_results(60, 12)
    summary = summarise(results)
    columns = np.array(results).T
    one = np.ones(60)
    quantities = {
        "return": (columns[0], one),
        "background_return": (columns[1], one),
        "return_per_1000": (1000 * columns[0], columns[4]),
        "pick_ups_per_1000": (1000 * columns[2], columns[4]),
        "length": (columns[4], one),
    }
    assert summary["episodes"] == 60
    expected_keys = {f"{name}{end}" for name in quantities for end in ("", "_low", "_high")}
    assert set(summary) == {"episodes"} | expected_keys
    for name, pair in quantities.items():
        assert summary[name] == pytest.approx(pair[0].sum() / pair[1].sum(), rel=1e-12)
        reference = scipy.stats.bootstrap(
            pair,
            lambda x, y, axis=-1: x.sum(axis) / y.sum(axis),
            paired=True,
            n_resamples=20_000,
            method="percentile",
            rng=rng(13),
        )
        for end, value in zip(("low", "high"), reference.confidence_interval):
            off = abs(summary[f"{name}_{end}"] - value) / reference.standard_error
            assert off < 0.3, f"{name}_{end} is {off:.2f} standard errors off scipy's"


def test_intervals_cover():
    """Of 300 samples of 30 episodes, about 94 % (samples being small) cover the true mean."""
    hits = 0
    for seed in range(300):
        values = rng(seed).normal(5, 2, 30)
        summary = summarise([Result(v, 0, 0, 0, 100) for v in values])
        hits += summary["return_low"] <= 5 <= summary["return_high"]
    assert 0.90 <= hits / 300 <= 0.98, hits


def test_summary_without_background_and_of_one_episode():
    (result,) = draw_results(1, 14)
    summary = summarise([result._replace(background_return=math.nan)])
    assert "background_return" not in summary
    assert summary["return"] == summary["return_low"] == summary["return_high"]
    assert summary["return"] == pytest.approx(result.focal_return)


def test_table_shows_every_row_and_interval():
    rows = {
        "self-play": summarise(draw_results(20, 15)),
        "v random": summarise(draw_results(7, 16)),
    }
    lines = table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are not aligned"
    assert re.fullmatch(r"\|(-+\|)+", lines[1])
    head, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert len(body) == 3 and {len(cells) for cells in body} == {len(head)}
    for (name, row), cells in zip(rows.items(), body[1:]):
        assert cells[0] == name and cells[-1] == str(row["episodes"])
        columns = {"focal return per 1,000 steps": "return_per_1000", "per episode": "return"}
        for title, key in columns.items():
            numbers = [row[key], row[f"{key}_low"], row[f"{key}_high"]]
            assert cells[head.index(title)] == "{:.1f} [{:.1f}, {:.1f}]".format(*numbers)


def test_scalars_of_a_rollouts_episodes():
    assert count_episodes([]) == {}
    ended = [
        Episode(0, 100, np.array([1.0, 3.0]), np.array([4, 6])),
        Episode(1, 300, np.array([5.0, 7.0]), np.array([0, 10])),
    ]
    assert count_episodes(ended) == {
        "episode/return": 4.0,
        "episode/length": 200.0,
        "episode/pick_ups_per_1000": 25.0,  # 10 of each player's in 400 steps
    }


def test_the_log_of_training_episodes():
    """Means over the episodes of all processes; saved and restored, with no episode, too."""
    ended = [
        Episode(0, 100, np.array([1.0, 3.0]), np.array([4, 6])),
        Episode(1, 300, np.array([5.0, 7.0]), np.array([0, 10])),
    ]
    another = Episode(0, 200, np.array([0.0, 12.0]), np.array([9, 1]), np.array([2.0]), np.ones(1))
    log = EpisodeLog(lambda own: [own, [another]])
    log.episodes += ended
    again = EpisodeLog(lambda own: [own, [another]])
    again.load_state_dict(json.loads(json.dumps(log.state_dict())))
    means = count_episodes([*ended, another])
    assert means["episode/return"] == pytest.approx(14 / 3)
    assert log.means() == again.means() == means
    log.gather = lambda own: [own]
    assert log.episodes == [] and log.means() == {}


# --- How it looks --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def film():
    """600 frames of coins under random play."""
    spec, generator = get_spec("coins"), rng(17)
    engine = Engine(spec, (1, 2, 3))
    frames = []
    for _ in range(600):
        if not engine.step(generator.integers(0, spec.num_actions, 2)):
            engine = Engine(spec, (1, 2, 3))
        frames.append(engine.lab.observation("WORLD.RGB").copy())
    return frames


def test_video_is_a_small_mp4(film, tmp_path):
    import imageio.v2 as imageio

    video = Video(limit=len(film), fps=15)
    for frame in film:
        video.add(frame)
    video.add(film[0])  # beyond the limit
    path = tmp_path / "new" / "folder" / "film.mp4"
    video.save(path)
    assert path.stat().st_size < 1_000_000, f"{path.stat().st_size:,} bytes"
    assert path.read_bytes()[4:8] == b"ftyp", "not an MP4"
    with imageio.get_reader(path) as reader:
        frames = [np.asarray(frame) for frame in reader]
        assert reader.get_meta_data()["fps"] == 15
    assert len(frames) == len(film) == 600
    # Enlarged to about 480 pixels, in whole steps: every tenth frame is what was shown.
    height, width = film[0].shape[:2]
    scale = round(480 / max(height, width))
    for frame, image in itertools.islice(zip(frames, film), 0, None, 10):
        assert frame.shape[0] % 16 == frame.shape[1] % 16 == 0
        shown = frame[: scale * height : scale, : scale * width : scale].astype(int)
        assert shown.shape == image.shape
        assert np.abs(shown - image).mean() < 16, "another picture"


def test_video_of_play_is_the_first_worlds_first_episode():
    envs = Recorded(TileGame(3, seed=4))
    video = Video()
    play(envs, Noted(0), None, 2, 9, rng(18), video=video)
    length = min(last for first, world, last in envs.episodes() if world == 0)
    assert len(video.frames) == length
    present = [envs.first, *(step.obs for step in envs.steps)]
    for frame, obs in zip(video.frames, present):
        assert np.array_equal(frame, envs.images(obs.world_ids[0]))


def test_play_pairs_names_its_summaries_and_films(arena, tmp_path):
    import imageio.v2 as imageio

    random = random_player(arena.spec.num_actions, rng(19))
    pairs = {"self-play": (Noted(1), None), "v random": (Noted(1), random)}
    summaries = play_pairs(arena, pairs, 7, 2, rng(20), videos=tmp_path / "videos", stem="4000")
    assert list(summaries) == list(pairs)
    assert all(summary["episodes"] == 2 for summary in summaries.values())
    assert "background_return" in summaries["v random"]
    assert "background_return" not in summaries["self-play"]
    assert len(table(summaries).splitlines()) == 4
    films = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert films == ["4000-self-play.mp4", "4000-v-random.mp4"]
    for name in films:
        with imageio.get_reader(tmp_path / "videos" / name) as reader:
            assert sum(1 for _ in reader) == 10
    assert not (tmp_path / "4000").exists()
    without = play_pairs(arena, {"self-play": (Noted(1), None)}, 7, 1, rng(21))
    assert list(without) == ["self-play"]
