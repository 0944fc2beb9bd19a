"""Code cards and tokens by hand: what a click, a typed number or a button does, on the kernel's side."""

import html
import io
import re
import shutil
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from registry import SMALL_DIGITS, small_settings

from ibqlab.data import resize_and_crop
from ibqlab.diagnostics.lab import World, run_lab
from ibqlab.pretrained import export_tokenizer
from ibqlab.quantizers import quantizer_config
from ibqlab.runs import Run
from ibqlab.tokenizer import AutoencoderConfig, Tokenizer, TokenizerConfig
from ibqlab.training import recipe_config, train
from ibqlab.views import encoding
from ibqlab.views.card_page import card_html
from ibqlab.views.cards import CardReader
from ibqlab.views.patches import PatchIndex
from ibqlab.views.subject import open_subject
from ibqlab.widgets import CodeCard, TokenView, compare_tokens, token_view
from ibqlab.widgets.code_card import typed_codes

COUNT = 12
"""Images that are looked at."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tokenizer of digits: 32 codes on 4 × 4 tokens."""
    torch.set_num_threads(1)
    settings = {**SMALL_DIGITS, "tokenizer.quantizer.name": "ibq", "steps": 2, "record.validate_every": 1}
    folder = tmp_path_factory.mktemp("cards") / "fine"
    return train(recipe_config("builtin/smoke", settings), folder, progress=False).path


@pytest.fixture(scope="module")
def file(run):
    """The same as a file of weights, which brings no images."""
    return export_tokenizer(run, run.parent / "fine.safetensors", "raw")


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    """A file of another tokenizer: 16 codes on 2 × 2 tokens."""
    return untrained(tmp_path_factory.mktemp("coarse"), {"name": "vq", "codebook_size": 16}, levels=3)


@pytest.fixture(scope="module")
def reader(run):
    return CardReader(open_subject(run), COUNT, progress=False)


@pytest.fixture
def card(reader):
    return CodeCard(reader)


@pytest.fixture(scope="module")
def one_card(reader):
    """For tests that leave it as it is."""
    return CodeCard(reader)


@pytest.fixture
def view(reader):
    return TokenView(reader)


@pytest.fixture(scope="module")
def one_view(reader):
    """For tests that leave its tokens as they are."""
    return TokenView(reader)


def words(widget):
    """What a page says, without its style and marks."""
    return re.sub(r"<style>.*?</style>|<[^>]*>", " ", widget.page.value, flags=re.DOTALL)


def click(page, **message):
    """What the browser sends when an element is clicked."""
    page._hear(page, {"code": "", "token": "", "shift": False} | message, [])


def upload(view, name, content):
    """What the browser sends when a file was chosen."""
    entry = {"name": name, "type": "image/png", "size": len(content), "last_modified": datetime.now(UTC)}
    view.own.value = ({**entry, "content": memoryview(content)},)


def static(widget):
    """What a notebook without a kernel shows, as HTML and as text."""
    bundle = widget._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "application/vnd.jupyter.widget-view+json" in data
    return data["text/html"], data["text/plain"]


class TestCodeCard:
    def test_opens_at_the_code_in_use_most(self, reader, card):
        code = int(reader.index.counts.argmax())
        assert card.codes == (code,) and f"Code {code} of 32" in words(card)
        assert card.back.disabled and card.forward.disabled

    def test_a_click_leads_to_the_neighbour_and_back(self, card):
        first = card.codes[0]
        other = int(re.findall(r'data-code="(\d+)"', card.page.value)[-1])
        click(card.page, code=str(other))
        assert card.codes == (other,) and f"Code {other} of 32" in words(card)
        assert not card.back.disabled and card.forward.disabled
        card.back.click()
        assert card.codes == (first,) and f"Code {first} of 32" in words(card)
        assert card.back.disabled and not card.forward.disabled
        card.forward.click()
        assert card.codes == (other,)
        card.back.click()
        card.show(5)
        assert card.forward.disabled, "a new way leaves the old one"

    @pytest.mark.parametrize(
        ("typed", "codes", "said"),
        [
            ("7", (7,), "Code 7 of 32"),
            ("3, 4 5", (3, 4, 5), "3 codes of 32"),
            ("3 3", (3,), "Code 3 of 32"),
            ("32", None, "codes are 0 to 31; got 32"),
            ("seven", None, "codes are whole numbers, 0 to 31; got seven"),
            ("-1", None, "got -1"),
            ("", None, ""),
        ],
    )
    def test_numbers_are_typed(self, card, typed, codes, said):
        before, page = card.codes, card.page.value
        card.number.value = typed
        assert card.codes == (codes or before)
        if codes:
            assert said in words(card) and card.number.value == " ".join(map(str, codes))
        else:
            assert said in card.said.value and card.page.value == page
            click(card.page, code="5")
            assert card.said.value == "", "what was said is gone with the next card"

    @pytest.mark.parametrize("message", ["text", {}, {"code": "x"}, {"code": "²"}, {"code": None}, {"code": "99"}])
    def test_a_strange_message_changes_nothing(self, one_card, message):
        before = one_card.codes
        one_card.page._hear(one_card.page, message, [])
        assert one_card.codes == before

    @pytest.mark.parametrize("codes", [7, "7", [7], (7, 7), np.int64(7), np.array([7]), torch.tensor(7)])
    def test_codes_come_in_many_forms(self, one_card, codes):
        one_card.show(5)
        one_card.show(codes)
        assert one_card.codes == (7,)

    @pytest.mark.parametrize("codes", ["seven", None, [[1]], 32, -1])
    def test_what_is_no_code_is_said(self, one_card, codes):
        one_card.show(7)
        one_card.show(codes)
        assert one_card.codes == (7,) and "0 to 31" in one_card.said.value

    @pytest.mark.parametrize(
        ("text", "size", "codes"),
        [
            ("1,005", 4096, ["1005"]),
            ("1,005", 32, ["1", "005"]),
            ("262,143", 262_144, ["262143"]),
            ("1, 5", 4096, ["1", "5"]),
            ("1,5", 4096, ["1", "5"]),
            ("1,016, 3", 4096, ["1016", "3"]),
            ("17 1,019 3", 4096, ["17", "1019", "3"]),
            ("1,0051", 4096, ["1", "0051"]),
            ("", 4096, []),
            ("five", 4096, ["five"]),
        ],
    )
    def test_commas_may_group_digits_as_the_pages_do(self, text, size, codes):
        assert typed_codes(text, size) == codes

    def test_no_code_says_how_to_choose(self, reader):
        assert "Click a point" in words(CodeCard(reader, code=()))

    def test_has_a_static_twin(self, card):
        page, text = static(card)
        assert f"Code {card.codes[0]} of 32" in text
        # The same without buttons, which nobody would answer.
        assert "<button" in card.page.value and "button>" not in page and "<button" not in page
        for part in (r'data-code="\d+"', r'src="[^"]+"'):
            assert re.findall(part, page) == re.findall(part, card.page.value)


class TestTokenView:
    def test_a_click_chooses_a_token_and_opens_its_card(self, view):
        click(view.page, token="2,3")
        code = int(view.tokens.codes[2, 3])
        assert view.chosen == (2, 3) and view.card.codes == (code,)
        assert f"Row 2, column 3: code {code}" in words(view)
        assert re.search('class="[^"]*chosen[^"]*" data-token="2,3"', view.page.value)

    def test_one_token_is_replaced_and_undone(self, view):
        click(view.page, token="1,1")
        before, old = view.page.value, view.tokens.codes.copy()
        view.code.value = str((int(old[1, 1]) + 1) % 32)
        view.one.click()
        assert (view.tokens.codes != old).sum() == 1 and view.tokens.codes[1, 1] == int(view.code.value)
        assert "1 token replaced" in words(view) and not view.undo.disabled
        view.undo.click()
        assert (view.tokens.codes == old).all() and view.page.value == before and view.undo.disabled

    def test_replacements_are_taken_back_one_by_one_or_all_at_once(self, view):
        states = [view.tokens.codes.copy()]
        for code, place in enumerate(("1,1", "2,2", "3,3")):
            click(view.page, token=place)
            view.code.value = str(code if states[0][code + 1, code + 1] != code else code + 3)
            view.one.click()
            view.one.click()  # once more changes nothing, and is no step to take back
            states.append(view.tokens.codes.copy())
        view.undo.click()
        assert (view.tokens.codes == states[2]).all() and not view.undo.disabled
        view.undo_all.click()
        assert (view.tokens.codes == states[0]).all() and view.undo.disabled and view.undo_all.disabled
        view.tokens.undo()
        assert (view.tokens.codes == states[0]).all()

    def test_all_tokens_of_a_code_are_replaced(self, view):
        values, times = np.unique(view.tokens.codes, return_counts=True)
        row, column = np.argwhere(view.tokens.codes == values[times.argmax()])[0]
        click(view.page, token=f"{row},{column}")
        view.code.value = str((int(values[times.argmax()]) + 1) % 32)
        view.all.click()
        assert (view.tokens.codes != view.tokens.original).sum() == times.max()

    def test_after_one_the_others_of_its_code_are_replaced(self, view):
        values, times = np.unique(view.tokens.codes, return_counts=True)
        old = int(values[times.argmax()])
        row, column = np.argwhere(view.tokens.codes == old)[0]
        click(view.page, token=f"{row},{column}")
        view.code.value = str((old + 1) % 32)
        view.one.click()
        view.one.click()
        assert f"Nothing replaced: the token has code {(old + 1) % 32} already" in view.said.value
        view.all.click()
        assert (view.tokens.codes != view.tokens.original).sum() == times.max() and view.said.value == ""
        view.all.click()
        assert f"Nothing replaced: no token of code {old} is left here" in view.said.value

    def test_a_code_is_taken_from_another_token(self, view):
        click(view.page, token="1,1")
        click(view.page, token="3,3", shift=True)
        assert view.chosen == (1, 1) and view.code.value == str(view.tokens.codes[3, 3])

    def test_every_token_has_its_numbers_for_the_pointer(self, view):
        titles = re.findall(r"<title>(.*?)</title>", view.page.value)
        code = int(view.tokens.codes[0, 1])
        assert len(titles) == 16 and titles[1].startswith(f"code {code} · {view.index.counts[code]} hits in all images")
        assert titles[1].endswith("row 0, column 1") and "nearly code" in titles[1]

    def test_the_errors_have_a_scale(self, view):
        error = np.abs(view.tokens.picture.astype(float) - view.tokens.decode(view.tokens.original)).mean(2)
        top = int(re.search(r"</i> (\d+)", view.page.value)[1])
        assert (error <= top).mean() > 0.99 and (error > top // 2).any()

    @pytest.mark.parametrize(("image", "said"), [(np.int64(2), "image 2"), (COUNT, "images are 0 to 11; got 12")])
    def test_opens_at_an_image(self, reader, image, said):
        assert said in words(TokenView(reader, image))

    def test_another_image_starts_afresh(self, view):
        click(view.page, token="1,1")
        view.image.value = 3
        assert view.chosen is None and view.tokens.image == 3 and "image 3" in words(view)

    @pytest.mark.parametrize("button", ["one", "all"])
    @pytest.mark.parametrize(
        ("token", "typed", "said"),
        [
            ("", "3", "click a token first"),
            ("0,0", "", "type a code, 0 to 31"),
            ("0,0", "many", "many"),
            ("0,0", "²", "type a code, 0 to 31"),
            ("0,0", "32", "codes are 0 to 31; got 32"),
        ],
    )
    def test_what_cannot_be_replaced_is_said(self, one_view, button, token, typed, said):
        one_view.image.value = 1 - one_view.image.value  # no token is chosen
        click(one_view.page, token=token)
        one_view.code.value = typed
        getattr(one_view, button).click()
        assert said in one_view.said.value and not one_view.tokens.is_changed

    @pytest.mark.parametrize("message", ["text", {}, {"token": "9,9"}, {"token": "1"}, {"token": "-1,0"}])
    def test_a_strange_message_changes_nothing(self, one_view, message):
        before = one_view.chosen
        one_view.page._hear(one_view.page, message, [])
        assert one_view.chosen == before

    def test_has_a_static_twin(self, view):
        click(view.page, token="0,0")
        page, text = static(view)
        assert page.count('data-token="') == 16 and "Row 0, column 0" in text and f"Code {view.card.codes[0]}" in text


class TestOwnImage:
    @pytest.fixture
    def picture(self):
        return Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))

    @pytest.mark.parametrize("form", ["Pillow", "path", "upload", "grey", "tiny"])
    def test_is_tokenised_as_validation_images_are(self, reader, picture, tmp_path, form):
        picture = {"grey": picture.convert("L"), "tiny": picture.resize((3, 2))}.get(form, picture)
        picture.save(tmp_path / "<mine>.png")
        if form == "upload":
            view = TokenView(reader)
            upload(view, "<mine>.png", (tmp_path / "<mine>.png").read_bytes())
        else:
            view = TokenView(reader, picture if form == "Pillow" else tmp_path / "<mine>.png")
        pixels = resize_and_crop(picture.convert("RGB"), 8, "pil")
        assert np.array_equal(view.tokens.picture, pixels)
        codes = reader.subject.tokenizer.encode_indices(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
        assert np.array_equal(view.tokens.codes, codes[0].numpy())
        assert ("your image" if form == "Pillow" else "&lt;mine&gt;.png") in view.page.value
        click(view.page, token="1,1")
        assert view.card.codes == (int(view.tokens.codes[1, 1]),)

    def test_needs_no_other_images(self, file, picture):
        view = TokenView(file, picture)
        assert view.tokens.codes.shape == (4, 4) and view.index is None
        click(view.page, token="1,1")
        assert "brings no images" in words(view.card)

    def test_that_cannot_be_read_is_said_and_leaves_the_other(self, view, tmp_path):
        before = view.page.value
        upload(view, "a.png", b"no picture")
        assert "a.png cannot be read as a picture" in view.said.value and view.page.value == before
        (tmp_path / "a.png").write_bytes(b"no picture")
        assert "cannot be read as a picture" in words(TokenView(view.reader, tmp_path / "a.png"))


class TestComparing:
    def test_other_grids_and_codebooks_stand_on_one_image(self, run, coarse):
        both = compare_tokens(run, coarse, image=2, count=COUNT).children
        assert [view.tokens.codes.shape for view in both] == [(4, 4), (2, 2)]
        assert [view.index.codebook_size for view in both] == [32, 16]
        both[0].image.value = 4
        assert [view.tokens.image for view in both] == [4, 4]
        tops = {re.search(r"</i> (\d+)", view.page.value)[1] for view in both}
        assert tops == {str(max(view.tokens.error_top for view in both))}
        click(both[0].page, token="3,0")
        assert both[1].chosen == (1, 0) and both[1].card.codes == (int(both[1].tokens.codes[1, 0]),)
        click(both[1].page, token="0,1")
        assert both[0].chosen == (1, 3)

    def test_a_checkpoint_looks_at_the_other_runs_images(self, run, coarse):
        first, second = compare_tokens(run, coarse, count=COUNT).children
        assert np.array_equal(first.index.pictures, second.index.pictures)

    def test_an_own_image_is_shown_to_both(self, run, coarse):
        picture = Image.new("RGB", (9, 9), "red")
        both = compare_tokens(run, coarse, picture, count=COUNT).children
        assert all(np.array_equal(view.tokens.picture, np.full((8, 8, 3), (255, 0, 0))) for view in both)
        upload(both[1], "blue.png", png(np.full((9, 9, 3), (0, 0, 255), np.uint8)))
        assert all(np.array_equal(view.tokens.picture, np.full((8, 8, 3), (0, 0, 255))) for view in both)
        both[0].again.click()
        assert all(view.tokens.image == 0 and view.picture is None for view in both)
        assert np.array_equal(both[1].tokens.picture, both[1].index.pictures[0])

    def test_other_images_are_refused(self, coarse, view):
        with pytest.raises(ValueError, match="same images"):
            compare_tokens(view, TokenView(coarse, images="digits", count=2))

    def test_photos_of_two_sizes_are_not_the_same(self, view):
        larger = SimpleNamespace(images_mark="other", codes=view.index.codes, pictures=np.zeros((4, 16, 16, 3)))
        other = SimpleNamespace(index=larger, reader=view.reader)
        with pytest.raises(ValueError, match="at 8 and 16 pixels, for which photos are cut again: give both"):
            token_view._require_same_images(view, other)


# --- what a run or checkpoint may lack --------------------------------------------------------------------------------


@pytest.fixture
def broken(run, file, tmp_path):
    """Makes a run or a file of a kind, and what a view is to be given."""

    def copy(name="copy"):
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("views"))
        return tmp_path / name

    def spoilt(path, **changes):
        """With other arrays in every snapshot; None leaves one out."""
        run = Run(path)
        for step in run.snapshot_steps:
            arrays = run.snapshot(step) | changes
            run.save_snapshot(step, **{name: values for name, values in arrays.items() if values is not None})
        return path

    def weights(path, change):
        step, state = Run(path).load_checkpoint()
        for name, values in state["model"].items():
            change(name, values)
        Run(path).save_checkpoint(step, state)
        return path

    def without(path, *parts):
        for part in parts:
            shutil.rmtree(path / part)
        return path

    def images(*pictures, classes=()):
        folder = tmp_path / "images"
        for number, picture in enumerate(pictures):
            place = folder / classes[number] if classes else folder
            place.mkdir(parents=True, exist_ok=True)
            content = picture if isinstance(picture, bytes) else png(picture)
            (place / f"{number}.png").write_bytes(content)
        return folder

    def lone(name, values):
        """Every feature alike."""
        if name == "quant_conv.weight":
            values.zero_()

    def empty():
        (tmp_path / "empty").mkdir()
        return tmp_path / "empty"

    def young():
        return without(copy(), "snapshots", "checkpoints")

    def generator():
        folder = empty()
        (folder / "config.yaml").write_text("generator: {name: ibq}\ntokenizer: mine\n")
        return folder

    def lab():
        run_lab(World(dim=2), ["vq"], codebook_size=8, steps=2, batch_size=16, progress=False, folder=tmp_path / "lab")
        return tmp_path / "lab" / "vq"

    def monitored():
        folder = empty()
        (folder / "config.yaml").write_text("kind: monitored\ncodebook_size: 8\n")
        Run(folder).save_snapshot(1, counts=np.arange(8), codebook=np.eye(8, dtype=np.float32))
        return folder

    def old():
        path = spoilt(copy(), last_hit=None, assignments=None)
        config = (path / "config.yaml").read_text()
        (path / "config.yaml").write_text("\n".join(line for line in config.split("\n") if "probe_tokens" not in line))
        return path

    def cut():
        path = copy()
        file = sorted((path / "snapshots").iterdir())[-1]
        file.write_bytes(file.read_bytes()[:900])
        return path

    grey = np.full((8, 8), 90, np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (9, 30, 3)).astype(np.uint8)
    return {
        "an empty folder": lambda: (empty(),),
        "a study's folder": lambda: (run.parent,),
        "no such run": lambda: ("nowhere",),
        "a run that has just begun": lambda: (young(),),
        "a run before its first checkpoint": lambda: (without(copy(), "checkpoints"),),
        "a run without snapshots": lambda: (without(copy(), "snapshots"),),
        "an older version's run": lambda: (old(),),
        "a snapshot that is cut": lambda: (cut(),),
        "snapshots without counts": lambda: (spoilt(copy(), counts=None),),
        "NaN features": lambda: (spoilt(copy(), features=np.full((4, 64), np.nan, np.float32)),),
        "NaN codes": lambda: (spoilt(copy(), codebook=np.full((32, 64), np.nan, np.float32)),),
        "NaN weights": lambda: (weights(copy(), lambda _, values: values.fill_(np.nan)),),
        "a decoder of NaN": lambda: (
            weights(copy(), lambda name, values: values.fill_(np.nan) if name.startswith("decoder") else None),
        ),
        "one live code": lambda: (weights(copy(), lone),),
        "a file of weights": lambda: (file,),
        "another run's images": lambda: (file, {"images": run}),
        "no images": lambda: (run, {"images": empty()}),
        "no such images": lambda: (run, {"images": tmp_path / "nowhere"}),
        "a broken image among others": lambda: (run, {"images": images(grey, b"no picture", noise)}),
        "broken images alone": lambda: (run, {"images": images(b"no picture")}),
        "grey, tiny and wide images": lambda: (run, {"images": images(grey, grey[:2, :3], noise)}),
        "a generator's run": lambda: (generator(),),
        "a lab's run": lambda: (lab(),),
        "a monitored run": lambda: (monitored(),),
    }


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "card", "tokens", "said"),
    [
        ("an empty folder", False, False, "is no run: it holds no config.yaml"),
        ("a study's folder", False, False, "is no run"),
        ("no such run", False, False, "there is no such run or checkpoint 'nowhere'"),
        ("a run that has just begun", False, False, "has no checkpoint yet"),
        ("a run before its first checkpoint", True, False, "has no checkpoint yet"),
        ("a run without snapshots", True, True, "Decodes to"),
        ("an older version's run", True, True, "Use through training"),
        ("a snapshot that is cut", True, True, "is damaged"),
        ("snapshots without counts", True, True, "holds no counts of hits"),
        ("NaN features", True, True, "Use through training"),
        ("NaN codes", True, True, "Nearest codes"),
        ("NaN weights", True, False, "makes NaN or infinity of them, so training has diverged"),
        ("a decoder of NaN", True, False, "a picture needs numbers; got NaN"),
        ("one live code", True, True, "100 %"),
        ("a file of weights", True, False, "brings no images; name some: images=FOLDER"),
        ("another run's images", True, True, "Classes of the images"),
        ("no images", True, False, "which holds none"),
        ("no such images", True, False, "Correct the path, or use images="),
        ("a broken image among others", True, True, "Unreadable images were left out: 1.png"),
        ("broken images alone", True, False, "at least one image must be readable"),
        ("grey, tiny and wide images", True, True, "The images have no classes"),
        ("a generator's run", False, False, "its codebook is its tokenizer's: give mine"),
        ("a lab's run", True, False, "it has no images"),
        ("a monitored run", True, False, "a monitor stores codes and features, not the model"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*validation")
def test_what_is_missing_is_said_in_a_sentence(broken, kind, card, tokens, said):
    what, settings = (*broken[kind](), {})[:2]
    shown = CodeCard(what, count=COUNT, **settings)
    for view in (shown, TokenView(shown.reader or what, count=COUNT, **settings)):
        has = card if isinstance(view, CodeCard) else tokens
        if isinstance(view, CodeCard):
            assert bool(view.codes) == has
            text = words(view)
        else:
            assert (view.tokens is not None and "data-token=" in view.page.value) == has
            for button in (view.one, view.all, view.undo, view.undo_all) if view.card else ():
                button.click()
            text = words(view) + view.said.value
        if isinstance(view, CodeCard) or not has:
            assert said in html.unescape(text)
        assert "Traceback" not in text and "Error:" not in text
        static(view)


def test_a_run_that_is_deleted_while_it_is_shown(run, tmp_path):
    path = tmp_path / "gone"
    shutil.copytree(run, path)
    view = TokenView(path, count=COUNT)
    shutil.rmtree(path)
    click(view.page, token="1,1")
    view.image.value = 2
    click(view.card.page, code="3")
    assert view.card.codes == (3,) and "Code 3 of 32" in words(view.card) and view.tokens.image == 2
    assert not path.exists()


def test_more_codes_than_tokens_make_counts_too_few(coarse):
    card = CodeCard(coarse, images="digits", count=1)
    assert "Counts are too few: 4 tokens for 16 codes" in words(card) and "78 % would have no hit" in words(card)


@pytest.mark.parametrize(
    "name", ["residual", "grouped", "multi_scale", "hierarchical", "lfq", "bsq", "fsq", "gumbel", "vq_projected"]
)
def test_every_kind_of_codebook_has_cards_and_tokens(name, tmp_path):
    """Composites, whose index stands for several; codebooks that are no list; methods without a distance."""
    file = untrained(tmp_path, {"name": name, **small_settings(name, 32, 6)})
    view = TokenView(file, images="digits", count=4)
    click(view.page, token="1,1")
    text = words(view.card)
    assert f"Code {view.tokens.codes[1, 1]:,} of {view.index.codebook_size:,}" in text and "Decodes to" in text
    assert ("No distance between features and codes" in text) == (view.index.ruler == "")
    assert ("of its parts" in text) == (name in ("residual", "grouped", "multi_scale", "hierarchical"))
    if name == "residual":  # 36 codes are pairs of 6
        assert f"stands for the indices {', '.join(map(str, divmod(view.card.codes[0], 6)))} of" in text
    assert "Nearest codes" in text and not [lack for lack in view.reader.lacks if "cannot be shown" in lack]
    view.code.value = "0" if view.tokens.codes[1, 1] else "1"
    view.one.click()
    assert "1 token replaced" in words(view)


def test_combinations_too_many_to_be_listed_have_no_near_codes(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "LISTED", 100)
    file = untrained(tmp_path, {"name": "residual", **small_settings("residual", 32, 6)})
    card = CodeCard(file, images="digits", count=2)
    assert "combinations of parts, too many to be listed" in words(card) and "Nearest codes" not in words(card)


def untrained(folder, quantizer, levels=2):
    """A file of a small tokenizer of digits."""
    autoencoder = {"base_channels": 32, "channel_multipliers": [1] * levels, "num_res_blocks": 1, "resolution": 8}
    quantizer = quantizer_config(quantizer)
    autoencoder = AutoencoderConfig(**autoencoder, attention_resolutions=(), latent_channels=quantizer.code_dim)
    tokenizer = Tokenizer(TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer)).eval()
    return export_tokenizer(tokenizer, folder / "small.safetensors")


def test_cards_of_the_largest_codebook(reader, monkeypatch):
    """262,144 codes and 2,000 images of 16 × 16 tokens; how long it takes is the business of a benchmark."""
    codes, rng = 2**18, np.random.default_rng(0)
    grid = (2000, 16, 16)
    tokens = (rng.pareto(1, grid) * 50).astype(np.int64) % codes
    index = PatchIndex(
        pictures=np.broadcast_to(np.uint8(90), (2000, 256, 256, 3)),
        codes=tokens.astype(np.int32),
        seconds=tokens.astype(np.int32),
        distance=rng.random(grid, np.float32),
        margin=rng.random(grid, np.float32),
        labels=np.zeros(2000, np.int32),
        classes=(),
        ruler="L2",
        codebook_size=codes,
    )
    large = CardReader(reader.subject, COUNT, progress=False)
    large.index, large.codebook_size = index, codes
    monkeypatch.setattr(CardReader, "codebook", rng.standard_normal((codes, 16), np.float32))
    for chosen in ([1], list(range(300))):
        assert card_html(large.read(chosen, decode=False)).count("<img") > 20
