"""Learned codebooks: 1-D k-means in a trace, exact on the host, and at a price for every bit."""

from lcq.schemes.kmeans.kmeans import KMeans

__all__ = ["KMeans"]


def __dir__() -> list[str]:
    return sorted(__all__)
