"""Whole encoders as one native call, where the architecture is known.

``fuse_encoders_`` replaces the forward of a base model of transformers: a reader walks
through its modules, by class, into an ``ops.EncoderSpec``, and what computes anything
else stays with the stock modules. transformers itself is not imported.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..report import EncoderReport
from .bert import read_bert, read_electra, read_roberta
from .distilbert import read_distilbert
from .forward import Bound, FusedForward, Reading
from .modernbert import read_modernbert
from .mpnet import read_mpnet
from .reader import Deviation, Reader
from .vit import read_vit

__all__ = ["FusedForward", "fuse_encoders_", "unfuse_encoders_"]

#: Who reads a model of this class, from ``transformers.models``.
_READERS: dict[str, Callable[[nn.Module, Reader], Reading]] = {
    "bert.modeling_bert.BertModel": read_bert,
    "camembert.modeling_camembert.CamembertModel": read_roberta,
    "deit.modeling_deit.DeiTModel": read_vit,
    "distilbert.modeling_distilbert.DistilBertModel": read_distilbert,
    "electra.modeling_electra.ElectraModel": read_electra,
    "modernbert.modeling_modernbert.ModernBertModel": read_modernbert,
    "mpnet.modeling_mpnet.MPNetModel": read_mpnet,
    "roberta.modeling_roberta.RobertaModel": read_roberta,
    "vit.modeling_vit.ViTModel": read_vit,
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaModel": read_roberta,
}


def fuse_encoders_(model: nn.Module) -> tuple[EncoderReport, ...]:
    """Let every encoder in ``model`` run natively whose modules are as expected.

    Returns all those found, each with the reason if it is not native.
    """
    unfuse_encoders_(model)
    reports = []
    for name, module in model.named_modules():
        kind = type(module)
        place = f"{kind.__module__}.{kind.__qualname__}"
        read = _READERS.get(place.removeprefix("transformers.models."))
        if read is None:
            continue
        try:
            _fuse(module, read)
        except Deviation as deviation:
            reports.append(EncoderReport(name, kind.__name__, False, str(deviation)))
        else:
            reports.append(EncoderReport(name, kind.__name__, True))
    if not reports and hasattr(getattr(model, "config", None), "model_type"):
        reason = "this architecture is not known"
        reports.append(EncoderReport("", type(model).__name__, False, reason))
    return tuple(reports)


def _fuse(model: nn.Module, read: Callable[[nn.Module, Reader], Reading]) -> None:
    if "forward" in vars(model):
        raise Deviation("its forward was replaced")
    bound = Bound(model, read)
    seen = bound.watch.look()
    if seen is None or seen.hooked:
        raise Deviation("there are hooks on its modules")
    model.forward = FusedForward(model, read, bound)


def unfuse_encoders_(model: nn.Module) -> None:
    """Give every model its own forward back."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FusedForward):
            del module.forward
