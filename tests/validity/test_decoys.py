"""Decoys: they resemble the true name, never repeat it, and can be exchanged with it."""

import hashlib
import time
import unicodedata

import numpy as np
import pytest
from faker.providers.person.en_US import Provider
from scipy import stats

from lightleak.errors import UserError
from lightleak.records.people import name_key
from lightleak.validity.decoys import TrueName, draw, draw_names, from_file

FREQUENCY = Provider.first_names | Provider.last_names


def drawn(name, count=100, gender=None, **options):
    """Decoys for one name."""
    return draw([TrueName(name, gender)], count, seed=0, **options)


def script(text):
    return {unicodedata.name(letter).split()[0] for letter in text if letter.isalpha()}


def hashed(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def frequency(name):
    return np.prod([FREQUENCY[word] for word in name.split()])


def femininity(name):
    first = name.split()[0]
    return Provider.first_names_female.get(first, 0) - Provider.first_names_male.get(first, 0)


@pytest.mark.parametrize(
    "liking", [hashed, len, frequency, femininity, name_key], ids=lambda each: each.__name__
)
def test_a_name_drawn_at_random_ranks_anywhere_among_its_decoys(liking, trials):
    """Whatever a target likes in names, the p-values of people unknown to it are uniform."""
    p_values = []
    for seed, (name, decoys) in enumerate(trials):
        # Ties are broken at random.
        ties = np.random.default_rng(seed).permutation(len(decoys) + 1)
        scores = [(liking(each), tie) for each, tie in zip((name, *decoys), ties, strict=True)]
        p_values.append(sum(score >= scores[0] for score in scores) / len(scores))
    # The p-values have steps of 1/50; jittered, they would be uniform on an interval.
    jitter = np.random.default_rng(0).random(len(p_values)) / 50
    assert stats.kstest(np.array(p_values) - jitter, "uniform").pvalue > 0.001


@pytest.fixture(scope="module")
def trials():
    """One of several names drawn as the lab draws them, and its 49 decoys, 400 times."""
    found = []
    for seed in range(400):
        names = draw_names(4, seed=seed)
        decoys = draw([TrueName(name) for name in names], 49, seed=seed)
        assert all(decoys.known)
        assert not decoys.warnings
        served = zip(decoys.names, decoys.strata, strict=True)
        found.append((names[0], [name for name, number in served if number == decoys.of[0]]))
    return found


@pytest.mark.parametrize(
    "name",
    ["Emma Dubois", "Иван Иванов", "محمد نايلي", "राज शर्मा", "Νίκος Παπαδόπουλος", "דוד לוי"],
)
def test_decoys_are_written_in_the_script_of_the_name(name):
    decoys = drawn(name)
    assert script("".join(decoys.names)) == script(name)
    assert {len(each.split()) for each in decoys.names} == {2}


@pytest.mark.parametrize("name", ["王伟", "山田太郎", "김민준"])
def test_names_without_a_space_get_decoys_without_one(name):
    decoys = drawn(name)
    assert decoys.known == (True,)
    assert not any(" " in each for each in decoys.names)
    assert any(each.startswith(name[0]) for each in drawn(name, 800).names)


def test_decoys_have_as_many_words_as_the_name():
    names = [TrueName(name) for name in ("Madonna", "John Smith", "Mary Anne Smith")]
    decoys = draw(names, 50, seed=0)
    for position, words in enumerate((1, 2, 3)):
        served = zip(decoys.names, decoys.strata, strict=True)
        assert {len(n.split()) for n, stratum in served if stratum == decoys.of[position]} == {
            words
        }


def test_decoys_have_the_gender_of_the_name_or_the_one_that_is_given():
    women = drawn("Mary Smith")
    assert women.described[0].gender == "female"
    assert all(femininity(each) > 0 for each in women.names)
    men = drawn("Xyz Smith", gender="male")
    assert all(femininity(each) < 0 for each in men.names)
    assert drawn("Xyz Smith").described[0].gender is None


def test_a_family_name_has_the_ending_of_the_gender():
    assert all(name.endswith("а") for name in drawn("Анна Иванова").names)


def test_decoys_are_as_common_as_the_name():
    common, rare = drawn("James Smith"), drawn("Marvin Brandt")
    assert str(common.described[0]) == (
        "Latin script, male, two words, common, from the name lists of en_US"
    )
    medians = [np.median([frequency(name) for name in each.names]) for each in (common, rare)]
    assert medians[0] > 2 * medians[1]


def test_a_name_that_stands_in_no_list_is_told():
    decoys = draw([TrueName("Zzyzx Qwrty"), TrueName("John Smith")], 20, seed=0)
    assert decoys.known == (False, True)
    (warning,) = decoys.warnings
    assert "1 of 2 names" in warning
    assert warning.endswith("Zzyzx Qwrty.")
    # The lists call nobody so, once the gender is given.
    assert drawn("Mary Smith", gender="male").known == (False,)


def test_no_decoy_is_a_true_name_or_taken_or_another_decoy():
    everybody = drawn("김민준", 2000).names
    people, taken = everybody[:500], everybody[500:1000]
    again = draw([TrueName(name) for name in people], 400, seed=1, taken=taken)
    assert not set(again.names) & {*people, *taken}
    assert len({name_key(name) for name in again.names}) == len(again.names)
    same = [TrueName(name) for name in ("john smith", "JOHN SMITH", "Mary Smith", "Emma Dubois")]
    keys = [name_key(name) for name in draw(same, 5000, seed=0).names]
    assert len(set(keys)) == len(keys)


def test_a_small_pool_says_how_many_names_it_has():
    with pytest.raises(UserError) as caught:
        drawn("રમેશ પટેલ", 5000)
    most = int(str(caught.value).split("at most ")[1].split(",")[0])
    assert len(drawn("રમેશ પટેલ", most).names) == most
    with pytest.raises(UserError, match="at most"):
        drawn("રમેશ પટેલ", most + 1)


@pytest.mark.parametrize("name", ["ⴰⵎⵏⴰⵢ", "ゆきこ", "007"])
def test_a_script_without_lists_asks_for_a_file(name):
    with pytest.raises(UserError, match="--decoys FILE"):
        drawn(name)


def test_the_seed_decides_and_the_order_of_people_does_not():
    names = [TrueName(name) for name in draw_names(20, seed=1)]
    one, other = draw(names, 50, seed=5), draw(names[::-1], 50, seed=5)
    assert (one.names, one.strata, one.of) == (other.names, other.strata, other.of[::-1])
    assert set(draw(names, 50, seed=6).names) != set(one.names)
    assert draw_names(5, seed=1) == draw_names(5, seed=1) != draw_names(5, seed=2)


def test_drawn_names_are_distinct():
    assert len(set(draw_names(100_000, seed=0))) == 100_000
    with pytest.raises(UserError, match="at least one"):
        draw_names(0, seed=0)


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="decoys.txt", encoding="utf-8"):
        file = tmp_path / name
        file.write_text(text, encoding=encoding)
        return file

    return to_file


def test_a_file_gives_decoys_and_says_what_it_left_out(write):
    file = write("Ann Lee\n\n# Bo  Day \nANN LEE\nJohn Smith\nCy Fox\n", encoding="utf-8-sig")
    decoys = from_file(file, [TrueName("John Smith")], taken=["cy fox"])
    assert decoys.names == ("Ann Lee", "# Bo Day")
    for why in ("true names: 1", "repetitions: 1", "taken: 1", "in Latin script: 2"):
        assert sum(why in warning for warning in decoys.warnings) == 1


def test_a_decoy_of_a_file_serves_the_names_in_its_script(write):
    names = [f"Имя Номер{chr(0x430 + number)}" for number in range(20)]
    file = write("name\n" + "\n".join([*names, "Ann Lee"]) + "\n", "decoys.csv")
    people = [TrueName("Иван Иванов"), TrueName("John Smith"), TrueName("王伟")]
    decoys = from_file(file, people)
    served = [decoys.strata.count(stratum) for stratum in decoys.of]
    assert served == [20, 1, 0]
    assert len(decoys.warnings) == 2
    assert str(decoys.described[decoys.of[0]]) == "Cyrillic script, from decoys.csv"


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("John Smith\n", "decoys.txt", "no name in it"),
        ("Ann\nB\x07o\n", "decoys.txt", "line 2"),
        ("names\nAnn\n", "decoys.csv", "Did you mean 'name'?"),
    ],
)
def test_faults_of_a_file_of_decoys_are_named(write, text, name, message):
    with pytest.raises(UserError) as caught:
        from_file(write(text, name), [TrueName("John Smith")])
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(write, tmp_path):
    for file in (tmp_path / "nowhere.txt", write("Zoë\n", encoding="latin-1")):
        with pytest.raises(UserError, match=file.name):
            from_file(file, [])


def test_a_hundred_thousand_decoys_take_seconds(write):
    start = time.perf_counter()
    many = drawn("Marvin Brandt", 100_000)
    file = write("\n".join(many.names))
    decoys = from_file(file, [TrueName("John Smith")])
    assert decoys.names == many.names
    assert time.perf_counter() - start < 20
