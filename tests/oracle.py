"""The paper's Algorithm 1 and the published losses, written out literally: what every fast path is compared with."""

from torch.nn import functional as F


def algorithm_1(z, codebook):
    """Index backpropagation quantization as the paper's Algorithm 1 prints it, N × K matrices and all."""
    logits = z @ codebook.T
    soft_one_hot = logits.softmax(dim=1)
    index = soft_one_hot.argmax(dim=1)
    hard_one_hot = F.one_hot(index, len(codebook)).to(z.dtype)
    one_hot = hard_one_hot - soft_one_hot.detach() + soft_one_hot
    return one_hot @ codebook, index, hard_one_hot @ codebook


def entropies(z, codebook, temperature, epsilon=1e-5):
    """Mean entropy of the tokens' distributions and entropy of their mean, as the published code computes them."""
    logits = z @ codebook.T / temperature
    p, log_p = logits.softmax(dim=1), (logits + epsilon).log_softmax(dim=1)
    mean = p.mean(dim=0)
    return -(p * log_p).sum(dim=1).mean(), -(mean * (mean + epsilon).log()).sum()


def ibq_loss(z, codebook, beta=0.25, double=True):
    """The published quantization loss of IBQ."""
    z_q, index, z_hat = algorithm_1(z, codebook)
    loss = F.mse_loss(z, z_hat.detach()) + beta * F.mse_loss(z_hat, z.detach())
    return z_q, index, loss + F.mse_loss(z_q, z) if double else loss
