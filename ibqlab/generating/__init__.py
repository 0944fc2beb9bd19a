"""Generating: from a trained generator to samples, galleries and the numbers of a tokenizer's tokens.

`pipeline` trains tokenizer and generator one after the other, `sampling_runs` writes samples into a folder and goes on
where it was stopped, and `gallery` arranges samples by class. Start with `sampling_runs`.
"""
