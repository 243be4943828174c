"""lcq: compress any JAX function's parameters, and run the result.

What a first hour needs is here; the rest is in namespaces, whose `__all__` is what is public:

    lcq.forms      what is stored
    lcq.schemes    how an array becomes a form
    lcq.tree       where: paths of leaves, rules on them, whole trees
    lcq.tracing    functions as equations
    lcq.training   who chooses the weights while a net trains
    lcq.io         files and checkpoints
    lcq.kernels    products with forms
    lcq.ptq        who chooses the weights without training
    lcq.reporting  tables and pages
    lcq.runtime    functions on forms
    lcq.plans      rules chosen, written down, previewed
    lcq.layers     binary layers of linen and nnx
    lcq.examples   data, nets, training loops

A name is imported when it is first used: `import lcq` alone takes little more than JAX.
"""

import lazy_loader

from lcq import interrupt as interrupt  # first, as importing the rest takes a while

# isort: split
from lcq import forms as forms  # at once: its types are known to jax.export and flax from here on

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
