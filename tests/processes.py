"""Several processes that train together. They are forked from one that has the imports behind it, which costs most."""

import multiprocessing
import os
import socket

import torch

CONTEXT = multiprocessing.get_context("forkserver")  # a fork of this process could not call backward
CONTEXT.set_forkserver_preload(["tests.helpers"])


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def together(worker, *args, processes=2):
    """Calls ``worker(rank, *args)`` in each process, which is told of the others as ``torchrun`` tells it."""
    torch.multiprocessing.start_processes(
        _told, (processes, free_port(), worker, *args), nprocs=processes, start_method="forkserver"
    )


def _told(rank, processes, port, worker, *args):
    tell(rank, processes, port)
    worker(rank, *args)


def tell(rank, processes, port):
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "RANK": str(rank),
        "GROUP_RANK": "0", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "test",
        "PL_GLOBAL_SEED": "5",
    }  # fmt: skip
