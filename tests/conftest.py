"""Set up before jax or lcq is imported: simulated devices, run-time shape checks, a hypothesis profile."""

import gc
import os
import typing
from pathlib import Path

# Eight simulated CPU devices, so that sharding is tested on every machine.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# LAPACK's threads wait for each other in busy loops: on busy cores a small SVD takes ten times its time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tables are as wide as the terminal; in tests as where there is none.
os.environ["COLUMNS"] = "100"

import beartype
import jaxtyping


def checked(function):
    """beartype, an int being a float, except for `Self`, which it refuses where it does not decorate the class."""
    hints = getattr(function, "__annotations__", {})
    hints.update({name: typing.Any for name, hint in hints.items() if hint is typing.Self})
    return beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))(function)


# Every annotated function of lcq checks its shapes and types while the tests run.
jaxtyping.install_import_hook("lcq", f"{__name__}.checked")

# Traces make many objects and few cycles: at Python's thresholds every twelfth second goes into looking for them.
gc.set_threshold(10_000, 20, 20)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile(
    "lcq", deadline=None, max_examples=20, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile("lcq")


def pytest_collection_finish():
    """What was imported stays: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def x64_stays_off():
    """Oracles in float64 are plain numpy; no test, and nothing in lcq, switches jax to 64 bits."""
    yield
    assert not jax.config.jax_enable_x64


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_few():
    """Programs that XLA compiles map memory; Linux allows a process 65,530 maps, and without more XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
