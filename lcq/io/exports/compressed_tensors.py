"""compressed-tensors, pack-quantized: what vLLM and llm-compressor read, also on TPUs.

    value[o, i] = scale[o, i // g] (q[o, i] - z[o, i // g]),    q of b bits, z = 2^(b-1) without zeros

    NAME.weight_packed       int32 [out, ceil(in b / 32)]   q, a bit stream along each row
    NAME.weight_scale        [out, in / g]                  of either sign; weights are decoded in its dtype
    NAME.weight_shape        int64 [2]                      out, in
    NAME.weight_zero_point   int32 [ceil(out b / 32), in / g]   zeros, a bit stream down each column

Binary goes out as 2 bits, as 1 bit without zeros would be decoded to {-1, 0}.

Source: compressed-tensors 0.20, compressors/quantized_compressors/pack_quantized.py.
"""

import numpy as np

from lcq.forms import Codes
from lcq.forms.bitpack import word_count
from lcq.io.container import Json
from lcq.io.exports.base import EXPORT_FORMATS, Encoded, Tensor
from lcq.io.exports.folder import SafetensorsFolder, encode_plain, plain, plain_layer, tensor
from lcq.io.exports.grids import kind_of
from lcq.io.exports.leaves import NO_TARGET, Item
from lcq.io.exports.linear import bits_of, encoded, scale_dtype, stem_of
from lcq.io.exports.steps import whole_zeros
from lcq.io.facts import Facts
from lcq.io.layouts import pack_rows

_BITS = tuple(range(2, 9))


@EXPORT_FORMATS.register("compressed-tensors")
class CompressedTensors(SafetensorsFolder):
    """model.safetensors, and config.json with a quantization_config.

    `config` is the model's config.json. Matrices that are not compressed, and lm_head unless it is, are in `ignore`.
    """

    @classmethod
    def facts(cls) -> Facts:
        return Facts(
            "a folder by compressed-tensors, pack-quantized, for vLLM, llm-compressor, transformers",
            "as they are; matrices stand in `ignore`",
            f"{_BITS[0]} to {_BITS[-1]} bits, in groups or by channel, with zeros or without; binary as 2 bits",
            f"more bits; zeros that are not whole; {NO_TARGET}",
        )

    def declare(self, item: Item) -> dict[str, Tensor]:
        if not isinstance(item.value, Codes):
            self.layers |= dict.fromkeys(plain_layer(item))
            return plain(item)
        stem, kind, bits = stem_of(item), kind_of(item.value, item.rule.layout), bits_of(item, _BITS)
        group = None if kind.group == kind.inputs else kind.group
        self.layers[stem] = bits, kind.steps.shifted, group
        groups = kind.inputs // kind.group
        made = {
            "packed": tensor((kind.outputs, word_count(kind.inputs, bits)), "int32"),
            "scale": tensor((kind.outputs, groups), scale_dtype(item.value, kind)),
            "shape": tensor((2,), "int64"),
        }
        if kind.steps.shifted:
            made["zero_point"] = tensor((word_count(kind.outputs, bits), groups), "int32")
        return {f"{stem}.weight_{name}": each for name, each in made.items()}

    def encode(self, item: Item) -> Encoded:
        if not isinstance(item.value, Codes):
            return encode_plain(item)
        stem, kind, bits = stem_of(item), kind_of(item.value, item.rule.layout), bits_of(item, _BITS)
        grid, error = encoded(item, bits, scale_dtype(item.value, kind))
        made = {
            "packed": pack_rows(grid.codes, bits),
            "scale": grid.scale,
            "shape": np.array([kind.outputs, kind.inputs], np.int64),
        }
        if grid.zero is not None:
            made["zero_point"] = pack_rows(np.ascontiguousarray(whole_zeros(grid.zero, bits).T), bits).T
        return Encoded({f"{stem}.weight_{name}": each for name, each in made.items()}, f"int{bits} {kind.words}", error)

    def files(self) -> dict[str, Json]:
        by_settings: dict[tuple[int, bool, int | None], list[str]] = {}
        for name, how in self.layers.items():
            if how is not None:
                by_settings.setdefault(how, []).append(name)
        ignore = [*sorted(self.dense_layers), *({"lm_head"} - self.layers.keys())]
        alone = len(by_settings) == 1
        groups = {
            f"group_{i}": {
                "targets": ["Linear"] if alone else sorted(names),
                "weights": _weights(*settings),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for i, (settings, names) in enumerate(by_settings.items())
        }
        said = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": ignore,
            "config_groups": groups,
        }
        return {"config.json": {**self.config, "quantization_config": said}}


def _weights(bits: int, shifted: bool, group: int | None) -> dict[str, Json]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": not shifted,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
