"""Which leaves a walk rounds, by which method, and which are projected before it."""

import dataclasses
import re
import warnings
from collections.abc import Sequence
from typing import Any

from lcq.forms.base import Form
from lcq.forms.paths import piece_length
from lcq.forms.rotation import check_length
from lcq.forms.validate import named
from lcq.ptq.leaf_assembly import inputs_along, paths_along
from lcq.ptq.rounding import Rounding
from lcq.schemes import Cast, Rotated, Trellis, Uniform
from lcq.schemes.base import Quantizer
from lcq.schemes.rotated import unrotated
from lcq.tracing.program import Program
from lcq.tree.compress import check_finite
from lcq.tree.paths import flatten
from lcq.tree.rules import Rule, Rules, Task, checked, resolve


def decide(
    rules: Sequence[Rule], rtn: Sequence[Rule], dense: Any, given: dict[str, Form]
) -> tuple[dict[str, Rule], dict[str, int], list[Task]]:
    """The rule of each leaf that is rounded in the walk, and the tasks that are projected before it.

    Of leaves that are rounded in turned coordinates the rules are those of the schemes there; their seeds are apart.
    """
    rules, rtn = checked(rules), checked(rtn)
    for rule in rules:
        _check(rule)
    kept = [Rule(re.escape(path), None) for path in given]
    direct = resolve([*kept, *rtn], dense) if rtn else ()
    taken = {path for task in direct for path in task.paths}
    whole = [dataclasses.replace(rule, scheme=without_blocks(rule)) for rule in rules]
    tasks = resolve([*kept, *(Rule(re.escape(path), None) for path in taken), *whole], dense)
    chosen: dict[str, Rule] = {}
    seeds: dict[str, int] = {}
    before = list(direct)
    for task in tasks:
        if not isinstance(task.scheme, Quantizer | Trellis):
            before.append(task)
            continue
        if len(task.paths) > 1:
            raise ValueError(f"{', '.join(task.paths)}: each product has a codebook of its own; drop joint=True")
        rule = next(rule for rule in rules if re.fullmatch(rule.pattern, task.name))
        chosen[task.name] = dataclasses.replace(rule, scheme=unrotated(rule.scheme))
        if isinstance(rule.scheme, Rotated):
            seeds[task.name] = rule.scheme.seed
        if chosen[task.name].stacked > 1:
            raise ValueError(f"{task.name}: expected stacked=0 or 1; layers of a scan are independent without it")
    for path in (*chosen, *(path for task in before for path in task.paths)):
        check_finite(path, flatten(dense)[0][path])
    return chosen, seeds, before


def _check(rule: Rule) -> None:
    """Refuses settings that belong to products, which have them."""
    scheme = unrotated(rule.scheme)
    per = getattr(scheme, "per", None)
    if isinstance(per, tuple):
        raise ValueError(
            f"rule {rule.pattern!r}: expected per=None, 'channel' or a group length, "
            f"whose axes the product decides, got per={per!r}"
        )
    for each in (rule.scheme, scheme):
        if isinstance(each, Trellis | Rotated) and each.along is not None:
            raise ValueError(
                f"rule {rule.pattern!r}: expected along=None, as {type(each).__name__} runs along the inputs of the "
                f"product, got along={each.along!r}"
            )
    if isinstance(scheme, Trellis) and scheme.code == "learned":
        raise ValueError(
            f"rule {rule.pattern!r}: expected code='computed' or 'gaussian', got 'learned', whose table belongs to a "
            "leaf and not to its products; take lcq.compress, with importance= from lcq.ptq.curvature"
        )


def without_blocks(rule: Rule) -> Any:
    """The scheme on the whole leaf: the blocks of `per`, and the inputs that are turned, are the product's, not the
    leaf's."""
    if not isinstance(unrotated(rule.scheme), Quantizer | Trellis):
        return rule.scheme
    scheme: Any = unrotated(rule.scheme)  # a dataclass, as all schemes are
    return dataclasses.replace(scheme, per=None, **({"scale_bits": None} if isinstance(scheme, Uniform) else {}))


def method_at(path: str, method: Rounding, rule: Rule) -> Rounding:
    """The method for a leaf, whose codes may be steps of paths."""
    with named(path):
        return method.on_paths() if isinstance(rule.scheme, Trellis) else method


def check_paths(program: Program, chosen: dict[str, Rule], seeds: dict[str, int], dense: Any) -> None:
    """Refuses leaves for whose products paths, or turned inputs, cannot be put together."""
    shapes = flatten(dense)[0]
    for path, rule in chosen.items():
        scheme = rule.scheme
        if path not in seeds and not isinstance(scheme, Trellis) and getattr(scheme, "scale_bits", None) is None:
            continue
        products = [program.products[unit.uses[0]] for unit in program.units]
        here = [product for product in products if product.path == path]
        pieces = {
            piece_length(product.shape[2], scheme.block)
            if isinstance(scheme, Trellis) and path not in seeds
            else product.shape[2]
            for product in here
        }
        if len(pieces) > 1:
            raise ValueError(
                f"{path}: expected products with as many inputs each, whose paths and units are alike, got pieces of "
                f"{', '.join(map(str, sorted(pieces)))} weights; split the leaf, or choose another scheme for it"
            )
        if path in seeds:
            with named(path):
                check_length(min(pieces))
            inputs_along(shapes[path].shape, here)
        else:
            paths_along(shapes[path].shape, here, pieces.pop())


def warn_of_direct(direct: Sequence[Task], rtn: Rules) -> None:
    """Says which leaves are projected as they are, by schemes that no method rounds; a cast has nothing to choose."""
    asked = [rule.pattern for rule in checked(rtn)]
    for task in direct:
        meant = any(re.fullmatch(pattern, path) for pattern in asked for path in task.paths)
        if not meant and not isinstance(task.scheme, Cast):
            warnings.warn(
                f"{', '.join(task.paths)}: expected a scheme that is rounded product by product, such as Uniform or "
                f"Trellis, got {task.scheme}, which is projected on the weights alone, as by lcq.compress, without a "
                "record; pass its rule in rtn= if that is meant",
                stacklevel=3,
            )
