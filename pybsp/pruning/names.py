"""Which modules are meant: lists of names, and regular expressions for whole names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .config import BlockPruningConfig

#: Left out unless ``exclude_modules`` says otherwise: a name with one of these runs of
#: components.
DEFAULT_EXCLUDED = (
    "embeddings",
    "embed_out",
    "embeddings_project",
    "classifier",
    "pre_classifier",
    "cls_classifier",
    "distillation_classifier",
    "pooler",
    "sequence_summary",
    "lm_head",
    "generator_lm_head",
    "generator_predictions",
    "discriminator_predictions",
    "qa_outputs",
    "score",
    "cls",
    "head.dense",
    "vocab_transform",
    "vocab_projector",
)


def is_named(name: str, wanted: str | tuple[str, ...]) -> bool:
    """Whether a regular expression, or one of several endings, names this module."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith("." + end) for end in wanted)


def is_selected(name: str, cfg: BlockPruningConfig) -> bool:
    """Whether ``cfg`` prunes a linear layer of this name."""
    wanted = cfg.target_modules
    if wanted != "all-linear" and not is_named(name, wanted):
        return False
    excluded = DEFAULT_EXCLUDED if cfg.exclude_modules is None else cfg.exclude_modules
    return not is_among(name, excluded)


def is_among(name: str, modules: str | tuple[str, ...]) -> bool:
    """Whether a regular expression, or one of several runs of dotted components, names
    this module."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(f".{part}." in f".{name}." for part in modules)


def check_each_matches(
    option: str,
    wanted: str | tuple[str, ...],
    names: Sequence[str],
    what: str,
    matches: Callable[[str, str | tuple[str, ...]], bool] = is_among,
) -> None:
    """``ValueError`` for a regular expression, or any of several names, that matches
    none of ``names``."""
    for one in (wanted,) if isinstance(wanted, str) else wanted:
        pattern = wanted if isinstance(wanted, str) else (one,)
        if not any(matches(name, pattern) for name in names):
            raise ValueError(
                f"{option}: {one!r} matches no {what}; the model's are: {listed(names)}"
            )


def listed(names: Sequence[str]) -> str:
    """The first ``names``, for people."""
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "none"
