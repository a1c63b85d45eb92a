"Near-duplicates on real and planted text: the plain definition, datasketch and all pairs are the oracles."
import gzip
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import public_data
from datasketch import MinHash, MinHashLSH

from finetune_nb.core.rows import make_row
from finetune_nb.core.similarity import jaccard, row_shingles, row_text, shingles
from finetune_nb.curation.boilerplate import excused
from finetune_nb.curation.buckets import _Banded, candidates
from finetune_nb.curation.dedup import duplicate_texts, near_duplicates, rank, similar_pairs
from finetune_nb.curation.kernels import compiled, fast
from finetune_nb.curation.minhash import bands_for, fingerprint, shingle_hash, signatures
from finetune_nb.curation.prints import fingerprints

needs_numba = pytest.mark.skipif(not fast(), reason='numba is not installed, or FINETUNE_NB_FAST=0')


def say(prompt, reply='ok', line=0, **more):
    return make_row([{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': reply}], file='a.jsonl', line=line, **more)


def real_rows(name, prompt, reply, most):
    with gzip.open(public_data(f'{name}.jsonl.gz'), 'rt', encoding='utf8') as lines:
        records = [json.loads(line) for _, line in zip(range(most), lines)]
    return [say('\n'.join(str(r[k]) for k in prompt if r.get(k)), str(r[reply]), n) for n, r in enumerate(records, 1)]


@pytest.fixture(scope='module')
def passages():
    "Passages under many templates: full of near-duplicates."
    return real_rows('self_instruct_t0_50k', ['prompt'], 'completion', 1500)


@pytest.fixture(scope='module')
def tongues(passages):
    "Real text in Latin, Chinese and whatever else these files hold, and what is hard about Unicode."
    chinese = real_rows('lf_alpaca_zh_demo', ['instruction', 'input'], 'output', 300)
    hard = ['ΟΔΟΣ ΣΑΣ Σ', 'İstanbul IŞIK', 'a\u3000b\u2003c\x85d\xa0e\u202ff', '\ud800 lone \udfff', '🤖' * 9, '', ' \t\n', 'e\u0301 é ﬁ ǅ ẞ', '\x1cx\x1dy\x1ez\x1fw q', '\0 nul \0']
    return [row_text(row) for row in passages[:300] + chinese] + hard


def without_numba(monkeypatch, function, *args, **named):
    with monkeypatch.context() as patch:
        patch.setenv('FINETUNE_NB_FAST', '0')
        return function(*args, **named)


@needs_numba
def test_numba_changes_no_number(tongues, passages, monkeypatch):
    for with_numba, plain in zip(fingerprint(tongues), without_numba(monkeypatch, fingerprint, tongues)): assert np.array_equal(with_numba, plain)
    a, b = near_duplicates(passages, boilerplate=0.02), without_numba(monkeypatch, near_duplicates, passages, boilerplate=0.02)
    assert a.pairs == b.pairs and a.saved == b.saved and a.sweep == b.sweep and a.proposed == b.proposed
    assert all(np.array_equal(a.observed[name], b.observed[name]) for name in ('similarity', 'bands'))


def test_datasketch_reads_our_signatures(tongues):
    "The same numbers as its own, and its index finds by them what it finds by its own."
    signed, oracle = signatures(tongues), MinHash(num_perm=128, seed=1, scheme='affine32', hashfunc=shingle_hash)
    ours, theirs = (MinHashLSH(params=bands_for(0.8), num_perm=128) for _ in range(2))
    for n, (text, signature) in enumerate(zip(tongues, signed)):
        made = oracle.copy()
        made.update_batch(list(shingles(text)))
        assert np.array_equal(made.hashvalues, signature)
        ours.insert(n, MinHash(hashvalues=signature, permutations=oracle.permutations, scheme='affine32'))
        theirs.insert(n, made)
    assert all(sorted(ours.query(MinHash(hashvalues=s, permutations=oracle.permutations, scheme='affine32'))) ==
               sorted(theirs.query(MinHash(hashvalues=s, permutations=oracle.permutations, scheme='affine32'))) for s in signed[::20])


def test_all_pairs_are_found_and_every_removal_is_true(passages):
    passages = passages[:700]
    rows = sorted(passages, key=rank)
    sets = [row_shingles(row) for row in rows]
    true = {(i, j): value for j in range(len(rows)) for i in range(j) if len(sets[i] & sets[j]) >= 4 and (value := jaccard(sets[i], sets[j])) >= 0.8}
    found = similar_pairs(passages, 0.8)
    pairs = {(i, j): value for i, j, value in found.pairs}
    assert pairs.items() <= true.items() and len(pairs) >= 0.99 * len(true) > 300

    near = near_duplicates(passages)
    gone = {id(row) for row, _, _ in near.pairs}
    assert all(id(kept) not in gone and jaccard(row_shingles(row), row_shingles(kept)) == value >= 0.8 for row, kept, value in near.pairs)
    left = [(i, j) for i, j in true if id(rows[i]) not in gone and id(rows[j]) not in gone]
    assert len(left) <= 0.01 * len(gone)


def test_order_of_input_changes_nothing(passages):
    shuffled = random.Random(4).sample(passages, len(passages))
    named = lambda near: [(a['id'], b['id'], value) for a, b, value in near.pairs]
    near = near_duplicates(passages, boilerplate=0.02)
    assert named(near) == named(near_duplicates(shuffled, boilerplate=0.02)) and near.sweep == near_duplicates(shuffled, boilerplate=0.02).sweep
    scored = [{**row, 'scores': {'clarity': 1.0, 'quality': 1.0, 'judge': random.Random(n).random()}} for n, row in enumerate(passages)]
    assert named(near_duplicates(scored, boilerplate=0.02)) == named(near)


def test_prints_made_once_serve_every_search(passages):
    prints = fingerprints(passages)
    later = [{**row, 'scores': {'clarity': 0.5}, 'category': 'x'} for row in passages[::-3]] + [say('a variant made later', line=9)]
    with_prints, without = similar_pairs(later, 0.8, prints=prints), similar_pairs(later, 0.8)
    assert with_prints.pairs == without.pairs and len(without.pairs) > 20


# Planted text: forms with slots must stay, edited copies of one document must go.
WORDS = [f'{a}{b}{c}' for a in 'bdfgklmnprst' for b in 'aeiou' for c in ('n', 'r', 's', 'lo', 'ma', 'ti')]


def text_of(dice, words): return dice.choices(WORDS, k=words)


def edited(dice, words, edits):
    words = list(words)
    for at in dice.sample(range(len(words)), edits):
        change = dice.choice(['replace', 'insert', 'delete'])
        words[at] = {'replace': dice.choice(WORDS), 'insert': f'{words[at]} {dice.choice(WORDS)}', 'delete': ''}[change]
    return ' '.join(words)


@pytest.mark.parametrize('size, slots, values', [(120, 1, 3), (200, 2, 3), (400, 3, 4), (300, 1, 8), (400, 4, 2)])
def test_fillings_of_a_form_stay(size, slots, values):
    dice = random.Random(size + slots)
    parts = [' '.join(text_of(dice, size // (slots + 1))) for _ in range(slots + 1)]
    value = lambda: ' '.join(str(dice.randrange(10**6)) for _ in range(values))
    fill = lambda: ' '.join([parts[0], *(f'{value()} {part}' for part in parts[1:])])
    rows = [say(fill(), line=n) for n in range(300)] + [say(' '.join(text_of(dice, size)), line=1000 + n) for n in range(300)]
    near, plain = near_duplicates(rows, boilerplate=0.02), near_duplicates(rows)
    assert not near.pairs and near.saved_rows == len(plain.pairs) > 200


def test_a_slot_with_few_values_is_still_a_slot():
    dice = random.Random(8)
    form, cities = [' '.join(text_of(dice, 40)) for _ in range(3)], ['berlin', 'paris', 'oslo', 'rome', 'wien', 'bern', 'prag', 'turin']
    rows = [say(f'{form[0]} {dice.choice(cities)} {form[1]} ticket{n} name{n} {form[2]}', line=n) for n in range(300)]
    assert not near_duplicates(rows, boilerplate=0.02).pairs


@pytest.mark.parametrize('copies, edits', [(15, 1), (50, 1), (50, 2), (200, 2), (50, 3)])
def test_edited_copies_of_one_document_go(copies, edits):
    dice = random.Random(copies + edits)
    documents = [text_of(dice, 150) for _ in range(4)]
    rows = [say(edited(dice, words, edits), line=1000 * d + n) for d, words in enumerate(documents) for n in range(copies)]
    rows += [say(' '.join(text_of(dice, 150)), line=9000 + n) for n in range(100)]
    kept = len(rows) - len(near_duplicates(rows, boilerplate=0.02).pairs)
    plain = len(rows) - len(near_duplicates(rows).pairs)
    assert plain <= kept <= plain + 1


def test_copies_of_fillings_go_and_their_forms_stay():
    "A form filled 300 times, thirty of the rows copied with a word changed: in the form for some, in the filling for others."
    dice = random.Random(5)
    form = [text_of(dice, 50), text_of(dice, 50)]
    fillings = [[f'v{n}x{k}' for k in range(10)] for n in range(300)]
    rows = [{**say(' '.join([*form[0], *own, *form[1]]), line=n), 'scores': {'quality': 1.0}} for n, own in enumerate(fillings)]
    copies = []
    for n in range(30):
        words = [*form[0], *fillings[n], *form[1]]
        words[dice.choice(range(50, 60)) if n % 2 else dice.choice(range(5, 45))] = 'changed'
        copies.append(say(' '.join(words), line=1000 + n))
    near = near_duplicates(rows + copies, boilerplate=0.02)
    assert sorted(row['origin']['line'] for row, _, _ in near.pairs) == [1000 + n for n in range(30)]
    assert all(kept['origin']['line'] == row['origin']['line'] - 1000 for row, kept, _ in near.pairs)


def test_rows_that_share_a_form_do_not_turn_it_quadratic():
    "Pairs looked at, counted: four times the rows, no more than about four times the pairs."
    form = [' '.join(text_of(random.Random(1), 30)) for _ in range(2)]
    def looked_at(n):
        banded = _Banded(signatures([f'{form[0]} {" ".join(f"own{i}x{k}" for k in range(12))} {form[1]}' for i in range(n)]), 20, 6, cap=16)
        return sum(len(left) for band in range(20) for left, _ in banded.band(band)) + sum(len(left) for left, _ in banded.over_full()), banded.capped
    (few, _), (many, capped) = looked_at(1000), looked_at(4000)
    assert many < 6 * few and capped


def test_over_full_buckets_are_divided_by_a_longer_key():
    "With a cap so low that most buckets are over it, nearly all similar pairs are still found."
    dice = random.Random(2)
    base = text_of(dice, 400)
    texts = [' '.join(base[:200] + text_of(dice, 45)) for _ in range(60)]
    texts += [edited(random.Random(n), text.split(), 2) for n, text in enumerate(texts)]
    signed = signatures(texts)
    wanted = {(i, i + 60) for i in range(60) if jaccard(shingles(texts[i]), shingles(texts[i + 60])) >= 0.8}
    found = candidates(signed, 20, 6, 0.8, cap=8)
    assert len(wanted) > 50 and len(wanted & set(zip(found.left.tolist(), found.right.tolist()))) >= 0.95 * len(wanted)


def test_ratings_and_preferences_are_not_merged():
    text = ' '.join(WORDS[:60])
    rows = [say(text, line=1, label=True), say(text, line=2, label=False), say(text + ' more', line=3, label=False)]
    near = near_duplicates(rows)
    assert [(a['label'], b['label']) for a, b, _ in near.pairs] == [(False, False)] and near.contrary
    turn = lambda words: [{'role': 'assistant', 'content': ' '.join(words)}]
    pairs = [say(text, line=n, rejected=turn(words)) for n, words in enumerate((WORDS[100:130], WORDS[200:230], WORDS[100:129]))]
    assert len(near_duplicates(pairs).pairs) == 1


def test_texts_without_rows():
    assert duplicate_texts(['a b c d e f', 'other', 'A  b c d e f']) == [(2, 0, 1.0)]
    assert duplicate_texts([]) == [] and near_duplicates([]).pairs == []


def test_numba_is_neither_needed_nor_imported_early():
    code = 'import sys, finetune_nb.curation.dedup; print(any(m in sys.modules for m in ("numba", "torch", "datasketch", "scipy")))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == 'False\n'
    code = 'import sys; sys.modules["numba"] = None; import finetune_nb.curation.kernels as k, finetune_nb.curation.dedup as d; k.find_spec = lambda name: None; print(d.duplicate_texts(["a", "a"]))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[(1, 0, 1.0)]\n'


@needs_numba
def test_a_folder_that_cannot_be_written_only_costs_the_cache(monkeypatch):
    import numba
    real = numba.njit
    def njit(function, cache=False, **options):
        if cache: raise RuntimeError('cannot cache function: no locator available for file')
        return real(function, **options)
    monkeypatch.setattr(numba, 'njit', njit)
    def twice(x): return 2 * x
    assert compiled(twice)(4) == 8


def test_no_pair_is_excused_without_a_form():
    rows = [say(' '.join(text_of(random.Random(n), 60)), line=n) for n in range(20)]
    i, j = np.triu_indices(20, 1)
    assert not excused(fingerprints(rows), i, j, 0.02, lambda n: row_text(rows[n])).any()
