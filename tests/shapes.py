"""Models as planning knows them: one whose numbers are counted by hand, one of a size that people use."""

from __future__ import annotations

from apb.planning.shape import ModelShape

# Keys and values of a token in a layer: 64 numbers; a rank's partial results of a query's row: 4 x 17 fp32 numbers.
SMALL = ModelShape(
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    hidden=64,
    intermediate=128,
    vocabulary=503,
    layer_parameters=1000,
    parameters=5000,
)
# Llama-3.1-8B: long documents are dominated by attention.
LLAMA_8B = ModelShape(
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    hidden=4096,
    intermediate=14336,
    vocabulary=128256,
    layer_parameters=6_979_321_856,
    parameters=8_030_261_248,
)
