"Nothing that belongs together is parted: near-copies, conversations, documents, parents and the user's groups; and the order of the file does not matter."
import random

import planted
import pytest

from finetune_nb.core.rows import make_row
from finetune_nb.core.similarity import jaccard, row_shingles
from finetune_nb.curation.prints import fingerprints
from finetune_nb.curation.split import attach, split_rows


def row(prompt, said='It is so.', category='a', **more): return make_row([{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': said}], category=category, file='rows.jsonl', **more)


def many(seed=1, n=400):
    "Rows of which many are alike in different degrees, in three categories, some of one conversation or document."
    rng, rows = random.Random(seed), []
    for i in range(n // 4):
        words = [f'w{rng.randrange(300)}' for _ in range(rng.randint(6, 50))]
        for k in range(4):
            said = [word if rng.random() > 0.02 * k else f'x{rng.randrange(999)}' for word in words]
            tie = rng.choice([{}, {'conversation_id': f'c{rng.randrange(40)}'}, {'document': f'd{rng.randrange(40)}'}, {'metadata': {'family': f'f{rng.randrange(40)}'}}])
            rows.append(row(' '.join(said), category=rng.choice('aabc'), line=len(rows), **tie))
    return rows


def crossing(split, threshold):
    "Pairs of rows of different sets at or above the threshold, every pair compared."
    parts = [[row_shingles(r) for r in part] for part in split.parts.values()]
    return [(a, b) for i, one in enumerate(parts) for other in parts[i + 1:] for a in one for b in other if jaccard(a, b) >= threshold]


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('threshold', [0.6, 0.8])
def test_nothing_crosses(seed, threshold):
    rows = many(seed)
    split = split_rows(rows, 0.1, 0.15, group='family', threshold=threshold, seed=seed)
    assert split.straddles == 0 and crossing(split, threshold) == []
    assert sum(map(len, split.parts.values())) == len(rows)
    for names in ('conversation_id', 'document'):
        seen = [{r[names] for r in part if names in r} for part in split.parts.values()]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    for part in split.parts.values(): assert {r['category'] for r in part} == set('abc')


def test_order_and_prints_do_not_matter():
    rows = many(7)
    first = split_rows(rows, seed=3)
    mixed = random.Random(5).sample(rows, len(rows))
    for other in (split_rows(mixed, seed=3), split_rows(mixed, seed=3, prints=fingerprints(rows + many(8)))):
        assert {name: [r['id'] for r in part] for name, part in other.parts.items()} == {name: [r['id'] for r in part] for name, part in first.parts.items()}


def test_categories_stand_everywhere_or_are_listed():
    made = planted.build(2, 300, 0, only=('none',))
    rows = [row(p, a, c, line=n) for n, (p, a, c, *_) in enumerate(made.rows)] + [row(f'odd task {n} about {n * 7}', category='rare', line=900 + n) for n in range(3)] + [row('alone', category='single', line=999)]
    split = split_rows(rows)
    for part in split.parts.values(): assert {'explain', 'extract', 'rare'} <= {r['category'] for r in part}
    assert {(u['category'], u['split']) for u in split.unmet} == {('single', 'test'), ('single', 'validation')}


def test_counterfactual_is_not_nought_where_groups_are_split_at_random():
    rows = [row(f'turn {n} of talk {n // 8}', conversation_id=n // 8, line=n) for n in range(400)]
    near, mates = split_rows(rows, duplicates=[(row('copy'), rows[0], 0.9)]).against[:2]
    assert mates['here'] == 0 and mates['least'] > 100 and mates['least'] <= mates['random split, mean'] <= mates['most']
    assert near['here'] == 0


def test_made_rows_only_enter_training():
    rows = many(4)
    split = split_rows(rows, threshold=0.8, seed=1)
    of = lambda parent, prompt: {**row(prompt, category=parent['category'], parent=parent['id'])}
    good = [of(r, f'variant {n} of something new {n * 3}') for n, r in enumerate(split.train[:5])]
    copies = [of(split.train[0], held['messages'][0]['content']) for held in (split.test[0], split.validation[0])]
    orphans = [of(split.test[1], 'a variant of a test row'), of(split.validation[1], 'a variant of a validation row')]
    grown, turned = attach(split, good + copies + orphans)
    assert grown.train == split.train + good and grown.test == split.test
    assert [t.partner for t in turned] == [split.test[0]['id'], split.validation[0]['id'], split.test[1]['id'], split.validation[1]['id']]
    assert all(t.value >= 0.8 for t in turned[:2]) and all(t.value is None for t in turned[2:])
