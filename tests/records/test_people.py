"""People: whose photos are used, what they are called, and how a fault is named."""

import unicodedata

import pytest
from PIL import Image

from lightleak.errors import UserError
from lightleak.records.people import load_people


@pytest.fixture
def folder(tmp_path):
    """A folder without people yet."""
    inside = tmp_path / "people"
    inside.mkdir()
    return inside


def save(file, shade=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), (shade, 0, 0)).save(file, "PNG")
    return file


def people(folder, *names):
    """Give each a folder with two photos that nobody else has."""
    start = sum(1 for each in folder.rglob("*.png"))
    for number, name in enumerate(names):
        for photo in range(2):
            save(folder / name / f"{photo}.png", start + 2 * number + photo)


def write_names(folder, text, encoding="utf-8"):
    file = folder.parent / "names.csv"
    file.write_text(text, encoding=encoding)
    return file


def reasons(found):
    return {failure.id: failure.error for failure in found.failures}


def refusal(folder, **options):
    """The message with which the whole folder is refused; always one line."""
    with pytest.raises(UserError) as caught:
        load_people(folder, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_a_folder_of_photos_is_a_person_named_by_the_folder(folder):
    people(folder, "marie_curie", "alan__turing_")
    found = load_people(folder)
    assert not found.failures
    assert [(each.person, each.name) for each in found.people] == [
        ("alan__turing_", "alan turing"),
        ("marie_curie", "marie curie"),
    ]
    assert [photo.id for photo in found.people[1].photos] == [
        "marie_curie/0.png",
        "marie_curie/1.png",
    ]


def test_photos_are_known_by_their_content_and_not_by_their_suffix(folder):
    save(folder / "a" / "photo.of.a")
    assert load_people(folder).people[0].photos[0].file.name == "photo.of.a"


def test_what_is_no_photo_is_listed_and_what_is_hidden_is_not(folder):
    people(folder, "a")
    (folder / "a" / "notes.txt").write_text("hello")
    (folder / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "a" / ".DS_Store").write_text("x")
    (folder / ".cache").mkdir()
    save(folder / "a" / "more" / "2.png", 9)
    found = load_people(folder)
    assert set(reasons(found)) == {"a/notes.txt", "a/broken.png", "a/more"}
    assert {failure.stage for failure in found.failures} == {"photo"}
    assert "a folder inside" in reasons(found)["a/more"]
    assert len(found.people[0].photos) == 2


def test_strict_raises_the_first_fault(folder):
    people(folder, "a")
    (folder / "a" / "notes.txt").write_text("hello")
    assert "a/notes.txt" in refusal(folder, strict=True)


def test_a_photo_beside_the_folders_belongs_to_no_person(folder):
    people(folder, "a")
    save(folder / "loose.png", 9)
    (folder / "names.csv").write_text("person,name\na,Ann Lee\n")
    found = load_people(folder, names=folder / "names.csv")
    assert list(reasons(found)) == ["loose.png"]
    assert "belongs to no person" in reasons(found)["loose.png"]


def test_a_photo_that_stands_twice_counts_once(folder):
    people(folder, "a")
    save(folder / "a" / "again.png", 1)
    found = load_people(folder)
    assert len(found.people[0].photos) == 2
    assert list(reasons(found)) == ["a/again.png"]
    assert "copy of 'a/1.png'" in reasons(found)["a/again.png"]


def test_a_photo_of_two_people_shows_neither(folder):
    people(folder, "a", "b")
    save(folder / "a" / "both.png", 99)
    save(folder / "b" / "same.png", 99)
    found = load_people(folder)
    assert set(reasons(found)) == {"a/both.png", "b/same.png"}
    assert all("under 2 people ('a', 'b')" in error for error in reasons(found).values())
    assert [len(each.photos) for each in found.people] == [2, 2]


def test_a_person_without_a_usable_photo_is_listed(folder):
    people(folder, "a")
    (folder / "b").mkdir()
    found = load_people(folder)
    assert [(each.id, each.stage) for each in found.failures] == [("b", "person")]
    assert [each.person for each in found.people] == ["a"]


def test_a_folder_without_any_usable_person_is_refused_with_a_reason(folder):
    (folder / "a").mkdir()
    (folder / "a" / "notes.txt").write_text("hello")
    assert "a/notes.txt" in refusal(folder)
    assert "no folder" in refusal(folder / "a")
    assert "cannot be opened" in refusal(folder / "nowhere")


def test_links_outside_are_refused_unless_allowed(folder):
    people(folder, "a")
    outside = save(folder.parent / "store" / "photo.png", 77)
    (folder / "a" / "link.png").symlink_to(outside)
    (folder / "b").symlink_to(outside.parent)
    found = load_people(folder)
    assert set(reasons(found)) == {"a/link.png", "b"}
    assert all("outside" in error for error in reasons(found).values())
    (folder / "b").unlink()
    allowed = load_people(folder, allow_outside=True)
    assert not allowed.failures
    assert [photo.id for photo in allowed.people[0].photos][-1] == "a/link.png"


def test_a_link_in_a_circle_is_a_failure(folder):
    people(folder, "a")
    (folder / "a" / "loop.png").symlink_to("loop.png")
    assert set(reasons(load_people(folder))) == {"a/loop.png"}


@pytest.mark.parametrize(
    "name",
    [
        "محمد الخطيب",
        "王伟",
        "김민준",
        "Анна Иванова",
        "अनन्\u200dत शर्मा",
        "דוד לוי",
        "Nguyễn Thị Ánh",
        "ゆきこ",
        "ⴰⵎⵏⴰⵢ",
        "D’Angelo O'Brien-Smith",
    ],
)
def test_names_in_any_script_are_kept_composed(folder, name):
    people(folder, "p1")
    file = write_names(folder, f"person,name\np1,{unicodedata.normalize('NFD', name)}\n")
    assert load_people(folder, names=file).people[0].name == unicodedata.normalize("NFC", name)
    people(folder, name)
    (by_folder,) = (each for each in load_people(folder).people if each.person == name)
    assert by_folder.name == unicodedata.normalize("NFC", name)


def test_the_file_of_names_gives_names_and_genders(folder):
    people(folder, "p1", "p2", "p3")
    file = write_names(
        folder,
        'gender,person,name\nFemale,p2,"Curie,  Marie"\n,p1,Ann\nmale,p3,Al\n\n',
        encoding="utf-8-sig",
    )
    found = load_people(folder, names=file)
    assert [(each.name, each.gender) for each in found.people] == [
        ("Ann", None),
        ("Curie, Marie", "female"),
        ("Al", "male"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("person,name\nmarie,M\nalan,A\n", "folder 'bob' is not in it"),
        ("person,name\nmarie,M\nalam,A\nbob,B\n", "Did you mean 'alan'?"),
        ("person,name\nmarie,M\nmarie,A\nbob,B\n", "stands twice"),
        ("person,name\nmarie,M\nalan, \nbob,B\n", "line 3: the name is empty"),
        ("person,name\nmarie,M\nalan\nbob,B\n", "1 cells instead of 2"),
        ('person,name\nmarie,M\nalan,"A\nB"\nbob,B\n', "invisible character U+000A"),
        ("person,name\nmarie,M\nalan,A\u202eB\nbob,B\n", "invisible character U+202E"),
        ("person,name,gendre\nmarie,M,x\n", "Did you mean 'gender'?"),
        ("person\nmarie\n", "no column 'name'"),
        ("", "no column 'person'"),
        ("person,name,gender\nmarie,M,x\n", "unknown gender 'x'"),
        ("person,name\nmarie,M\nalan,m\nbob,B\n", "folders 'alan' and 'marie' both"),
    ],
)
def test_faults_of_the_file_of_names_are_named(folder, text, message):
    people(folder, "marie", "alan", "bob")
    assert message in refusal(folder, names=write_names(folder, text))


def test_a_file_of_names_that_is_not_unicode_is_refused(folder):
    people(folder, "a")
    file = write_names(folder, "person,name\na,Zoë\n", encoding="latin-1")
    assert "UTF-8" in refusal(folder, names=file)


def test_two_folders_with_one_name_are_refused(folder):
    people(folder, "zoë_lee", unicodedata.normalize("NFD", "Zoë Lee"))
    message = refusal(folder)
    assert "'zoë_lee'" in message
    assert "both have the name" in message


def test_the_digest_follows_names_and_photos(folder):
    people(folder, "a", "b")
    digest = load_people(folder).sha256
    assert load_people(folder).sha256 == digest
    names = write_names(folder, "person,name\na,Ann\nb,b\n")
    renamed = load_people(folder, names=names).sha256
    save(folder / "a" / "0.png", 200)
    assert len({digest, renamed, load_people(folder).sha256}) == 3
