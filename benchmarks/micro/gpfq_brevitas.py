"""Times Brevitas' GPFQ on one linear layer with frozen per-neuron scales, and keeps its codes for comparison.

    taskset -c 0,1 python benchmarks/micro/gpfq_brevitas.py --input x.npz --out y.npz

Needs torch, brevitas and numpy, and nothing of this package.
x.npz: w [N, n], x [m, N] the inputs in the original net, y [m, N] those in the quantized one, scale [n]. The levels are
scale * (-2^(bits-1) .. 2^(bits-1) - 1). y.npz: codes [N, n], seconds (the median), all_seconds, collect_seconds,
threads, versions (JSON). Timed, in float32 on the CPU: entering `gpfq_mode`, both passes over the rows, the recursion.
Not timed: reading the file, building the layer, reading its codes.
"""

import argparse
import json
import platform
import time

import brevitas
import numpy as np
import torch
from brevitas.graph.gpfq import gpfq_mode
from brevitas.inject.enum import ScalingImplType
from brevitas.nn import QuantLinear
from brevitas.quant import Int8WeightPerChannelFloat


class Layer(torch.nn.Module):
    """One linear layer in a net whose layers before it are replaced by their recorded outputs, x and y.

    `gpfq_mode` calls it twice a batch: quantization on, for the inputs in the quantized net, then off.
    """

    def __init__(self, w: torch.Tensor, scale: torch.Tensor, bits: int) -> None:
        super().__init__()
        self.linear = QuantLinear(
            *w.shape,
            bias=False,
            weight_quant=Int8WeightPerChannelFloat,
            weight_bit_width=bits,
            weight_narrow_range=False,
            weight_scaling_impl_type=ScalingImplType.CONST,  # the default follows the weights as GPFQ rewrites them
            weight_scaling_init=scale[:, None] * 2 ** (bits - 1),  # Brevitas divides by 2^(bits-1): exact
        )
        self.linear.weight.data = w.T.contiguous()
        self.scale = scale

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.linear(y if self.linear.weight_quant.is_quant_enabled else x)


@torch.no_grad()
def run(layer: Layer, x: torch.Tensor, y: torch.Tensor, batch: int) -> tuple[float, float, np.ndarray]:
    """Seconds in all, seconds of these for the statistics, codes [N, n]."""
    start = time.perf_counter()
    with gpfq_mode(layer, create_weight_orig=True, use_quant_activations=True, act_order=False) as gpfq:
        for rows in zip(x.split(batch), y.split(batch), strict=True):
            gpfq.model(*rows)
        collected = time.perf_counter()
        gpfq.update()
    end = time.perf_counter()
    quantized = layer.linear.quant_weight()
    assert torch.equal(quantized.scale.flatten(), layer.scale), "the scale moved"
    return end - start, collected - start, quantized.int().numpy().T.astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batch", type=int, help="rows a pass, a divisor of m (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with np.load(args.input) as file:
        w, x, y, scale = (torch.from_numpy(file[k].astype(np.float32)) for k in ("w", "x", "y", "scale"))
    batch = args.batch or len(x)
    if len(x) % batch:
        parser.error("--batch must divide the rows: Brevitas weighs every batch alike")

    runs = [run(Layer(w, scale, args.bits).eval(), x, y, batch) for _ in range(args.repeats)]
    codes = runs[0][2]
    assert all(np.array_equal(codes, other) for _, _, other in runs)
    versions = {"python": platform.python_version(), "brevitas": brevitas.__version__}
    versions |= {"torch": torch.__version__, "numpy": np.__version__}
    seconds, collect = (float(np.median([r[i] for r in runs])) for i in (0, 1))
    np.savez(
        args.out,
        codes=codes,
        seconds=seconds,
        all_seconds=[r[0] for r in runs],
        collect_seconds=collect,
        threads=torch.get_num_threads(),
        versions=json.dumps(versions),
    )
    print(f"{seconds:.3f} s, of which statistics {collect:.3f} s; all: {[round(r[0], 3) for r in runs]}; {versions}")


if __name__ == "__main__":
    main()
