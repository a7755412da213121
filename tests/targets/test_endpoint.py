"""An endpoint: what is sent, what is believed, and what is told of a server that misbehaves."""

import base64
import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
from PIL import Image

from lightleak import targets
from lightleak.errors import UserError
from lightleak.targets import endpoint
from lightleak.targets.endpoint import Question

RED = Image.new("RGB", (20, 10), "red")
QUESTION = Question(RED, "What is it?", 0.1, 7)


@contextmanager
def serving(reply):
    """A server on this machine; `reply(path, headers, body)` gives status and body, as bytes."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            length = int(self.headers.get("Content-Length") or 0)
            asked = json.loads(self.rfile.read(length)) if length else None
            status, body, *headers = reply(self.path, self.headers, asked)
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(OSError):  # Who asked may have hung up.
                self.wfile.write(body)

        do_GET = do_POST = _answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def chat(text, **more):
    return json.dumps({"choices": [{"message": {"content": text}}], **more}).encode()


def always(status, body, *headers):
    return lambda *_: (status, body, *headers)


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(endpoint, "_WAITS", (0.0, 0.0))
    monkeypatch.delenv(endpoint.KEY, raising=False)


def ask(address, *questions):
    return targets.connect(address).answer(questions or [QUESTION])


class TestWhatIsSent:
    def test_the_image_as_data_the_prompt_and_how_to_sample(self):
        seen = []

        def reply(path, headers, body):
            seen.append((path, headers, body))
            return 200, chat("a red thing", system_fingerprint="fp_1")

        with serving(reply) as address:
            (said,) = ask(f"{address}/#some/model:7b")
        (path, headers, body) = seen[0]
        picture, question = body["messages"][0]["content"]
        data = picture["image_url"]["url"].removeprefix("data:image/png;base64,")
        image = Image.open(BytesIO(base64.b64decode(data)))
        assert path == "/v1/chat/completions"
        assert (image.size, image.getpixel((3, 3))) == (RED.size, (255, 0, 0))
        assert question["text"] == "What is it?"
        assert (body["model"], body["temperature"], body["seed"]) == ("some/model:7b", 0.1, 7)
        assert body["max_tokens"] == endpoint.ANSWER_TOKENS
        assert "Authorization" not in headers
        assert (said.text, said.server) == ("a red thing", "fp_1")

    def test_the_key_comes_from_the_environment_and_is_shown_nowhere(self, monkeypatch):
        monkeypatch.setenv(endpoint.KEY, "sk-secret-123")
        seen = []

        def reply(path, headers, body):
            seen.append(headers["Authorization"])
            return 400, b"bad key sk-secret-123 in your request"

        with serving(reply) as address:
            target = targets.connect(f"{address}#m")
            with pytest.raises(ValueError, match="400: bad key …") as refused:
                target.answer([QUESTION])
        assert seen == ["Bearer sk-secret-123"]
        for shown in (repr(target), str(refused.value), target.name, str(target.hashes)):
            assert "secret" not in shown

    def test_answers_come_in_the_order_of_the_questions(self):
        def reply(path, headers, body):
            return 200, chat(str(body["seed"]))

        questions = [Question(RED, "?", 1.6, k) for k in range(20)]
        with serving(reply) as address:
            said = ask(f"{address}#m", *questions)
        assert [each.text for each in said] == [str(k) for k in range(20)]

    def test_a_large_picture_goes_as_jpeg(self):
        noise = Image.effect_noise((1800, 1800), 90).convert("RGB")
        url = endpoint._data_url(noise)
        assert url.startswith("data:image/jpeg;base64,")
        assert len(url) < 6_000_000


class TestWhichModel:
    def test_the_only_one_is_taken_and_named(self):
        body = json.dumps({"data": [{"id": "tiny"}]}).encode()
        with serving(always(200, body)) as address:
            assert targets.connect(address).name == f"{address}#tiny"

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b'{"data": [{"id": "a"}, {"id": "b"}]}', r"2 models \(a, b\)\. Name the model"),
            (b'{"data": []}', "0 models"),
            (b"<html>", "does not say which models"),
            (b'{"data": 3}', "does not say which models"),
        ],
    )
    def test_else_it_has_to_be_named(self, body, message):
        with serving(always(200, body)) as address, pytest.raises(UserError, match=message):
            targets.connect(address)

    def test_models_and_addresses_are_told_apart(self):
        hashes = {
            targets.connect(name).hashes["endpoint"]
            for name in ("http://a/v1#x", "http://a/v1#y", "http://b/v1#x", "http://b/v1/#x")
        }
        assert len(hashes) == 3

    @pytest.mark.parametrize(
        ("address", "message"),
        [
            ("http://user:word@host/v1#m", "http://host: an address with a password"),
            ("https://host/v1?api-key=x#m", "would be kept in the report"),
            ("http://#m", "no address"),
            ("http://[::1/v1#m", "no address"),
            ("http://host:99999/v1#m", "no address"),
        ],
    )
    def test_an_address_that_cannot_be_used(self, address, message):
        with pytest.raises(UserError, match=message) as refused:
            targets.connect(address)
        assert "word@" not in str(refused.value)


class TestHostileReplies:
    """One record fails, with a reason of one short line; nothing else does."""

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b"<html><script>alert(1)</script></html>", "no chat completion: <html>"),
            (b"", "no chat completion: nothing"),
            (b"\xff\xfe\x00", "no chat completion"),
            (b"[" * 100_000, "no chat completion"),
            (b'{"choices": []}', "no chat completion"),
            (b'["choices"]', "no chat completion"),
            (chat(None), "holds no text"),
            (chat(["a"]), "holds no text"),
            (b'{"choices": "' + b"x" * (1 << 21) + b'"}', "larger than 1 MiB"),
        ],
    )
    def test_no_answer(self, body, message):
        with serving(always(200, body)) as address, pytest.raises(ValueError, match=message) as no:
            ask(f"{address}#m")
        assert len(str(no.value)) < 300

    def test_an_answer_is_cut_and_made_storable(self):
        with serving(always(200, chat("\ud800" + "x" * 10_000))) as address:
            (said,) = ask(f"{address}#m")
        assert len(said.text) == 4096
        said.text.encode()

    @pytest.mark.parametrize("status", [400, 413, 422])
    def test_one_question_that_is_refused_is_not_asked_again(self, status):
        asked = []

        def reply(*_):
            asked.append(1)
            return status, b"too large"

        with serving(reply) as address, pytest.raises(ValueError, match=f"{status}: too large"):
            ask(f"{address}#m")
        assert len(asked) == 1


class TestServersThatCannotBeAskedOn:
    @pytest.mark.parametrize(
        ("status", "message"),
        [
            (401, "it wants a key .401.. Put the right one into .* LIGHTLEAK_API_KEY"),
            (403, "it wants a key"),
            (404, "knows no such address or model"),
            (302, "it says 302"),
            (402, "it says 402"),
            (500, "it says 500: out of order. What it has answered is kept"),
            (429, "it says 429"),
        ],
    )
    def test_are_told_of_in_one_line(self, status, message):
        there = ("Location", "http://127.0.0.1:1/elsewhere")
        with (
            serving(always(status, b"out\nof\x1b order", there)) as address,
            pytest.raises(UserError, match=message) as refused,
        ):
            ask(f"{address}#m")
        assert str(refused.value).isprintable()

    def test_a_wrong_key_is_said_to_be_wrong(self, monkeypatch):
        monkeypatch.setenv(endpoint.KEY, "sk-secret-123")
        with serving(always(401, b"")) as address, pytest.raises(UserError, match="not take the"):
            ask(f"{address}#m")

    def test_nobody_there(self):
        with serving(always(200, b"")) as address:
            pass
        with pytest.raises(UserError, match="cannot be reached"):
            ask(f"{address}#m")

    def test_a_busy_server_is_asked_again_as_late_as_it_says(self, monkeypatch):
        waited, replies = [], [(429, b"", ("Retry-After", "7")), (503, b""), (200, chat("yes"))]
        monkeypatch.setattr(endpoint.time, "sleep", waited.append)
        with serving(lambda *_: replies.pop(0)) as address:
            (said,) = ask(f"{address}#m")
        assert said.text == "yes"
        assert waited == [7.0, 0.0]


class TestFunctions:
    def test_a_function_answers(self):
        def said(image, prompt, temperature, seed):
            return f"{image.size} {prompt} {temperature} {seed}"

        (reply,) = ask(targets.registered(said))
        assert reply.text == "(20, 10) What is it? 0.1 7"

    def test_what_is_no_text_is_no_answer(self):
        with pytest.raises(ValueError, match="holds no text"):
            ask(targets.registered(lambda *_: None))

    def test_one_that_this_process_does_not_know(self):
        with pytest.raises(
            UserError, match=r"not known to this process\. Give the function itself"
        ):
            targets.connect("function:elsewhere.said")
