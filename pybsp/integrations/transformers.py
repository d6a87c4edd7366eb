"""Loading pruned checkpoints through the stock calls of transformers.

A checkpoint whose ``config.json`` has ``quantization_config.quant_method == "pybsp"``
comes in two formats. ``"dense"``: an ordinary ``model.safetensors`` with zero blocks,
packed after loading. ``"packed"``: ``model.pybsp.safetensors``, usually beside the
ordinary file, is loaded instead of it. See docs/packing.md.

Imported from within the import of ``transformers.quantizers``; thus nothing here may
import more of transformers than that.
"""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..blocks import BlockShapeSpec, check_block_shape, check_block_shape_spec
from ..nn import pack
from ..nn.encoder import fuse_encoders_
from ..nn.fuse import fuse_
from ..nn.linear import BlockSparseLinear
from ..nn.plan import NothingToPack
from ..nn.report import EncoderReport
from ..nn.shrink import shrink_
from .loading import (
    check_input_scales,
    check_layer_names,
    check_record,
    finish_layers,
    prepare_layers,
    recorded_name,
    settle_files,
)
from .packed_file import FORMAT_VERSION, PACKED_FILE, read_packed_layers
from .save import packing_record, save_packed

__all__ = ["BlockSparseConfig", "BlockSparseHfQuantizer", "register", "save_packed"]

QUANT_METHOD = "pybsp"
logger = logging.getLogger(__name__)


def register() -> None:
    """Make ``quant_method: "pybsp"`` known to transformers; again after a reload."""
    # Looked up now: the module may have been imported anew.
    registry: Any = importlib.import_module("transformers.quantizers.auto")
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    registry.AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
    registry.register_quantization_config(QUANT_METHOD)(BlockSparseConfig)
    registry.register_quantizer(QUANT_METHOD)(BlockSparseHfQuantizer)
    pack.listeners[__name__] = follow_packing


class BlockSparseConfig(QuantizationConfigMixin):
    """What ``config.json`` says about a pruned model, as ``quantization_config``.

    Parameters
    ----------
    block_shape : ``(out, in)`` for layers that ``modules`` does not name; None detects.
    modules : block shape of each pruned layer by name.
    format : ``"dense"`` or ``"packed"``: which file holds the weights.
    dtype : of the packed weights, ``"float32"``, ``"bfloat16"`` or ``"int8"``.
    input_scales : of int8 layers by name, those that are known.
    float32_modules : layers that are not rounded though others are.
    min_gain, fuse, shrink : as for ``pybsp.pack_``, for what happens on loading.

    Other entries, such as ``sparsity``, are kept and written again.
    """

    def __init__(
        self,
        block_shape: BlockShapeSpec | None = None,
        modules: dict[str, Any] | None = None,
        format: str = "dense",
        min_gain: float = 1.0,
        fuse: bool = True,
        shrink: bool = True,
        dtype: str = "float32",
        input_scales: dict[str, float] | None = None,
        float32_modules: list[str] | None = None,
        **notes: Any,
    ) -> None:
        if dtype not in pack.DTYPES:
            raise ValueError(
                "the dtype in quantization_config is 'float32', 'bfloat16' or 'int8'; "
                f"got {dtype!r}: upgrade pybsp"
            )
        if format not in ("dense", "packed"):
            raise ValueError(
                "the format in quantization_config is 'dense' or 'packed'; got "
                f"{format!r}: save the model again"
            )
        notes.pop("quant_method", None)
        version = notes.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"quantization_config has format_version {version!r} and this pybsp "
                f"reads {FORMAT_VERSION}: install the version of pybsp that wrote it"
            )
        if isinstance(min_gain, bool) or not isinstance(min_gain, (int, float)):
            raise ValueError(
                f"quantization_config.min_gain must be a number; got {min_gain!r}"
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format = format
        self.block_shape = (
            None if block_shape is None else check_block_shape_spec(block_shape)
        )
        if not isinstance(modules or {}, dict):
            raise ValueError(
                f"quantization_config.modules maps names to (out, in); got {modules!r}"
            )
        self.modules = {k: check_block_shape(v) for k, v in (modules or {}).items()}
        self.dtype = dtype
        self.input_scales = check_input_scales(input_scales or {})
        self.float32_modules = check_layer_names(float32_modules or [])
        self.min_gain = min_gain
        self.fuse = fuse
        self.shrink = shrink
        self.notes = {"format_version": FORMAT_VERSION, **notes}

    def to_dict(self) -> dict[str, Any]:
        record = {
            **self.notes,
            "quant_method": self.quant_method,
            "format": self.format,
            "modules": {name: list(shape) for name, shape in self.modules.items()},
        }
        if self.block_shape is not None:
            record["block_shape"] = list(self.block_shape)
        if self.dtype != "float32":
            record["dtype"] = self.dtype
        if self.input_scales:
            record["input_scales"] = dict(self.input_scales)
        if self.float32_modules:
            record["float32_modules"] = list(self.float32_modules)
        if self.min_gain != 1.0:
            record["min_gain"] = self.min_gain
        if not self.fuse:
            record["fuse"] = False
        if not self.shrink:
            record["shrink"] = False
        return record

    def rounding_options(self, model: nn.Module) -> dict[str, Any]:
        """Those of ``pack_``, with the names that layers have in ``model``."""
        if self.dtype == "float32":
            return {}
        names = dict(model.named_modules(remove_duplicate=False))
        recorded = {*self.input_scales, *self.float32_modules}
        found = {name: recorded_name(model, name, names) for name in recorded}
        scales = {
            name: scale
            for key, scale in self.input_scales.items()
            if (name := found[key]) is not None
        }
        return {
            "dtype": self.dtype,
            "calibration": scales if self.dtype == "int8" else None,
            "float32_modules": [
                name for key in self.float32_modules if (name := found[key]) is not None
            ],
        }


class BlockSparseHfQuantizer(HfQuantizer):
    """Builds packed layers while transformers loads a model, and saves them dense."""

    requires_calibration = False
    quantization_config: BlockSparseConfig

    def __init__(self, quantization_config: BlockSparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loaded_packed: Path | None = None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in (None, torch.float32):
            raise ValueError(
                f"packed layers compute in float32 and dtype is {dtype}: call "
                "from_pretrained with dtype=torch.float32"
            )
        return torch.float32

    def update_attn_implementation(self, config: Any) -> Any:
        # Not about attention: this is the one hook that sees the config before
        # transformers looks for the weights.
        if self.quantization_config.format == "packed":
            config.transformers_weights = PACKED_FILE
        return config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            return
        # transformers builds models under the meta device, the files hold real numbers.
        with torch.device("cpu"):
            settle_files(checkpoint_files)
        files = [Path(file) for file in checkpoint_files]
        if any(file.suffix != ".safetensors" for file in files):
            return
        layers = read_packed_layers(files)
        self._loaded_packed = files[0] if layers else None
        if files[0].name == PACKED_FILE:
            check_record(self.quantization_config.modules, layers, files[0])
        if layers:
            prepare_layers(model, layers, files[0])

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        model_config: Any = model.config
        if hasattr(model_config, "transformers_weights"):
            del model_config.transformers_weights
        self._mark_embeddings(model)
        # From here on the stock save_pretrained writes the dense form.
        self.quantization_config.format = "dense"
        if self._loaded_packed is not None:
            finish_layers(model, self._loaded_packed)
            if self.quantization_config.shrink:
                shrink_(model)
            if self.quantization_config.fuse:
                fuse_(model)
                tell_encoders(fuse_encoders_(model))
            return
        try:
            report = pack.pack_(
                model,
                **self.quantization_config.rounding_options(model),
                fuse=self.quantization_config.fuse,
                min_gain=self.quantization_config.min_gain,
                shrink=self.quantization_config.shrink,
            )
        except NothingToPack as error:
            if not self.pre_quantized:
                raise
            logger.warning("nothing was packed, the model stays dense: %s", error)
            follow_packing(model)
        else:
            tell_encoders(report.encoders)

    def _mark_embeddings(self, model: nn.Module) -> None:
        """Note on the tables that were pruned in which blocks."""
        names = dict(model.named_modules(remove_duplicate=False))
        recorded = self.quantization_config.notes.get("embeddings") or {}
        for key, shape in recorded.items():
            name = recorded_name(model, key, names)
            if name is not None:
                table: Any = model.get_submodule(name)
                table.pybsp_block_shape = check_block_shape(shape)

    def _dequantize(
        self, model: nn.Module, dtype: torch.dtype | str | None = None
    ) -> nn.Module:
        pack.unpack_(model)
        if isinstance(dtype, str):  # what model.config.dtype is after saving
            dtype = getattr(torch, dtype)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> bool:
        return True

    # Both are asked for by Trainer, even if it is only to evaluate.
    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def tell_encoders(reports: tuple[EncoderReport, ...]) -> None:
    """Loading returns the model alone, so what runs where goes to the log."""
    for report in reports:
        logger.info("%s", report)


def follow_packing(model: nn.Module) -> None:
    """Give a transformers model with packed layers its quantizer, or take it away.

    With it, ``save_pretrained`` writes a dense checkpoint that any reader loads, and
    ``model.dequantize()`` works.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return
    quantizer = getattr(model, "hf_quantizer", None)
    packed = any(isinstance(module, BlockSparseLinear) for module in model.modules())
    if packed and quantizer is None:
        config = BlockSparseConfig(**packing_record(model))
        model.config.quantization_config = config
        model.hf_quantizer = BlockSparseHfQuantizer(config, pre_quantized=True)
        model.is_quantized = True
        model.quantization_method = QUANT_METHOD
    elif not packed and isinstance(quantizer, BlockSparseHfQuantizer):
        record = quantizer.quantization_config.to_dict()
        quantizer.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        # Still pruned, and what is saved says so.
        model.config.quantization_config = record


# Whoever imports this module first has the method, too; see _register.
register()
