"""Each token signal equals its paper's formula, written out record by record."""

import zlib as compression

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from lightleak import signals
from lightleak.audits.settings import AuditSettings
from lightleak.errors import UserError
from lightleak.evidence.readings import GradientNorms, Ragged, TokenStatistics

TEXTS = ["a red kettle", "two cats on a mat, asleep", "x"]


def ragged(rows):
    offsets = np.cumsum([0, *map(len, rows)])
    values = np.concatenate([np.asarray(row, dtype=float) for row in rows]) if rows else np.zeros(0)
    return Ragged(values, offsets)


@pytest.fixture
def tokens():
    rng = np.random.default_rng(0)
    lengths = (3, 11, 1)
    return TokenStatistics(
        ragged([-rng.exponential(size=n) for n in lengths]),
        ragged([-rng.exponential(size=n) for n in lengths]),
        ragged([rng.exponential(size=n) for n in lengths]),
        np.array([len(compression.compress(text.encode())) for text in TEXTS]),
    )


def rows(values):
    return [values.values[a:b] for a, b in zip(values.offsets, values.offsets[1:], strict=False)]


def test_loss_is_the_mean_log_likelihood(tokens):
    expected = [row.mean() for row in rows(tokens.logprob)]
    np.testing.assert_allclose(signals.get("loss").score(tokens), expected)


def test_zlib_divides_by_the_compressed_length(tokens):
    expected = [
        row.mean() / len(compression.compress(text.encode()))
        for row, text in zip(rows(tokens.logprob), TEXTS, strict=True)
    ]
    np.testing.assert_allclose(signals.get("zlib").score(tokens), expected)


@pytest.mark.parametrize("k", [0.05, 0.2, 0.5, 1.0])
def test_mink_takes_the_lowest_share_and_at_least_one_token(tokens, k):
    expected = [np.sort(row)[: max(1, int(k * len(row)))].mean() for row in rows(tokens.logprob)]
    np.testing.assert_allclose(signals.get("mink").score(tokens, options={"k": k}), expected)


@pytest.mark.parametrize("k", [0.05, 0.2, 1.0])
def test_minkpp_standardises_first(tokens, k):
    expected = []
    for logprob, mean, variance in zip(
        rows(tokens.logprob), rows(tokens.mean), rows(tokens.variance), strict=True
    ):
        z = (logprob - mean) / np.sqrt(variance)
        expected.append(np.sort(z)[: max(1, int(k * len(z)))].mean())
    np.testing.assert_allclose(signals.get("minkpp").score(tokens, options={"k": k}), expected)


def test_minkpp_of_a_certain_model_is_zero_not_unscorable():
    certain = ragged([[0.0, 0.0]])
    tokens = TokenStatistics(certain, certain, certain, np.array([9]))
    assert signals.get("minkpp").score(tokens).tolist() == [0.0]


def test_gradient_norm_joins_the_matrices():
    norms = GradientNorms(("a", "b"), np.array([[3.0, 4.0], [0.0, 1.0]]))
    assert signals.get("grad_norm").score(norms).tolist() == [-5.0, -1.0]


def test_a_record_without_tokens_is_unscorable_and_harms_no_other():
    empty = ragged([[-1.0, -3.0], [], [-2.0]])
    tokens = TokenStatistics(empty, empty, empty, np.array([9, 9, 9]))
    for name in ("loss", "zlib", "mink"):
        scores = signals.get(name).score(tokens)
        assert np.isnan(scores[1]), name
        assert np.isfinite(scores[[0, 2]]).all(), name


@given(some.lists(some.lists(some.floats(-50, 0), max_size=6), min_size=1, max_size=6))
def test_ragged_means_equal_those_of_each_row(lists):
    found = ragged(lists).mean()
    for value, row in zip(found, lists, strict=True):
        if row:
            assert value == pytest.approx(np.mean(row), abs=1e-9)
        else:
            assert np.isnan(value)


def test_a_parquet_slice_reads_only_its_own_rows():
    import pyarrow as pa

    from lightleak.evidence.table import token_statistics

    columns = {
        name: [[-1.0, -2.0], [-3.0], [-4.0, -5.0]] for name in ("logprob", "mean", "variance")
    }
    table = pa.table({**columns, "zlib_bytes": [1, 1, 1]}).slice(1, 2)
    assert token_statistics(table).logprob.mean().tolist() == [-3.0, -4.5]


class TestRegistry:
    def test_an_unknown_signal_names_the_closest(self):
        with pytest.raises(UserError, match="Did you mean minkpp"):
            signals.get("minkp")

    def test_options_are_read_by_their_types(self):
        read = signals.parse_options(["mink.k=0.1", "gradaudit.mask=fixed_tau", "gradaudit.q=none"])
        assert read == {"mink": {"k": 0.1}, "gradaudit": {"mask": "fixed_tau", "q": None}}

    @pytest.mark.parametrize(
        ("assignment", "message"),
        [
            ("mink", "SIGNAL.OPTION=VALUE"),
            ("mink.kk=1", "Did you mean k"),
            ("mink.k=many", "not a number"),
            ("gradaudit.mask=best", "not one of auto, fixed_tau"),
            ("nothing.k=1", "no such signal"),
        ],
    )
    def test_a_wrong_assignment_says_what_is_wrong(self, assignment, message):
        with pytest.raises(UserError, match=message):
            signals.parse_options([assignment])

    def test_options_of_a_script_are_checked_like_those_of_a_command(self):
        asked = {"target": "t", "suspect": "s", "control": "c"}
        read = AuditSettings.read(**asked, options={"mink": {"k": 1}, "gradaudit": {"q": None}})
        assert read.options == {"mink": {"k": 1.0}, "gradaudit": {"q": None}}
        wrongs = [({"mink": {"k": "x"}}, "not a number"), ({"mink": 0.1}, "look like")]
        for wrong, message in wrongs:
            with pytest.raises(UserError, match=message):
                AuditSettings.read(**asked, options=wrong)

    def test_every_signal_names_its_source_and_says_what_it_is(self):
        for name in signals.names():
            signal = signals.get(name)
            assert signal.source
            assert signal.summary.endswith("."), name
