"""GGUF files made by hand, and blocks decoded number by number as ggml-quants.c does."""

import struct

import numpy as np

UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def text(words):
    return struct.pack("<Q", len(words.encode())) + words.encode()


def field(name, kind, data):
    return text(name) + struct.pack("<I", kind) + data


def gguf(tensors, fields=b"", many=0, *, version=3, alignment=32):
    """Tensors by name as (shape of numpy, type, bytes), one after another at multiples of the alignment."""
    infos, data = b"", b""
    for name, (shape, kind, content) in tensors.items():
        axes = shape[::-1]
        infos += text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, len(data))
        data += content + b"\0" * (-len(content) % alignment)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), many) + fields + infos
    return head + b"\0" * (-len(head) % alignment) + data


def half(data):
    return float(np.frombuffer(bytes(data), "<f2")[0])


def byte(value):
    return value - 256 if value > 127 else value


def six_bits(j, q):
    """get_scale_min_k4."""
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 0xF) | ((q[j - 4] >> 6) << 4), (q[j + 4] >> 4) | ((q[j] >> 6) << 4)


def q2_k(b):
    scales, qs, d, least = b[:16], b[16:80], half(b[80:82]), half(b[82:84])
    y = []
    for n in range(2):
        for shift in range(4):
            for part in range(2):
                sc = scales[8 * n + 2 * shift + part]
                for i in range(16):
                    y.append(d * (sc & 15) * (qs[32 * n + 16 * part + i] >> 2 * shift & 3) - least * (sc >> 4))
    return y


def q3_k(b):
    mask, qs, packed, d = b[:32], b[32:96], b[96:108], half(b[108:110])
    scales = [
        ((packed[i] & 15) if i < 8 else packed[i - 8] >> 4) | (packed[8 + i % 4] >> 2 * (i // 4) & 3) << 4
        for i in range(16)
    ]
    y = []
    for n in range(2):
        for shift in range(4):
            for part in range(2):
                for i in range(16):
                    at = 16 * part + i
                    low = qs[32 * n + at] >> 2 * shift & 3
                    y.append(
                        d
                        * (scales[8 * n + 2 * shift + part] - 32)
                        * (low - (0 if mask[at] >> 4 * n + shift & 1 else 4))
                    )
    return y


def q4_k(b):
    d, least, packed, qs = half(b[:2]), half(b[2:4]), b[4:16], b[16:]
    y = []
    for j in range(4):
        for part in range(2):
            sc, m = six_bits(2 * j + part, packed)
            y += [d * sc * (qs[32 * j + i] >> 4 * part & 15) - least * m for i in range(32)]
    return y


def q5_k(b):
    d, least, packed, high, qs = half(b[:2]), half(b[2:4]), b[4:16], b[16:48], b[48:]
    y = []
    for j in range(4):
        for part in range(2):
            sc, m = six_bits(2 * j + part, packed)
            for i in range(32):
                code = (qs[32 * j + i] >> 4 * part & 15) + (16 if high[i] >> 2 * j + part & 1 else 0)
                y.append(d * sc * code - least * m)
    return y


def q6_k(b):
    low, high, scales, d = b[:128], b[128:192], b[192:208], half(b[208:210])
    y = np.zeros(256)
    for n in range(2):
        for i in range(32):
            a, c, h = low[64 * n + i], low[64 * n + 32 + i], high[32 * n + i]
            codes = (
                a & 15 | (h & 3) << 4,
                c & 15 | (h >> 2 & 3) << 4,
                a >> 4 | (h >> 4 & 3) << 4,
                c >> 4 | h >> 6 << 4,
            )
            for k, code in enumerate(codes):
                y[128 * n + 32 * k + i] = d * byte(scales[8 * n + i // 16 + 2 * k]) * (code - 32)
    return y


def iq4_nl(b):
    return [half(b[:2]) * UNEVEN[b[2 + j % 16] >> 4 * (j // 16) & 15] for j in range(32)]


def iq4_xs(b):
    d, high, low, qs = half(b[:2]), b[2] | b[3] << 8, b[4:8], b[8:]
    y = []
    for g in range(8):
        scale = (low[g // 2] >> 4 * (g % 2) & 15 | (high >> 2 * g & 3) << 4) - 32
        y += [d * scale * UNEVEN[qs[16 * g + j % 16] >> 4 * (j // 16) & 15] for j in range(32)]
    return y


def q4_0(b):
    return [half(b[:2]) * ((b[2 + j % 16] >> 4 * (j // 16) & 15) - 8) for j in range(32)]


def q4_1(b):
    return [half(b[:2]) * (b[4 + j % 16] >> 4 * (j // 16) & 15) + half(b[2:4]) for j in range(32)]


def q8_0(b):
    return [half(b[:2]) * byte(b[2 + j]) for j in range(32)]


BLOCKS = {  # number, weights, bytes, where float16 numbers are, one block to its values
    "Q4_0": (2, 32, 18, (0,), q4_0),
    "Q4_1": (3, 32, 20, (0, 2), q4_1),
    "Q8_0": (8, 32, 34, (0,), q8_0),
    "Q2_K": (10, 256, 84, (80, 82), q2_k),
    "Q3_K": (11, 256, 110, (108,), q3_k),
    "Q4_K": (12, 256, 144, (0, 2), q4_k),
    "Q5_K": (13, 256, 176, (0, 2), q5_k),
    "Q6_K": (14, 256, 210, (208,), q6_k),
    "IQ4_NL": (20, 32, 18, (0,), iq4_nl),
    "IQ4_XS": (23, 256, 136, (0,), iq4_xs),
}


def random_blocks(name, many, seed=0):
    """Bytes of blocks at random, their float16 numbers small and of either sign."""
    _, _, size, halves, _ = BLOCKS[name]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (many, size), dtype=np.uint8)
    for at in halves:
        data[:, at : at + 2] = rng.normal(size=(many, 1)).astype("<f2").view(np.uint8)
    return data


def values(name, data):
    return np.array([BLOCKS[name][4]([int(v) for v in block]) for block in data])
