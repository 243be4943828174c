"""What a walk has rounded so far, on disk: a folder with a file for each product, from which a killed run goes on.

    run.json             what the run was of: digests by name
    00000.safetensors    codes, codebook and what a bias takes up, of the first product, and the record's numbers

Files appear whole or not at all. A run that goes on makes the products that are there without rounding them again, so
it sees the activations that the first one saw, and gives the same bytes.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcq.forms import Codes, Trellis
from lcq.io.checkpoints.checkpoint import read_checkpoint, write
from lcq.io.file import replacing
from lcq.ptq.layer import Rounded
from lcq.ptq.rounding.coded import codes_of, tables
from lcq.tracing.program import Program
from lcq.tree.aliases import Leaves
from lcq.tree.lazy import parts

_FORMS = {kind.__name__: kind for kind in (Codes, Trellis)}
_SEVERAL = 6  # names that an error lists


def description(
    programs: Sequence[Program], leaves: Leaves, inputs: Sequence[Any], settings: Mapping[str, Any]
) -> dict[str, str]:
    """What a run is of, by name: the function as it was traced, parameters, batches with their masks, and settings."""
    texts = [re.sub(r"0x[0-9a-f]+", "", str(program.jaxpr)) for program in dict.fromkeys(programs)]
    consts = [const for program in dict.fromkeys(programs) for const in program.consts]
    said = {name: text_of(value) for name, value in settings.items()}
    said |= {"jax": f"{jax.__version__} on {jax.default_backend()}", "function": digest(*texts, *consts)}
    given = {f"batch {i}": batch for i, batch in enumerate(inputs)} | {
        f"params {path}": a for path, a in leaves.items()
    }
    return said | {name: digest(str(jax.tree.structure(a)), *jax.tree.leaves(a)) for name, a in given.items()}


class Saved:
    """The folder of one run.

    Args:
        folder: made if it is not there.
        run: by name, a text that says what the run is of; the same in the run that goes on.

    Raises:
        ValueError: the folder is of a run on something else; names what differs. It is a file, or is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], run: Mapping[str, str]) -> None:
        self._folder = Path(folder)
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"resume={os.fspath(folder)!r}: expected a folder, or none yet, got a file; name another")
        self._folder.mkdir(parents=True, exist_ok=True)
        said = self._folder / "run.json"
        if not said.exists():
            with replacing(said) as file:
                file.write(json.dumps(dict(run), indent=1).encode())
            return
        try:
            before = dict(json.loads(said.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{said}: damaged, {error}; remove the folder, or give a new one") from error
        names = [name for name in {**before, **run} if before.get(name) != run.get(name)]
        if names:
            listed = ", ".join(names[:_SEVERAL]) + (f" and {len(names) - _SEVERAL} more" if names[_SEVERAL:] else "")
            raise ValueError(
                f"resume={os.fspath(folder)!r}: expected the run that this folder is of, got another: {listed} differ; "
                "give a new folder, or call quantize as before"
            )

    def get(self, number: int, name: str) -> tuple[Rounded, float] | None:
        """The outcome at the product of this number, and the seconds it took; None if it is not there.

        Raises:
            ValueError: a file that is damaged, or of another product.
        """
        path = self._path(number)
        if not path.exists():
            return None
        found = read_checkpoint(path)
        if "record" not in found.metadata:
            raise ValueError(
                f"{path}: expected the outcome at {name}, got a file of another program; remove the folder"
            )
        said: dict[str, Any] = json.loads(found.metadata["record"])
        if said.pop("name") != name:
            raise ValueError(f"{path}: expected the outcome at {name}, got that of another product; remove the folder")
        arrays = {key: jnp.asarray(a) for key, a in found.tree.items()}
        correction, static = arrays.pop("correction", None), said.pop("form")
        kind = _FORMS[static.pop("kind")]
        fields: dict[str, Any] = arrays | {key: tuple(a) if isinstance(a, list) else a for key, a in static.items()}
        seconds = said.pop("seconds")
        silent = tuple(said.pop("silent"))
        return Rounded(form=kind(**fields), correction=correction, silent=silent, **said), seconds

    def put(self, number: int, name: str, rounded: Rounded, seconds: float) -> None:
        """Keeps the outcome at a product."""
        form = rounded.form
        beside = {"codes" if isinstance(form, Codes) else "steps": codes_of(form), **tables(form)}
        static = {field.name: getattr(form, field.name) for field in dataclasses.fields(form)}
        static = {key: value for key, value in static.items() if key not in beside and value is not None}
        said = {"name": name, "seconds": seconds, **rounded._asdict()}
        said["form"] = {"kind": type(form).__name__, **static}
        del said["correction"]
        tree = {
            key: jax.device_get(a) for key, a in {**beside, "correction": rounded.correction}.items() if a is not None
        }
        write(self._path(number), tree, {"record": json.dumps(said)})

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05}.safetensors"


def digest(*leaves: Any) -> str:
    """BLAKE2b of arrays: shapes, dtypes and bytes; of lazy ones a part at a time.

    Example:
        >>> digest(np.zeros(2)) == digest(jnp.zeros(2)), digest(jnp.zeros(2)) == digest(np.zeros(2, np.float32))
        (False, True)
    """
    found = hashlib.blake2b(digest_size=16)
    for leaf in leaves:
        if not hasattr(leaf, "dtype"):
            found.update(repr(leaf).encode())
            continue
        found.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        for part in parts(leaf):
            found.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def text_of(value: Any) -> str:
    """A setting as text, the same in another process; a function has its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f"{field.name}={text_of(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(text_of, value))}]"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)
