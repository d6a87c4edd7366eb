"""The training side: prune a model in blocks while it trains."""

from .config import BlockPruningConfig
from .one_shot import prune_one_shot
from .preserve import PreservedSparsity, preserve_sparsity
from .pruner import BlockPruner
from .record import sparsity_record
from .sparsity import ModelSparsity, model_sparsity, print_sparsity

__all__ = [
    "BlockPruner",
    "BlockPruningConfig",
    "ModelSparsity",
    "PreservedSparsity",
    "model_sparsity",
    "preserve_sparsity",
    "print_sparsity",
    "prune_one_shot",
    "sparsity_record",
]
