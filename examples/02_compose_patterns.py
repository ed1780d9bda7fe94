"""Patterns are values: join them, give heads and layers their own, print, store and read them back."""

from s2attn import ByRange, Dense, Local, Pattern, PerHead, Power, Recipe, Sink, Stride, Window, parse_pattern, preset

s2 = Local(16) | Stride(8)  # near blocks, and every 8th block far away
ranged = ByRange([(0, 512, Dense()), (512, 8192, Stride(4)), (8192, None, Stride(32))])  # by distance from the query
mixed = PerHead({0: Dense(), 1: Sink(64) | Window(512)}, default=s2)  # head by head
power = Sink(256) | Local(5, block=256) | Power(block=256)  # distances 1, 2, 4, 8 ... blocks

for pattern in (s2, ranged, mixed, power):
    again = Pattern.from_json(pattern.to_json())
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert eval(repr(pattern)) == pattern
    print(f"{pattern.digest}  {pattern}")

assert power == preset("power_attention")
assert s2 == parse_pattern("local:16|stride:8")
assert preset("s2") == Local(16) | Stride(8, offset="spread")  # as the original spreads few heads

# A recipe says which layer uses which pattern.
recipe = Recipe(default=s2, dense_layers=[0, 7])
assert recipe.pattern(7) == Dense()
assert recipe.pattern(8) == s2
assert Recipe.from_json(recipe.to_json()) == recipe
print(recipe)
