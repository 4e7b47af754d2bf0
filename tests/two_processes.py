"""A function in two processes that have joined as torchrun's do, without torchrun."""

import multiprocessing
import os

import torch.distributed as dist


def join(rank, function, path, pipe):
    store = dist.FileStore(str(path), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    pipe.send(function(rank))
    os._exit(0)


def in_two(function, folder):
    """What function(rank) returns in each of them; folder: of their own."""
    fork, pipes, processes = multiprocessing.get_context("fork"), [], []
    for rank in (0, 1):
        ours, theirs = fork.Pipe(duplex=False)
        target = (rank, function, folder / "store", theirs)
        processes.append(fork.Process(target=join, args=target))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    results = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return results
