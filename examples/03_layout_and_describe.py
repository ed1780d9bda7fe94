"""What a pattern comes to for given lengths: the blocks that are read, and the numbers to judge it by."""

from s2attn import Local, Stride, build_layout, describe

pattern = Local(4) | Stride(8)
layout = build_layout(pattern, num_heads=8, num_kv_heads=8, seqlen_q=4096)
layout.validate()
print(layout)

# Row 40 of two heads: both keep their local blocks, their far blocks differ.
for head in (0, 1):
    full, partial = layout.rows.line(head, 40)
    print(f"head {head}: full blocks {full}, partial blocks {[block for block, _ in partial]}")
far0, far1 = (set(layout.rows.line(head, 40)[0]) - {37, 38, 39} for head in (0, 1))
assert far0
assert far1
assert not far0 & far1

# Together the heads read every block.
union = {block for head in range(layout.heads) for block in layout.rows.line(head, 40)[0]}
assert union == set(range(40))

print(describe(pattern, num_heads=8, num_kv_heads=8, seqlen=4096))
