"""Training of tokenizers: `loop` is the whole run, `step` what is learned from one batch."""
