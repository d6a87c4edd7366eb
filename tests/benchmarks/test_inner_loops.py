"""Counting instructions in listings of ``objdump -d -C --no-show-raw-insn``."""

from __future__ import annotations

import pytest

from benchmarks.inner_loops import Loop, one_each, short_name, summary, widest_loops

X86 = """
0000000000000040 <void pybsp::avx512::(anonymous namespace)::tile<2, 1>(int, float*)>:
      40:	vmovups (%rdi),%zmm0
      46:	lea    (%rax,%rax,2),%rcx
      4a:	vmovups 0x40(%rsi,%rcx,4),%zmm2
      52:	vfmadd231ps (%rdx){1to16},%zmm2,%zmm0
      58:	vbroadcastss 0x4(%rdx),%zmm3
      5e:	{evex} vfmadd231ps %zmm3,%zmm2,%zmm1
      64:	vmovaps %zmm1,-0x40(%rsp)
      6a:	mov    (%r8),%r9d
      6e:	add    $0x1,%rax
      72:	jne    46 <void pybsp::avx512::(anonymous namespace)::tile<2, 1>(int)+0x6>
      74:	sub    $0x1,%rbx
      78:	jne    40 <void pybsp::avx512::(anonymous namespace)::tile<2, 1>(int)>
      7a:	ret

0000000000000080 <void pybsp::avx512::(anonymous namespace)::straight(int)>:
      80:	vfmadd231ps %zmm3,%zmm2,%zmm1
      86:	jmp    90 <elsewhere+0x10>
      88:	ret
"""

AARCH64 = """
0000000000000000 <pybsp::neon::(anonymous namespace)::tile(float const*)>:
   0:	ldr	q2, [x8, x1]
   4:	ldp	q1, q0, [x3, #16]
   8:	ld1r	{v3.4s}, [x0]
   c:	fmla	v16.4s, v2.4s, v3.4s
  10:	ldp	s3, s4, [x0, #4]
  14:	fmla	v17.4s, v1.4s, v3.s[0]
  18:	fmla	v18.4s, v0.4s, v4.s[0]
  1c:	ld1	{v5.4s, v6.4s}, [x2], #32
  20:	stp	q16, q17, [sp, #176]
  24:	mov	w7, #0x30                  	// #48
  28:	ldr	w1, [x2], #4
  2c:	cbnz	x1, 0 <pybsp::neon::(anonymous namespace)::tile(float const*)>
  30:	b.le	54 <elsewhere+0x54>
"""


def test_counts_an_x86_loop() -> None:
    (loop,) = widest_loops(X86, least=1)
    assert loop == Loop(
        "tile<2, 1>", multiply_adds=2, vectors=1, scalars=2, load_instructions=4,
        stores=1, stack=1, instructions=9,
    )  # fmt: skip


def test_counts_an_aarch64_loop() -> None:
    (loop,) = widest_loops(AARCH64, least=1)
    assert loop == Loop(
        "tile", multiply_adds=3, vectors=5, scalars=3, load_instructions=6, stores=1,
        stack=1, instructions=12,
    )  # fmt: skip


def test_leaves_out_loops_with_fewer_multiply_adds() -> None:
    assert widest_loops(X86, least=3) == []


@pytest.mark.parametrize(
    ("multiply_adds", "loads", "instructions", "expected"),
    [(24, 11, 40, 1.0), (8, 9, 14, 8 / 9), (12, 7, 27, 24 / 27)],
)
def test_on_paper_is_what_the_slowest_part_leaves(
    multiply_adds: int, loads: int, instructions: int, expected: float
) -> None:
    loop = Loop(
        "", multiply_adds=multiply_adds, load_instructions=loads,
        instructions=instructions,
    )  # fmt: skip
    assert loop.on_paper == pytest.approx(expected)


def test_names_without_namespaces_and_arguments() -> None:
    assert short_name(
        "void pybsp::avx512::(anonymous namespace)::unpack<(pybsp::Activation)2>"
        "(float const*, long) [clone .isra.0]"
    ) == "unpack<2>"  # fmt: skip


def test_keeps_the_widest_instance_of_each_template() -> None:
    names = ("tile<8, 3, true>", "tile<8, 3, false>", "tile<7, 3, true>")
    kept = one_each([Loop(name) for name in names])
    assert [loop.function for loop in kept] == ["tile<8, 3, true>", "tile<8, 3, false>"]


def test_summary_has_a_column_for_each_heading() -> None:
    head, rows = summary({"avx512 tile": widest_loops(X86, least=1)})
    assert [len(row) for row in rows] == [len(head)]
