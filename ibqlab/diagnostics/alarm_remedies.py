"""What to change in somebody else's model, in words: it has none of the settings that the rules name for our own."""

IN_WORDS = {
    "usage_falls": "a lower learning rate, a smaller weight of the commitment loss, or codes that start among the "
    "features (k-means on those of one batch)",
    "few_codes": "codes that start among the features (k-means on those of one batch), or setting codes that no token "
    "has chosen for some steps to features of the current batch",
    "reach_lost": "codes that start among the features (k-means on those of one batch), setting codes that no token "
    "has chosen for some steps to features of the current batch, or one linear map that all codes come out of",
    "features_at_codes": "a larger weight of the commitment loss, a norm that bounds the features before the codebook, "
    "or a lower learning rate",
    "features_run_away": "codes that start among the features (k-means on those of one batch), a larger weight of the "
    "commitment loss, a norm that bounds the features before the codebook, or a lower learning rate",
    "entropy_ceiling": "longer codes, or a lower temperature in the softmax that the entropy is taken of",
    "nonfinite": "a lower learning rate, gradients cut off at a norm (torch.nn.utils.clip_grad_norm_), or 32-bit "
    "floats where the loss is computed",
    "placeholder_averages": "averages that start at the weights, or more steps",
}
"""Name of a rule → the quantities to change, for any model."""
UNDER_SOFTMAX = {
    "few_codes": "codes of the features' order of length, since z·C decides how sharp the softmax is",
    "reach_lost": "shorter codes, or a lower learning rate, since large z·C make the softmax decide",
}
"""The same where the gradient goes through a softmax over z·C."""
ON_A_GRID = {"few_codes": "a larger weight of the entropy loss, features spread over the whole grid, or fewer codes"}
"""The same where codes are a grid that nothing moves."""


def remedy_in_words(rule: str, remedy: str, softmax: bool, fixed: bool) -> str:
    """What to change where a rule goes off in somebody else's model.

    Args:
        rule: its name.
        remedy: what it says of our own models; stands where a rule of somebody's own has no words here.
        softmax, fixed: as of `CodebookFacts`.
    """
    words = IN_WORDS | (UNDER_SOFTMAX if softmax else {}) | (ON_A_GRID if fixed else {})
    return words.get(rule, remedy)
