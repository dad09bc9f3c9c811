"""Formats: torchao's numbers, ragged groups, what cannot be stored is an error that says why."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftc.dialect.quantized_linear import pack_int4, quantize_rows, unpack_int4
from ftc.errors import FtcError
from ftc.quantize.formats import Format, why_not

NAMES = ["fp8-row", "fp8-tensor", "fp8-block", "int8-row", "int8-tensor", "int8-g32", "int4-g32", "int4-g32-symmetric", "int4-g64"]


def weight_of(rows, columns, seed, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(codes=st.lists(st.integers(-8, 7), min_size=1, max_size=9), rows=st.integers(1, 3))
def test_int4_codes_come_back_whatever_the_width(codes, rows):
    given_codes = torch.tensor([codes] * rows)
    packed = pack_int4(given_codes)
    assert packed.shape == (rows, -(-len(codes) // 2))
    assert torch.equal(unpack_int4(packed, len(codes)), given_codes.to(torch.int8))


@given(name=st.sampled_from(NAMES), rows=st.integers(1, 150), columns=st.integers(1, 200), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_a_weight_comes_back_within_half_a_step(name, rows, columns, seed, dtype):
    format, weight = Format.named(name), weight_of(rows, columns, seed, dtype)
    stored = format.nearest(weight)
    assert list(stored.scale.shape) == format.scale_shape(weight.shape) and list(stored.data.shape) == format.data_shape(weight.shape)
    back = format.decode(stored, columns, dtype).double()
    step = {"fp8": 1 / 14, "int8": 1 / 127, "int4": 1 / 7}[format.dtype]  # of the largest: symmetric codes clip at the top, FP8's widest step is 32 of 448
    assert float((back - weight.double()).abs().max()) <= (step + 0.02) * float(weight.double().abs().max()) * (1.2 if format.zero else 1) + 1e-6
    assert format.num_bytes(weight.shape, dtype) == sum(t.nbytes for t in (stored.data, stored.scale, stored.zero) if t is not None)


@given(name=st.sampled_from(NAMES), seed=st.integers(0, 99))
def test_rounding_again_changes_nothing(name, seed):
    format, weight = Format.named(name), weight_of(40, 172, seed, torch.float64)
    stored = format.nearest(weight)
    back = format.decode(stored, 172, torch.float64)
    assert torch.equal(format.codes(back, stored.scale, stored.zero), format.codes(weight, stored.scale, stored.zero))


@given(seed=st.integers(0, 99), columns=st.integers(33, 63))
def test_the_ragged_last_group_is_a_group_of_its_own(seed, columns):
    format, weight = Format.named("int4-g32"), weight_of(8, columns, seed)
    whole, first, last = (format.nearest(w) for w in (weight, weight[:, :32], weight[:, 32:]))
    assert torch.equal(whole.scale, torch.cat([first.scale, last.scale], 1)) and torch.equal(whole.zero, torch.cat([first.zero, last.zero], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_products_have_torchaos_bits(dtype):
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup, PerTensor
    from torchao.quantization.quant_primitives import MappingType

    group = {"weight_dtype": torch.int4, "granularity": PerGroup(32)}
    configs = {
        "fp8-row": quantization.Float8WeightOnlyConfig(),
        "fp8-tensor": quantization.Float8WeightOnlyConfig(granularity=PerTensor()),
        "int8-row": quantization.Int8WeightOnlyConfig(),
        "int4-g32-symmetric": quantization.IntxWeightOnlyConfig(**group),
        "int4-g32": quantization.IntxWeightOnlyConfig(**group, mapping_type=MappingType.ASYMMETRIC),
    }
    weight, x, bias = weight_of(48, 96, 0, dtype), weight_of(40, 96, 1, dtype), weight_of(1, 48, 2, dtype)[0]
    for name, config in configs.items():
        module = torch.nn.Linear(96, 48, dtype=dtype)
        module.weight.data, module.bias.data = weight.clone(), bias.clone()
        quantization.quantize_(module, config)
        format = Format.named(name)
        stored = format.nearest(weight)
        codes = unpack_int4(stored.data, 96) if format.dtype == "int4" else stored.data
        assert torch.equal(codes.float(), module.weight.qdata.float()), name
        assert torch.equal(stored.scale.flatten().float(), module.weight.scale.flatten().float()), name
        made = torch.ops.ftc.quantized_linear(x, stored.data, stored.scale, stored.zero, bias, None, format.dtype, format.block(weight.shape), 96)
        assert torch.equal(made, module(x)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_activations_have_torchaos_bits(dtype):
    pytest.importorskip("torchao")
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor
    from torchao.quantization.granularity import PerRow, PerTensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    weight, x, bias = weight_of(48, 96, 0, dtype), weight_of(5, 96, 1, dtype), weight_of(1, 48, 2, dtype)[0]
    for name, granularity in (("fp8-row-dynamic", PerRow()), ("fp8-tensor-dynamic", PerTensor())):
        config = Float8MMConfig(use_fast_accum=True)
        kwargs = QuantizeTensorToFloat8Kwargs(granularity=granularity, mm_config=config)
        theirs = Float8Tensor.from_hp(weight, granularity=granularity, mm_config=config, act_quant_kwargs=kwargs)
        format = Format.named(name)
        stored = format.nearest(weight)
        made = torch.ops.ftc.quantized_linear(x, stored.data, stored.scale, None, bias, None, "fp8", format.block(weight.shape), 96, "dynamic")
        assert torch.equal(made, torch.nn.functional.linear(x, theirs, bias)), name


@given(name=st.sampled_from([*NAMES, "fp8-block-dynamic", "fp8-row-static", "int8-g16-zero"]))
def test_a_format_is_what_its_name_says(name):
    format = Format.named(name)
    assert Format.named(format.name) == format


@pytest.mark.parametrize("name", ["fp9", "int4-row", "fp8-g32-dynamic", "int8-row-dynamic", "fp8-row-zero", "int4-g32-static"])
def test_a_format_that_there_is_not_is_an_error_with_the_nearest(name):
    with pytest.raises(FtcError, match=r"format"):
        Format.named(name)


def test_an_unknown_dtype_names_the_nearest():
    with pytest.raises(ValueError, match="'fp8'"):
        Format.of("fp88")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_no_scale_fits_are_an_error(value):
    weight = weight_of(4, 32, 0)
    weight[1, 3] = value
    with pytest.raises(FtcError, match="infinities or NaN"):
        Format.named("int8").nearest(weight)


def test_a_scale_that_overflows_its_dtype_is_an_error():
    with pytest.raises(FtcError, match="overflows"):
        Format("int8", "group", 32, zero=True).nearest(torch.tensor([[-65504.0, 65504.0] * 16], dtype=torch.float16) * torch.tensor(1.0).half())


def test_sizes_that_a_format_cannot_take_have_a_reason():
    assert "16 divides" in why_not(Format.named("fp8-row-dynamic"), (172, 64)) and why_not(Format.named("fp8-row"), (172, 64)) is None
    assert "two columns" in why_not(Format.named("int4-g5"), (8, 10)) and "experts" in why_not(Format.named("fp8-row-static"), (4, 16, 16))


@given(seed=st.integers(0, 50), name=st.sampled_from(["row", "tensor", "block"]))
def test_rows_of_zeros_and_of_outliers_are_finite(seed, name):
    x = weight_of(3, 256, seed)
    x[0], x[1, 7] = 0.0, 1e30
    codes, scale = quantize_rows(x, Format.of("fp8", name).block((256, 256)), None)
    assert bool(torch.isfinite(codes.float()).all()) and bool((scale > 0).all()) and float(codes[0].float().abs().max()) == 0.0
