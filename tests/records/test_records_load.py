"""Records files: what is read, what is refused, and how a fault is named."""

import csv
import json
import os
import pickle
import tempfile
from codecs import BOM_UTF8
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightleak.errors import UserError
from lightleak.records import DEFAULT_PROMPT, Record, content_sha256, load
from lightleak.records.formats import tables

IMAGE = "img/a.png"


@pytest.fixture
def folder(tmp_path):
    """A folder with one image inside and one beside it."""
    inside = tmp_path / "set"
    (inside / "img").mkdir(parents=True)
    Image.new("RGB", (2, 2), "red").save(inside / IMAGE)
    Image.new("RGB", (2, 2), "blue").save(tmp_path / "secret.png")
    return inside


def row(**fields):
    return {"id": "a1", "image": IMAGE, "text": "a red kettle"} | fields


def write_jsonl(folder, *rows, name="records.jsonl"):
    file = folder / name
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


def write_json(folder, entries):
    file = folder / "records.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    return file


def write_parquet(folder, columns, name="records.parquet"):
    file = folder / name
    pq.write_table(pa.table(columns), file)
    return file


def write_csv(folder, *rows, name="records.csv"):
    file = folder / name
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return file


def only_record(path, **options):
    record_set = load(path, **options)
    assert not record_set.failures
    (record,) = record_set.records
    return record


def refusal(path, **options):
    """The message with which the whole file is refused; always one line that names the file."""
    with pytest.raises(UserError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    return message


# JSONL


def test_a_full_jsonl_record(folder):
    line = row(prompt="What is it?", group="p17", meta={"camera": "x"})
    assert only_record(write_jsonl(folder, line)) == Record(
        "a1", folder / IMAGE, "a red kettle", "What is it?", "p17", {"camera": "x"}
    )


def test_a_record_without_a_prompt_gets_the_default(folder):
    assert only_record(write_jsonl(folder, row())).prompt == DEFAULT_PROMPT


texts = st.text(min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"id": texts, "text": texts},
            optional={
                "prompt": st.text(),
                "group": texts,
                "meta": st.dictionaries(st.text(), st.integers() | st.text() | st.none()),
            },
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda fields: fields["id"],
    ),
    st.sampled_from(["\n", "\r\n", "\n\n", "\n  \r\n"]),
    st.booleans(),
    st.booleans(),
)
def test_jsonl_comes_back_as_it_was_written(rows, line_end, byte_order_mark, escaped):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        Image.new("L", (1, 1)).save(folder / "a.png")
        lines = [json.dumps(fields | {"image": "a.png"}, ensure_ascii=escaped) for fields in rows]
        content = ("\ufeff" if byte_order_mark else "") + line_end.join(lines)
        (folder / "r.jsonl").write_bytes(content.encode())
        record_set = load(folder / "r.jsonl")
    assert not record_set.failures
    assert list(record_set.records) == [
        Record(**({"prompt": DEFAULT_PROMPT} | fields | {"image": folder / "a.png"}))
        for fields in rows
    ]


@pytest.mark.parametrize("text", ["e\u0301", "\u00e9", " padded ", "a\u2028b", "x" * 3_000_000])
def test_texts_are_not_altered(folder, text):
    assert only_record(write_jsonl(folder, row(text=text))).text == text


def test_numbers_as_ids_and_groups_become_strings(folder):
    record = only_record(write_jsonl(folder, row(id=7, group=3)))
    assert (record.id, record.group) == ("7", "3")


def test_a_blank_group_is_no_group(folder):
    assert only_record(write_jsonl(folder, row(group=" "))).group is None


def test_the_prefix_stands_before_every_id(folder):
    record_set = load(write_jsonl(folder, row(), row(id="a2", text="")), id_prefix="control/")
    assert record_set.records[0].id == "control/a1"
    assert record_set.failures[0].id == "control/a2"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"id": NaN}', "NaN"),
        ("[" * 200_000, "nested too deeply"),
        (json.dumps({"image": IMAGE, "text": "x"}), "no id"),
        (json.dumps(row(id="  ")), "no id"),
        (json.dumps(row(id=[1])), "id must be a string, not list"),
        (json.dumps(row(id=True)), "id must be a string, not bool"),
        (json.dumps(row(id="\ud800")), "lone surrogate"),
        (json.dumps(row(captoin="x")), "'captoin'"),
        (json.dumps(row(caption="x")), "'text' and 'caption' all mean text"),
    ],
)
def test_a_line_that_breaks_the_file_is_named(folder, line, told):
    message = refusal(write_jsonl(folder, row(id="first"), "", line))
    assert told in message
    assert "line 3" in message


def test_a_file_in_another_encoding_is_named_with_its_line(folder):
    file = folder / "latin.jsonl"
    file.write_bytes(json.dumps(row(text="é"), ensure_ascii=False).encode("latin-1"))
    assert "line 1" in refusal(file)


def test_an_unknown_column_gets_a_suggestion_and_the_known_ones(folder):
    message = refusal(write_jsonl(folder, row(PROMT="x")))
    assert "'PROMT'" in message
    assert "Did you mean 'prompt'?" in message
    assert "instruction" in message
    assert "meta" in message


@pytest.mark.parametrize("second", ["a1", "1"])
def test_an_id_given_twice_is_refused_with_both_places(folder, second):
    first = int(second) if second.isdigit() else second
    file = write_jsonl(folder, row(id=first), row(id="b"), row(id=second, text=""))
    message = refusal(file)
    assert repr(second) in message
    assert "line 1 " in message
    assert "line 3" in message


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.parquet", "r.json"])
def test_an_empty_file_has_no_records(folder, name):
    (folder / name).touch()
    assert "no records" in refusal(folder / name)


def test_files_with_structure_but_no_rows_have_no_records(folder):
    empty = {"image": pa.array([], pa.string()), "text": pa.array([], pa.string())}
    for file in (
        write_jsonl(folder, "", " "),
        write_csv(folder, ["image", "text"]),
        write_json(folder, []),
        write_parquet(folder, empty),
    ):
        assert "no records" in refusal(file)


# Faults of single records


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"image": "img/none.png"}, "no image file 'img/none.png'"),
        ({"image": "img"}, "no image file 'img'"),
        ({"image": "a\nb.png"}, "no image file"),
        ({"image": "a\0b.png"}, "null byte"),
        ({"image": "x" * 5000}, "cannot be opened"),
        ({"image": None}, "no image"),
        ({"image": ""}, "no image"),
        ({"image": 7}, "image must be a string, not int"),
        ({"image": {"path": IMAGE}}, "image must be a string, not dict"),
        ({"text": ""}, "text is empty"),
        ({"text": " \n\t\u00a0"}, "text is empty"),
        ({"text": None}, "text is empty"),
        ({"text": ["a"]}, "text must be a string, not list"),
        ({"text": "\udfff"}, "text has half a character"),
        ({"prompt": 5}, "prompt must be a string, not int"),
        ({"group": {"a": 1}}, "group must be a string, not dict"),
        ({"meta": [1]}, "meta must be an object, not list"),
    ],
)
def test_a_bad_record_is_listed_and_the_rest_goes_on(folder, fields, told):
    bad_id = "bad\n\u2028one"
    file = write_jsonl(folder, row(), row(id=bad_id) | fields, row(id="a3"))
    record_set = load(file)
    assert [record.id for record in record_set.records] == ["a1", "a3"]
    (failure,) = record_set.failures
    assert (failure.id, failure.stage) == (bad_id, "load")
    assert told in failure.error
    assert "line 2" in failure.error
    assert repr(bad_id) in failure.error
    assert len(failure.error.splitlines()) == 1
    assert refusal(file, strict=True) == failure.error


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_an_image_that_may_not_be_read_is_listed(folder):
    (folder / IMAGE).chmod(0)
    (failure,) = load(write_jsonl(folder, row())).failures
    assert "cannot be opened" in failure.error


# Images outside the folder


def link_to_file(folder):
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    return "link.png"


def link_to_folder(folder):
    (folder / "up").symlink_to(folder.parent, target_is_directory=True)
    return "up/secret.png"


ESCAPES = [
    pytest.param(lambda _: "../secret.png", id="parent"),
    pytest.param(lambda _: "img/../../secret.png", id="through a folder"),
    pytest.param(lambda folder: str(folder.parent / "secret.png"), id="absolute"),
    pytest.param(link_to_file, id="symlink"),
    pytest.param(link_to_folder, id="symlinked folder"),
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_an_image_outside_is_opened_only_when_allowed(folder, escape):
    file = write_jsonl(folder, row(image=escape(folder)))
    (failure,) = load(file).failures
    assert "outside the folder" in failure.error
    assert only_record(file, allow_outside=True).image == folder.parent / "secret.png"


def test_a_sibling_folder_whose_name_begins_alike_is_outside(folder):
    sibling = folder.with_name(folder.name + "-other")
    sibling.mkdir()
    Image.new("L", (1, 1)).save(sibling / "a.png")
    assert load(write_jsonl(folder, row(image=f"../{sibling.name}/a.png"))).failures


def test_paths_that_stay_inside_are_allowed(folder):
    (folder / "link.png").symlink_to(folder / IMAGE)
    inside = ["img/../img/a.png", str(folder / IMAGE), "link.png"]
    rows = [row(id=number, image=image) for number, image in enumerate(inside)]
    record_set = load(write_jsonl(folder, *rows))
    assert {record.image for record in record_set.records} == {folder / IMAGE}
    assert not record_set.failures


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "img", "a.png", "set", "secret.png", "/", "up"])))
def test_no_combination_of_parts_leaves_the_folder(parts):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "set"
        (folder / "img").mkdir(parents=True)
        for file in (folder / IMAGE, folder.parent / "secret.png"):
            Image.new("L", (1, 1)).save(file)
        (folder / "up").symlink_to(folder.parent)
        record_set = load(write_jsonl(folder, row(image="/".join(parts))))
        for record in record_set.records:
            assert record.image == folder / IMAGE


def test_a_loop_of_symlinks_is_a_failure(folder):
    (folder / "loop.png").symlink_to(folder / "loop.png")
    assert len(load(write_jsonl(folder, row(image="loop.png"))).failures) == 1


# Image folders and CSV


def write_metadata(folder, name):
    if name.endswith("csv"):
        return write_csv(folder, ["file_name", "text"], [IMAGE, "a, \n“red” one"], name=name)
    values = {"file_name": IMAGE, "text": "a, \n“red” one"}
    if name.endswith("jsonl"):
        return write_jsonl(folder, values, name=name)
    return write_parquet(folder, {key: [value] for key, value in values.items()}, name=name)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_an_image_folder_names_its_records_by_file(folder, name):
    write_metadata(folder, name)
    expected = Record(IMAGE, folder / IMAGE, "a, \n“red” one")
    assert only_record(folder) == expected
    assert only_record(folder / name) == expected


def test_a_folder_without_or_with_two_metadata_files_is_refused(folder):
    assert "no metadata file" in refusal(folder)
    for name in ("metadata.csv", "metadata.jsonl"):
        write_metadata(folder, name)
    assert "metadata.csv and metadata.jsonl" in refusal(folder)


def test_an_image_with_two_captions_in_a_folder_is_refused(folder):
    write_csv(folder, ["file_name", "text"], [IMAGE, "a"], [IMAGE, "b"], name="metadata.csv")
    assert "row 0 (counted from 0) and again at row 1" in refusal(folder)


def test_csv_cells_are_text_and_empty_ones_absent(folder):
    header = ["id", "image_path", "question", "answer", "group", "meta"]
    file = write_csv(
        folder,
        header,
        ["001", IMAGE, "", "1.50", "", ""],
        ["002", IMAGE, "NA", "null", "07", '{"a": [1]}'],
        ["003", IMAGE, "", "", "", ""],
        ["004", IMAGE, "", "x", "", "{"],
    )
    record_set = load(file)
    assert record_set.records == (
        Record("001", folder / IMAGE, "1.50"),
        Record("002", folder / IMAGE, "null", "NA", "07", {"a": [1]}),
    )
    assert [failure.id for failure in record_set.failures] == ["003", "004"]
    assert "text is empty" in record_set.failures[0].error
    assert "meta is not JSON" in record_set.failures[1].error


def test_csv_with_byte_order_mark_windows_lines_and_a_very_long_one(folder):
    long_text = "x" * 5_000_000
    content = f"id,image,text\r\n1,{IMAGE},short\r\n\r\n2,{IMAGE},{long_text}\r\n"
    (folder / "r.csv").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert [record.text for record in load(folder / "r.csv").records] == ["short", long_text]


def test_csv_values_with_newlines_may_cross_the_blocks_it_is_read_in(folder, monkeypatch):
    monkeypatch.setattr(tables, "CSV_BLOCK_BYTES", 100)
    texts = ["one\ntwo\n" * length for length in range(1, 9)]
    rows = [[str(number), IMAGE, text] for number, text in enumerate(texts)]
    file = write_csv(folder, ["id", "image", "text"], *rows)
    assert [record.text for record in load(file).records] == texts


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("image,text\na.png\n", "not a readable CSV"),
        ("image,text\na.png,\xff\n", "not a readable CSV"),
        ("image,\xff\na.png,x\n", "not a readable CSV"),
        ("image,txet\na.png,x\n", "Did you mean 'text'?"),
        ("image,text,text\na.png,x,y\n", "all mean text"),
        ("id,image\n1,a.png\n", "no column for the text"),
        ("id,text\n1,x\n", "no column for the image"),
    ],
)
def test_a_bad_csv_is_refused(folder, content, told):
    (folder / "r.csv").write_bytes(content.encode("latin-1"))
    assert told in refusal(folder / "r.csv")


# Parquet


def test_parquet_with_images_as_hugging_face_structs(folder):
    encoded = (folder / IMAGE).read_bytes()
    images = [{"bytes": encoded, "path": "x.png"}, {"bytes": None, "path": IMAGE}]
    file = write_parquet(folder, {"image": images, "caption": ["one", "two"]})
    assert load(file).records == (
        Record("0", encoded, "one"),
        Record("1", folder / IMAGE, "two"),
    )


def test_parquet_with_images_as_bytes_and_ids_as_numbers(folder):
    encoded = (folder / IMAGE).read_bytes()
    columns = {
        "id": pa.array([3.0, 4.5, 5.0]),
        "image": pa.array([encoded, encoded, None], pa.binary()),
        "text": ["one", "two", "three"],
        "group": pa.array([7.0, float("nan"), None]),
        "meta": [{"source": "x"}, None, None],
    }
    record_set = load(write_parquet(folder, columns))
    assert record_set.records == (
        Record("3", encoded, "one", group="7", meta={"source": "x"}),
        Record("4.5", encoded, "two"),
    )
    (failure,) = record_set.failures
    assert failure.id == "5"
    assert "no image" in failure.error
    assert "row 2 (counted from 0)" in failure.error


def test_parquet_faults(folder):
    (folder / "no.parquet").write_bytes(b"PAR1 this is not it")
    assert "not a readable Parquet file" in refusal(folder / "no.parquet")
    file = write_parquet(folder, {"image": [IMAGE], "text": ["x"], "labels": [1]})
    assert "'labels'" in refusal(file)


def test_parquet_with_text_that_is_not_utf8_is_refused(folder):
    texts = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    file = write_parquet(folder, {"image": [IMAGE], "text": texts})
    assert "not a readable Parquet file" in refusal(file)


def test_a_damaged_parquet_file_is_refused(folder):
    file = write_parquet(folder, {"image": [IMAGE] * 900, "text": [str(n) for n in range(900)]})
    content = bytearray(file.read_bytes())
    content[20:600] = bytes(580)
    file.write_bytes(content)
    assert "not a readable Parquet file" in refusal(file)


# Conversations


def llava(*turns, **fields):
    speakers = ("human", "gpt") * len(turns)
    said = [{"from": who, "value": what} for who, what in zip(speakers, turns, strict=False)]
    return {"id": "c1", "image": IMAGE, "conversations": said} | fields


def test_a_llava_conversation(folder):
    file = write_json(folder, [llava("<image>\nWhat is it?", "A kettle.")])
    file.write_bytes(BOM_UTF8 + file.read_bytes())
    assert only_record(file) == Record("c1", folder / IMAGE, "A kettle.", "What is it?")


def test_of_a_longer_conversation_the_first_pair_is_the_record_and_meta_says_so(folder):
    file = write_json(folder, [llava("One?", "1", "Two?<image>", "2", "Three?", "3", source="x")])
    record = only_record(file)
    assert (record.prompt, record.text) == ("One?", "1")
    assert record.meta == {"turns": 3, "source": "x"}


def test_sharegpt_messages_with_plain_and_typed_content(folder):
    def messages(question):
        return [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": "A kettle."}]},
        ]

    typed = [{"type": "image"}, {"type": "text", "text": "What?"}]
    entries = [
        {"messages": messages(question), "images": [IMAGE]} for question in ("<image>What?", typed)
    ]
    assert load(write_json(folder, entries)).records == (
        Record("0", folder / IMAGE, "A kettle.", "What?"),
        Record("1", folder / IMAGE, "A kettle.", "What?"),
    )


def test_a_question_that_is_only_the_image_gets_the_default_prompt(folder):
    assert only_record(write_json(folder, [llava("<image>", "x")])).prompt == DEFAULT_PROMPT


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (llava(), "does not begin with a question"),
        (llava("only asked"), "does not begin with a question"),
        ({"conversations": "hello"}, "not a list of objects"),
        (llava("a", 5), "must be a string, not int"),
        (llava("a", "b", image=None), "no image"),
        (llava("a", " "), "text is empty"),
        (llava("a", "b", image=[IMAGE, IMAGE]), "2 images"),
    ],
)
def test_a_bad_conversation_is_listed(folder, entry, told):
    record_set = load(write_json(folder, [llava("a", "b"), entry | {"id": "bad"}]))
    assert len(record_set.records) == 1
    (failure,) = record_set.failures
    assert failure.id == "bad"
    assert told in failure.error


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('[\n{"id": 1,\n}]', "line 3"),
        ("{}", "not a JSON list"),
        ("[{}]", "neither conversations nor messages"),
        ("\xff", "not JSON"),
    ],
)
def test_a_bad_json_file_is_refused(folder, content, told):
    (folder / "r.json").write_bytes(content.encode("latin-1"))
    assert told in refusal(folder / "r.json")


# Paths


def test_a_missing_path_and_an_unknown_format_are_named(folder):
    assert "no such file" in refusal(folder / "none.jsonl")
    (folder / "records.txt").write_text("x")
    assert ".jsonl" in refusal(folder / "records.txt")
    assert "cannot be opened" in refusal(folder / ("x" * 5000))


def test_a_hub_id_is_told_how_to_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "hf download owner/some-set --repo-type dataset" in refusal("owner/some-set")
    assert "hf download" not in refusal("owner/some-set.jsonl")
    (tmp_path / "here").mkdir()
    assert "hf download" not in refusal("here/some-set")


# The digest


def digest(folder, *rows):
    return load(write_jsonl(folder, *rows)).sha256


def test_the_digest_depends_on_content_only(folder):
    before = digest(folder, row())
    assert digest(folder, row(id="x", text=""), row(meta={"a": 1})) == before
    (folder / "b.png").write_bytes((folder / IMAGE).read_bytes())
    assert digest(folder, row(image="b.png")) == before


@pytest.mark.parametrize(
    "change", [{"id": "a2"}, {"text": "other"}, {"prompt": "Why?"}, {"group": "g"}]
)
def test_the_digest_changes_with_each_field(folder, change):
    assert digest(folder, row()) != digest(folder, row(**change))


def test_the_digest_changes_with_the_bytes_of_an_image(folder):
    before = digest(folder, row())
    with (folder / IMAGE).open("ab") as file:
        file.write(b"\0")
    assert digest(folder, row()) != before


def test_the_digest_does_not_confuse_where_fields_end():
    first = Record("a", b"", "bc", prompt="d")
    assert content_sha256([first]) != content_sha256([Record("a", b"", "b", prompt="cd")])


def test_a_record_travels_between_processes(folder):
    record = only_record(write_jsonl(folder, row(meta={"a": 1})))
    assert pickle.loads(pickle.dumps(record)) == record  # noqa: S301
