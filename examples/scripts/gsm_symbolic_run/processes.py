"""Calls side by side, each in a process of its own."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import wait

import torch


def run_all(calls: dict[str, Callable[[], None]], jobs: int) -> None:
    """
    Runs every call: with one job one after the other in this process, else up to `jobs` at a time, each in a process of
    its own. When one has failed the others still end.

    Raises:
        SystemExit: If a process has failed; names which.
    """
    if jobs == 1:
        for call in calls.values():
            call()
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    threads = max(1, torch.get_num_threads() // max(1, min(jobs, len(calls))))
    waiting, running, failed = list(calls.items()), {}, []
    while waiting or running:
        while waiting and len(running) < jobs:
            name, call = waiting.pop(0)
            # A daemon is stopped with this process.
            process = context.Process(target=_call, args=(call, threads), name=name, daemon=True)
            process.start()
            running[process.sentinel] = process
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                failed.append(process.name)
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}. The same command repeats what failed and keeps the rest.")


def _call(call: Callable[[], None], threads: int) -> None:
    torch.set_num_threads(threads)
    call()
