"""Grids: many runs that differ in a few settings, each trained once, on this machine or under Slurm.

A cell is one run of the grid and its folder; a file in the store says that it is finished, so a grid that was stopped
trains only what is missing (`cells`, `engine`). `local` and `slurm` start workers, and `worker` is what runs inside
one. `evaluation_session` measures tokenizers that are already there: `own_protocols` each under its system's protocol
beside the common one, `protocol_shares` which part of a difference is the protocol's, `token_statistics` what tokens
are like. Start with `engine`.
"""
