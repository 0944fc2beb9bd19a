"""Costs: what a run needs before it starts, in parameters, operations, memory and time.

`meter` and `shapes` run one step on tensors that have no contents, so that the published sizes are counted on a laptop.
`tokenizer_step_cost` and `generator_step_cost` do that for the two networks, `run_cost` makes a whole run's cost of it,
`time_and_price` what it takes at a known speed, and `fitting` refuses a run that the memory cannot hold. Start with
`run_cost`.
"""
