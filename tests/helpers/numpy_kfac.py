"""K-FAC of one layer in float64 NumPy, from the equations, sharing nothing with the implementation."""

from __future__ import annotations

import numpy as np


class NumpyKFAC:
    """One matrix (out, in); factors are given as those of the batch."""

    def __init__(self, weight, *, lr, damping, beta, momentum, weight_decay):
        self.w = np.array(weight, dtype=np.float64)
        self.lr, self.damping, self.beta = lr, damping, beta
        self.momentum, self.weight_decay = momentum, weight_decay
        self.a = self.g = 0.0
        self.t = 0
        self.buffer = None

    def step(self, gradient, a, g):
        self.t += 1
        self.a = self.beta * self.a + (1 - self.beta) * a
        self.g = self.beta * self.g + (1 - self.beta) * g
        unbiased_a, unbiased_g = (x / (1 - self.beta**self.t) for x in (self.a, self.g))
        pi = np.sqrt((np.trace(unbiased_a) / len(a)) / (np.trace(unbiased_g) / len(g)))
        root = np.sqrt(self.damping)
        damped_a = unbiased_a + pi * root * np.eye(len(a))
        damped_g = unbiased_g + root / pi * np.eye(len(g))
        update = np.linalg.inv(damped_g) @ gradient @ np.linalg.inv(damped_a)
        self.buffer = update if self.buffer is None else self.momentum * self.buffer + update
        self.w = (1 - self.lr * self.weight_decay) * self.w - self.lr * self.buffer
