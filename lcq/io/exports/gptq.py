"""GPTQ's safetensors, version 1 (auto_gptq) and 2 (GPTQModel): what vLLM, ExLlama and transformers read.

    value[i, o] = scale[i // g, o] (q[i, o] - z[i // g, o]),    q of 2, 3, 4 or 8 bits, z = 2^(b-1) without zeros

    NAME.qweight   int32 [in b / 32, out]      q, a bit stream down each column
    NAME.qzeros    int32 [in / g, out b / 32]  zeros, a bit stream along each row; version 1 stores z - 1
    NAME.scales    float16 [in / g, out]
    NAME.g_idx     int32 [in]                  i // g

Version 1 has no zero of 0, as its readers add 1 without a mask: such groups go out turned round, which is exact,

    scale (q - 0) = -scale ((2^b - 1 - q) - (2^b - 1))

Readers take all linear layers of a model's blocks for codes. Where some are not, the config says so, once for each
reader, as none reads what the other does:

    dynamic                        {"-:^NAME$": {}}, regular expressions of modules that are no codes (GPTQModel, vLLM)
    modules_in_block_to_quantize   [[NAME, ..]], ends of the names of those that are (optimum for transformers, vLLM)

Source: auto_gptq 0.7.1, nn_modules/qlinear/qlinear_cuda.py; auto_round 0.16.1, auto_round_extension/torch; GPTQModel
7.7.0, quantization/config.py; optimum 2.3.0, gptq/quantizer.py; vLLM 0.32, quantization/utils/gptq_utils.py.
"""

import re
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from lcq.forms import Codes
from lcq.io.container import Json
from lcq.io.exports.base import EXPORT_FORMATS, Encoded, Tensor
from lcq.io.exports.folder import SafetensorsFolder, encode_plain, is_table, plain, plain_layer, tensor
from lcq.io.exports.grids import kind_of
from lcq.io.exports.leaves import NO_TARGET, Item
from lcq.io.exports.linear import bits_of, encoded, stem_of
from lcq.io.exports.steps import offset_of, whole_zeros
from lcq.io.facts import Facts
from lcq.io.layouts import pack_rows

_BITS = (2, 3, 4, 8)


class _Gptq(SafetensorsFolder):
    """model.safetensors, quantize_config.json, and the same in config.json; one width and one group for all layers."""

    version: ClassVar[str]
    before: ClassVar[int]
    """What is taken from zeros before they are stored."""

    @classmethod
    def facts(cls) -> Facts:
        return Facts(
            f"a folder of GPTQ, `checkpoint_format` {cls.version}, for vLLM, ExLlama, transformers",
            "as they are; matrices stand in `dynamic`, codes in `modules_in_block_to_quantize`",
            f"{', '.join(map(str, _BITS))} bits, in groups or by channel, with zeros or without; scales become float16",
            f"several widths or groups in a file; inputs or outputs that do not fill words of 32 bits; {NO_TARGET}",
        )

    def __init__(self, config: Mapping[str, Json]) -> None:
        super().__init__(config)
        self._settings: tuple[int, int] | None = None
        self._first, self._shifted = "", False

    def declare(self, item: Item) -> dict[str, Tensor]:
        if not isinstance(item.value, Codes):
            self.layers |= dict.fromkeys(plain_layer(item))
            return plain(item)
        stem, kind, bits = stem_of(item), kind_of(item.value, item.rule.layout), bits_of(item, _BITS)
        settings = bits, -1 if kind.group == kind.inputs else kind.group
        if self._settings is not None and self._settings != settings:
            raise ValueError(
                f"expected codes of {self._settings[0]} bits in groups of {self._settings[1]}, as {self._first} has, "
                f"got {settings[0]} and {settings[1]}, and one file has one of both; compress them alike, or choose "
                "compressed-tensors"
            )
        if self._settings is None:
            self._settings, self._first = settings, item.path
        for axis, length in (("inputs", kind.inputs), ("outputs", kind.outputs)):
            if length * bits % 32:
                raise ValueError(
                    f"expected {axis} whose {bits} bits fill words of 32, got {length}; leave this leaf out of the "
                    "rules, or choose compressed-tensors"
                )
        self._shifted |= kind.steps.shifted
        self.layers[stem] = settings[0], False, settings[1]
        groups = kind.inputs // kind.group
        made = {
            "qweight": tensor((kind.inputs * bits // 32, kind.outputs), "int32"),
            "qzeros": tensor((groups, kind.outputs * bits // 32), "int32"),
            "scales": tensor((groups, kind.outputs), "float16"),
            "g_idx": tensor((kind.inputs,), "int32"),
        }
        return {f"{stem}.{name}": each for name, each in made.items()}

    def encode(self, item: Item) -> Encoded:
        if not isinstance(item.value, Codes):
            return encode_plain(item)
        stem, kind, bits = stem_of(item), kind_of(item.value, item.rule.layout), bits_of(item, _BITS)
        before = "float32" if item.value.scale is None else str(item.value.scale.dtype)
        grid, error = encoded(item, bits, "float16")
        codes, scale, zero = grid.codes, grid.scale, np.full(grid.scale.shape, offset_of(kind.steps, bits), np.uint8)
        if grid.zero is not None:
            zero = whole_zeros(grid.zero, bits)
        if (low := zero < self.before).any():
            top = np.uint8((1 << bits) - 1)
            codes = np.where(np.repeat(low, kind.group, axis=1), top - codes, codes)
            scale, zero = np.where(low, -scale, scale), np.where(low, top, zero)
        made = {
            "qweight": pack_rows(codes, bits).T,
            "qzeros": pack_rows(np.ascontiguousarray((zero - np.uint8(self.before)).T), bits),
            "scales": scale.T,
            "g_idx": np.arange(kind.inputs, dtype=np.int32) // kind.group,
        }
        why = f"scales {before} to float16" if error else ""
        return Encoded({f"{stem}.{name}": each for name, each in made.items()}, f"int{bits} {kind.words}", error, why)

    def files(self) -> dict[str, Json]:
        coded = [name for name, how in self.layers.items() if how is not None]
        bits, group = self._settings or (4, -1)
        said: dict[str, Json] = {
            "bits": bits,
            "group_size": group,
            "desc_act": False,
            "static_groups": False,
            "sym": not self._shifted,
            "lm_head": "lm_head" in coded,
            "true_sequential": True,
            "damp_percent": 0.01,
            "quant_method": "gptq",
            "checkpoint_format": self.version,
        }
        if coded and any(name != "lm_head" and not is_table(name) for name in self.dense_layers):
            said["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in self.dense_layers}
            said["modules_in_block_to_quantize"] = [coded]
        return {"quantize_config.json": said, "config.json": {**self.config, "quantization_config": said}}


@EXPORT_FORMATS.register("gptq")
class GptqV1(_Gptq):
    """Zeros are stored less one, as by auto_gptq and auto_round."""

    version = "gptq"
    before = 1


@EXPORT_FORMATS.register("gptq_v2")
class GptqV2(_Gptq):
    """Zeros are stored as they are, as by GPTQModel."""

    version = "gptq_v2"
    before = 0
