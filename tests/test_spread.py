"""The plan over parts keeps the rows that the search in memory keeps, whatever the parts, their form and their order."""
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_nb.core.files import BadInput, write_jsonl
from finetune_nb.core.rows import make_row
from finetune_nb.curation.dedup import exact_duplicates, near_duplicates

pytest.importorskip('daft', reason='the extra [spread] is not installed')
from finetune_nb.curation.spread import dedup_parts, kept_records  # noqa: E402


def said(text: str, answer: str, line: int, quality: float, **extra) -> dict:
    row = make_row([{'role': 'user', 'content': text}, {'role': 'assistant', 'content': answer}], file='all.jsonl', line=line, **extra)
    return {**row, 'scores': {'quality': quality}}


def corpus(seed: int, texts: int, forms: int, fillings: int) -> list[dict]:
    "Free texts, edited copies, exact copies, forms filled in, and pairs of one text under two labels."
    rng = random.Random(seed)
    words = [f'w{i}' for i in range(3000)]
    free = [' '.join(rng.choices(words, k=rng.randint(3, 120))) for _ in range(texts)]
    edited = [' '.join(w if rng.random() > rng.choice([0.002, 0.01, 0.03]) else rng.choice(words) for w in rng.choice(free).split()) for _ in range(texts)]
    frames = [rng.choices(words, k=150) for _ in range(forms)]
    filled = [' '.join([*frame[:70], *rng.choices(words, k=rng.choice([1, 3, 12])), *frame[70:]]) for frame in frames for _ in range(fillings)]
    every = [*free, *edited, *filled, *rng.choices(free + filled, k=texts // 5)]
    rng.shuffle(every)
    rows = [said(text, rng.choice(['Done.', 'It is done.']), n, rng.choice([0.0, 0.5, 1.0])) for n, text in enumerate(every, 1)]
    labelled = [said(free[i % 7] + ' ' + free[i % 11], 'Yes.', len(rows) + i + 1, 1.0, label=bool(i % 2)) for i in range(40)]
    return rows + labelled


def on_one_machine(rows: list[dict], **how) -> tuple[list[str], object, int]:
    "(places of the rows that stay, the search, exact copies)."
    gone = {id(row) for row, _ in exact_duplicates(rows)}
    copies = len(gone)
    near = near_duplicates([row for row in rows if id(row) not in gone], **how)
    gone |= {id(row) for row, *_ in near.pairs}
    return sorted(row['origin']['line'] for row in rows if id(row) not in gone), near, copies


def in_parts(rows: list[dict], folder, parts: int, form: str) -> list:
    "The rows as files; a part holds every so-manieth row."
    paths = []
    for part in range(parts):
        some, path = rows[part::parts], folder / f'{part:03}.{form}'
        if form == 'jsonl': write_jsonl(path, some)
        else: pq.write_table(pa.Table.from_pylist([{**row, 'label': row.get('label')} for row in some]), path)
        paths.append(path)
    return paths


def lines_of(folder) -> list[int]:
    return sorted(row['origin']['line'] for row in kept_records(folder))


@pytest.mark.parametrize('form, parts, how', [('jsonl', 5, {}), ('parquet', 3, {'boilerplate': 0.02}), ('jsonl', 1, {'boilerplate': 0.02, 'cap': 6}), ('jsonl', 4, {'threshold': 0.6, 'cap': 4})])
def test_same_rows_stay(tmp_path, form, parts, how):
    rows = corpus(seed=parts, texts=500, forms=6, fillings=90)
    stays, near, copies = on_one_machine(rows, **how)
    told = dedup_parts(in_parts(rows, tmp_path, parts, form), tmp_path / 'out', **how)
    assert lines_of(tmp_path / 'out') == stays
    assert (told.rows, told.exact, told.near) == (len(rows), copies, len(near.pairs))
    assert (told.verified, told.excused, told.contrary, told.capped_buckets) == (near.verified, near.excused, near.contrary, near.capped_buckets)
    assert copies > 50 and told.near > 50
    assert 'boilerplate' not in how or near.excused > 100, 'the test must try the cut'
    assert 'cap' not in how or near.capped_buckets > 10, 'the test must fill buckets'


def test_each_drop_names_its_reason(tmp_path):
    rows = corpus(seed=9, texts=200, forms=2, fillings=40)
    paths = in_parts(rows, tmp_path, 3, 'jsonl')
    _, near, _ = on_one_machine(rows)
    (tmp_path / 'out/work/signed').mkdir(parents=True)     # what a killed run may leave
    pq.write_table(pa.table({'place': pa.array([0], pa.uint64())}), tmp_path / 'out/work/signed/old.parquet')
    told = dedup_parts(paths, tmp_path / 'out')
    dropped = pq.read_table(tmp_path / 'out' / 'dropped.parquet').to_pylist()
    row_at = lambda part, line: json.loads(paths[part].read_text().splitlines()[line - 1])
    found = {(row_at(d['part'], d['line'])['origin']['line'], row_at(d['kept_part'], d['kept_line'])['origin']['line'], round(d['value'], 9)) for d in dropped if d['rule'] == 'dup.near'}
    assert found == {(a['origin']['line'], b['origin']['line'], round(v, 9)) for a, b, v in near.pairs}
    assert told.kept + len(dropped) == told.rows == len(rows)
    assert not (tmp_path / 'out' / 'work').exists()


def test_order_of_rows_does_not_matter(tmp_path):
    rows = corpus(seed=4, texts=200, forms=2, fillings=40)
    (tmp_path / 'a').mkdir(), (tmp_path / 'b').mkdir()
    dedup_parts(in_parts(rows, tmp_path / 'a', 2, 'jsonl'), tmp_path / 'a/out')
    dedup_parts(in_parts(rows[::-1], tmp_path / 'b', 7, 'jsonl'), tmp_path / 'b/out')
    assert lines_of(tmp_path / 'a/out') == lines_of(tmp_path / 'b/out')


def test_plain_text_nothing_to_drop_and_bad_parts(tmp_path):
    write_jsonl(tmp_path / 'a.jsonl', [{'text': f'text number {i} says one thing of its own'} for i in range(3)])
    told = dedup_parts([tmp_path / 'a.jsonl'], tmp_path / 'out')
    assert (told.rows, told.kept) == (3, 3) and list(kept_records(tmp_path / 'out'))[2]['text'].startswith('text number 2')
    (tmp_path / 'bad.jsonl').write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(Exception, match=r'bad.jsonl:2: not JSON'): dedup_parts([tmp_path / 'bad.jsonl'], tmp_path / 'other')
    with pytest.raises(BadInput, match='no parts'): dedup_parts([], tmp_path / 'third')
