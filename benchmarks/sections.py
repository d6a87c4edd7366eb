"""The sections of ``python -m benchmarks``, in their order."""

from __future__ import annotations

from benchmarks import (
    bert_base,
    block_sparse_linear,
    block_sparse_linears,
    break_even,
    every_peer,
    few_tokens,
    isa,
    kernel,
    threads,
    tokens,
    work,
)
from benchmarks.section import Section

#: One line each. A module without a summary of its own takes ``every_column``, as in
#: ``Section("name", lambda options: {"rows": module.measure_all()}, every_column)``.
SECTIONS: tuple[Section, ...] = (
    kernel.SECTION,
    block_sparse_linear.SECTION,
    block_sparse_linears.SECTION,
    every_peer.SECTION,
    bert_base.SECTION,
    few_tokens.SECTION,
    break_even.SECTION,
    work.SECTION,
    tokens.SECTION,
    threads.SECTION,
    isa.SECTION,
)
