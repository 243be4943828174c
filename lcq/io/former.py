"""Versions 1 and 2 of the file, in the words of version 3: what was written once is read for ever.

Version 1 had every stream in a tensor of its own, as an uncoded file of version 3 has.

Version 2 had all streams in one block, as a coded file of version 3 has. The digest of its index was `index` in the
metadata, and a stream [name, dtype, shape, bytes, digest] if raw, [.., [levels, count]] if coded by rANS.
"""

import reprlib

from lcq.io.container import Json


def current_metadata(metadata: dict[str, Json]) -> dict[str, Json]:
    """The metadata of a header of any version as version 3 has them."""
    if metadata["version"] != "2":
        return metadata
    return {"coded" if name == "index" else name: value for name, value in metadata.items()}


def current_stream(version: str, stream: Json) -> Json:
    """The entry of a stream in the index of any version as version 3 has it.

    Raises:
        ValueError: no entry of that version.
    """
    match stream:
        case _ if version != "2":
            return stream
        case [name, dtype, shape, size, digest]:
            return [name, "raw", size, digest, dtype, shape]
        case [name, "U32", [_], size, digest, [levels, count]]:
            return [name, "rans", size, digest, levels, count]
    raise ValueError(f"expected a stream of version 2, got {reprlib.repr(stream)}")
