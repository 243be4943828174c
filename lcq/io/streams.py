"""How the streams of a tree are written: a tensor each, or coded, all in one; see `index`."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lcq.io.codecs.base import encode
from lcq.io.container import NAMES, SET, Json, digest, flat, header, to_json
from lcq.io.index import SHORT, Said, Shard
from lcq.io.records import Encoder
from lcq.io.tree_paths import Leaf


def plain_layout(records: list[Json], encoder: Encoder, said: Said) -> list[Any]:
    """A file with a tensor for each stream, in pieces."""
    streams = dict(sorted(encoder.streams.items(), key=lambda item: -item[1].dtype.itemsize))  # keeps all aligned
    digests = {name: digest(flat(array)) for name, array in streams.items()}
    index = to_json({"leaves": records, "digests": digests} | said)
    return [header({"index": index}, streams), *(flat(array).data for array in streams.values())]


class CodedLeaves:
    """Leaves, one after another, as records and coded streams; nothing is kept of one but what the index says of it.

    Attributes:
        records: of the leaves that came, each with the leaf's number.
        entries: of their streams, in order.
    """

    def __init__(self, codecs: Sequence[str]) -> None:
        self.records: list[tuple[int, Json]] = []
        self.entries: list[Json] = []
        self._codecs, self._encoder = codecs, Encoder()

    def encode(self, number: int, leaf: Leaf) -> list[tuple[Json, np.ndarray]]:
        """The entries of the streams that a leaf adds, each by the codec that makes it shortest, and their bytes.

        Args:
            number: of the leaf in its tree.
            leaf: a host array, a stored form of host arrays, or an empty container.

        Raises:
            ValueError: as `Encoder.encode`.
        """
        self.records.append((number, self._encoder.encode(leaf)))
        pieces = []
        for name, array in self._encoder.take().items():
            codes = self._encoder.codes.get(name)
            codec, piece = encode(array, codes, self._codecs)
            what = codes or (NAMES[array.dtype], [*array.shape])
            self.entries.append([name, codec, piece.size, digest(piece, SHORT), *what])
            pieces.append((self.entries[-1], piece))
        return pieces


def coded_head(records: list[Json], entries: list[Json], said: Said, shards: list[Shard] | None = None) -> bytes:
    """A coded file up to its first stream; or, of a set, the whole file of the index."""
    written: Json = {} if shards is None else {"shards": [list(shard) for shard in shards]}
    deflate = zlib.compressobj(9, wbits=-15)
    text = to_json({"leaves": records, "streams": entries} | written | said)
    index = deflate.compress(text.encode()) + deflate.flush()
    metadata, tensors = {"coded": digest(index, SHORT)}, {"index": len(index)}
    if shards is not None:
        return header(metadata, tensors, SET) + index
    return header(metadata, tensors | {"data": sum(entry[2] for entry in entries)}) + index
