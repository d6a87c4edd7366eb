"""``BlockPruningConfig``: what is pruned, how hard, and on which schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from ..blocks import BlockShapeSpec, check_block_shape_spec

Method = Literal["reweighted_group_lasso", "group_lasso", "magnitude"]
Penalty = Literal["gradient", "decoupled", "proximal"]
Scope = Literal["global", "layer", "balanced"]
Ranking = Literal["norm", "rms", "relative"]
Saliency = Literal["magnitude", "taylor"]

CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("reweighted_group_lasso", "group_lasso", "magnitude"),
    "scope": ("global", "layer", "balanced"),
    "penalty": ("gradient", "decoupled", "proximal"),
    "lambda_scaling": ("none", "sqrt_block_size"),
    "ramp": ("one_shot", "cubic"),
    "ranking": ("norm", "rms", "relative"),
    "saliency": ("magnitude", "taylor"),
}
OVERRIDABLE = ("block_shape", "target_sparsity", "threshold")


@dataclass(frozen=True, kw_only=True)
class BlockPruningConfig:
    """Settings of one pruning run; every field is checked on construction.

    Args:
        block_shape: ``(out, in)`` extents of a block. An extent may be a fraction of
            the matrix, such as ``(1, "in/8")``.
        target_sparsity: removed fraction of the targeted weights, ``0 < s < 1``.
        method: ``"reweighted_group_lasso"`` (Li et al. 2020: factors
            ``1 / (||W_b|| + eps)`` refreshed as training goes on), ``"group_lasso"``
            (the same factors, taken once when the regularise phase starts) or
            ``"magnitude"`` (no penalty).
        target_modules: ``"all-linear"``, a list of module name endings, or a regular
            expression matched against the whole name. Here and below, every name that
            is listed has to match something.
        exclude_modules: names (any run of dotted components) or one regular expression
            to leave out. ``None`` leaves out embeddings and task heads; ``()`` nothing.
            Names that are left out by default need not match.
        embedding_modules: embedding tables to prune as well, by name endings or a
            regular expression; each is ranked by itself, and ``exclude_modules`` does
            not count. It makes no forward faster.
        scope: ``"global"`` ranks the blocks of all layers together, ``"layer"`` prunes
            every layer to the target, ``"balanced"`` also every row of its blocks, or
            every column of them where columns hold more blocks.
        max_layer_sparsity: no layer loses more than this fraction of its blocks.
        phases: dense warm-up, regularise, masked retrain: three fractions of the
            total steps that sum to 1, or three numbers of steps (integers that sum to
            more).
        reg_lambda: strength of the penalty; see docs/pruning.md for how to set it.
            ``"auto"`` (``"proximal"`` and ``"decoupled"`` only) sizes it so that the
            target fraction of each layer's blocks reaches zero by the end of the
            regularise phase unless the loss holds them.
        reweight_every: steps between refreshes of the factors (and of the masks of a
            cubic ramp): a fraction of the total steps or a number of steps.
        reweight_eps: ``eps`` of the factors, in units of a block norm.
        overrides: glob over module names -> ``{"block_shape": ..., "target_sparsity":
            ..., "threshold": ...}``. A layer with its own target or threshold is left
            out of the global ranking.
        penalty: ``"gradient"`` adds the penalty's gradient to ``.grad`` before the
            optimizer step (the paper's loss term); ``"decoupled"`` takes its gradient
            step on the weight directly, scaled by the learning rate; ``"proximal"``
            soft-thresholds the blocks after the step, which gives exact zeros.
        lambda_scaling: ``"sqrt_block_size"`` multiplies lambda by ``sqrt(r * c)``.
        ramp: ``"one_shot"`` cuts once, when the regularise phase ends; ``"cubic"``
            raises the sparsity during that phase (Zhu & Gupta 2017, eq. 1).
        ranking: score of a block: its ``"norm"``, its ``"rms"`` (norm over
            ``sqrt(r * c)``), or ``"relative"``: the rms over the layer's mean rms.
        saliency: what scores a block: the ``"magnitude"`` of its weights (see
            ``ranking``), or a first-order ``"taylor"`` expansion of the loss by
            gradients gathered until the cut.
        threshold: cut every block whose score (see ``ranking``) is at most this, in
            place of a fixed fraction of them (Li et al. 2020). How many that are is up
            to the training, but for ``max_layer_sparsity``; ``target_sparsity`` does
            not count then. Needs ``ramp="one_shot"``, ``saliency="magnitude"``, a scope
            other than ``"balanced"`` and a number for ``reg_lambda``.
        packed_retraining: after the cut, train packed layers that hold the kept blocks
            alone instead of masked dense ones: the same steps but for rounding, faster.
            One process, on the CPU, with an optimizer that treats every weight by
            itself. The model is dense again when the run is finalized; what is saved
            on the way is dense.

    Raises:
        ValueError: for a value outside its rule, naming the field.
    """

    block_shape: BlockShapeSpec = (8, 1)
    target_sparsity: float = 0.8
    method: Method = "reweighted_group_lasso"
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    embedding_modules: str | tuple[str, ...] = ()
    scope: Scope = "global"
    max_layer_sparsity: float = 0.95
    phases: tuple[float, float, float] = (0.1, 0.5, 0.4)
    reg_lambda: float | Literal["auto"] = 1e-4
    reweight_every: float = 0.05
    reweight_eps: float = 1e-3
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    penalty: Penalty = "gradient"
    lambda_scaling: Literal["none", "sqrt_block_size"] = "none"
    ramp: Literal["one_shot", "cubic"] = "one_shot"
    ranking: Ranking = "rms"
    saliency: Saliency = "magnitude"
    threshold: float | None = None
    packed_retraining: bool = False

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}; "
                    f"got {getattr(self, name)!r}"
                )
        set_field(self, "block_shape", check_block_shape_spec(self.block_shape))
        _check_fraction("target_sparsity", self.target_sparsity, below_one=True)
        _check_fraction("max_layer_sparsity", self.max_layer_sparsity)
        set_field(
            self, "target_modules", check_names("target_modules", self.target_modules)
        )
        if self.exclude_modules is not None:
            names = check_names("exclude_modules", self.exclude_modules, empty=True)
            set_field(self, "exclude_modules", names)
        names = check_names("embedding_modules", self.embedding_modules, empty=True)
        set_field(self, "embedding_modules", names)
        set_field(self, "phases", _check_phases(self.phases))
        _check_lambda(self)
        _check_cadence(self)
        if not _is_number(self.reweight_eps) or self.reweight_eps <= 0:
            raise ValueError(
                f"reweight_eps must be a positive number; got {self.reweight_eps!r}"
            )
        if not isinstance(self.packed_retraining, bool):
            raise ValueError(
                f"packed_retraining must be True or False; got "
                f"{self.packed_retraining!r}"
            )
        set_field(self, "overrides", _check_overrides(self.overrides))
        _check_cap(self)
        if self.packed_retraining and self.embedding_modules:
            raise ValueError(
                "packed_retraining trains packed linear layers, and embedding tables "
                "are none: leave one of packed_retraining and embedding_modules out"
            )
        if self.threshold is not None:
            _check_threshold("threshold", self.threshold)
        if self.has_threshold:
            _check_fits_threshold(self)

    @property
    def has_threshold(self) -> bool:
        """Whether any layer is cut at a threshold."""
        own = any("threshold" in settings for settings in self.overrides.values())
        return own or self.threshold is not None

    @property
    def penalised(self) -> bool:
        """Whether the method adds a penalty at all."""
        return self.method != "magnitude"

    @property
    def refreshes(self) -> bool:
        """Whether anything happens every ``reweight_every`` steps."""
        return self.method == "reweighted_group_lasso" or self.ramp == "cubic"

    @classmethod
    def paper(cls, **changes: Any) -> BlockPruningConfig:
        """Li et al. 2020 (arXiv 2009.08065): the published form of the method.

        Row segments of eight column blocks, the penalty as a loss term with lambda
        1e-4, factors ``1 / (norm + 1e-3)`` refreshed every quarter of the regularise
        phase, then one cut at one percentile per matrix. ``changes`` replace fields.
        """
        settings: dict[str, Any] = {
            "block_shape": (1, "in/8"),
            "method": "reweighted_group_lasso",
            "scope": "layer",
            "max_layer_sparsity": 1.0,
            "phases": (1 / 3, 1 / 3, 1 / 3),
            "reg_lambda": 1e-4,
            "reweight_every": 1 / 12,
            "reweight_eps": 1e-3,
            "penalty": "gradient",
            "lambda_scaling": "none",
            "ramp": "one_shot",
        }
        return cls(**{**settings, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and texts: ``json.dumps`` takes it."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockPruningConfig:
        """The inverse of ``to_dict``; an unknown key is a ``ValueError``."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"unknown BlockPruningConfig key {unknown[0]!r}; "
                f"known keys: {', '.join(known)}"
            )
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _is_number(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def _is_steps(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_fraction(name: str, value: Any, below_one: bool = False) -> None:
    if _is_number(value) and 0 < value <= 1 and not (below_one and value == 1):
        return
    bounds = f"0 < {name} < 1" if below_one else f"0 < {name} <= 1"
    raise ValueError(
        f"{bounds} must hold; got {value!r}; 80 % is written as the fraction 0.8"
    )


def check_names(name: str, value: object, empty: bool = False) -> str | tuple[str, ...]:
    """``value`` as one regular expression or a tuple of names; ``ValueError`` names the
    option ``name``."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"{name} is not a regular expression: {value!r} ({error}); "
                "module name endings are given as a list"
            ) from None
        if value:
            return value
    elif isinstance(value, (list, tuple, set, frozenset)):
        names = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
        if all(isinstance(item, str) and item for item in names) and (names or empty):
            return names
    raise ValueError(
        f"{name} must be a regular expression or a list of module names; got {value!r}"
    )


def _check_phases(value: object) -> tuple[float, float, float]:
    rule = "phases must be three fractions that sum to 1 or three numbers of steps"
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise ValueError(f"{rule} (warm-up, regularise, retrain); got {value!r}")
    if not all(_is_number(phase) and phase >= 0 for phase in value):
        raise ValueError(f"{rule}, none negative; got {tuple(value)!r}")
    whole = sum(value)
    # (0, 0, 1) is all of the run, and not one step of it
    if whole != 1 and all(_is_steps(phase) for phase in value):
        if whole == 0:
            raise ValueError(f"{rule}; got {tuple(value)!r}, no steps at all")
        return (value[0], value[1], value[2])
    if not math.isclose(whole, 1.0, abs_tol=1e-6):
        raise ValueError(f"{rule}; got {tuple(value)!r}, which sum to {whole:g}")
    return (float(value[0]), float(value[1]), float(value[2]))


def _check_lambda(cfg: BlockPruningConfig) -> None:
    if cfg.reg_lambda == "auto":
        if cfg.penalised and cfg.penalty == "gradient":
            raise ValueError(
                'reg_lambda="auto" needs penalty="proximal" or "decoupled": how far a '
                "coupled gradient moves a weight is up to the optimizer"
            )
        return
    if not _is_number(cfg.reg_lambda) or cfg.reg_lambda < 0:
        raise ValueError(
            f'reg_lambda must be "auto" or a number >= 0; got {cfg.reg_lambda!r}'
        )


def _check_cadence(cfg: BlockPruningConfig) -> None:
    every, regularise = cfg.reweight_every, cfg.phases[1]
    if not _is_number(every) or every <= 0 or (not _is_steps(every) and every > 1):
        raise ValueError(
            "reweight_every must be a fraction of the total steps (0 < f <= 1) or a "
            f"positive number of steps; got {every!r}"
        )
    if cfg.refreshes and regularise == 0:
        raise ValueError(
            f"method {cfg.method!r} with ramp {cfg.ramp!r} needs a regularise phase; "
            f"got phases {cfg.phases!r}; give the second one steps"
        )
    same_unit = _is_steps(every) == _is_steps(regularise)
    if cfg.refreshes and same_unit and every >= regularise:
        raise ValueError(
            f"reweight_every = {every!r} never fires within a regularise phase of "
            f"{regularise!r}; choose a smaller one"
        )


def _check_overrides(value: object) -> dict[str, dict[str, Any]]:
    if not isinstance(value, Mapping):
        raise ValueError(f"overrides must map globs to settings; got {value!r}")
    checked: dict[str, dict[str, Any]] = {}
    for pattern, settings in value.items():
        if not isinstance(pattern, str) or not isinstance(settings, Mapping):
            raise ValueError(
                "overrides must map a glob of module names to a dict; got "
                f"{pattern!r}: {settings!r}"
            )
        unknown = sorted(set(settings) - set(OVERRIDABLE))
        if unknown or not settings:
            raise ValueError(
                f"overrides[{pattern!r}] may set {', '.join(OVERRIDABLE)}; "
                f"got {unknown or 'nothing'}"
            )
        checked[pattern] = dict(settings)
        if "block_shape" in settings:
            shape = check_block_shape_spec(settings["block_shape"])
            checked[pattern]["block_shape"] = shape
        if "target_sparsity" in settings:
            target = settings["target_sparsity"]
            _check_fraction(f"overrides[{pattern!r}] target_sparsity", target, True)
        if "threshold" in settings:
            _check_threshold(f"overrides[{pattern!r}] threshold", settings["threshold"])
            if "target_sparsity" in settings:
                raise ValueError(
                    f"overrides[{pattern!r}] sets both target_sparsity and threshold; "
                    "a layer has one of them"
                )
    return checked


def _check_threshold(name: str, value: object) -> None:
    if not _is_number(value) or value <= 0:  # type: ignore[operator]
        raise ValueError(f"{name} must be a number > 0; got {value!r}")


def _check_fits_threshold(cfg: BlockPruningConfig) -> None:
    for name, wanted in (("ramp", "one_shot"), ("saliency", "magnitude")):
        if getattr(cfg, name) != wanted:
            raise ValueError(
                f"a threshold needs {name}={wanted!r}; got {getattr(cfg, name)!r}"
            )
    if cfg.penalised and cfg.reg_lambda == "auto":
        raise ValueError(
            'reg_lambda="auto" sizes the penalty for a fraction of the blocks, which a '
            "threshold leaves open: give reg_lambda a number"
        )
    if cfg.scope == "balanced":
        raise ValueError(
            "a threshold does not balance the rows of a layer: use scope='layer' or "
            "'global', or target_sparsity"
        )


def _check_cap(cfg: BlockPruningConfig) -> None:
    targets = []
    if cfg.threshold is None:
        targets.append(("target_sparsity", cfg.target_sparsity))
    for pattern, settings in cfg.overrides.items():
        if "target_sparsity" in settings:
            name = f"overrides[{pattern!r}] target_sparsity"
            targets.append((name, settings["target_sparsity"]))
    for name, target in targets:
        if target > cfg.max_layer_sparsity:
            raise ValueError(
                f"{name} = {target:g} exceeds max_layer_sparsity = "
                f"{cfg.max_layer_sparsity:g}; raise max_layer_sparsity"
            )
