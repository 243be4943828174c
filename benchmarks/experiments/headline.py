"""The README's table: a row for each kind of compression, from what the experiments recorded."""

from benchmarks.harness.markdown import grid
from benchmarks.harness.record import stored

LENET = "LeNet300, MNIST"
RESNET = "ResNet-20, CIFAR-10"
ROWS = (
    (LENET, "`lc`: 1 bit a weight", "lenet300_lc_k2_teacher_slowest"),
    (LENET, "`lc`: 5 % of the weights", "lenet300_lc_l0_5_slow"),
    (LENET, "`lc`: 2.5 % of the weights, of 8 values", "smallest_lenet300_2.5_moved"),
    (RESNET, "`lc`: 2 bits a weight", "resnet20_lc_k4_steep"),
    (RESNET, "`smooth_binary`: 1 bit a weight", "smooth_binary_resnet20_smooth_l2"),
    (RESNET, "`quantize`: 4 levels, without training", "gpfq_resnet20"),
)


def table() -> str:
    """Test errors in percent, bytes of the file, and the ratio of bits at a fixed width."""
    before = {
        LENET: stored("lenet300_reference")[0]["median"]["test_error"],
        RESNET: 100 - stored("gpfq_resnet20")[0]["float_accuracy"],
    }
    rows = []
    for net, how, name in ROWS:
        found = next(row for row in stored(name) if name != "gpfq_resnet20" or row["recipe"] == "descent-4")
        row = found.get("median", found)
        error = row["test_error"] if "test_error" in row else 100 - row["accuracy"]
        rows.append([f"{net}, {how}", f"{before[net]:.2f}", f"{error:.2f}", f"{row['bytes']:,}", f"{row['ratio']:.1f}"])
    return grid(["net and method", "float32, error %", "compressed, error %", "bytes of the file", "ratio"], rows)
