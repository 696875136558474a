"""Shampoo in float64 NumPy, written from the equations and sharing nothing with the implementation.

One parameter at a time, explicit loops over blocks and sides, roots by ``numpy.linalg.eigh``.
"""

from __future__ import annotations

import itertools

import numpy as np


def inverse_root(a, p, ridge):
    values, vectors = np.linalg.eigh(a)
    values = np.maximum(values, 0.0) + ridge * values.max()
    return (vectors * values ** (-1.0 / p)) @ vectors.T


def mode_product(tensor, matrix, dim):
    """Contract dimension ``dim`` of ``tensor`` with the rows of a symmetric ``matrix``."""
    return np.moveaxis(np.tensordot(matrix, tensor, axes=(1, dim)), 0, dim)


class NumpyShampoo:
    """``block_starts`` lists, per dimension, the (start, stop) of its pieces."""

    def __init__(
        self,
        weight,
        *,
        lr,
        merged,
        pieces,
        grafting,
        beta1=0.9,
        beta_graft=0.99,
        epsilon=1e-8,
        beta_statistics=0.95,
        accumulate="ema",
        ridge=1e-6,
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
    ):
        self.w = np.array(weight, dtype=np.float64)
        self.lr, self.merged, self.grafting = lr, merged, grafting
        self.beta1, self.beta_graft, self.epsilon = beta1, beta_graft, epsilon
        self.beta_statistics, self.accumulate, self.ridge = beta_statistics, accumulate, ridge
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.m = np.zeros_like(self.w)
        self.v = np.zeros_like(self.w)
        self.buffer = None
        self.t = 0
        self.places = [
            tuple(slice(a, b) for a, b in combination) for combination in itertools.product(*pieces)
        ]
        self.statistics = [
            [np.zeros((s.stop - s.start, s.stop - s.start)) for s in place] for place in self.places
        ]

    def step(self, gradient):
        g = np.array(gradient, dtype=np.float64)
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        m = self.m / (1 - self.beta1**self.t) if self.beta1 > 0 else g
        d = self._diagonal(g, m)
        gm, mm, dm = (x.reshape(self.merged) for x in (g, m, d.copy()))
        update = np.empty_like(dm)
        for place, statistics in zip(self.places, self.statistics, strict=True):
            block_g, u = gm[place], mm[place].copy()
            order = 2 * block_g.ndim
            for dim, s in enumerate(statistics):
                others = [axis for axis in range(block_g.ndim) if axis != dim]
                outer = np.tensordot(block_g, block_g, axes=(others, others))
                if self.accumulate == "ema":
                    s *= self.beta_statistics
                    s += (1 - self.beta_statistics) * outer
                    corrected = s / (1 - self.beta_statistics**self.t)
                else:
                    s += outer
                    corrected = s
                u = mode_product(u, inverse_root(corrected, order, self.ridge), dim)
            if self.grafting != "none":
                u *= np.linalg.norm(dm[place]) / np.linalg.norm(u)
            update[place] = u
        u = update.reshape(self.w.shape)
        if self.momentum > 0:
            self.buffer = u.copy() if self.buffer is None else self.momentum * self.buffer + u
            u = u + self.momentum * self.buffer if self.nesterov else self.buffer
        self.w = self.w * (1 - self.lr * self.weight_decay) - self.lr * u

    def _diagonal(self, g, m):
        if self.grafting in ("none", "sgd"):
            return m
        if self.grafting == "adagrad":
            self.v = self.v + g * g
            return m / (np.sqrt(self.v) + self.epsilon)
        self.v = self.beta_graft * self.v + (1 - self.beta_graft) * g * g
        v = self.v / (1 - self.beta_graft**self.t) if self.grafting == "adam" else self.v
        return m / (np.sqrt(v) + self.epsilon)
