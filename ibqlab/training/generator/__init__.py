"""Training of generators over a tokenizer's tokens: `loop` is the whole run, `step` what is learned from one batch."""
