"""What tests on the card share: device times, and memory that shows what was not written."""

from __future__ import annotations

import statistics

import torch


def time_us(run, repeats=20, replays=15):
    """Median device time of one call in a CUDA graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    samples = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) * 1000 / repeats)
    return statistics.median(samples)


def poison_memory():
    """What the allocator hands out next holds NaN: what a kernel forgets to write, or reads unwritten, shows."""
    torch.cuda.empty_cache()
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (1 << 26, 1 << 22, 1 << 18, 1 << 14)]
    del blocks
