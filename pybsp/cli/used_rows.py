"""Word embeddings of which training touches only the rows that its texts use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class UsedRows(nn.Module):
    """Stands in for the table ``(rows, size)`` while it is trained.

    Only the rows of ``ids`` are parameters. In evaluation every id is known.
    """

    def __init__(self, table: nn.Embedding, ids: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(table.weight.detach()[ids])
        row_of = torch.full((table.num_embeddings,), -1)
        row_of[ids] = torch.arange(len(ids))
        self.ids: torch.Tensor
        self.row_of: torch.Tensor
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("row_of", row_of, persistent=False)
        self._table = (table,)  # in a tuple: no part of the model

    def forward(self, ids: torch.Tensor) -> Any:
        if not self.training:
            return self.whole()(ids)
        table = self._table[0]
        padding = None if table.padding_idx is None else self.row_of[table.padding_idx]
        return nn.functional.embedding(
            self.row_of[ids], self.weight, None if padding is None else int(padding)
        )

    def whole(self) -> nn.Embedding:
        """The table with the rows as they are now."""
        table = self._table[0].to(self.weight.device)
        with torch.no_grad():
            table.weight[self.ids] = self.weight
        return table


@contextmanager
def train_used_rows(
    model: PreTrainedModel, texts: Sequence[Sequence[int]]
) -> Iterator[None]:
    """Leave the word embeddings of ids that are not in ``texts`` out of training.

    Their gradient is zero, and still clipping and AdamW read and write all of it in
    every step: a sixth of a step of all-MiniLM-L6-v2 on cola, more once it is pruned.
    What changes is that weight decay does not shrink rows that nothing trains. A model
    whose table is shared with another module is trained as it is.
    """
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding) or not _can_be_replaced(model, table):
        yield
        return
    used = {token for text in texts for token in text}
    if table.padding_idx is not None:
        used.add(table.padding_idx)
    rows = UsedRows(table, torch.tensor(sorted(used))).train(table.training)
    model.set_input_embeddings(rows)
    try:
        yield
    finally:
        model.set_input_embeddings(rows.whole())


def _can_be_replaced(model: nn.Module, table: nn.Embedding) -> bool:
    return (
        type(table) is nn.Embedding
        and table.weight.requires_grad
        and table.max_norm is None
        and not table.scale_grad_by_freq
        and sum(
            parameter is table.weight
            for _, parameter in model.named_parameters(remove_duplicate=False)
        )
        == 1
    )
