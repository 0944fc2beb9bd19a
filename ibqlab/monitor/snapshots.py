"""What a snapshot of a monitored run holds."""

from typing import Any

from torch import Tensor

from ibqlab.monitor.inputs import UpdateInputs, sample_rows, to_pictures, value_of
from ibqlab.monitor.reading import Reading
from ibqlab.monitor.trouble import Trouble


def snapshot_arrays(seen: Reading, most_features: int) -> dict[str, Tensor]:
    """Codebook, features and their codes, and the fixed probe's features, those that there are.

    Args:
        seen: what was read of the update.
        most_features: of the sample that are kept, evenly spread.
    """
    sample, chosen = seen.sample, seen.chosen
    if sample is not None:
        rows = sample_rows(len(sample), most_features).to(sample.device)
        sample, chosen = sample[rows], None if chosen is None else chosen[rows.to(chosen.device)]
    codes = None if seen.codes is None else seen.codes.float()
    arrays = {"codebook": codes, "features": sample, "assignments": chosen, "probe_features": seen.probe}
    return {name: array for name, array in arrays.items() if array is not None}


def snapshot_pictures(given: UpdateInputs, most: int, trouble: Trouble) -> dict[str, Any]:
    """Images and reconstructions; none where either is missing or is not what it must be.

    Args:
        given: images and reconstructions, or functions that give them.
        most: kept of each.
        trouble: told of a mistake.
    """
    if not most:
        return {}
    pairs = ((given.images, "images"), (given.reconstructions, "reconstructions"))
    images, rebuilt = (trouble.checked(lambda pair=pair: value_of(*pair)) for pair in pairs)
    if images is None or rebuilt is None:
        return {}
    pictures: dict[str, Any] = {}
    for name, values in {"images": images, "reconstructions": rebuilt}.items():
        picture = trouble.checked(lambda v=values, n=name: to_pictures(v[:most], images[:most], n))
        if picture is None:
            return {}
        pictures[name] = picture
    shapes = {name: picture.shape for name, picture in pictures.items()}
    if shapes["images"] != shapes["reconstructions"]:
        trouble.warn(
            f"reconstructions must have the shape of their images; got (B, H, W, C) = {shapes['reconstructions']} and "
            f"{shapes['images']}, so the snapshot holds neither"
        )
        return {}
    return pictures
