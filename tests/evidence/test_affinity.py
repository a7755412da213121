"""How well names fit photos: blocks, the cache and cut sentences change no answer."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from lightleak import targets
from lightleak.audits.judge_identity import _best
from lightleak.errors import UserError
from lightleak.evidence.affinity import best_of_block, matcher
from lightleak.lab.dual import tiny_clip
from lightleak.records import Photo
from lightleak.validity.decoys import draw_names

NAMES = draw_names(300, seed=8)
TEMPLATES = ("{}", "a photo of {}", "{} at a gala")


def photo(folder, number):
    file = folder / f"{number}.png"
    noise = np.random.default_rng(number).integers(0, 255, (40, 36, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    return Photo("ann", file, hashlib.sha256(file.read_bytes()).hexdigest())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return [photo(folder, number) for number in range(4)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models that differ in their weights alone."""
    root = tmp_path_factory.mktemp("models")
    for seed in (1, 2):
        tiny_clip(root / str(seed), NAMES, seed=seed)
    return root / "1", root / "2"


@pytest.fixture
def target(folders):
    return targets.load(folders[0], dtype="float64")


def silence(target):
    """Make the text tower say nothing that is a number."""
    for parameter in target.model.text_model.parameters():
        parameter.data.fill_(torch.nan)


class TestBestOfBlock:
    @pytest.mark.parametrize("block", [1, 3, 7, 20, 64])
    @pytest.mark.parametrize("count", [1, 5])
    def test_blocks_merged_hold_the_best_of_all_and_of_equals_the_first(self, block, count):
        rng = np.random.default_rng(block)
        affinities = rng.integers(6, size=(50, 3, 4)).astype(float)
        names = np.sort(rng.choice(1000, 50, replace=False))
        merged = None
        for start in range(0, 50, block):
            here = slice(start, start + block)
            part = best_of_block(affinities[here], names[here], count)
            merged = _best(part, (4, 3), count, merged)
        for j in range(3):
            for k in range(4):
                order = sorted(range(50), key=lambda i: (-affinities[i, j, k], i))[:count]
                np.testing.assert_array_equal(merged[1][k, j], names[order])
                np.testing.assert_array_equal(merged[0][k, j], affinities[order, j, k])


class TestCosines:
    def test_are_those_of_each_sentence_alone_and_a_blank_picture_is_last(self, target, photos):
        found = matcher(target, photos, TEMPLATES).affinities(NAMES[:6])
        assert found.shape == (6, 3, 5)
        blank = Image.new("RGB", (64, 64), (127, 127, 127))
        with torch.no_grad():
            images = [
                target.embed_images(target.pixels(image))[0]
                for image in [*(Image.open(each.file) for each in photos), blank]
            ]
            for i, name in enumerate(NAMES[:6]):
                for j, template in enumerate(TEMPLATES):
                    tokens, _ = target.tokens([template.replace("{}", name)])
                    text = target.embed_texts(tokens)[0]
                    expected = [float(text @ image) for image in images]
                    np.testing.assert_allclose(found[i, j], expected, rtol=1e-9, atol=1e-12)

    def test_do_not_depend_on_the_names_beside(self, target, photos):
        fits = matcher(target, photos, TEMPLATES)
        whole = fits.affinities(NAMES)
        cuts = [0, 1, 5, 100, 299, 300]
        parts = [fits.affinities(NAMES[a:b]) for a, b in pairwise(cuts)]
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-9, atol=1e-12)

    def test_a_photo_that_cannot_be_read_is_a_failure_and_leaves_no_gap(self, target, photos):
        gone = Photo("ann", photos[0].file.with_name("gone.png"), "0")
        fits = matcher(target, [photos[0], gone, photos[1]], TEMPLATES)
        assert [each.id for each in fits.photos] == ["ann/0.png", "ann/1.png"]
        assert [each.id for each in fits.failures] == ["ann/gone.png"]
        expected = matcher(target, photos[:2], TEMPLATES).affinities(NAMES[:3])
        np.testing.assert_allclose(fits.affinities(NAMES[:3]), expected, rtol=1e-9)


class TestCutSentences:
    TEMPLATES = ("{}", "a very long sentence " * 40 + "{}")

    def test_are_counted(self, target, photos):
        fits = matcher(target, photos, self.TEMPLATES)
        fits.affinities(NAMES[:7])
        assert fits.truncated == 7

    def test_are_counted_when_their_embeddings_were_kept(self, target, photos, tmp_path):
        for _ in range(2):
            fits = matcher(target, photos, self.TEMPLATES, cache=tmp_path)
            fits.affinities(NAMES[:7])
            assert fits.truncated == 7


class TestCache:
    def test_a_second_run_does_not_ask_the_model(self, target, photos, tmp_path):
        first = matcher(target, photos, TEMPLATES, cache=tmp_path).affinities(NAMES)
        silence(target)
        again = matcher(target, photos, TEMPLATES, cache=tmp_path).affinities(NAMES)
        np.testing.assert_array_equal(again, first)
        with pytest.raises(UserError, match="not finite"):
            matcher(target, photos, TEMPLATES[:2], cache=tmp_path).affinities(NAMES)

    @pytest.mark.parametrize("left", [0, 20, 1000])
    def test_a_torn_file_is_made_again(self, target, photos, tmp_path, left):
        first = matcher(target, photos, TEMPLATES, cache=tmp_path).affinities(NAMES[:9])
        (file,) = tmp_path.iterdir()
        whole = file.read_bytes()
        file.write_bytes(whole[:left])
        again = matcher(target, photos, TEMPLATES, cache=tmp_path).affinities(NAMES[:9])
        np.testing.assert_array_equal(again, first)
        assert file.read_bytes() == whole

    def test_another_model_and_another_precision_do_not_share_it(self, folders, photos, tmp_path):
        loaded = [(folders[0], "float64"), (folders[1], "float64"), (folders[0], "float32")]
        for folder, dtype in loaded:
            target = targets.load(folder, dtype=dtype)
            found, fresh = (
                matcher(target, photos, TEMPLATES, cache=cache).affinities(NAMES[:9])
                for cache in (tmp_path, None)
            )
            np.testing.assert_array_equal(found, fresh)
        assert len(list(tmp_path.iterdir())) == 3
