"""Losses: what training minimises, as functions of a network's outputs.

`tokenizer_loss` is the paper's eq. 8 with the quantizer's own terms, `gan_losses` the losses between tokenizer and
discriminator, `next_token_loss` the generator's. They stand below the training loops so that `costs` can count the same
step that `training` computes. Start with `tokenizer_loss`.
"""
