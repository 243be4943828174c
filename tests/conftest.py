"""Set up before jax or lcq is imported: how XLA compiles, simulated devices, run-time shape checks, hypothesis."""

import ctypes
import functools
import gc
import os
import subprocess
import sys
import tempfile
import typing
from pathlib import Path


def known(*flags):
    """Those that this XLA knows: it ends a process at any other, as newer ones do at the second below."""
    parse = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.CompileOptions()"]
    if subprocess.run(parse, env=os.environ | {"XLA_FLAGS": " ".join(flags)}, capture_output=True).returncode == 0:
        return flags
    return () if len(flags) == 1 else tuple(flag for each in flags for flag in known(each))


# Nearly all of the tests' time is XLA's, most of it for programs that run once: they are not optimised. Where it is
# about what XLA makes for users, `tests/test_optimized.py` runs tests again. XLA_FLAGS in the environment are kept.
if "XLA_FLAGS" not in os.environ:
    # Small programs are faster made in one piece than in pieces for several threads.
    fewer = (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
    os.environ["XLA_FLAGS"] = " ".join(known(*fewer))
# Eight simulated CPU devices, so that sharding is tested on every machine.
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
# Devices wait for each other in threads of one pool: with few, all of them may wait, for one that gets none.
os.environ.setdefault("NPROC", "32")
# What one worker has compiled, the others read.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="lcq-tests-")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": compiled.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
# LAPACK's threads wait for each other in busy loops: on busy cores a small SVD takes ten times its time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Tables are as wide as the terminal; in tests as where there is none.
os.environ["COLUMNS"] = "100"

import beartype  # noqa: E402
import jaxtyping  # noqa: E402


def checked(function):
    """`whole`, for the bodies of one line that jaxtyping makes of a signature, of a function in a function at each call
    of the outer one: equal signatures of one name are looked at once."""
    hints = getattr(function, "__annotations__", {})
    defaults = function.__defaults__, *(function.__kwdefaults__ or {}).items()
    signature = function.__module__, function.__qualname__, function.__code__, *hints.items(), *defaults
    try:
        return checks.get(signature) or checks.setdefault(signature, whole(function))
    except TypeError:  # a default that has no hash
        return whole(function)


def whole(function):
    """beartype, an int being a float, except for `Self`, which it refuses where it does not decorate the class."""
    hints = getattr(function, "__annotations__", {})
    hints.update({name: typing.Any for name, hint in hints.items() if hint is typing.Self})
    return check(function)


check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
checks = {}


def jaxtyped(function=None, *, typechecker):
    """jaxtyping's where there are shapes to compare, elsewhere `whole`: jaxtyping's binds the arguments of every call
    and looks at them twice. It has functions in functions too, for which `checked` is made, and names of other modules
    that beartype cannot resolve."""
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    hints = repr(list(getattr(function, "__annotations__", {}).values()))
    apart = isinstance(function, type) or "<locals>" in function.__qualname__
    if apart or "jaxtyping" in hints or "ForwardRef" in hints:
        return jaxtyping_jaxtyped(function, typechecker=typechecker)
    looked_at = whole(function)

    @functools.wraps(function)
    def switched(*args, **kwargs):
        return (function if jaxtyping.config.jaxtyping_disable else looked_at)(*args, **kwargs)

    return switched


jaxtyping_jaxtyped, jaxtyping.jaxtyped = jaxtyping.jaxtyped, jaxtyped
# Every annotated function of lcq checks its shapes and types while the tests run.
jaxtyping.install_import_hook("lcq", f"{__name__}.checked")

# Traces make many objects and few cycles: at Python's thresholds every twelfth second goes into looking for them.
gc.set_threshold(10_000, 20, 20)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402

# jax lowers each program in a context of its own; to make one takes as long as to lower a small program in it.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

hypothesis.settings.register_profile(
    "lcq", deadline=None, max_examples=20, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile("lcq")


def pytest_collection_modifyitems(items):
    """First what is about lcq as a whole, where the longest tests are: at the end one core would wait for the other."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


def pytest_collection_finish():
    """What was imported stays: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def x64_stays_off():
    """Oracles in float64 are plain numpy; no test, and nothing in lcq, switches jax to 64 bits."""
    yield
    assert not jax.config.jax_enable_x64


def pytest_xdist_auto_num_workers(config):
    """A worker for each core where all tests run; what is asked for by name runs here, in one process."""
    return None if config.args_source is config.ArgsSource.TESTPATHS else 0


class Room:
    """Bytes that a worker may hold; programs that XLA compiled are most of them."""

    usual = most = 1600 << 20


def resident():
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """Forgets compiled programs where they have become many; what is needed again is read from the disk."""
    if resident() > Room.most:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Room.most = max(Room.usual, resident() + Room.usual // 4)
