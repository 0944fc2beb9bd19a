"""What a snapshot of a monitored run holds."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ibqlab.monitor.inputs import sample_rows, to_pictures, value_of


def snapshot_arrays(
    codes: Tensor | None, sample: Tensor | None, chosen: Tensor | None, most_features: int
) -> dict[str, Tensor]:
    """Codebook, features and their codes, those that there are.

    Args:
        codes: (K, D).
        sample: (n, D) features.
        chosen: (n,) the sample's codes.
        most_features: of the sample that are kept, evenly spread.
    """
    if sample is not None:
        rows = sample_rows(len(sample), most_features).to(sample.device)
        sample, chosen = sample[rows], None if chosen is None else chosen[rows.to(chosen.device)]
    arrays = {"codebook": None if codes is None else codes.float(), "features": sample, "assignments": chosen}
    return {name: array for name, array in arrays.items() if array is not None}


def snapshot_pictures(pictures: tuple[Any, Any], most: int, checked: Callable[[Callable[[], Any]], Any]) -> dict:
    """Images and reconstructions; none where either is missing or is not what it must be.

    Args:
        pictures: images and reconstructions, or functions that give them.
        most: kept of each.
        checked: reads one, and tells of a mistake.
    """
    images, rebuilt = map(value_of, pictures)
    if images is None or rebuilt is None or not most:
        return {}
    first = slice(most)
    images, rebuilt = (
        checked(lambda given=given: to_pictures(given[first], like=images[first])) for given in (images, rebuilt)
    )
    fits = images is not None and rebuilt is not None and images.shape == rebuilt.shape
    return {"images": images, "reconstructions": rebuilt} if fits else {}
