"""The promises of the statistics, tested by simulation: false alarms, coverage, power, and the known order of four real models.

Each number is drawn anew with its own seed; `Within` allows for the error of the simulation itself and for nothing else."""
import json
from pathlib import Path

import numpy as np
import pytest

from finetune_nb.core.statistics import decide, mcnemar, paired
from finetune_nb.evaluation.records import corrected, measure, numbers, record
from finetune_nb.evaluation.verdict import conclude

HERE = Path(__file__).parent


def right(rng, n, base=.4, gain=0.0, agree=.5):
    "0/1 scores of two models that agree on a share of the rows by more than chance."
    latent, tuned = rng.random((2, n))
    tuned = np.where(rng.random(n) < agree, latent, tuned)
    return (latent < base).astype(float), (tuned < base + gain).astype(float), None


def graded(rng, n, gain=0.0):
    "Scores between 0 and 1, as of token F1."
    base = rng.beta(2, 2, n)
    return base, base + gain + rng.normal(0, .15, n), None


def lopsided(rng, n, gain=0.0):
    "Differences with a long tail: most rows change little, some a lot."
    return np.zeros(n), gain + .2 * (rng.exponential(1, n) - 1), None


def tied(rng, n, gain=0.0, moved=.4):
    "Most rows do not change at all, the others by any amount."
    moves = (rng.random(n) < moved) * rng.normal(gain / moved, .3, n)
    return np.zeros(n), moves, None


def families(rng, n, gain=0.0, sizes=None):
    "Rows of families of unequal size whose members move together."
    sizes = rng.choice([1, 2, 3, 4, 8], n // 3) if sizes is None else sizes
    shift = np.repeat(rng.normal(0, .2, len(sizes)), sizes)
    return np.zeros(len(shift)), gain + shift + rng.normal(0, .2, len(shift)), np.repeat(np.arange(len(sizes)), sizes)


def right_families(rng, n, gain=0.0):
    "0/1 scores of rows whose families decide most of them."
    size = 4
    hard = np.repeat(rng.random(n // size), size)
    base, tuned = np.where(rng.random((2, len(hard))) < .6, hard, rng.random((2, len(hard))))
    return (base < .4).astype(float), (tuned < .4 + gain).astype(float), np.repeat(np.arange(n // size), size)


KINDS = {'right': right, 'graded': graded, 'lopsided': lopsided, 'tied': tied, 'families': families, 'right_families': right_families}


def simulate(kind, n, trials, gain=0.0, seed=0):
    "The comparisons of many simulated evaluations."
    rng = np.random.default_rng([seed, n, sorted(KINDS).index(kind)])
    out = []
    for trial in range(trials):
        base, tuned, clusters = KINDS[kind](rng, n, gain=gain)
        out.append(paired(base, tuned, clusters=clusters, seed=trial % 4))   # few seeds: draws are shared
    return out


def judged(found, **rule):
    "The word that a verdict would give."
    return corrected([{'metric': 'm', **numbers(found)}], **rule)[0]['verdict']


def test_no_true_difference_gives_better_or_worse_in_at_most_one_of_twenty():
    "1,000 comparisons of two equal models, of every kind of score and size."
    cases = [(kind, n) for kind in KINDS for n in (30, 60, 120)]
    words = [judged(found) for kind, n in cases for found in simulate(kind, n, 1000 // len(cases) + 1, seed=1)]
    assert len(words) >= 1000
    assert sum(w in ('BETTER', 'WORSE') for w in words) <= .05 * len(words)
    assert 'BETTER' in words and 'WORSE' in words   # a rule that never speaks would pass too


@pytest.mark.parametrize('kind', KINDS)
def test_false_alarms_of_each_kind(kind):
    words = [judged(found) for n in (40, 100) for found in simulate(kind, n, 500, seed=2)]
    assert sum(w in ('BETTER', 'WORSE') for w in words) <= 68   # 5 % of 1,000, plus 2.6 errors of the simulation


TRUE_GAIN = dict.fromkeys(KINDS, .1)


@pytest.mark.parametrize('kind', KINDS)
def test_intervals_cover(kind):
    "95 % intervals hold the true difference in 94 to 96 % of trials; the error of 1,500 trials is 0.56 points."
    found = [one for n in (30, 100, 300) for one in simulate(kind, n, 500, gain=TRUE_GAIN[kind], seed=3)]
    covered = np.mean([one.low <= TRUE_GAIN[kind] <= one.high for one in found])
    assert .94 - .011 <= covered <= .96 + .011, covered


@pytest.mark.parametrize('kind', KINDS)
def test_a_difference_of_the_printed_size_is_found_four_times_in_five(kind):
    "What a first evaluation without any effect prints as its smallest effect is the true effect of the next ones."
    printed = np.mean([one.mde for one in simulate(kind, 100, 60, seed=4)])
    words = [judged(one) for one in simulate(kind, 100, 500, gain=float(printed), seed=5)]
    assert .78 - .035 <= words.count('BETTER') / len(words) <= .85 + .035   # twice the error of 500 trials


def test_same_is_said_of_a_difference_at_the_margin_in_at_most_one_of_twenty():
    rng = np.random.default_rng(6)
    words = [judged(paired(base, base + .02 + rng.normal(0, .05, 120)), margin=.02) for base in rng.random((600, 120))]
    assert words.count('SAME') / len(words) <= .05 + .018


def test_equal_models_with_many_rows_are_the_same():
    rng = np.random.default_rng(7)
    words = [judged(paired(base, base + rng.normal(0, .05, 200)), margin=.02) for base in rng.random((100, 200))]
    assert words.count('SAME') >= 90


def test_a_model_evaluated_twice_is_the_same():
    rng = np.random.default_rng(8)
    rows = [{'id': str(i), 'category': 'ab'[i % 2], 'base': f'text {i}', 'tuned': f'text {i}', 'expected': '', 'prompt': '', 'stopped': {'base': True, 'tuned': True},
             'scores': {m: {'base': s, 'tuned': s} for m, s in (('exact_match', float(rng.random() < .5)), ('f1', rng.random()))}} for i in range(12)]
    verdict = conclude(rows, ['exact_match', 'f1'], 32)
    assert verdict.verdict == 'SAME' and {r['verdict'] for r in verdict.metrics} == {'SAME'}


def test_many_true_nulls_in_one_table_seldom_give_one_finding():
    "Holm: the chance of any false finding in a table of twenty lines stays at 5 %."
    rng = np.random.default_rng(9)
    tables = 0
    for trial in range(200):
        lines = [record([{'scores': {'m': {'base': a, 'tuned': b}}, 'base': 'x', 'tuned': 'y'} for a, b in zip(*rng.random((2, 30)))], 'm', str(k), 'category', trial % 4, frozenset())
                 for k in range(10)]
        tables += any(r['verdict'] in ('BETTER', 'WORSE') for r in corrected(lines))
    assert tables / 200 <= .05 + .04


def test_interval_and_p_agree():
    "They are two tests of one thing; where they differ, it is at the border."
    found = [one for kind in KINDS for one in simulate(kind, 60, 60, gain=.05, seed=10)]
    differ = [one for one in found if (one.p <= .05) != (one.low > 0 or one.high < 0)]
    assert len(differ) <= .06 * len(found)
    assert all(.02 < one.p < .12 for one in differ), [one.p for one in differ]


def test_nearly_all_right_is_sure_to_be_good_and_not_sure_to_be_perfect():
    "Families of different sizes, nearly all of them all right: the bootstrap's samples without any error once gave -1 to 1."
    rng, held, widths = np.random.default_rng(0), 0, []
    for trial in range(200):
        sizes = rng.integers(1, 10, 12)
        tuned = np.repeat(rng.beta(1.9, .1, 12), sizes) > rng.random(sizes.sum())
        found = paired(np.zeros(len(tuned)), tuned.astype(float), np.repeat(np.arange(12), sizes), seed=trial % 4)
        held, widths = held + (found.low <= .95 <= found.high), [*widths, found.high - found.low]
        assert found.low > 0 and found.p < .01
    assert held >= 190 and np.median(widths) < .5


def test_mcnemar_is_the_p_of_right_and_wrong():
    rng = np.random.default_rng(11)
    for n in (10, 50, 200):
        base, tuned, _ = right(rng, n, gain=.1)
        assert paired(base, tuned).p == pytest.approx(mcnemar(base, tuned))


def test_a_few_clusters_prove_nothing_alone():
    "Five families that all agree: luck does as much once in sixteen."
    found = paired(np.zeros(50), np.full(50, .5) + np.random.default_rng(12).normal(0, .01, 50), clusters=np.repeat(np.arange(5), 10))
    assert found.p > .05 and judged(found) == 'INCONCLUSIVE'
    assert decide(found.low, found.high) == 'BETTER'   # the interval alone would have said so


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('n', (30, 60, 120, 300, 1000))
def test_widely(kind, n):
    "The same three promises at every size, with ten times the trials where rows are few."
    trials = 4000 if n < 300 else 1000
    none, some = simulate(kind, n, trials, seed=21), simulate(kind, n, trials, gain=.1, seed=22)
    assert sum(judged(one) in ('BETTER', 'WORSE') for one in none) / trials <= .05 + 1.7 / trials**.5 * .22
    for truth, found in ((0, none), (.1, some)):
        covered = np.mean([one.low <= truth <= one.high for one in found])
        assert .915 <= covered <= .985, (truth, covered)


# ---- real material: right or wrong of four models on 1,319 problems of GSM8K

@pytest.fixture(scope='module')
def gsm8k():
    "Model → 0 or 1 for each problem."
    told = json.loads((HERE / 'gsm8k_correct.json').read_text())
    return {who: np.array([float(bit) for bit in f'{int(bits, 16):0{told["rows"]}b}']) for who, bits in told['correct'].items()}


def rows_of(gsm8k, small, large, chosen):
    return [{'id': str(i), 'category': 'first half' if i < 660 else 'second half', 'base': f'{small}{i}', 'tuned': f'{large}{i}', 'expected': '', 'prompt': '',
             'stopped': {'base': True, 'tuned': True}, 'scores': {'exact_match': {'base': gsm8k[small][i], 'tuned': gsm8k[large][i]}}} for i in chosen]


PAIRS = [('6b_finetuning', '175b_finetuning'), ('6b_verification', '175b_verification'), ('6b_finetuning', '6b_verification'), ('175b_finetuning', '175b_verification')]


@pytest.mark.parametrize('small, large', PAIRS)
def test_real_models_stand_in_their_known_order(gsm8k, small, large):
    "300 held-out problems find the larger or better model; the interval contains the difference on all 1,319."
    known = gsm8k[large].mean() - gsm8k[small].mean()
    verdict = conclude(rows_of(gsm8k, small, large, np.random.default_rng(0).choice(1319, 300, replace=False)), ['exact_match'], 256)
    assert verdict.verdict == 'BETTER' and verdict.low <= known <= verdict.high
    assert conclude(rows_of(gsm8k, large, small, range(400)), ['exact_match'], 256).verdict == 'WORSE'
    assert {r['verdict'] for r in verdict.metrics if r['slice'] != 'all'} == {'BETTER'}


def test_intervals_of_real_models_cover_the_known_difference(gsm8k):
    "Samples of 60, drawn many times over from the 1,319 problems, as if these were the world."
    rng, held = np.random.default_rng(1), []
    for small, large in PAIRS:
        known = gsm8k[large].mean() - gsm8k[small].mean()
        for trial in range(250):
            chosen = rng.integers(1319, size=60)
            found = paired(gsm8k[small][chosen], gsm8k[large][chosen])
            held.append(found.low <= known <= found.high)
    assert .925 <= np.mean(held) <= .975, np.mean(held)


def test_two_halves_of_one_model_do_not_differ(gsm8k):
    "The same model on other problems, exchanged at random: BETTER or WORSE in at most 5 % of trials."
    rng, words = np.random.default_rng(2), []
    for trial in range(400):
        chosen, swap = rng.choice(1319, 100, replace=False), rng.random(100) < .5
        pair = gsm8k['6b_verification'][chosen], gsm8k['175b_verification'][chosen]
        words.append(judged(paired(np.where(swap, *pair), np.where(swap, *pair[::-1]))))
    assert sum(w in ('BETTER', 'WORSE') for w in words) <= .05 * 400 + 9


def test_slices_are_judged_apart():
    "A gain that is all in one slice is found there and not in the other."
    rng = np.random.default_rng(3)
    rows = [{'id': str(i), 'category': None, 'slices': {'difficulty': 'easy' if i % 2 else 'hard'}, 'base': 'b', 'tuned': f't{i}',
             'scores': {'m': {'base': float(rng.random() < .3), 'tuned': float(rng.random() < (.8 if i % 2 else .3))}}} for i in range(200)]
    words = {r['slice']: r['verdict'] for r in measure(rows, ['m'])}
    assert words['difficulty=easy'] == 'BETTER' and words['difficulty=hard'] == 'INCONCLUSIVE'
