"""Processor time of functions that take turns: other programs on the machine bend it little.

The clock of the wall counts the time in which a program waits for a core. Processor time does not,
so a busy machine slows it only through shared caches and memory. The turns make this equal for all
functions, the minimum over the rounds removes most of it, and the median shows what is usual.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np


def processor_ms(function: Callable, *arguments) -> float:
    """Processor time of one call in milliseconds, over all threads of this process."""
    start = time.process_time_ns()
    function(*arguments)
    return (time.process_time_ns() - start) / 1e6


def turns(functions: Sequence[Callable], items: Sequence[tuple], rounds: int) -> np.ndarray:
    """Milliseconds [functions, rounds, items]; in each round every function gets all items.

    A round before the first one warms up and is not counted.
    """
    spent = np.zeros((len(functions), rounds + 1, len(items)))
    for turn in range(rounds + 1):
        for k, function in enumerate(functions):
            for i, item in enumerate(items):
                spent[k, turn, i] = processor_ms(function, *item)
    return spent[:, 1:]
