"""What the Hopper kernels share: rings of tiles, the order of work, and which pairs of a tile are allowed."""

from s2attn.kernels.hopper.names import REINTERPRET, gl, gluon, make_descriptor, mbarrier

FULL = gl.constexpr(-1)
ABSENT = gl.constexpr(-2)
WORK = gl.constexpr(8)


@gluon.jit
def advance(stage, phase, RING: gl.constexpr):
    """The next stage of a ring, and the parity of the phase in which it is used."""
    stage += 1
    around = stage == RING
    return gl.where(around, 0, stage), gl.where(around, phase ^ 1, phase)


@gluon.jit
def kept_here(number):
    """The same int64, in a manner that keeps what is computed from it inside its partition.

    The compiler takes what does not change out of a partition to the start of the program, for all warps, where it has no registers.
    """
    return gl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [number], dtype=gl.int64, is_pure=False, pack=1)


@gluon.jit
def rows_of(pointer, counts, strides, BOX: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr):
    """A descriptor of a tensor ``(batch, tokens, heads, D)`` by batch entry, head, token and column; its boxes are BOX tokens of a head.

    Args:
        counts: batch entries, heads and tokens; ``strides`` those of batch entries, tokens and heads.
    """
    batches, heads, tokens = counts
    batch, token, head = strides
    return make_descriptor(
        pointer, [batches, heads, tokens, D], [kept_here(batch), kept_here(head), kept_here(token), 1], [1, 1, BOX, D], LAYOUT
    )


@gluon.jit
def as_tiles(ring, COUNT: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr):
    """A ring of boxes, as the copy engine fills it, seen as COUNT tiles of ROWS rows, as products read it."""
    kind: gl.constexpr = ring.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], kind)
    if REINTERPRET:
        return ring.reinterpret(kind, [COUNT, ROWS, D], layout)
    else:
        return ring._reinterpret(kind, [COUNT, ROWS, D], layout)


@gluon.jit
def begin_barriers(bars, COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Initialise an array of barriers."""
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)


@gluon.jit
def in_turn(step, items):
    """The number of a program's item at a step of its own (it takes every ``num_programs``-th).

    Items come longest first; every other round is dealt out backwards, so that no program always gets the longest of a round.
    """
    programs = gl.num_programs(0)
    around = step // programs
    back = ((around & 1) == 1) & ((around + 1) * programs <= items)
    return gl.where(back, (2 * around + 1) * programs - 1 - step, step)


@gluon.jit
def read_work(number, work_ptr, batches, stacks, SUBS: gl.constexpr):
    """Batch entry, member of the layout head and tile of the line of an item, and where its row of the table begins.

    Items that differ only in the member, then the tile, then the batch entry, are neighbours: they read the same list.
    """
    rest = number // stacks
    piece = rest // SUBS // batches
    return rest // SUBS % batches, number % stacks, rest % SUBS, work_ptr + piece * WORK


@gluon.jit
def allowed_keys(bits_ptr, code, first, WORDS: gl.constexpr, word, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Which of 64 keys each of ROWS lines sees, from a code and a word of the table of mask tiles.

    Args:
        code: FULL, or the number of a mask tile (not ABSENT).
        first: the first of these lines in the table; ``word`` the word of these keys, of WORDS in a line.
        LAYOUT: of the tile of pairs.
    """
    lines = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    key = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    at = bits_ptr + (first + lines).to(gl.int64) * WORDS + word
    bits = gl.load(at, mask=lines >= gl.where(code == FULL, ROWS, 0), other=-1)
    return ((bits[:, None] >> key[None, :]) & 1) != 0
