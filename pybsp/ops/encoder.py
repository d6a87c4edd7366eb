"""A whole encoder as one native call."""

from __future__ import annotations

import torch

from .. import reference_encoder
from .encoder_spec import EncoderSpec


class Encoder:
    """Computes an ``EncoderSpec`` natively, on the tokens that are not padding only."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec

    def __call__(
        self,
        ids: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        token_types: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last hidden states ``(batch, length, features)``, float32.

        Parameters
        ----------
        ids : int64 ``(batch, length)``, for a spec with embeddings; else
        hidden : float32 ``(batch, length, features)``
        mask : ``(batch, length)``, zero where a token is padding, anywhere in a row.
            The result is zero there.
        token_types, positions : int64 ``(batch, length)`` rows of their tables; default
            0, and the place in the row. Windows, rotations and relative biases always
            go by the place in the row.
        """
        return reference_encoder.encoder(
            self.spec, ids, hidden, mask, token_types, positions
        )
