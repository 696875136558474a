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
    """One parameter.

    ``pieces`` lists, per dimension, the (start, stop) of its pieces. Snapshots are taken in every
    ``refresh_every``-th step and used from ``delay`` steps later on; before, a block takes the diagonal step,
    and with ``blend_steps`` it passes over to the preconditioned one in as many steps and one. The buffer of
    the momentum begins with the whole first update; ``dampening`` is of those after it. With
    ``graft_averages`` momentum comes before grafting: diagonal directions and preconditioned gradients are
    averaged, both from 0 on, and the second average takes the length of the first. Roots are of ``order``, by
    default 2k for k sides.
    """

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
        dampening=0.0,
        nesterov=False,
        weight_decay=0.0,
        refresh_every=1,
        delay=0,
        blend_steps=0,
        order=None,
        graft_averages=False,
    ):
        self.w = np.array(weight, dtype=np.float64)
        self.lr, self.merged, self.grafting = lr, merged, grafting
        self.beta1, self.beta_graft, self.epsilon = beta1, beta_graft, epsilon
        self.beta_statistics, self.accumulate, self.ridge = beta_statistics, accumulate, ridge
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.dampening, self.blend_steps = dampening, blend_steps
        self.refresh_every, self.delay, self.order = refresh_every, delay, order
        self.graft_averages = graft_averages
        self.averages = np.zeros(merged)
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
        self.under_way = {}
        self.roots = None
        self.begun = None

    def step(self, gradient):
        g = np.array(gradient, dtype=np.float64)
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        m = self.m / (1 - self.beta1**self.t) if self.beta1 > 0 else g
        d = self._diagonal(g, m)
        if self.graft_averages:
            before = np.zeros_like(d) if self.buffer is None else self.buffer
            d = self.buffer = self.momentum * before + (1 - self.dampening) * d
        gm, mm, dm = (x.reshape(self.merged) for x in (g, m, d.copy()))
        for place, statistics in zip(self.places, self.statistics, strict=True):
            self._accumulate(gm[place], statistics)
        self._refresh()
        update = dm.copy()
        self.averages *= self.momentum
        if self.roots is not None:
            blended = min(1.0, (self.t - self.begun + 1) / (self.blend_steps + 1))
            for place, roots in zip(self.places, self.roots, strict=True):
                u = mm[place].copy()
                for dim, root in enumerate(roots):
                    u = mode_product(u, root, dim)
                if self.graft_averages:
                    self.averages[place] += (1 - self.dampening) * u
                    u = self.averages[place].copy()
                if self.grafting != "none":
                    u *= np.linalg.norm(dm[place]) / np.linalg.norm(u)
                update[place] = (1 - blended) * dm[place] + blended * u
        u = update.reshape(self.w.shape)
        if self.momentum > 0 and not self.graft_averages:
            first = self.buffer is None
            self.buffer = u.copy() if first else self.momentum * self.buffer + (1 - self.dampening) * u
            u = u + self.momentum * self.buffer if self.nesterov else self.buffer
        self.w = self.w * (1 - self.lr * self.weight_decay) - self.lr * u

    def _accumulate(self, gradient, statistics):
        for dim, s in enumerate(statistics):
            others = [axis for axis in range(gradient.ndim) if axis != dim]
            outer = np.tensordot(gradient, gradient, axes=(others, others))
            if self.accumulate == "ema":
                s *= self.beta_statistics
                s += (1 - self.beta_statistics) * outer
            else:
                s += outer

    def _refresh(self):
        if self.t % self.refresh_every == 0:
            scale = 1 / (1 - self.beta_statistics**self.t) if self.accumulate == "ema" else 1.0
            self.under_way[self.t + self.delay] = [
                [inverse_root(scale * s, self.order or 2 * len(statistics), self.ridge) for s in statistics]
                for statistics in self.statistics
            ]
        if self.t in self.under_way:
            self.roots = self.under_way.pop(self.t)
            self.begun = self.begun or self.t

    def _diagonal(self, g, m):
        if self.grafting in ("none", "sgd"):
            return m
        if self.grafting == "adagrad":
            self.v = self.v + g * g
            return m / (np.sqrt(self.v) + self.epsilon)
        self.v = self.beta_graft * self.v + (1 - self.beta_graft) * g * g
        v = self.v / (1 - self.beta_graft**self.t) if self.grafting == "adam" else self.v
        return m / (np.sqrt(v) + self.epsilon)
