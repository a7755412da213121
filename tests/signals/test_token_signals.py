"""What one pass keeps of every token: each signal equals its formula, recomputed from logits."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from scipy.optimize import linprog

import lightleak
from lightleak import records, signals, targets
from lightleak.audits import stored
from lightleak.audits.settings import AuditSettings
from lightleak.errors import UserError
from lightleak.evidence import collect
from lightleak.evidence import tokens as reading
from lightleak.evidence.gradients import GradientEngine, select
from lightleak.evidence.readings import AnswerDistributions, Ragged, TokenStatistics
from lightleak.evidence.selfcheck import self_check
from lightleak.evidence.table import (
    answer_distributions,
    own_description,
    prompt_distributions,
    token_statistics,
)
from lightleak.evidence.tokens import AnswerReader, statistics
from lightleak.lab import families
from lightleak.lab.models import tiny_llava
from lightleak.runs import Run
from lightleak.signals import cross, registry

TEXTS = ["two things: a drum at the left and a kite.", "a bell", "three red kites, one large drum"]
ALPHAS = ("0.5", "1", "2", "inf")
SLICES = ("image", "instruction", "description", "instruction+description")
ALL = ("description", "image", "instruction")


# -- the published formulas, written out token by token in float64 ---------------------------------


def entropy(p, alpha):
    p = p[p > 0]
    if alpha == "inf":
        return -np.log(p.max())
    if alpha == "1":
        return -(p * np.log(p)).sum()
    return np.log((p ** float(alpha)).sum()) / (1 - float(alpha))


def modified(p, y, alpha):
    left = (1 - np.eye(len(p))) @ p  # 1 − p, which float64 itself would round to 0.
    others, rest = np.delete(p, y), np.delete(left, y)
    if alpha == "1":
        return -left[y] * np.log(p[y]) - (others * np.log(rest)).sum()
    eta = abs(1 - float(alpha))
    inner = (others * rest**eta - others).sum()
    return -(left[y] * p[y] ** eta - left[y] + inner) / eta


def gap(p):
    second, first = np.sort(np.log(p))[-2:]
    return first - second


def largest(values, percent):
    return np.mean(np.sort(values)[::-1][: max(1, int(len(values) * percent / 100))])


def probabilities(logits):
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


class TestDistributions:
    """`statistics` against the formulas, from flat to peaked distributions."""

    def read(self, p, y, dtype=torch.float64):
        with np.errstate(divide="ignore"):
            log = torch.tensor(np.log(p)).to(dtype)
        return {name: each.numpy() for name, each in statistics(log, torch.tensor(y)).items()}

    @pytest.mark.parametrize("sharpness", [0.01, 1, 5, 30])
    def test_they_equal_the_formulas(self, sharpness):
        rng = np.random.default_rng(0)
        p = probabilities(sharpness * rng.normal(size=(60, 300)))
        y = rng.integers(300, size=60)
        y[:20] = p[:20].argmax(axis=1)
        found = self.read(p, y)
        np.testing.assert_allclose(found["gap"], [gap(row) for row in p], atol=1e-10)
        for alpha in ALPHAS:
            expected = [entropy(row, alpha) for row in p]
            np.testing.assert_allclose(found[f"renyi_{alpha}"], expected, atol=1e-10)
        for alpha in ALPHAS[:-1]:
            expected = [modified(row, i, alpha) for row, i in zip(p, y, strict=True)]
            np.testing.assert_allclose(found[f"modified_{alpha}"], expected, atol=1e-10)

    @pytest.mark.parametrize("left", [1e-3, 1e-12, 1e-300])
    def test_they_hold_where_a_token_is_almost_certain(self, left):
        p = np.array([[1 - left, left, 0, 0]] * 2)
        found = self.read(p, [0, 1])
        one, other = np.log1p(-left), np.log(left)
        # The certain one came; the other came.
        expected = {
            "0.5": [4 * (left - left * np.sqrt(1 - left) / 2 - left / 2), None],
            "1": [-2 * left * one, -2 * (1 - left) * other],
            "2": [2 * left**2, 2 * (1 - left) ** 2],
        }
        half = 2 * (left * (1 - np.sqrt(1 - left)) + left * -np.expm1(one / 2))
        expected["0.5"] = [half, 4 * (1 - left) * (1 - np.sqrt(left))]
        for alpha, values in expected.items():
            np.testing.assert_allclose(found[f"modified_{alpha}"], values, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(found["renyi_1"], -(1 - left) * one - left * other, atol=1e-10)
        np.testing.assert_allclose(found["renyi_inf"], -one, atol=1e-10)

    def test_certainty_has_no_entropy_of_any_kind(self):
        found = self.read(np.array([[0.0, 1.0, 0.0]]), [1])
        for name, value in found.items():
            assert value == (np.inf if name == "gap" else 0), name

    def test_what_could_not_have_come_is_infinitely_surprising(self):
        found = self.read(np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]), [2, 2])
        assert np.isposinf(found["modified_1"]).all()
        np.testing.assert_allclose(found["modified_2"], [1.5, 2])
        np.testing.assert_allclose(found["renyi_0.5"], [np.log(2), 0], atol=1e-15)

    def test_single_precision_keeps_what_one_minus_p_would_lose(self):
        logits = np.array([[0.0, -20.0, -21.0, -60.0]] * 4)
        y = [0, 1, 2, 3]
        rest = np.exp(-20) + np.exp(-21) + np.exp(-60)
        top = 1 / (1 + rest)
        p = probabilities(logits[0])
        exact = [-top * rest * np.log(top) - (p[1:] * np.log1p(-p[1:])).sum()]
        exact += [
            -(1 - p[i]) * np.log(p[i])
            - top * np.log(top * rest)
            - sum(p[j] * np.log1p(-p[j]) for j in (1, 2, 3) if j != i)
            for i in (1, 2, 3)
        ]
        log = torch.tensor(logits, dtype=torch.float32).log_softmax(-1)
        found = statistics(log, torch.tensor(y))["modified_1"].numpy()
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-12)


# -- the signals, from a real model's logits -------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("llava")
    tiny_llava(made, TEXTS)
    return made


@pytest.fixture(scope="module")
def target(folder):
    """In float64; it also says what it expects at image and instruction."""
    loaded = targets.load(folder, dtype="float64")
    loaded.hears_prompt = True
    return loaded


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    """Records of several lengths, with prompts of several lengths."""
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    made = []
    for i in range(18):
        file = place / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file)
        text = TEXTS[i % 3] + " kite" * (i % 5)
        prompt = "what is it?" if i % 2 else "Describe the image."
        made.append(records.Record(f"r{i}", file, text, prompt))
    return made


def measure(target, some, slices=ALL, **named):
    reader = AnswerReader(slices, named.pop("own", None))
    engine = GradientEngine(target, select(target, "last3")) if named.pop("gradients", 0) else None
    found = collect.measure(target, engine, reader, some, **named)
    assert not found.failures
    return found.table


def naive(target, record):
    """A record's distributions and targets by slice, from a batch of one."""
    encoded = target.encode(record, records.open_rgb(record.image))
    ids = encoded.inputs["input_ids"][0].numpy()
    with torch.no_grad():
        p = probabilities(target.model(**encoded.inputs).logits[0].double().numpy())
    image = np.flatnonzero(ids == target.plain.config.image_token_id)
    behind, start = image[-1] + 1, encoded.answer_start
    found = {
        "image": (p[image], None),
        "instruction": (p[behind - 1 : start - 1], ids[behind:start]),
        "description": (p[start - 1 : -1], ids[start:]),
        "instruction+description": (p[behind - 1 : -1], ids[behind:]),
    }
    text = target.processor.tokenizer.decode(found["instruction"][1])
    assert record.prompt in text
    assert "<image>" not in text
    return found


@pytest.fixture(scope="module")
def table(target, some):
    return measure(target, some, gradients=True)


@pytest.fixture(scope="module")
def by_hand(target, some):
    return [naive(target, record) for record in some]


class TestFromLogits:
    """Each signal recomputed from a batch of one, in float64."""

    @pytest.mark.parametrize("name", SLICES)
    @pytest.mark.parametrize("alpha", ALPHAS)
    @pytest.mark.parametrize("k", [0, 10, 100])
    def test_maxrenyi(self, table, by_hand, name, alpha, k):
        expected = [-largest([entropy(row, alpha) for row in each[name][0]], k) for each in by_hand]
        options = {"alpha": alpha, "k": k, "slice": name}
        found = signals.get("maxrenyi").score(prompt_distributions(table), options=options)
        np.testing.assert_allclose(found, expected, rtol=1e-9)

    @pytest.mark.parametrize("name", SLICES[1:])
    @pytest.mark.parametrize("alpha", ALPHAS[:-1])
    def test_modrenyi(self, table, by_hand, name, alpha):
        expected = [
            -np.mean([modified(p, y, alpha) for p, y in zip(*each[name], strict=True)])
            for each in by_hand
        ]
        options = {"alpha": alpha, "slice": name}
        found = signals.get("modrenyi").score(prompt_distributions(table), options=options)
        np.testing.assert_allclose(found, expected, rtol=1e-9)

    def test_maxprobgap(self, table, by_hand):
        expected = [np.mean([gap(p) for p in each["description"][0]]) for each in by_hand]
        found = signals.get("maxprobgap").score(answer_distributions(table))
        np.testing.assert_allclose(found, expected, rtol=1e-9)

    def test_mink_and_minkpp(self, table, by_hand):
        lowest = lambda values: np.mean(np.sort(values)[: max(1, int(0.2 * len(values)))])  # noqa: E731
        plain, standardised = [], []
        for each in by_hand:
            p, y = each["description"]
            own, log = np.log(p[np.arange(len(y)), y]), np.log(p)
            mean = (p * log).sum(1)
            plain.append(lowest(own))
            standardised.append(lowest((own - mean) / np.sqrt((p * log**2).sum(1) - mean**2)))
        found = token_statistics(table)
        np.testing.assert_allclose(signals.get("mink").score(found), plain, rtol=1e-9)
        np.testing.assert_allclose(signals.get("minkpp").score(found), standardised, rtol=1e-6)

    def test_half_precision_enters_no_softmax(self, folder, some):
        half = targets.load(folder, dtype="bfloat16")
        half.hears_prompt = True
        found = prompt_distributions(measure(half, some[:4]))
        for name in SLICES:
            expected = [
                -largest([entropy(p, "0.5") for p in naive(half, record)[name][0]], 100)
                for record in some[:4]
            ]
            options = {"k": 100, "slice": name}
            scores = signals.get("maxrenyi").score(found, options=options)
            # The batch may change bfloat16's own roundings, a softmax in it would far more.
            np.testing.assert_allclose(scores, expected, rtol=2e-4)


class TestBatches:
    def test_a_batch_of_one_equals_a_batch_of_many(self, folder, some):
        single = targets.load(folder)
        single.hears_prompt = True
        alone, together = (
            measure(single, some, gradients=True, size=collect.BatchSize(n)).to_pylist()
            for n in (1, 16)
        )
        for one, other in zip(alone, together, strict=True):
            for name in ALL:
                for column, values in one[name].items():
                    assert name == "image" or values, (name, column)
                    if values is not None:
                        np.testing.assert_allclose(values, other[name][column], atol=1e-4)

    def test_hearing_the_prompt_changes_nothing_of_the_answer(self, folder, some, table):
        plain = measure(targets.load(folder, dtype="float64"), some, ("description",))
        for row, other in zip(plain.to_pylist(), table.to_pylist(), strict=True):
            np.testing.assert_allclose(row["logprob"], other["logprob"], rtol=1e-9)
            for column, values in row["description"].items():
                np.testing.assert_allclose(values, other["description"][column], rtol=1e-9)

    def test_the_self_check_sees_a_prompt_that_depends_on_its_batch(self, target, some):
        engine = GradientEngine(target, select(target, "last3"))
        self_check(target, engine, some, collect.BatchSize())
        forward = target.outputs

        def leaking(batch):
            outputs = forward(batch)
            if len(batch) > 1:
                for prompt in outputs.prompts:
                    prompt["image"].logits[0] += torch.arange(prompt["image"].logits.shape[1])
            return outputs

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, "outputs", leaking)
            with pytest.raises(UserError, match="alone and in a batch"):
                self_check(target, engine, some, collect.BatchSize())


@pytest.mark.parametrize("make", [families.tiny_paligemma, families.tiny_gemma3])
def test_slices_are_found_by_ids_in_other_families(make, some, tmp_path):
    make(tmp_path, TEXTS)
    other = targets.load(tmp_path, dtype="float64")
    other.hears_prompt = True
    found = prompt_distributions(measure(other, some[:5]))
    for name in SLICES:
        expected = []
        for record in some[:5]:
            # Both attend to a whole prompt: ask them in the way that the target does.
            with torch.no_grad():
                batch = other.collate([other.encode(record, records.open_rgb(record.image))])
                logits = other.model(**batch.inputs, use_cache=False).logits[0]
            ids, (start, stop) = batch.inputs["input_ids"][0], batch.answers[0]
            p = probabilities(logits.numpy())
            image = np.flatnonzero(ids.numpy() == other.plain.config.image_token_id)
            at = {
                "image": image,
                "instruction": range(image[-1], start - 1),
                "description": range(start - 1, stop - 1),
                "instruction+description": range(image[-1], stop - 1),
            }[name]
            expected.append(-largest([entropy(p[i], "1") for i in at], 100))
        options = {"alpha": "1", "k": 100, "slice": name}
        scores = signals.get("maxrenyi").score(found, options=options)
        np.testing.assert_allclose(scores, expected, rtol=1e-9)


class TestWithoutAScore:
    def test_an_image_that_the_ids_do_not_mark(self, target, some, monkeypatch):
        monkeypatch.setattr(
            targets.GenerativeTarget, "_image_ids", torch.zeros(0, dtype=torch.long)
        )
        found = prompt_distributions(measure(target, some[:3]))
        assert np.isnan(signals.get("maxrenyi").score(found, options={"slice": "image"})).all()
        assert np.isfinite(signals.get("maxrenyi").score(found)).all()
        assert "does not mark" in signals.get("maxrenyi").unscorable

    def test_a_token_of_probability_zero_harms_no_other(self):
        value = Ragged(np.array([1.0, np.inf, 2.0]), np.array([0, 2, 3]))
        said = AnswerDistributions(
            {"description": reading_of(gap=value, renyi=value, modified=value)}
        )
        for name in ("maxprobgap", "maxrenyi", "modrenyi"):
            assert np.isnan(signals.get(name).score(said)).tolist() == [True, False], name

    def test_an_answer_without_tokens_harms_no_other(self):
        value = Ragged(np.array([1.0, 2.0]), np.array([0, 0, 2]))
        said = AnswerDistributions(
            {"description": reading_of(gap=value, renyi=value, modified=value)}
        )
        for name in ("maxprobgap", "maxrenyi", "modrenyi"):
            assert np.isnan(signals.get(name).score(said)).tolist() == [True, False], name


def reading_of(gap, renyi, modified):
    from lightleak.evidence.readings import Distributions

    return Distributions(gap, dict.fromkeys(ALPHAS, renyi), dict.fromkeys(ALPHAS, modified))


class TestDirection:
    """What a member looks like scores higher: the sure token came, and few others might have."""

    @pytest.mark.parametrize("name", ["maxprobgap", "maxrenyi", "modrenyi"])
    def test_a_surer_model_scores_higher(self, name):
        rows = [torch.tensor([[4.0, 0, 0, 0]] * 3), torch.tensor([[1.0, 0, 0, 0]] * 3)]
        came = torch.zeros(3, dtype=torch.long)
        found = [statistics(each.log_softmax(-1), came) for each in rows]
        columns = {key: [list(each[key].numpy()) for each in found] for key in reading.SHAPE}
        shapes = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
        scores = signals.get(name).score(answer_distributions(pa.table({"description": shapes})))
        assert scores[0] > scores[1]


# -- the model's own description -------------------------------------------------------------------


def greedy(target, record):
    """The likeliest answer, token after token, with nothing kept from one to the next."""
    asked = records.Record(record.id, record.image, "image", reading.OWN_PROMPT)
    encoded = target.encode(asked, records.open_rgb(record.image))
    inputs = {
        name: value[:, : encoded.answer_start] if name in encoded.along_tokens else value
        for name, value in encoded.inputs.items()
    }
    answer = []
    for _ in range(reading.OWN_TOKENS):
        with torch.no_grad():
            best = int(target.model(**inputs).logits[0, -1].argmax())
        answer.append(best)
        if best == target.processor.tokenizer.eos_token_id:
            break
        for name in encoded.along_tokens:
            following = best if name == "input_ids" else 1
            inputs[name] = torch.cat([inputs[name], torch.tensor([[following]])], 1)
    return answer


class TestOwnDescription:
    @pytest.fixture(scope="class")
    def told(self, target, some):
        return measure(target, some[:3], ("description",), own=target)

    @pytest.fixture(scope="class")
    def by_hand(self, target, some):
        return [greedy(target, record) for record in some[:3]]

    def test_it_is_the_likeliest_answer_alone_and_in_a_batch(self, target, some, told, by_hand):
        encoded = [
            target.encode(
                records.Record(each.id, each.image, "image", reading.OWN_PROMPT),
                records.open_rgb(each.image),
            )
            for each in some[:3]
        ]
        together = target.generate(encoded, reading.OWN_TOKENS)
        alone = [target.generate([each], reading.OWN_TOKENS)[0] for each in encoded]
        assert together == alone == by_hand
        texts = [target.processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in alone]
        assert told["own"].to_pylist() == [text.strip() for text in texts]

    def test_its_distributions_are_those_of_the_text_fed_back(self, target, told, some, by_hand):
        fed_back = [
            naive(target, records.Record(record.id, record.image, text, reading.OWN_PROMPT))
            for record, text in zip(some, told["own"].to_pylist(), strict=False)
        ]
        for name in ("image", "instruction", "description"):
            expected = []
            for each, ids in zip(fed_back, by_hand, strict=True):
                # What the template puts behind an answer that was cut off was not said.
                p = each[name][0][: len(ids) if name == "description" else None]
                expected.append(-largest([entropy(row, "0.5") for row in p], 10))
            scores = signals.get("maxrenyi").score(
                own_description(told), options={"slice": name, "answer": "own"}
            )
            np.testing.assert_allclose(scores, expected, rtol=1e-9)

    def test_nothing_to_say_is_unscorable(self, target, some, monkeypatch):
        end = target.processor.tokenizer.eos_token_id
        monkeypatch.setattr(
            targets.GenerativeTarget, "generate", lambda _, chosen, most: [[end]] * len(chosen)
        )
        found = own_description(measure(target, some[:2], ("description",), own=target))
        assert np.isnan(signals.get("maxrenyi").score(found, options={"answer": "own"})).all()


# -- quantile regression ---------------------------------------------------------------------------


class TestQuantile:
    N = 160
    SIDE = np.array(["suspect", "control"] * (N // 2))
    FOLDS = np.arange(N) // 2 % 2

    @pytest.fixture
    def tokens(self):
        rng = np.random.default_rng(0)
        lengths = rng.integers(2, 40, self.N)
        own = [-rng.exponential(1 + 20 / n, n) for n in lengths]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        logprob = Ragged(np.concatenate(own), offsets)
        return TokenStatistics(logprob, logprob, logprob, 5 * lengths + rng.integers(8, 30, self.N))

    @pytest.mark.parametrize("level", ["0.5", "0.9"])
    def test_it_is_the_distance_to_the_quantile_of_other_folds(self, tokens, level):
        loss, tau = tokens.logprob.mean(), float(level)
        x = np.stack(
            [np.ones(self.N), np.log(tokens.logprob.lengths), np.log(tokens.zlib_bytes)], axis=1
        )
        expected = np.empty(self.N)
        for k in range(2):
            known = (self.SIDE == "control") & ~np.equal(self.FOLDS, k)
            # min Σ τ u + (1 − τ) v with ℓ = x w + u − v and u, v ≥ 0.
            m = known.sum()
            cost = np.concatenate([np.zeros(3), np.full(m, tau), np.full(m, 1 - tau)])
            equal = np.concatenate([x[known], np.eye(m), -np.eye(m)], axis=1)
            bounds = [(None, None)] * 3 + [(0, None)] * (2 * m)
            w = linprog(cost, A_eq=equal, b_eq=loss[known], bounds=bounds).x[:3]
            here = np.equal(self.FOLDS, k)
            expected[here] = loss[here] - x[here] @ w
        fits = cross("crossfit", 2, self.SIDE, self.FOLDS)
        found = signals.get("quantile").score(tokens, fits, {"level": level})
        np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_no_suspect_is_fitted_on(self, tokens):
        fits = cross("crossfit", 2, self.SIDE, self.FOLDS)
        before = signals.get("quantile").score(tokens, fits)
        values = tokens.logprob.values.copy()
        values[: tokens.logprob.offsets[1]] -= 100  # The first record is a suspect.
        changed = TokenStatistics(
            Ragged(values, tokens.logprob.offsets), tokens.mean, tokens.variance, tokens.zlib_bytes
        )
        after = signals.get("quantile").score(changed, fits)
        assert np.flatnonzero(after != before).tolist() == [0]

    def test_too_few_controls_give_no_score(self, tokens):
        fits = cross(
            "crossfit", 2, np.where(np.arange(self.N) < 30, self.SIDE, "suspect"), self.FOLDS
        )
        assert np.isnan(signals.get("quantile").score(tokens, fits)).all()


# -- through a real run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(folder, some, tmp_path_factory):
    """An audit whose signals need all slices and the model's own descriptions."""
    place = tmp_path_factory.mktemp("audit")
    rng = np.random.default_rng(1)
    for side in ("suspect", "control"):
        rows = []
        for i in range(24):
            file = place / f"{side}{i}.png"
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file)
            rows.append({"id": f"{i}", "image": file.name, "text": f"{TEXTS[i % 3]} {side[0]}{i}"})
        (place / f"{side}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    lightleak.audit(
        target=folder,
        suspect=place / "suspect.jsonl",
        control=place / "control.jsonl",
        out=place / "run",
        signals=("loss", "maxprobgap", "maxrenyi", "modrenyi", "quantile"),
        options=["maxrenyi.slice=image", "modrenyi.answer=own"],
        negative_controls=False,
        device="cpu",
    )
    return Run.open(place / "run")


class TestThroughARun:
    def test_options_say_what_is_gathered(self, run):
        table = stored.load(run).table
        assert {"description", "image", "instruction", "own"} <= set(table.column_names)
        scores = pa.parquet.read_table(run.scores_file).to_pandas()
        assert np.isfinite(scores[scores.signal.isin(["maxrenyi", "modrenyi"])].score).all()

    def test_any_order_and_share_is_scored_from_what_is_stored(self, run):
        measured = stored.load(run)
        settings = AuditSettings.read(**run.manifest()["settings"])
        seen = set()
        for alpha in ALPHAS:
            for k in (0, 25, 100):
                options = {"maxrenyi": {"alpha": alpha, "k": k, "slice": "image"}}
                again = settings.model_copy(update={"options": options})
                seen.add(tuple(stored.score(again, measured, "maxrenyi")))
        assert len(seen) == 12

    def test_a_new_signal_is_a_few_lines(self, run, monkeypatch):
        monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

        @registry.signal(needs=TokenStatistics, source="here")
        def worst(tokens: TokenStatistics, *, k: float = 0.5) -> np.ndarray:
            """Mean of the lowest and of the mean log-likelihoods."""
            return (tokens.logprob.mean_of_lowest(k) + tokens.logprob.mean()) / 2

        settings = AuditSettings.read(**run.manifest()["settings"])
        chosen = {"signals": ("loss", "worst"), "options": signals.parse_options(["worst.k=0"])}
        settings = settings.model_copy(update=chosen)
        measured = stored.load(run)
        expected = [(min(row) + np.mean(row)) / 2 for row in measured.table["logprob"].to_pylist()]
        np.testing.assert_allclose(stored.score(settings, measured, "worst"), expected, rtol=1e-6)
        assert "worst" in signals.names("generative")
