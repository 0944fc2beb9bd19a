"""Costs: what a run needs before it starts, in parameters, operations, memory and time.

`meter` runs one step on tensors that have shapes and no contents, so that the published sizes are counted on a laptop.
`step_cost` does that for the tokenizer's step; `tokenizer_cost` and `generator_cost` make a whole run's cost of it, and
`fitting` refuses a run that the memory cannot hold. Start with `tokenizer_cost`.
"""
