"""A quantised program as a folder that transformers loads with torchao: the same codes and scales as torchao's tensors, in its safetensors form.

torchao is an optional package (`pip install torchao`), imported when something is saved.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ftc.dialect.quantized_linear import unpack_int4
from ftc.errors import FtcError
from ftc.files import atomic_folder, check_replaceable
from ftc.quantize.formats import Format
from ftc.quantize.lens import InputScale, Quantize
from ftc.rewrite.lens import Lens

KIND = "torchao model"


def save_torchao(program, folder: str | Path) -> int:
    """Write `config.json` and `model.safetensors` to `folder` in one step; returns the number of quantised weights.

    The program must come from a transformers model, and its weights must have gone through the pass `quantize` alone. Raises FtcError for other programs, for
    formats that torchao has no tensor for, and without torchao.
    """
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise FtcError(f"torchao is needed for this and cannot be imported ({error}); pip install torchao") from error
    config = _config(program)
    check_replaceable(folder, KIND)
    state, formats = _state(program)
    if not formats:
        raise FtcError("the program has no quantised weights; rewrite it with the pass quantize first")
    _write(folder, state, config, formats)
    return len(formats)


def _config(program) -> dict:
    config = getattr(program, "config", None)
    found = config.to_dict() if hasattr(config, "to_dict") else dict(vars(config)) if hasattr(config, "__dict__") else {}
    if not found.get("model_type") or not found.get("architectures"):
        raise FtcError("the program was not captured from a transformers model (its configuration names no architecture), so there is no form of it that transformers loads")
    return found


def _state(program) -> tuple[dict[str, Tensor], dict[str, Format]]:
    """All tensors by the names of the original model, quantised ones as torchao's, and the formats of those."""
    tensors = {name: t.detach() for name, t in program.state_dict().items()}
    formats: dict[str, Format] = {}
    for prefix, code in [(r.ftc_name + ".", r.code) for r in program.regions] + [("", program.code)]:
        for lens in reversed([lens.with_prefix(prefix) for lens in code.lenses]):
            if isinstance(lens, Quantize):
                stored = [tensors.pop(name) for name in lens.targets]
                tensors[lens.source] = _torchao_tensor(lens, *stored)
                formats[lens.source] = lens.stored_as
            else:
                _refuse(lens)
    return tensors, formats


def _refuse(lens: Lens) -> None:
    what = "a static scale of activations" if isinstance(lens, InputScale) else f"a {lens.kind} lens"
    raise FtcError(f"the weights went through {what} besides ({', '.join((*lens.sources, *lens.targets))}), and torchao's folder form has no such thing; rewrite with the pass quantize alone, weights only or dynamic")


def _torchao_tensor(lens: Quantize, data: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor
    from torchao.quantization.granularity import PerRow, PerTensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    format, dtype, block = lens.stored_as, getattr(torch, lens.original), lens.stored_as.block(lens.shape)
    if len(lens.shape) != 2 or format.granularity == "block" or (format.granularity == "group" and lens.shape[1] % format.group):
        raise FtcError(f"{lens.source} is {list(lens.shape)} in {format.name}, for which torchao has no tensor that transformers loads; use rows, or groups that divide the columns")
    if format.dtype == "fp8":
        kwargs = {"block_size": block, "dtype": dtype}
        if format.activations == "dynamic":
            mm = Float8MMConfig(use_fast_accum=True)
            granularity = PerRow() if format.granularity == "row" else PerTensor()
            kwargs |= {"mm_config": mm, "act_quant_kwargs": QuantizeTensorToFloat8Kwargs(granularity=granularity, mm_config=mm)}
        return Float8Tensor(data, scale, **kwargs)
    if format.dtype == "int8" and format.granularity != "group":
        return Int8Tensor(data, scale, block, dtype, zero_point=torch.zeros_like(scale, dtype=torch.int8))
    codes = unpack_int4(data, lens.shape[1]) if format.dtype == "int4" else data
    target = torch.int4 if format.dtype == "int4" else torch.int8
    zero = torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero
    return IntxUnpackedToInt8Tensor(codes, scale, zero, target, tuple(block), dtype, None)


def _write(folder: str | Path, state: dict[str, Tensor], config: dict, formats: dict[str, Format]) -> None:
    from safetensors.torch import save_file
    from torchao.core.config import config_to_dict
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors, metadata = flatten_tensor_state_dict(_untied(state))
    plain = sorted({name.removesuffix(".weight") for name, t in state.items() if name.endswith(".weight") and t.dim() == 2 and name not in formats})
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    config["quantization_config"] = {
        "quant_method": "torchao", "quant_type": {"default": config_to_dict(_nominal(formats))}, "modules_to_not_convert": plain,
        "include_input_output_embeddings": False, "untie_embedding_weights": False,
    }  # fmt: skip
    with atomic_folder(folder, KIND) as place:
        save_file({name: t.contiguous() for name, t in tensors.items()}, str(place / "model.safetensors"), metadata={**metadata, "format": "pt"})
        (place / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n")


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor once: of tied weights the first name, which transformers ties again."""
    seen, found = set(), {}
    for name, tensor in state.items():
        plain = type(tensor) is Tensor
        place = (tensor.data_ptr(), tuple(tensor.shape)) if plain and tensor.numel() else name
        if place not in seen:
            found[name] = tensor
        seen.add(place)
    return found


def _nominal(formats: dict[str, Format]):
    """The configuration that stands for most of the weights: what is stored says for each tensor what it is."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
    )
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor

    names = [format.name for format in formats.values()]
    format = Format.named(max(set(names), key=names.count))
    granularity = PerTensor() if format.granularity == "tensor" else PerRow()
    if format.dtype == "fp8" and format.activations == "dynamic":
        return Float8DynamicActivationFloat8WeightConfig(granularity=granularity)
    if format.dtype == "fp8":
        return Float8WeightOnlyConfig(granularity=granularity)
    if format.granularity != "group":
        return Int8WeightOnlyConfig()
    return IntxWeightOnlyConfig(weight_dtype=torch.int4 if format.dtype == "int4" else torch.int8, granularity=PerGroup(format.group))
