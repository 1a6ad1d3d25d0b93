"""The table of chips, and how far its roofline is from what others have measured."""

import pytest

from mlx_dist.cluster.chips import CHIPS, chip_named, nominal_speeds, ordinary_speeds
from mlx_dist.errors import ConfigError

# Weights, tokens a second of a prompt and, where nothing else counts, while generating in 16 bits:
# LLaMA 7 B with llama.cpp (its discussion 4167), K2-Horizon with MLX (mlx-vlm 2153).
PUBLISHED = [
    ("M1 Pro", 14, 6.74e9, 262.65, 12.75),
    ("M3 Pro", 18, 6.74e9, 357.45, 9.89),
    ("M3 Ultra", 80, 0.9e9, 10_682, None),
    ("M3 Ultra", 80, 3.7e9, 2_748, None),
]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("M4", "M4"),
        ("Apple M3 Ultra", "M3 Ultra"),
        ("apple m4 pro", "M4 Pro"),
        ("  m1-max ", "M1 Max"),
        ("M5Max", "M5 Max"),
    ],
)
def test_a_chip_is_found_by_its_name(text, name):
    assert chip_named(text).name == name


@pytest.mark.parametrize("text", ["M9", "M4 Ultra", "", "Apple", "Intel(R) Xeon(R)", "M 4 2"])
def test_an_unknown_chip_is_refused_with_those_that_are_known(text):
    with pytest.raises(ConfigError, match=r"is no chip known here; known are M1, M1 Pro, .*Ultra$"):
        chip_named(text)


def test_fewer_cores_may_come_with_less_bandwidth():
    chip = chip_named("M4 Max")
    assert chip.variant(32).bandwidth_gb_s == 410
    assert chip.variant() == chip.variant(40)
    with pytest.raises(ConfigError, match="M4 Max has 32 or 40 GPU cores, not 38"):
        chip.variant(38)


@pytest.mark.parametrize(
    ("name", "tflops"), [("M1", 2.6), ("M1 Max", 10.4), ("M2", 3.6), ("M2 Max", 13.6)]
)
def test_the_peak_is_the_published_one(name, tflops):
    assert chip_named(name).tflops() == pytest.approx(tflops, rel=0.03)


def test_neural_accelerators_count_in_16_bits_only():
    chip = chip_named("M5")
    assert chip.tflops(10, "bfloat16") == 4 * chip_named("M4").tflops(10)
    assert chip.tflops(10, "float32") < 1.1 * chip_named("M4").tflops(10)


@pytest.mark.parametrize(("name", "gpu_cores", "num_weights", "prompt", "generation"), PUBLISHED)
def test_the_roofline_is_near_published_measurements(
    name, gpu_cores, num_weights, prompt, generation
):
    speeds = nominal_speeds(chip_named(name), gpu_cores, "float16", 0)
    assert 512 / (num_weights * speeds.product_s[512]) == pytest.approx(prompt, rel=0.15)
    if generation is not None:
        assert 1 / (num_weights * speeds.product_s[1]) == pytest.approx(generation, rel=0.15)


@pytest.mark.parametrize(("rows", "milliseconds"), [(6, 19.4), (8, 25.4), (10, 31.3), (12, 31.8)])
def test_a_small_batch_of_4_bit_weights_is_near_what_mlx_takes_on_an_m2_ultra(rows, milliseconds):
    """Mistral 7 B, of 7.1 G weights without its embedding, in mlx's pull request 2031."""
    speeds = nominal_speeds(chip_named("M2 Ultra"), 76, "float16", 4)
    sizes = speeds.quantized_s
    # Measured at sizes between those of the curve, which is read on straight lines.
    left, right = (4, 8) if rows <= 8 else (8, 16)
    slope = (sizes[right] - sizes[left]) / (right - left)
    seconds = 7.1e9 * (sizes[left] + slope * (rows - left))
    assert seconds * 1e3 == pytest.approx(milliseconds, rel=0.2)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_speeds_of_every_variant_make_sense(chip, dtype, bits):
    assert list(chip.variants) == sorted(chip.variants, key=lambda v: v.gpu_cores)
    for variant in chip.variants:
        speeds = nominal_speeds(chip, variant.gpu_cores, dtype, bits)
        for curve in (speeds.product_s, speeds.quantized_s):
            seconds = [curve[n] for n in sorted(curve)]
            assert seconds == sorted(seconds)
            each = [curve[n] / n for n in sorted(curve)]
            assert each == sorted(each, reverse=True)
        assert bool(speeds.quantized_s) == (bits > 0)
        assert 0 < speeds.element_s < speeds.op_s


def test_fewer_bits_are_faster_to_read():
    chip = chip_named("M3 Ultra")
    four, eight = (nominal_speeds(chip, None, "bfloat16", bits) for bits in (4, 8))
    assert four.quantized_s[1] == pytest.approx(eight.quantized_s[1] * 4.5 / 8.5)
    assert eight.quantized_s[1] < eight.product_s[1]


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="dtype 'int8' is none of float32, float16, bfloat16"):
        nominal_speeds(chip_named("M4"), None, "int8", 4)


def test_machines_that_nobody_measured_have_both_curves():
    speeds = ordinary_speeds("float32")
    assert speeds.product_s and speeds.quantized_s and speeds.bits == 4
