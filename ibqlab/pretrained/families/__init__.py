"""The families that are read here, one file each: names → ours and what differs, nothing else. See `family`."""

from ibqlab.pretrained.families import (  # noqa: F401 - each registers itself
    diffusers,
    gumbel,
    ibq,
    ldm,
    llamagen,
    magvit2,
    maskbit,
    maskgit,
    simvq,
    titok,
    vqgan,
    vqgan_lc,
)
