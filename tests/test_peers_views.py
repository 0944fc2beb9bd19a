"""The atlas and the cards of other systems' codebooks, each from its published container."""

import json

import pytest
import torch
from peers import stored_file

from ibqlab.pretrained import CheckpointError
from ibqlab.views.atlas import AtlasSettings, write_atlas
from ibqlab.views.atlas.moment import Moment
from ibqlab.views.card_page import card_html
from ibqlab.views.cards import CardReader
from ibqlab.views.subject import ViewError, open_subject
from ibqlab.widgets import link_maps

FAMILIES = {
    "taming_vqgan": {},
    "taming_gumbel": {},
    "ldm_vq_noattn": {"family": "ldm"},
    "llamagen_vq": {},
    "vqgan_lc": {},
    "maskgit_vqgan": {},
    "maskbit_lfq": {},
    "vqgan_plus": {},
    "simvq": {},
    "diffusers_vq": {},
    "titok": {"image_size": 16, "num_heads": 2},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IBQLAB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("name", "told"), FAMILIES.items(), ids=FAMILIES)
def test_an_atlas_and_its_cards(name, told, tmp_path):
    settings = {"image_size": 32} | told
    file = stored_file(name, tmp_path)
    page = write_atlas(file, tmp_path / "atlas", AtlasSettings(images="photos", count=3, **settings), progress=False)
    subject = open_subject(file, "photos", **settings)
    reader = CardReader(subject, 3, progress=False)
    network = subject.tokenizer
    pictures = torch.from_numpy(reader.index.pictures).permute(0, 3, 1, 2)
    assert pictures.shape[-2:] == (settings["image_size"],) * 2
    assert reader.index.codes.tolist() == network.encode_indices(pictures).tolist()
    packed = (page.parent / "data" / "facts.js").read_text()
    facts = json.loads(packed[packed.index("{") : packed.rindex("}") + 1])
    assert facts["codes"] == network.config.quantizer.codebook_size
    assert (page.parent / "data" / "map.js").is_file() and (page.parent / "decoded").is_dir()
    most_used = int(reader.index.counts.argmax())
    assert f"{int(reader.index.counts[most_used]):,}" in card_html(reader.read([most_used]))


def test_features_and_codes_of_unit_length_are_drawn_in_one_space(tmp_path):
    file = stored_file("llamagen_vq", tmp_path)
    reader = CardReader(open_subject(file, "photos", image_size=32), 2, progress=False)
    arrays = Moment(reader).snapshot()
    for name in ("features", "codebook"):
        lengths = torch.from_numpy(arrays[name]).norm(dim=1)
        assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5)


def test_what_no_shape_tells_is_asked_for(tmp_path):
    with pytest.raises(CheckpointError, match="family='ibq' for"):
        _ = open_subject(stored_file("ldm_vq", tmp_path), "photos", image_size=32).tokenizer
    with pytest.raises(CheckpointError, match="num_heads="):
        _ = open_subject(stored_file("titok", tmp_path), "photos").tokenizer
    with pytest.raises(ViewError, match=r"image_size: .* multiples of the downsampling 2"):
        _ = open_subject(stored_file("llamagen_vq", tmp_path), "photos", image_size=33).source


def test_codes_of_two_systems_side_by_side(tmp_path):
    both = [
        open_subject(stored_file(name, tmp_path), "photos", image_size=32, weights=weights)
        for name, weights in (("llamagen_vq", ""), ("simvq", "raw"))
    ]
    maps = link_maps(*both, titles=("LlamaGen", "SimVQ"), count=3, with_card=True)
    assert [one.data.codebook_size for one in maps.maps] == [64, 64]
    assert all(one.card is not None and one.said.value == "" for one in maps.maps)
    assert not maps.codes_correspond and "these are two codebooks" in maps.said.value
    page = maps.static_html()
    assert "LlamaGen" in page and "SimVQ" in page and page.count("<img") >= 2
    again = link_maps(both[0], both[0])
    assert again.codes_correspond
