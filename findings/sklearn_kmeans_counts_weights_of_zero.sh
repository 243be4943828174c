#!/usr/bin/env bash
# scikit-learn's KMeans stops after one iteration because of an outlier whose weight is 0.
#
# Versions: scikit-learn 1.9.1, scipy 1.17.1, numpy 2.4.6.
# Seen: 4,000 normal weights of spread .02 in 16 clusters take tens of iterations. With one more of 100 and a sample
# weight of 0 the fit is over after the first and says nothing; from a random start it loses 1.8 times as much, from a
# good one 1.1 times: the tolerance is a share of the variance of all samples, without their weights. tol=0 is right.
# Whoever gives masked or unimportant weights an importance of 0 gets a codebook that was hardly fitted.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata as m
import warnings

import numpy as np
from sklearn.cluster import KMeans

warnings.simplefilter("error")
weights = 0.02 * np.random.default_rng(0).normal(size=(4000, 1))
outlier, importance = np.vstack([weights, [[100.0]]]), np.append(np.ones(4000), 0)


def fitted(samples, importance, start, **settings):
    net = KMeans(16, init=start, n_init=1, random_state=0, **settings).fit(samples, sample_weight=importance)
    return net.n_iter_, round(float(1e6 * ((weights - net.cluster_centers_.T) ** 2).min(1).mean()), 2)


found = {}
for name, start in {"given": np.linspace(-0.05, 0.05, 16)[:, None], "random": "random"}.items():
    without = fitted(weights, None, start)
    found[name] = without, fitted(outlier, importance, start), fitted(outlier, importance, start, tol=0)
print("scikit-learn", m.version("scikit-learn"), "iterations and 1e6 times the squared error of the 4,000 weights,")
print("without the outlier, with it, with it and tol=0:", found)
assert all(with_it[0] == 1 and with_it[1] > 1.05 * without[1] for without, with_it, _ in found.values())
assert found["random"][1][1] > 1.5 * found["random"][0][1]
assert all(exact[1] < 1.05 * without[1] and without[0] > 10 for without, _, exact in found.values())
PYTHON
