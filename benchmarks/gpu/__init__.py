"""The kernels on a GPU against their opponents; `python -m benchmarks gpu` runs the sections in this order.

device    the copy rate, and what kernels cost that do nothing
capture   capture of six layers against the usual ways, by geometry, keys and rows
attention attention and capture of one layer against sdpa
host      what a call costs the host, in units of one torch operator
pixels    contrast and regions
decode    decode steps of a model with a session, eager, compiled and in CUDA graphs
engine    an engine call against two plain answers, on a model with the shape of Qwen2.5-VL-7B

`timing` holds the clock, `predicted` the predictions, `sections` the order, the budget and the report.
"""
