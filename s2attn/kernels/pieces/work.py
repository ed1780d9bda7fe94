"""What a program has to do: its piece of a list, the list itself, and its slot of the workspace."""

import triton
import triton.language as tl


@triton.jit
def read_piece(pieces_ptr, number):
    """One row of the schedule's table: item, full entries from and to, other entries from and to, slot (-1: none)."""
    at = pieces_ptr + number * 6
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def program_of(lines, num_heads, layout_heads, SUBS: tl.constexpr):
    """This program's number among the pieces, which query head of the layout head it serves, and which tile of the line.

    Programs that differ only in the query head are neighbours: they read the same keys.
    """
    program = tl.program_id(0)
    shared = num_heads // layout_heads
    return program // (SUBS * shared), program % shared, program // shared % SUBS


@triton.jit
def find_list(lists, layout_head, line, lines, F: tl.constexpr):
    """Where the list of a line begins, entries in its full part and in all, and the first code of its others."""
    ptr_ptr, full_ptr, sub_at_ptr, sub_ptr = lists
    at = layout_head.to(tl.int64) * (lines + 1) + line
    begin, end = tl.load(ptr_ptr + at), tl.load(ptr_ptr + at + 1)
    at = layout_head.to(tl.int64) * lines + line
    return begin, tl.load(full_ptr + at), (end - begin).to(tl.int32), sub_ptr + tl.load(sub_at_ptr + at) * F


@triton.jit
def slot_rows(batch, slots, slot, shared, member, tile, SUBS: tl.constexpr, ROWS: tl.constexpr):
    """The first row of a tile in a workspace of ``[batch, slots, members, SUBS, ROWS]`` rows."""
    return (((batch * slots + slot) * shared + member) * SUBS + tile) * ROWS


@triton.jit
def store_slot(slot_ptr, first, values, keep, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Write a tile of float32 rows into the workspace, if ``keep``."""
    lane = tl.arange(0, ROWS)
    at = lane[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(slot_ptr + first * WIDTH + at, values, mask=((lane >= 0) & keep)[:, None])
