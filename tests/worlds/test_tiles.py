"""envs/meltingpot/tiles.py and envs/meltingpot/tile_tensors.py: ids mean what they say, in one
process and in many, and tables over windows of ids equal the plain computation."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from envs.meltingpot import tile_kernels
from envs.meltingpot.tile_kernels import BLOCK, Pairs, find_pairs
from envs.meltingpot.tile_tensors import Sprites, Windows
from envs.meltingpot.tiles import CAPACITY, Palette, Spec, WorldError, ids_to_images
from envs.meltingpot.toy import TileGame
from envs.meltingpot.worlds import Engine, SharedArrays, get_spec

pytestmark = pytest.mark.numeric

ROOT = Path(__file__).resolve().parents[2]
REAL = ("coins", "chicken_in_the_matrix__repeated", "prisoners_dilemma_in_the_matrix__arena")


def draw_sprites(rng, number):
    return rng.integers(0, 256, (number, 8, 8, 3), np.uint8)


def put_together(tiles):
    """(H, W, 8, 8, 3) -> an image (8H, 8W, 3), without ids_to_images."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in tiles], axis=0)


def encode(palette, image, ids=None):
    ids = np.zeros((len(image) // 8, image.shape[1] // 8), np.uint16) if ids is None else ids
    palette.encode(image, ids)
    return ids


def tiles_of(image):
    """The bytes of each tile, row by row, cut out of the image one by one."""
    h, w = len(image) // 8, image.shape[1] // 8
    return [
        image[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].tobytes() for i in range(h) for j in range(w)
    ]


def python(code, *args, fds=()):
    """A new Python process that runs `code`, which finds `args` in sys.argv[1:]."""
    command = [sys.executable, "-c", code, *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, pass_fds=fds, stdout=subprocess.PIPE, text=True)


# --- One process ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_images():
    """What the engine shows to every player and to the critic in 40 random steps, per substrate."""
    images = {}
    for name in REAL:
        rng, spec = np.random.default_rng(0), get_spec(name)
        engine = Engine(spec, (1, 0, 0))
        images[name] = []
        for _ in range(40):
            engine.step(rng.integers(0, spec.num_actions, spec.num_agents))
            names = [*engine.rgb, "WORLD.RGB"]
            images[name].append([engine.lab.observation(key).copy() for key in names])
    return images


@pytest.mark.parametrize("name", REAL)
def test_real_images_are_rebuilt_exactly(real_images, name):
    palette = Palette.private()
    frames = real_images[name]
    ids = [np.zeros((len(x) // 8, x.shape[1] // 8), np.uint16) for x in frames[0]]
    seen = []
    for images in frames:
        for image, view in zip(images, ids):
            palette.encode(image, view)  # view holds the last frame's ids, as in a world
        seen.append([view.copy() for view in ids])
    for images, views in zip(frames, seen):  # with the palette as it is at the end
        for image, view in zip(images, views):
            rebuilt = ids_to_images(view, palette.pixels())
            assert np.array_equal(rebuilt, image), f"{name}: an image is not rebuilt exactly"
    different = {tile for images in frames for image in images for tile in tiles_of(image)}
    different.add(bytes(192))
    assert len(palette) == len(different), f"{name}: {len(palette)} ids for {len(different)} tiles"


def test_random_images_are_rebuilt_exactly():
    rng = np.random.default_rng(1)
    palette = Palette.private()
    for case in range(200):
        h, w, kinds = rng.integers(1, [12, 24, 40])
        image = put_together(draw_sprites(rng, kinds)[rng.integers(0, kinds, (h, w))])
        ids = encode(palette, image)
        assert np.array_equal(ids_to_images(ids, palette.pixels()), image), f"case {case}"


def test_ids_to_images_keeps_leading_dimensions():
    rng = np.random.default_rng(2)
    pixels, ids = draw_sprites(rng, 7), rng.integers(0, 7, (2, 3, 4, 5)).astype(np.uint16)
    images = ids_to_images(ids, pixels)
    assert images.shape == (2, 3, 32, 40, 3) and images.dtype == np.uint8
    for world in range(2):
        for player in range(3):
            expected = put_together(pixels[ids[world, player]])
            assert np.array_equal(images[world, player], expected), (world, player)


def test_black_is_id_0():
    palette = Palette.private()
    assert len(palette) == 1 and not palette.pixels().any(), "a new palette holds black alone"
    image = np.zeros((16, 24, 3), np.uint8)
    image[0, 0, 0] = 1
    assert encode(palette, image).tolist() == [[1, 0, 0], [0, 0, 0]]
    assert not palette.pixels()[0].any()


def test_ids_are_those_of_a_dictionary_of_bytes():
    """25,000 sprites, many of which differ in one bit: a table by hash must tell them apart."""
    rng = np.random.default_rng(3)
    palette, reference = Palette.private(), {bytes(192): 0}
    plain = draw_sprites(rng, 12_500)
    flipped = plain.copy().reshape(len(plain), -1)
    bit = np.uint8(1) << rng.integers(0, 8, len(plain), np.uint8)
    flipped[np.arange(len(plain)), rng.integers(0, 192, len(plain))] ^= bit
    tiles = np.concatenate([plain, flipped.reshape(plain.shape)])[rng.permutation(25_000)]
    view = np.zeros((20, 25), np.uint16)
    for image in map(put_together, tiles.reshape(50, 20, 25, 8, 8, 3)):
        palette.encode(image, view)
        expected = [reference.setdefault(tile, len(reference)) for tile in tiles_of(image)]
        assert view.ravel().tolist() == expected, "ids are not numbered in order of appearance"
    assert len(palette) == len(reference) > 20_000
    for image in map(put_together, tiles[rng.permutation(25_000)].reshape(50, 20, 25, 8, 8, 3)):
        palette.encode(image, view)
        expected = [reference[tile] for tile in tiles_of(image)]
        assert view.ravel().tolist() == expected, "a known sprite has got another id"
    assert len(palette) == len(reference), "a known sprite has been numbered again"


def test_equal_hashes_do_not_give_a_wrong_id():
    a, b = draw_sprites(np.random.default_rng(4), 2)
    other = Palette.private()
    encode(other, b)
    (slot,) = np.flatnonzero(other.slots == 1)  # where b belongs, with its hash
    palette = Palette.private()
    encode(palette, a)
    palette.slots[slot], palette.hashes[slot] = 1, other.hashes[slot]  # as if a had b's hash
    for _ in range(2):
        assert encode(palette, b).tolist() == [[2]], "b has been taken for a, which has its hash"
        assert encode(palette, a).tolist() == [[1]]
    assert np.array_equal(palette.pixels()[1:], [a, b])


def test_more_sprites_than_ids_is_one_sentence():
    rng = np.random.default_rng(5)
    palette = Palette.private()
    pixels = draw_sprites(rng, CAPACITY - 1)
    pixels[0] = 0
    palette.load(pixels)
    last, one_more = draw_sprites(rng, 2)
    assert encode(palette, last).item() == CAPACITY - 1, "the last id is not given out"
    with pytest.raises(WorldError, match=r"^More than 65536 different sprites: .*\.$"):
        encode(palette, one_more)
    assert len(palette) == CAPACITY
    assert encode(palette, last).item() == CAPACITY - 1
    assert np.array_equal(palette.pixels()[:-1], pixels), "sprites have changed"


# --- Growing, saving, loading --------------------------------------------------------------------


def test_ids_keep_their_meaning_while_the_palette_grows():
    rng = np.random.default_rng(6)
    palette, images, views = Palette.private(), [], []
    for _ in range(30):
        images.append(put_together(draw_sprites(rng, 30)[rng.integers(0, 30, (6, 7))]))
        before = palette.pixels()
        views.append(encode(palette, images[-1]))
        assert np.array_equal(palette.pixels()[: len(before)], before), "an old sprite has changed"
    for image, view in zip(images, views):
        assert np.array_equal(ids_to_images(view, palette.pixels()), image)
        assert np.array_equal(encode(palette, image), view), "an old image has got other ids"


def test_ids_keep_their_meaning_in_a_new_process(real_images, tmp_path):
    """As after --resume: a new process loads pixels(), meets old sprites and new ones."""
    frames = [images[-1] for images in real_images["coins"]]
    fresh = [images[-1] for images in real_images["chicken_in_the_matrix__repeated"]]
    palette = Palette.private()
    views = [encode(palette, image) for image in frames]
    np.savez(tmp_path / "in.npz", pixels=palette.pixels(), old=frames, new=fresh)
    code = """if True:
        import sys, numpy as np
        from envs.meltingpot.tiles import Palette
        data, palette = np.load(sys.argv[1]), Palette.private()
        palette.load(data["pixels"])
        views = {}
        for name in ("new", "old"):
            shape = [size // 8 for size in data[name].shape[1:3]]
            views[name] = np.zeros((len(data[name]), *shape), np.uint16)
            for image, view in zip(data[name], views[name]):
                palette.encode(image, view)
        np.savez(sys.argv[2], pixels=palette.pixels(), **views)
    """
    assert python(code, tmp_path / "in.npz", tmp_path / "out.npz").wait(120) == 0
    out = np.load(tmp_path / "out.npz")
    assert np.array_equal(out["old"], views), "the same images have other ids after loading"
    known = len(palette)
    assert len(out["pixels"]) > known and np.array_equal(out["pixels"][:known], palette.pixels())
    assert np.array_equal(ids_to_images(out["new"], out["pixels"]), fresh)


def test_load_refuses_a_palette_that_contradicts_ids():
    rng = np.random.default_rng(7)
    palette = Palette.private()
    for sprite in draw_sprites(rng, 5):
        encode(palette, sprite)
    pixels = palette.pixels()
    for wrong in (pixels[[0, 2, 1, 3, 4, 5]], pixels[[1]], pixels[[0, 1, 2, 3, 5, 4, 0, 1]]):
        with pytest.raises(ValueError, match=r"^The saved palette contradicts .*\.$"):
            palette.load(wrong)
        assert np.array_equal(palette.pixels(), pixels), "refused, and yet loaded"
    for agrees in (pixels[:3], pixels, np.concatenate([pixels, draw_sprites(rng, 2)])):
        palette.load(agrees)
        longer = agrees if len(agrees) > len(pixels) else pixels
        assert np.array_equal(palette.pixels(), longer)
    assert [encode(palette, sprite).item() for sprite in longer] == list(range(8))


# --- Many processes ------------------------------------------------------------------------------

SPEC = Spec("none", ("default",), (True,), ({},), (1, 1), (1, 1), ())  # for the arrays' sizes
SHARED = f"""if True:
    import os, sys, time
    import numpy as np
    from envs.meltingpot.worlds import SharedArrays
    from envs.meltingpot.tiles import Palette, Spec
    arrays = SharedArrays({SPEC}, 8, int(sys.argv[1]))
    palette = Palette(arrays.sprites, arrays.num_sprites, arrays.fd)
"""


@pytest.fixture
def shared():
    """Arrays as a trainer has them, and its palette; `SHARED` opens the same ones in a process."""
    arrays = SharedArrays(SPEC, 8)
    yield arrays, Palette(arrays.sprites, arrays.num_sprites, arrays.fd)
    arrays.close()


def test_processes_that_meet_new_sprites_at_once_agree(shared, tmp_path):
    arrays, palette = shared
    processes, rounds = 3, 50
    code = f"""{SHARED}
    me, number, rounds = int(sys.argv[2]), {processes}, {rounds}
    views = np.zeros((rounds, 2, 4), np.uint16)
    for r in range(rounds):  # the same eight new sprites for everyone, each in its own order
        sprites = np.random.default_rng(r).integers(0, 256, (8, 8, 8, 3), np.uint8)
        sprites = sprites[np.random.default_rng((r, me)).permutation(8)].reshape(2, 4, 8, 8, 3)
        image = np.ascontiguousarray(sprites.swapaxes(1, 2).reshape(16, 32, 3))
        arrays.ended[me] = r + 1  # a barrier: everyone is here
        while arrays.ended[:number].min() <= r:
            os.sched_yield()
        palette.encode(image, views[r])
    np.save(sys.argv[3], views)
    """
    files = [tmp_path / f"{i}.npy" for i in range(processes)]
    running = [python(code, arrays.fd, i, file, fds=[arrays.fd]) for i, file in enumerate(files)]
    assert [process.wait(120) for process in running] == [0] * processes
    pixels = palette.pixels()
    assert len(pixels) == 1 + 8 * rounds, "sprites are lost, or have several numbers"
    for me, file in enumerate(files):
        for r, view in enumerate(np.load(file)):
            sprites = np.random.default_rng(r).integers(0, 256, (8, 8, 8, 3), np.uint8)
            sprites = sprites[np.random.default_rng((r, me)).permutation(8)]
            got = pixels[view.ravel()]
            assert np.array_equal(got, sprites), f"process {me} has wrong ids in round {r}"


@pytest.mark.long
def test_a_process_killed_with_the_lock_in_hand_blocks_nobody(shared):
    arrays, palette = shared
    hold = f"""{SHARED}
    palette._catch_up = lambda: (print("has it", flush=True), time.sleep(600))  # inside the lock
    palette.encode(np.full((8, 8, 3), 1, np.uint8), np.zeros((1, 1), np.uint16))
    """
    learn = f"""{SHARED}
    print("begins", flush=True)
    palette.encode(np.full((8, 8, 3), 2, np.uint8), view := np.zeros((1, 1), np.uint16))
    print(view.item(), flush=True)
    """
    holder = python(hold, arrays.fd, fds=[arrays.fd])
    assert holder.stdout.readline() == "has it\n"
    learner = python(learn, arrays.fd, fds=[arrays.fd])
    try:
        assert learner.stdout.readline() == "begins\n"
        time.sleep(1.0)
        assert learner.poll() is None, "the lock does not exclude others: this test shows nothing"
        holder.kill()
        began = time.monotonic()
        assert learner.stdout.readline() == "1\n"
        assert time.monotonic() - began < 10
        assert learner.wait(60) == 0
    finally:
        for process in (holder, learner):
            process.kill()
            process.wait()
    assert (palette.pixels()[1] == 2).all()
    assert encode(palette, np.full((8, 8, 3), 2, np.uint8)).item() == 1, "the trainer disagrees"


def test_a_process_killed_at_any_line_of_learn_leaves_a_sound_palette(shared, tmp_path):
    arrays, palette = shared
    code = f"""{SHARED}
    import signal
    view, died = np.zeros((1, 1), np.uint16), []
    palette.encode(np.full((8, 8, 3), 250, np.uint8), view)  # so that all is compiled
    for moment in range(1, 100):
        if os.fork() == 0:
            left = moment
            def trace(frame, event, arg):
                global left
                left -= event == "line"
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace
            sys.settrace(lambda frame, *_: trace if frame.f_code.co_name == "_learn" else None)
            palette.encode(np.full((8, 8, 3), 2 * moment, np.uint8), view)
            os._exit(0)
        _, status = os.wait()
        palette.encode(np.full((8, 8, 3), 2 * moment + 1, np.uint8), view)  # life goes on
        if status == 0:
            break
        died.append(moment)
    np.save(sys.argv[2], died)
    """
    assert python(code, arrays.fd, tmp_path / "died.npy", fds=[arrays.fd]).wait(120) == 0
    died = np.load(tmp_path / "died.npy")
    assert len(died) >= 8, "too few moments: has _learn been renamed?"
    fcntl.lockf(arrays.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it
    pixels = palette.pixels()[1:].reshape(-1, 192)
    assert (pixels == pixels[:, :1]).all(), "a sprite is half written"
    values = pixels[:, 0].tolist()
    assert len(set(values)) == len(values), "a sprite has two numbers"
    assert 0 not in values, "black has a second number"
    assert {2 * moment + 1 for moment in died} < set(values), "a sprite is lost"


# --- On the torch side ---------------------------------------------------------------------------


def test_sprites_grow_with_the_palette():
    envs = TileGame(1)
    sprites = Sprites(envs, torch.device("cpu"))
    for _ in range(3):
        pixels = envs.palette.pixels()
        expected = torch.from_numpy(pixels.astype(np.float32) / 255).permute(0, 3, 1, 2)
        torch.testing.assert_close(sprites(), expected, rtol=0, atol=0)
        encode(envs.palette, draw_sprites(np.random.default_rng(len(pixels)), 1)[0])
    assert len(sprites()) == len(envs.palette)


CASES = [  # images, height, width, size of a window, ids
    (1, 4, 4, 4, 3),
    (37, 5, 5, 4, 3),
    (20, 4, 9, 4, 2),
    (16, 11, 11, 4, 2),
    (6, 15, 23, 4, 2),
    (9, 3, 5, 1, 4),
    (9, 3, 5, 3, 2),
]


def draw_ids(case):
    """Like views: many tiles alike, so that windows repeat; the largest ids there can be."""
    images, height, width, size, kinds = case
    rng = np.random.default_rng(case)
    which = np.sort(rng.integers(0, CAPACITY, kinds))
    shape = (images, height, width)
    ids = which[rng.integers(0, kinds, shape) * (rng.random(shape) < 0.1)]
    ids[rng.random(shape) < 0.02] = CAPACITY - 1
    ids[images // 2 :] = ids[: images - images // 2]  # whole images repeat, too
    return torch.from_numpy(ids.astype(np.int64))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_windows_are_those_of_a_dictionary(case):
    ids, size = draw_ids(case), case[3]
    windows = Windows(ids, size)
    columns = ids.shape[2] - size + 1
    pairs = {}  # (position, window) -> number in Windows
    images = {}  # number -> images that show it there
    for m in range(len(ids)):
        for q in range(windows.positions):
            i, j = divmod(q, columns)
            window = tuple(ids[m, i : i + size, j : j + size].flatten().tolist())
            number = windows.index[m, q].item()
            assert pairs.setdefault((q, window), number) == number, "one pair has two numbers"
            images.setdefault(number, []).append(m)
            assert windows.position[number] == q
            assert tuple(windows.ids[windows.window[number]].tolist()) == window, (m, q)
    assert len(pairs) == len(set(pairs.values())) == len(windows.offsets) == len(windows.window)
    assert set(pairs.values()) == set(range(len(pairs)))
    different = {window for _, window in pairs}
    assert len(different) == len(windows.ids), "a window is listed twice, or missing"
    ends = [*windows.offsets[1:].tolist(), len(windows.image)]
    for number, (first, last) in enumerate(zip(windows.offsets.tolist(), ends)):
        assert sorted(windows.image[first:last].tolist()) == images[number]
    assert (windows.position.diff() >= 0).all(), "positions are not ascending, as linear() needs"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pairs_are_those_of_a_dictionary(case):
    """As compiled for a CPU."""
    ids, size = draw_ids(case), case[3]
    pairs = Pairs(*find_pairs(ids.numpy(), size))
    columns = ids.shape[2] - size + 1
    numbers, images = {}, {}
    for m in range(len(ids)):
        for q in range(pairs.index.shape[1]):
            i, j = divmod(q, columns)
            window = tuple(ids[m, i : i + size, j : j + size].flatten().tolist())
            number = pairs.index[m, q]
            assert numbers.setdefault((q, window), number) == number, "one pair has two numbers"
            images.setdefault(number, []).append(m)
            assert pairs.begins[q] <= number < pairs.begins[q + 1]
            assert tuple(pairs.windows[number]) == window, (m, q)
    assert sorted(numbers.values()) == list(range(len(pairs.windows))) == list(range(len(numbers)))
    assert pairs.begins[0] == 0 and pairs.begins[-1] == len(pairs.windows)
    ends = [*pairs.offsets[1:], len(pairs.image)]
    for number, (first, last) in enumerate(zip(pairs.offsets, ends)):
        assert pairs.image[first:last].tolist() == images[number]


@pytest.mark.parametrize("bits", [0, 1])
def test_pairs_with_colliding_slots(bits, monkeypatch):
    """Codes that all want one slot of the hash table, or two, cost time and nothing else."""
    ids = draw_ids((12, 5, 6, 4, 3)).numpy()
    expected = find_pairs.py_func(ids, 4)
    codes = tile_kernels._hash_windows(ids, 4)
    _, numbers = np.unique(codes, return_inverse=True)
    crowded = (numbers.reshape(codes.shape).astype(np.uint64) << np.uint64(40)) | (
        codes & np.uint64(bits)
    )
    monkeypatch.setattr(tile_kernels, "_hash_windows", lambda ids, size: crowded)
    for found, array in zip(find_pairs.py_func(ids, 4), expected):
        assert np.array_equal(found, array)


@pytest.mark.parametrize("rows", [1, BLOCK, 2 * BLOCK + 3])
def test_layers_of_the_kernels_have_the_gradients_that_they_say(rows):
    """Of few and many pairs at one position; positions without a pair do not occur."""
    rng = np.random.default_rng(rows)
    ids = torch.from_numpy(rng.integers(0, 5, (rows, 4, 5)))
    torch.manual_seed(0)
    table, bias, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 16, 3), (3,), (2, 4, 3))
    )

    def layers(*inputs):
        return tile_kernels._Layers.apply(*inputs, ids, 4)

    assert torch.autograd.gradcheck(layers, (table, bias, weight))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear_and_sum_equal_a_linear_layer_on_everything(case):
    """Outputs and gradients, in float64, against torch on the (M, Q * C) inputs in full."""
    ids, size = draw_ids(case), case[3]
    windows = Windows(ids, size)
    rng = torch.Generator().manual_seed(0)
    channels, outputs, kinds = 5, 7, len(windows.ids)
    x = torch.randn(kinds, channels, generator=rng, dtype=torch.float64, requires_grad=True)
    shape = (outputs, windows.positions * channels)
    weight = torch.randn(shape, generator=rng, dtype=torch.float64, requires_grad=True)

    # Which row of x belongs to an image and position: found by comparing windows, not by index.
    numbers = {tuple(row): number for number, row in enumerate(windows.ids.tolist())}
    everything = ids.unfold(1, size, 1).unfold(2, size, 1).flatten(3).flatten(1, 2)  # (M, Q, K)
    rows = torch.tensor([[numbers[tuple(w)] for w in image] for image in everything.tolist()])
    expected = torch.nn.functional.linear(x[rows].flatten(1), weight)
    actual = windows.sum(windows.linear(x, weight))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    loss = torch.randn(expected.shape, generator=rng, dtype=torch.float64)
    for name, a, e in zip(
        ("x", "weight"),
        torch.autograd.grad((actual.sin() * loss).sum(), (x, weight)),
        torch.autograd.grad((expected.sin() * loss).sum(), (x, weight)),
    ):
        message = f"gradient of {name}"
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11, msg=lambda m, n=message: n + m)


def test_linear_and_sum_alone():
    windows = Windows(draw_ids((12, 5, 6, 4, 3)), 4)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(len(windows.ids), 3, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3 * windows.positions, generator=rng, dtype=torch.float64)
    pairs = windows.linear(x, weight.requires_grad_())
    for number, (q, window) in enumerate(zip(windows.position, windows.window)):
        expected = weight[:, 3 * q : 3 * q + 3] @ x[window]
        torch.testing.assert_close(pairs[number], expected, rtol=1e-12, atol=1e-12)
    total = windows.sum(pairs)
    torch.testing.assert_close(total, pairs[windows.index].sum(1), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(windows.linear, (x, weight)), "linear's gradient is wrong"
    pairs = pairs.detach().requires_grad_()
    assert torch.autograd.gradcheck(windows.sum, (pairs,)), "sum's gradient is wrong"
