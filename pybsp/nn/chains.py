"""Linear layers of known architectures that feed one another, neuron by neuron.

A chain is what computes a feed-forward part or an attention up to, and with, the
projection back into the hidden state. Its *items* are neurons or heads: each owns rows
of the source layers and columns of the sink, and shares nothing with the others, so
that items can be left out and reordered.

Feed-forward modules are known by their children. For attention this is not enough: some
that look the same are given a bias for each head. Thus its ``forward`` must take
nothing but hidden states, a mask, a cache and position embeddings, it must hold no
parameters of its own and be no decoder's; where even that is ambiguous the class is
named here.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..pruning import neurons
from ..reference import ACTIVATIONS
from .fuse import activation_of
from .linear import BlockSparseLinear

#: How many rows an item has for each row of its own in the sink's input.
_PARTS = {"neurons": 1, "gated neurons": 2, "heads": 3}

_HEAD_ARGUMENTS = {
    "hidden_states", "attention_mask", "past_key_values", "position_embeddings",
}  # fmt: skip

#: Attributes that hold the number of heads or of their features together.
_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "all_head_size", "dim")


@dataclass(frozen=True)
class Chain:
    """Source layers, by their names in the owner, and the sink that they feed.

    Rows of the sources, one layer after the other: ``parts`` ranges of the sink's
    ``width`` each. Neurons: ``activation(row)``. Gated neurons:
    ``activation(row) * row of the second range``. Heads: query, key and value ranges,
    ``size`` rows of each a head.
    """

    kind: str
    sources: tuple[str, ...]
    sink: str
    width: int
    size: int = 1
    activation: str | None = None
    #: (module, attribute) in the owner that count heads or their features.
    counts: tuple[tuple[str, str], ...] = ()

    @property
    def parts(self) -> int:
        return _PARTS[self.kind]

    @property
    def items(self) -> int:
        return self.width // self.size


@dataclass(frozen=True)
class _Architecture:
    """``modules``: the children that each of these may have, but for the activation."""

    kind: str
    modules: Mapping[str, tuple[set[str], ...]]
    sources: tuple[str, ...]
    sink: str
    activation: str = ""
    attention: str = ""
    classes: frozenset[str] = field(default=frozenset())


_OUTPUT = ({"dense", "dropout"}, {"dense", "LayerNorm", "dropout"})

_ARCHITECTURES = (
    # BERT, RoBERTa, XLM-R, ELECTRA, MPNet and others
    _Architecture(
        "neurons",
        {"intermediate": ({"dense"},), "output": _OUTPUT},
        ("intermediate.dense",),
        "output.dense",
        "intermediate.intermediate_act_fn",
    ),
    # the same, without MPNet, whose heads have a bias each
    _Architecture(
        "heads",
        {
            "": ({"self", "output"},),
            "self": ({"query", "key", "value", "dropout"},),
            "output": _OUTPUT,
        },
        ("self.query", "self.key", "self.value"),
        "output.dense",
        attention="self",
    ),
    # DistilBERT
    _Architecture(
        "neurons",
        {"": ({"lin1", "lin2", "dropout"},)},
        ("lin1",),
        "lin2",
        "activation",
    ),
    _Architecture(
        "heads",
        {"": ({"q_lin", "k_lin", "v_lin", "out_lin", "dropout"},)},
        ("q_lin", "k_lin", "v_lin"),
        "out_lin",
    ),
    # ModernBERT
    _Architecture("gated neurons", {"": ({"Wi", "drop", "Wo"},)}, ("Wi",), "Wo", "act"),
    _Architecture("heads", {"": ({"Wqkv", "Wo", "out_drop"},)}, ("Wqkv",), "Wo"),
    # ViT and its kin
    _Architecture("neurons", {"": ({"fc1", "fc2"},)}, ("fc1",), "fc2", "activation_fn"),
    _Architecture(
        "heads",
        {"": ({"q_proj", "k_proj", "v_proj", "o_proj"},)},
        ("q_proj", "k_proj", "v_proj"),
        "o_proj",
        classes=frozenset(
            f"{name}Attention"
            for name in ("ViT", "DeiT", "AST", "Dinov2", "IJepa", "Vivit")
        )
        | {"ViTMAEAttention", "ViTMSNAttention", "Dinov2WithRegistersAttention"},
    ),
)


def find_chains(
    model: nn.Module, *, anywhere: bool = False
) -> Iterator[tuple[str, nn.Module, Chain]]:
    """(name of the owner, owner, chain) for every chain that nothing else sees into.

    Left out are chains with a layer, a weight or an activation that is shared or has
    hooks, that is of another kind, or, unless ``anywhere``, not on the CPU.
    """
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    users = Counter(
        id(tensor)
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
    )
    for name, owner in model.named_modules():
        for architecture in _ARCHITECTURES:
            if not _has_modules(owner, architecture):
                continue
            chain = _chain(owner, architecture)
            if chain is not None and all(
                _is_free(layer, users, anywhere)
                and places[id(layer)] == places[id(owner)]
                for layer in layers(owner, chain).values()
            ):
                yield name, owner, chain


def layers(owner: nn.Module, chain: Chain) -> dict[str, nn.Linear | BlockSparseLinear]:
    """The sources, then the sink, by their names in the owner."""
    found = {}
    for path in (*chain.sources, chain.sink):
        layer = owner.get_submodule(path)
        assert isinstance(layer, (nn.Linear, BlockSparseLinear))
        found[path] = layer
    return found


def find_feed_forward(model: nn.Module) -> Iterator[neurons.FeedForward]:
    """The chains of neurons."""
    for name, _, chain in find_chains(model, anywhere=True):
        if chain.kind != "heads":
            prefix = f"{name}." if name else ""
            (source,) = chain.sources
            yield neurons.FeedForward(
                prefix + source, prefix + chain.sink, rows=chain.parts
            )


def _has_modules(owner: nn.Module, architecture: _Architecture) -> bool:
    inside, _, activation = architecture.activation.rpartition(".")
    for path, accepted in architecture.modules.items():
        module = owner
        for part in filter(None, path.split(".")):
            child = module._modules.get(part)
            if child is None:
                return False
            module = child
        found = set(module._modules)
        if path == inside:
            # A plain function as the activation is an attribute and not a child.
            if activation and not hasattr(module, activation):
                return False
            found.discard(activation)
        if found not in accepted or (path and _is_watched(module)):
            return False
    return True


def _chain(owner: nn.Module, architecture: _Architecture) -> Chain | None:
    sources, sink = architecture.sources, architecture.sink
    sizes = []
    for path in (*sources, sink):
        layer = owner.get_submodule(path)
        if type(layer) is not nn.Linear and type(layer) is not BlockSparseLinear:
            return None
        sizes.append((layer.out_features, layer.in_features))
    width = sizes[-1][1]
    rows = width * _PARTS[architecture.kind] // len(sources)
    if any(size[0] != rows for size in sizes[:-1]):
        return None
    if architecture.kind != "heads":
        inside, _, name = architecture.activation.rpartition(".")
        function = getattr(owner.get_submodule(inside), name)
        activation = activation_of(function)
        if activation is None or "forward" in vars(owner):
            return None
        return Chain(architecture.kind, sources, sink, width, 1, activation)
    attention = owner.get_submodule(architecture.attention)
    if architecture.classes and type(attention).__name__ not in architecture.classes:
        return None
    return _heads(owner, attention, architecture, width)


def _heads(
    owner: nn.Module, attention: nn.Module, architecture: _Architecture, width: int
) -> Chain | None:
    size = getattr(attention, "attention_head_size", None)
    size = getattr(attention, "head_dim", None) if size is None else size
    if not isinstance(size, int) or size < 1 or width % size:
        return None
    if any(
        getattr(module, flag, False)
        for module in (owner, attention)
        for flag in ("is_causal", "is_decoder", "is_cross_attention")
    ):
        return None
    if _is_watched(owner) or attention._parameters or attention._buffers:
        return None
    arguments = inspect.signature(attention.forward).parameters.values()
    named = {a.name for a in arguments if a.kind is not a.VAR_KEYWORD}
    if not named <= _HEAD_ARGUMENTS or len(named) == len(arguments):
        return None
    counts = tuple(name for name in _COUNTS if name in vars(attention))
    if any(getattr(attention, name) not in (width // size, width) for name in counts):
        return None
    return Chain(
        "heads",
        architecture.sources,
        architecture.sink,
        width,
        size,
        counts=tuple((architecture.attention, name) for name in counts),
    )


def _is_watched(module: nn.Module) -> bool:
    return "forward" in vars(module) or any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def _is_free(layer: nn.Module, users: Mapping[int, int], anywhere: bool) -> bool:
    return (
        not _is_watched(layer)
        and getattr(layer, "activation", None) is None
        # Of int8 and bfloat16 layers it is a buffer.
        and users[id(layer._buffers.get("weight_values", layer))] <= 1
        and all(
            users[id(parameter)] == 1
            and (anywhere or parameter.device.type == "cpu")
            and parameter.is_floating_point()
            for parameter in layer._parameters.values()
            if parameter is not None
        )
    )


def spare(
    chain: Chain,
    zero_rows: torch.Tensor,
    bias: torch.Tensor,
    unused: torch.Tensor,
    has_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which items the result does not need, and the constants that replace them.

    Parameters
    ----------
    zero_rows, bias : of the rows of the sources; the bias in float64.
    unused : which columns of the sink are zero.
    has_bias : whether the sink has a bias that can take up constants.

    Returns a bool for each item, and for each input of the sink the float64 constant
    that it is, zero where it is unused or not constant.
    """
    if chain.kind == "heads":
        # A head whose values do not depend on the input: its weights add up to one.
        constant, value = zero_rows[-chain.width :], bias[-chain.width :]
    else:
        constant = zero_rows[: chain.width]
        value = ACTIVATIONS[chain.activation](bias[: chain.width])
        if chain.kind == "gated neurons":
            gate_constant, gate = zero_rows[chain.width :], bias[chain.width :]
            zero = constant & (value == 0) | gate_constant & (gate == 0)
            constant = constant & gate_constant | zero
            value = value * gate
    constant = constant & value.isfinite()
    if not has_bias:
        constant = constant & (value == 0)
    items = (unused | constant).view(chain.items, chain.size).all(1)
    return items, torch.where(constant & ~unused, value, 0.0)


neurons.find_feed_forward = find_feed_forward
