from typing import Any

from numpy.typing import NDArray

def active_isa() -> str: ...
def set_active_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...
def fma_peak() -> float: ...
def tile_peak() -> float: ...
def dot_peak() -> float: ...
def read_bandwidth(bytes: int) -> float: ...
def l2_cache_bytes() -> int: ...
def max_int8_inputs() -> int: ...
def token_tile() -> tuple[int, int]: ...
def build_info() -> dict[str, str]: ...
def block_norms(
    weight: NDArray[Any],
    block_shape: tuple[int, int],
    norms: NDArray[Any],
    threads: int,
) -> None: ...
def reweight(norms: NDArray[Any], eps: float, factors: NDArray[Any]) -> None: ...
def group_lasso_grad(
    grad: NDArray[Any],
    weight: NDArray[Any],
    factors: NDArray[Any],
    lam: float,
    block_shape: tuple[int, int],
    threads: int,
) -> float: ...
def group_lasso_prox(
    weight: NDArray[Any],
    thresholds: NDArray[Any],
    step: float,
    block_shape: tuple[int, int],
    threads: int,
) -> None: ...
def block_mask(scores: NDArray[Any], keep: int, mask: NDArray[Any]) -> None: ...
def apply_block_mask(
    weight: NDArray[Any],
    mask: NDArray[Any],
    block_shape: tuple[int, int],
    threads: int,
) -> None: ...

class Int8Matrix:
    def __init__(
        self,
        crow_indices: NDArray[Any],
        col_indices: NDArray[Any],
        values: NDArray[Any],
        scales: NDArray[Any],
        shape: tuple[int, int],
        block_shape: tuple[int, int],
    ) -> None: ...
    def multiply(
        self,
        x: int,
        tokens: int,
        input_scale: float,
        bias: int,
        activation: int,
        residual: int,
        y: int,
        threads: int,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...

class BlockSparsePattern:
    def __init__(
        self,
        crow_indices: NDArray[Any],
        col_indices: NDArray[Any],
        shape: tuple[int, int],
        block_shape: tuple[int, int],
        bfloat16: bool = False,
    ) -> None: ...
    def multiply(
        self,
        values: int,
        x: int,
        tokens: int,
        bias: int,
        activation: int,
        residual: int,
        y: int,
        threads: int,
    ) -> None: ...
    def grad_x(
        self, values: int, dy: int, tokens: int, dx: int, threads: int
    ) -> None: ...
    def grad_values(
        self, dy: int, x: int, tokens: int, dvalues: int, dbias: int, threads: int
    ) -> None: ...
    @property
    def nnz(self) -> int: ...
    def schedule(self) -> tuple[NDArray[Any], ...]: ...

def multiply_many(
    products: list[tuple[BlockSparsePattern, int, int, int, int, int]],
    x: int,
    tokens: int,
    tiles: bool,
    threads: int,
) -> None: ...
def tile_lanes(tokens: int) -> int: ...
def pack_tiles(
    x: int, tokens: int, features: int, tiles: int, threads: int
) -> None: ...
def unpack_tiles(
    tiles: int, tokens: int, features: int, y: int, threads: int
) -> None: ...

_Linear = tuple[BlockSparsePattern, int, int] | tuple[Int8Matrix, float, int]
_Norm = tuple[int, int, float]
_Table = tuple[int, int]

class SelfAttention:
    def __init__(
        self,
        projections: list[_Linear],
        output: _Linear,
        heads: int,
        scale: float,
        window: int,
        cosines: int,
        sines: int,
        rotary_positions: int,
        relative_bias: int,
        bias_positions: int,
    ) -> None: ...

class FeedForward:
    def __init__(
        self, up: _Linear, activation: int, down: _Linear, gated: bool
    ) -> None: ...

class EncoderLayer:
    def __init__(
        self,
        attention: SelfAttention,
        attention_norm: _Norm,
        feed_forward: FeedForward,
        feed_forward_norm: _Norm,
    ) -> None: ...

class DictVersions:
    def __init__(self, dicts: list[Any]) -> None: ...
    def unchanged(self, dicts: list[Any]) -> bool: ...

class Encoder:
    def __init__(
        self,
        features: int,
        norm_first: bool,
        layers: list[EncoderLayer],
        words: _Table,
        positions: _Table,
        token_types: _Table,
        embedding_norm: _Norm,
        final_norm: _Norm,
    ) -> None: ...
    def run(
        self,
        batch: int,
        length: int,
        ids: int,
        hidden: int,
        mask: int,
        token_types: int,
        positions: int,
        y: int,
        threads: int,
    ) -> None: ...
    def profile(
        self,
        batch: int,
        length: int,
        ids: int,
        hidden: int,
        mask: int,
        token_types: int,
        positions: int,
        y: int,
        threads: int,
    ) -> dict[str, float]: ...
