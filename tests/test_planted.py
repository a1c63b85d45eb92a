"Defects that curation has not seen: each kind is found, little else is, no row is lost, and the order of the file does not matter."
import json
import random
from collections import Counter

import planted
import pytest
import yaml

from finetune_nb.core.run import Run
from finetune_nb.core.similarity import row_shingles
from finetune_nb.curation.curate import curate

FORMATS = ['alpaca', 'sharegpt', 'messages', 'prompt-completion', 'question-answer']
STRICT = {'format', 'dup.exact', 'dup.near', 'clean.secret', 'clean.control_token'}


def run_on(folder, made, format, suffix='.jsonl', **data):
    "Curate planted rows; the fate of each line, the key, and what curation says."
    file = folder / f'rows{suffix}'
    key, originals = planted.write(made, file, format)
    recipe = {'name': 'planted', 'base_models': ['./absent'], 'data': {'sources': [{'path': file.name}], 'category': 'category', **data}}
    (folder / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
    curated = curate(Run.open(folder / 'run', folder / 'recipe.yaml'))
    fate = {record['line']: record['rule'] for record in curated.ledger.records if record['outcome'] == 'dropped'}
    return curated, fate, key, originals


def scored(fate, key, originals):
    "Recall of each kind of defect, and precision of each family of rules; of a pair either row may go."
    twins, found, planted_, right, wrong = {v: k for k, v in originals.items()}, Counter(), Counter(), Counter(), Counter()
    for line, kind in key.items():
        if kind == 'pii': continue
        planted_[kind] += 1
        rules = [fate.get(line, ''), fate.get(originals.get(line), '')]
        found[kind] += any(rule.startswith('dup' if kind.startswith('dup') else kind) for rule in rules)
    for line, rule in fate.items():
        family = rule.split('.')[0] if rule.split('.')[0] in ('format', 'dup') else rule
        fine = line in key and key[line] != 'pii' or (rule.startswith('dup') and line in twins)
        (right if fine else wrong)[family] += 1
    recall = {kind: found[kind] / n for kind, n in planted_.items()}
    return recall, {family: right[family] / (right[family] + wrong[family]) for family in right | wrong}


@pytest.mark.parametrize('format', FORMATS)
def test_each_kind_is_found(format, tmp_path):
    made = planted.build(FORMATS.index(format), 700, .03)
    curated, fate, key, originals = run_on(tmp_path, made, format, '.jsonl.gz' if format == 'alpaca' else '.jsonl')
    recall, precision = scored(fate, key, originals)
    low = {kind: value for kind, value in recall.items() if value < (.98 if kind in STRICT else .95)}
    assert not low, {kind: [(n, made.rows[n - 1][:2], fate.get(n)) for n, k in key.items() if k == kind and not fate.get(n, '').startswith(kind)][:3] for kind in low}
    assert min(precision.values()) >= .95, precision
    said = json.dumps([row['messages'] for row in curated.kept] + curated.quarantine, ensure_ascii=False)
    assert not [value for value in made.values if value in said]
    outcomes = curated.ledger.counts('outcome', outcome=None)
    assert outcomes['kept'] + outcomes['dropped'] == len(made.rows) + outcomes.get('made', 0)


def test_order_does_not_matter(tmp_path):
    made, kept = planted.build(11, 500, .05), []
    for seed in (1, 2):
        random.Random(seed).shuffle(made.rows)
        (folder := tmp_path / str(seed)).mkdir()
        curated, *_ = run_on(folder, made, 'messages')
        kept.append({name: {row['id'] for row in getattr(curated, name)} for name in ('train', 'validation', 'test')})
    assert kept[0] == kept[1]


def test_no_similar_pair_straddles(tmp_path):
    made = planted.build(12, 600, .05)
    curated, *_ = run_on(tmp_path, made, 'sharegpt')
    sets = {name: [row_shingles(row) for row in getattr(curated, name)] for name in ('train', 'validation', 'test')}
    for a, b in (('train', 'validation'), ('train', 'test'), ('validation', 'test')):
        assert not [1 for x in sets[a] for y in sets[b] if len(x & y) >= .8 * len(x | y)]


def test_clean_rows_stay(tmp_path):
    made = planted.build(13, 1000, 0)
    made.rows = [row for row in made.rows if not row[4]]
    curated, fate, *_ = run_on(tmp_path, made, 'messages')
    assert len(fate) <= 10, Counter(fate.values())
