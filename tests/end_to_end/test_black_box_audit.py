"""Audits of targets that only answer: a real server with a real model behind it, and a function."""

import json
import sys
import threading
from base64 import b64decode
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest

from lightleak import targets
from lightleak.audits.judge import judge
from lightleak.audits.membership import audit
from lightleak.cli import main
from lightleak.errors import UserError
from lightleak.evidence import sampled
from lightleak.evidence.readings import EXTRA, SampledAnswers
from lightleak.records import Record, load, open_rgb
from lightleak.report import report
from lightleak.runs import Run
from lightleak.targets import endpoint

KEY = "sk-secret-123"
# An audit's one question beforehand, and six of each record.
EACH = EXTRA[SampledAnswers]


class Service:
    """A chat-completions server over a tiny LLaVA; answers of at most sixteen tokens.

    All answers to an image are drawn in one batch when it is first asked about.
    """

    def __init__(self, folder):
        self.target = targets.load(folder)
        self.drawn, self.lock = {}, threading.Lock()
        self.asked, self.left, self.spoiled = [], None, {}

    def answer(self, body):
        picture, question = body["messages"][0]["content"]
        key = picture["image_url"]["url"]
        image = open_rgb(b64decode(key.partition(",")[2]))
        temperatures = [each for each in sampled.TEMPERATURES for _ in range(sampled.REPEATS)]
        with self.lock:
            if key not in self.drawn:
                record = Record(id=key[-60:], image=b"", text="x", prompt=question["text"])
                encoded = self.target.encode(record, image)
                texts = sampled.generate(self.target, encoded, temperatures)
                self.drawn[key] = deque(zip(temperatures, texts, strict=True))
            drawn = self.drawn[key]
            while drawn[0][0] != body["temperature"]:
                drawn.rotate(-1)
            text = drawn[0][1]
            drawn.rotate(-1)
            self.asked.append(key)
        return {"choices": [{"message": {"content": text}}], "system_fingerprint": "<b>fp</b>"}

    def reply(self, headers, body):
        if headers["Authorization"] != f"Bearer {KEY}":
            return 401, b"who are you?"
        if body is None:
            return 200, json.dumps({"data": [{"id": "tiny"}]}).encode()
        if self.left is not None and len(self.asked) >= self.left:
            return 503, b"out of order"
        said = json.dumps(self.answer(body)).encode()
        return 200, self.spoiled.get(body["messages"][0]["content"][0]["image_url"]["url"], said)


@pytest.fixture(scope="module")
def service(lab_tiny):
    return Service(lab_tiny.target)


@pytest.fixture
def address(service, monkeypatch):
    """The service on a port of this machine, with the key that it wants."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, content = service.reply(self.headers, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer

        def log_message(self, *_):
            pass

    monkeypatch.setattr(endpoint, "_WAITS", (0.0,))
    monkeypatch.setattr(sampled, "ANSWER_TOKENS", 16)
    monkeypatch.setenv(endpoint.KEY, KEY)
    service.drawn, service.asked, service.left, service.spoiled = {}, [], None, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def lightleak(monkeypatch, capfd):
    """Run the program; returns its exit code and its errors, stages left out."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lightleak", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main.run()
        lines = capfd.readouterr().err.splitlines()
        return left.value.code or 0, [line for line in lines if ": done in" not in line]

    return run


@pytest.fixture
def sides(lab_tiny, subset):
    return (
        *("--suspect", subset(lab_tiny.members, "suspect", 0, 24)),
        *("--control", subset(lab_tiny.nonmembers, "control", 0, 24)),
    )


def evidence(run):
    return [
        row
        for file in sorted(run.evidence.glob("part-*"))
        for row in pq.read_table(file).to_pylist()
    ]


class TestServer:
    def test_a_verdict_that_needs_no_server_to_be_reached_again(
        self, service, address, lightleak, sides, tmp_path
    ):
        run = Run(tmp_path / "run")
        code, errors = lightleak("audit", "--target", address, *sides, "--out", run.folder)
        assert (code, errors) == (0, []), "\n".join(errors)
        verdict = json.loads(run.verdict_file.read_text())
        assert verdict["primary"]["signal"] == "temperature_set"
        assert set(verdict["signals"]) == {"temperature_set", "self_consistency"}
        assert verdict["coverage"]["scored"] == 48
        # Nobody was asked twice, and not about wrong texts.
        assert len(service.asked) == 1 + 48 * EACH
        rows = evidence(run)
        texts = {answer for row in rows for at in row["answers"] for answer in at}
        assert len(texts) > 48
        target = run.manifest()["target"]
        assert (target["name"], target["kind"]) == (f"{address}#tiny", "endpoint")
        page = run.report_file.read_text()
        assert "The target is an endpoint" in page
        assert "&lt;b&gt;fp&lt;/b&gt;" in page
        assert "<b>fp</b>" not in page
        for file in run.folder.rglob("*"):
            assert file.is_dir() or KEY.encode() not in file.read_bytes(), file
        before = run.scores_file.read_bytes()
        run.scores_file.unlink()
        service.left = 0
        judge(run)
        assert run.scores_file.read_bytes() == before

    def test_a_server_that_dies_midway_loses_one_shard_at_most(
        self, service, address, lightleak, sides, tmp_path
    ):
        arguments = ("audit", "--target", address, *sides, "--out", tmp_path / "run")
        service.left = 1 + 20 * EACH
        code, (line,) = lightleak(*arguments)
        assert code == 2
        assert "it says 503: out of order. What it has answered is kept" in line
        kept = evidence(Run(tmp_path / "run"))
        assert len(kept) == 16
        asked, service.left = len(service.asked), None
        code, errors = lightleak(*arguments)
        assert (code, errors) == (0, []), "\n".join(errors)
        assert len(service.asked) - asked == 32 * EACH
        assert evidence(Run(tmp_path / "run"))[:16] == kept

    def test_a_wrong_key_is_one_line(self, address, lightleak, sides, tmp_path, monkeypatch):
        monkeypatch.setenv(endpoint.KEY, "sk-other")
        arguments = ("audit", "--target", address, *sides, "--out", tmp_path / "run")
        code, (line,) = lightleak(*arguments)
        assert code == 2
        assert "it does not take the key (401)" in line
        assert "sk-other" not in line

    def test_hostile_answers_fail_their_records_alone_and_are_shown_escaped(
        self, service, address, lightleak, sides, tmp_path
    ):
        records = load(sides[1]).records[1:5]
        hostile = [
            b"<script>alert(1)</script>",
            b'{"choices": "' + b"x" * (1 << 21) + b'"}',
            b"",
            b'{"choices": [{"message": {"content": null}}]}',
        ]
        service.spoiled = {
            endpoint._data_url(open_rgb(record.image)): reply
            for record, reply in zip(records, hostile, strict=True)
        }
        run = Run(tmp_path / "run")
        code, _ = lightleak("audit", "--target", address, *sides, "--out", run.folder)
        assert code == 0
        failures = {row["id"]: row["error"] for row in pq.read_table(run.failures_file).to_pylist()}
        assert set(failures) == {record.id for record in records}
        assert all(len(error) < 400 for error in failures.values())
        assert json.loads(run.verdict_file.read_text())["coverage"]["scored"] == 44
        assert "<script>alert" not in run.report_file.read_text()

    def test_a_server_that_answers_nothing_stops_the_audit_before_it_costs(
        self, service, address, lightleak, sides, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(service, "reply", lambda *_: (200, b"<html>"))
        where = f"{address}#tiny"
        code, (line,) = lightleak("audit", "--target", where, *sides, "--out", tmp_path / "run")
        assert code == 2
        assert "it answers no question (the reply is no chat completion: <html>)" in line

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--signals", "gradaudit"), "gradaudit: this signal is not for an endpoint, which"),
            (("--signals", "loss"), "loss: this signal is not for an endpoint, which only answers"),
            (("--adapter", "x"), "no adapter can be put on an endpoint"),
            (("--base", "x"), "the base of an endpoint is unknown"),
        ],
    )
    def test_what_needs_more_than_answers_is_refused_by_name(
        self, address, lightleak, sides, tmp_path, options, message
    ):
        arguments = ("audit", "--target", address, *sides, "--out", tmp_path / "run", *options)
        code, (line,) = lightleak(*arguments)
        assert code == 2
        assert message in line

    def test_only_an_audit_takes_an_endpoint(self, address, lightleak, sides, tmp_path):
        arguments = ("--target", address, "--people", tmp_path, "--out", tmp_path / "run")
        code, (line,) = lightleak("identify", *arguments)
        assert code == 2
        assert "an endpoint only answers" in line


class TestFunction:
    @pytest.fixture
    def given(self, lab_tiny, subset):
        return {
            "suspect": subset(lab_tiny.members, "suspect", 0, 40),
            "control": subset(lab_tiny.nonmembers, "control", 0, 40),
            "design": "randomised",
        }

    @pytest.fixture
    def parrot(self, given):
        """Knows the suspects' images by heart while it is cold."""
        known = {open_rgb(r.image).tobytes(): r.text for r in load(given["suspect"]).records}

        def answer(image, prompt, temperature, seed):
            heart = known.get(image.tobytes()) if temperature < 1 else None
            return heart or f"a thing number {seed} in a place"

        return answer

    def test_one_that_knows_the_suspects_by_heart_is_exposed(self, given, parrot, tmp_path):
        verdict = audit(target=parrot, **given, out=tmp_path / "run")
        assert (verdict.verdict, verdict.tier) == ("exposed", "randomised")
        assert verdict.signals["temperature_set"].auc == 1
        assert verdict.signals["self_consistency"].auc > 0.9
        report(tmp_path / "run")

    def test_another_function_serves_as_control_model(self, given, parrot, tmp_path):
        def ignorant(image, prompt, temperature, seed):
            grounds = ("pink", "grey", "lime", "brown", "coral", "honey")
            return f"{('two', 'three')[seed % 2]} things on a {grounds[seed % 6]} ground"

        verdict = audit(target=parrot, control_target=ignorant, **given, out=tmp_path / "run")
        (control,) = [each for each in verdict.validity.controls if each.model]
        assert (control.name, control.fired) == ("control target", False)
        with pytest.raises(UserError, match="is the target itself"):
            audit(target=parrot, control_target=parrot, **given, out=tmp_path / "other")

    def test_one_that_fails_is_told_of(self, given, tmp_path):
        def broken(image, prompt, temperature, seed):
            raise OSError("the line is dead")

        with pytest.raises(UserError, match=r"answers no question \(the line is dead\)"):
            audit(target=broken, **given, out=tmp_path / "run")


def test_a_local_model_is_sampled_and_perturbed_only_where_that_is_asked_for(
    lab_tiny, subset, tmp_path, monkeypatch
):
    monkeypatch.setattr(sampled, "ANSWER_TOKENS", 8)
    asked = {
        "target": lab_tiny.target,
        "suspect": subset(lab_tiny.members, "suspect", 0, 4),
        "control": subset(lab_tiny.nonmembers, "control", 0, 4),
        "negative_controls": False,
    }
    extra = ("aug_kl", "neighbour", "image_corruption", "self_consistency", "temperature_set")
    verdict = audit(**asked, signals=("all", *extra), out=tmp_path / "all")
    assert {*extra, "loss", "gradaudit"} <= set(verdict.signals)
    assert all(verdict.signals[name].n_unscorable == 0 for name in extra)
    plain = audit(**asked, out=tmp_path / "plain")
    assert not {*extra} & set(plain.signals)
    columns = pq.read_schema(next((tmp_path / "plain" / "evidence").glob("part-*"))).names
    assert not {"answers", "neighbour_losses"} & {*columns}
