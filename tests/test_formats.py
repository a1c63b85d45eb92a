"Reading: public files without loss, broken files with located faults and bounded memory; and conversion there and back."
import csv
import gzip
import io
import json
import subprocess
import sys

import pytest
from conftest import cli, public_data
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_nb.core.rows import make_row
from finetune_nb.curation.convert import TARGETS, convert, write_objects
from finetune_nb.curation.formats import detect, to_row
from finetune_nb.curation.parse import parse_json
from finetune_nb.curation.sources import Record
from finetune_nb.curation.validate import check_file

PUBLIC = {'dolly_hhrlhf_small': ('prompt-completion', 1000), 'gpteacher_codegen': ('alpaca', 4535), 'gpteacher_roleplay': ('alpaca', 1923),
          'gpteacher_roleplay_0.6': ('alpaca', 3146), 'gpteacher_toolformer': ('alpaca', 7673), 'gsm8k_train': ('question-answer', 7473),
          'lf_alpaca_en_demo': ('alpaca', 999), 'lf_alpaca_zh_demo': ('alpaca', 1000), 'lf_c4_demo': ('text', 300), 'lf_dpo_en_demo': ('preference', 300),
          'lf_glaive_toolcall_en_demo': ('sharegpt', 300), 'lf_identity': ('alpaca', 91), 'lf_kto_en_demo': ('kto', 300), 'lf_v1_sft_demo': ('messages', 500),
          'self_instruct_seed_tasks': ('self-instruct', 175), 'self_instruct_t0_50k': ('prompt-completion', 55185)}


def texts(value):
    "Every text in a value; a text of JSON also by its parts."
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values(): yield from texts(inner)
    elif isinstance(value, list):
        for inner in value: yield from texts(inner)


def lost_texts(raw: dict, row: dict) -> list[str]:
    "Texts of the raw object that the row does not hold anywhere: roles are renamed and JSON may be written anew, so these do not count."
    held = list(texts(row))
    whole = '\n'.join(held)
    roles = {'human', 'gpt', 'function_call', 'observation', 'text', 'user', 'assistant', 'system'}
    return [text for text in texts(raw) if text.strip() and text not in roles and text not in whole and text[:1] not in '[{']


@pytest.mark.parametrize('name', PUBLIC)
def test_public_files_load_without_loss(name):
    path = public_data(f'{name}.jsonl.gz')
    found = check_file(path)
    assert (found.format, len(found.rows), list(found.problems)) == (*PUBLIC[name], [])
    raws = [json.loads(line) for line in gzip.open(path, 'rt', encoding='utf8')]
    by_line = {row['origin']['line']: row for row in found.rows}
    assert len(by_line) == len(raws)
    for line, raw in list(enumerate(raws, 1))[::max(1, len(raws) // 500)]: assert lost_texts(raw, by_line[line]) == []


def test_what_public_files_carry_beside_texts():
    path = public_data('lf_glaive_toolcall_en_demo.jsonl.gz')
    tools = check_file(path).rows
    assert [row.get('tools') or [] for row in tools] == [json.loads(json.loads(line)['tools'] or '[]') for line in gzip.open(path, 'rt')]
    assert any(turn['role'] == 'tool' for row in tools for turn in row['messages'])
    labels = [row['label'] for row in check_file(public_data('lf_kto_en_demo.jsonl.gz')).rows]
    assert set(labels) == {True, False}
    weights = [turn['weight'] for row in check_file(public_data('lf_v1_sft_demo.jsonl.gz')).rows for turn in row['messages']]
    assert set(weights) == {0, 1}
    for row in check_file(public_data('lf_dpo_en_demo.jsonl.gz')).rows:
        assert row['messages'] == row['prompt'] + row['chosen'] and row['chosen'] != row['rejected']


def test_public_files_convert_and_come_back(tmp_path):
    "Each public file to each target; what is said to be lost is all that is."
    for name in ('lf_glaive_toolcall_en_demo', 'lf_kto_en_demo', 'lf_v1_sft_demo', 'lf_dpo_en_demo', 'lf_alpaca_zh_demo'):
        rows = check_file(public_data(f'{name}.jsonl.gz')).rows
        for to in TARGETS:
            done = convert(rows, to)
            assert len(done.objects) + sum(lost.rows for lost in done.left_out) == len(rows)
            if not done.objects: continue
            again = check_file(write_objects(done.objects, tmp_path / f'{name}.{to}.jsonl.gz'))
            assert not again.problems, (name, to, again.problems[:1])
            if not done.lost and not done.left_out: assert [row['messages'] for row in again.rows] == [row['messages'] for row in rows]


# Conversion as a property

WORDS = st.text(st.characters(codec='utf-8', exclude_characters='\0'), min_size=1, max_size=30).filter(lambda text: text.strip())
TURN = st.fixed_dictionaries({'content': WORDS}, optional={'weight': st.sampled_from([0, 1]), 'name': WORDS})


@st.composite
def conversations(draw):
    "A row as any reader could have made it."
    turns = [{'role': 'system', **draw(TURN)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append({'role': 'user', **draw(TURN)})
        if draw(st.integers(0, 4)) == 0: turns += [{'role': 'assistant', **draw(TURN)}, {'role': 'tool', **draw(TURN)}]
        turns.append({'role': 'assistant', **draw(TURN)})
    extra = draw(st.fixed_dictionaries({}, optional={'tools': st.just([{'name': 'find'}]), 'label': st.booleans(), 'rating': st.integers(), 'raw_id': WORDS, 'raw_prompt': WORDS, 'context': WORDS}))
    if draw(st.booleans()):
        other = [{'role': 'assistant', 'content': draw(WORDS)}]
        if other != turns[-1:]: extra = {**{k: v for k, v in extra.items() if k != 'label'}, 'prompt': turns[:-1], 'chosen': turns[-1:], 'rejected': other}
    return make_row(turns, category=draw(st.sampled_from(['all', 'billing'])), file='a.jsonl', line=1, **extra)


@pytest.mark.parametrize('to', TARGETS)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(row=conversations())
def test_there_and_back(to, row):
    "Where nothing is reported lost, reading the object gives the same row; in any case one row is held or left out."
    done = convert([row], to)
    assert len(done.objects) + sum(lost.rows for lost in done.left_out) == 1
    if not done.objects: return
    raw = parse_json(json.dumps(done.objects[0], ensure_ascii=False))
    found = detect([raw]).format
    again = to_row(raw, found, Record(None, 'a.jsonl', 1, '', 'experts'))
    if done.lost: return
    for key in ('messages', 'tools', 'label', 'prompt', 'chosen', 'rejected', 'category', 'rating', 'raw_id'): assert again.get(key) == row.get(key), key


# Broken input

GOOD = '{"prompt": "Name a fruit", "completion": "Pear"}\n'


def checked(tmp_path, data: bytes | str, name='a.jsonl'):
    path = tmp_path / name
    path.write_bytes(data.encode('utf8') if isinstance(data, str) else data)
    found = check_file(path)
    return len(found.rows), [(p.line, p.rule) for p in found.problems]


@pytest.mark.parametrize('line, rule', [
    (b'{"prompt": "a", "completion": "b", "prompt": "c"}', 'format.json'), (b'{"prompt": "a", "completion": "b", "score": NaN}', 'format.json'),
    (b'{"prompt": "a", "completion": "b", "score": -Infinity}', 'format.json'), (b'{"prompt": "a", "completion": "b", "score": 1e999}', 'format.json'),
    (b'{"prompt": "a", "completion": "\\ud800"}', 'format.encoding'), (b'{"prompt": "a", "completion": "\xff"}', 'format.encoding'),
    (b'{"prompt": "a", "completion": "b\0"}', 'format.json'), (b'\0\0\0\0', 'format.json'), (b'{"prompt": ' + b'[' * 100_000, 'format.json'),
    (b'{"prompt": "a", "completion": "b", "x": ' + b'[' * 500 + b']' * 500 + b'}', 'format.json'),
    (b'{"prompt": "a", "completion": "b", "tools": "' + b'[' * 5000 + b'"}', 'format.schema'), (b'{"prompt": "a", "completion": 17}', 'format.schema'),
    (b'{"prompt": "a"', 'format.json'), (b'"text"', 'format.schema'), (b'null', 'format.schema'), (b'{"prompt": "a", "completion": "b"}{"prompt": "c"}', 'format.json'),
    (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', 'format.schema'), (b'{"prompt": " ", "completion": "b"}', 'format.empty')])
def test_one_bad_line_is_one_fault(tmp_path, line, rule):
    good = GOOD.encode()
    assert checked(tmp_path, good * 2 + line + b'\n' + good * 2) == (4, [(3, rule)])


def test_encodings_and_line_ends(tmp_path):
    for encoding in ('utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be'): assert checked(tmp_path, (GOOD * 3).encode(encoding)) == (3, [])
    assert checked(tmp_path, (GOOD * 3).replace('\n', '\r\n')) == (3, [])
    assert checked(tmp_path, (GOOD * 3).replace('\n', '\r')) == (3, [])
    assert checked(tmp_path, '', 'a.json')[1] == [(None, 'format.empty')] == checked(tmp_path, '[]', 'b.json')[1] == checked(tmp_path, ' \n', 'c.csv')[1]


def test_arrays(tmp_path):
    rows = [json.loads(GOOD)] * 5
    assert checked(tmp_path, json.dumps(rows), 'a.json') == (5, [])
    assert checked(tmp_path, ''.join(json.dumps(row, indent=1) for row in rows)) == (5, [])
    assert checked(tmp_path, json.dumps(rows).replace('"Pear"', '"Pe"ar"', 1), 'a.json') == (4, [(1, 'format.json')])
    assert checked(tmp_path, json.dumps(rows)[:-30], 'a.json') == (4, [(5, 'format.json'), (6, 'format.json')])


def test_tables(tmp_path):
    assert checked(tmp_path, 'prompt,completion\na,b\nc\n"d,e\nf,g\n', 'a.csv') == (2, [(3, 'format.schema'), (4, 'format.schema')])
    assert checked(tmp_path, 'prompt;completion\n"a;b";"c\nd"\n', 'a.csv') == (1, [])
    assert checked(tmp_path, 'prompt,prompt\na,b\n', 'a.csv') == (0, [(1, 'format.schema')])
    out = io.StringIO()
    csv.writer(out).writerows([['prompt', 'completion'], ['say "hi"', 'x,\r\ny']])
    assert checked(tmp_path, out.getvalue().encode('utf-16'), 'a.csv') == (1, [])


def test_archives(tmp_path):
    whole = gzip.compress(''.join(GOOD.replace('fruit', f'fruit {n}') for n in range(5000)).encode())
    rows, problems = checked(tmp_path, whole[:len(whole) // 2], 'a.jsonl.gz')
    assert rows > 1000 and problems == [(rows + 1, 'format.encoding')]
    assert checked(tmp_path, whole, 'named.jsonl') == (5000, [])


HUGE = '''
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from finetune_nb.curation.validate import check_file
print([p.rule for p in check_file(sys.argv[1]).problems])
'''


@pytest.mark.parametrize('kind', ['line', 'array', 'gzip', 'zst', 'brackets'])
def test_memory_is_bounded(tmp_path, kind):
    "A fifty-megabyte line, an endless array and three bombs, in one gigabyte of address space."
    zstandard = pytest.importorskip('zstandard')
    name, data = {'line': ('a.jsonl', lambda: GOOD.encode() + b'{"prompt": "' + b'x' * (50 << 20) + b'"}\n' + GOOD.encode()),
                  'array': ('a.json', lambda: b'[' + GOOD.encode() + b', {"prompt": "' + b'x' * (50 << 20) + b'"},' + GOOD.encode() + b']'),
                  'gzip': ('a.jsonl.gz', lambda: gzip.compress(GOOD.encode() * 2 + bytes(600 << 20), 1)), 'zst': ('a.json.zst', lambda: zstandard.compress(b'[' + bytes(600 << 20))),
                  'brackets': ('a.json', lambda: b'[' * (20 << 20))}[kind]
    (tmp_path / name).write_bytes(data())
    done = subprocess.run([sys.executable, '-c', HUGE, tmp_path / name], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    assert ('format.long' in done.stdout) == (kind != 'brackets') and 'format' in done.stdout


def test_check_reads_like_a_compiler(tmp_path):
    secret = 'sk-' + 'aB3dE5gH7' * 5
    (tmp_path / 'bad.jsonl').write_text(GOOD * 3 + '{"prompt": "key ' + secret + '", completion: "x"}\n' + '{"prompt": "a"}\n' * 40 + GOOD * 50)
    done = cli('check', 'bad.jsonl', cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 2 and secret not in done.stdout and secret[10:30] not in done.stdout
    assert lines[0].startswith('bad.jsonl:4: not JSON (expecting property name enclosed in double quotes, column ')
    assert lines[1][lines[2].index('^'):].startswith('completion: "x"}')
    assert lines[3].startswith('bad.jsonl:5: completion: missing;') and lines[4] == '    and 39 more like it: lines 6, 7, 8, 9, 10, 11, 12, 13, …'
    assert lines[-3].startswith('format: prompt-completion: 53 of 93') and lines[-1] == 'bad.jsonl: prompt-completion; 53 good rows, 41 bad'


def test_convert_command(tmp_path):
    (tmp_path / 'a.jsonl').write_text(GOOD * 2)
    done = cli('convert', 'a.jsonl', 'b.json', '--to', 'sharegpt', cwd=tmp_path)
    assert done.returncode == 0 and 'nothing was lost' in done.stdout, done.stdout + done.stderr
    assert len(json.loads((tmp_path / 'b.json').read_text())) == 2
    again = cli('convert', 'a.jsonl', 'b.json', '--to', 'sharegpt', cwd=tmp_path)
    assert again.returncode == 2 and '--force' in again.stderr
    assert cli('convert', 'a.jsonl', 'b.json', '--to', 'messages', '--force', cwd=tmp_path).returncode == 0
    out = cli('convert', 'a.jsonl', 'c.json', '--to', 'preference', cwd=tmp_path)
    assert out.returncode == 2 and 'one answer only: 2 rows, first a.jsonl:1' in out.stdout and not (tmp_path / 'c.json').exists()


def test_logs_with_feedback(tmp_path):
    asked = lambda n, **more: {'gen_ai.response.id': f'r{n}', 'finetune_nb.status': 200, 'finetune_nb.input.messages': [{'role': 'user', 'content': f'Question {n}?'}], 'finetune_nb.output.text': f'Answer {n}', **more}
    lines = [asked(1), asked(2), asked(3, **{'finetune_nb.feedback.rating': 'up'}), {'gen_ai.response.id': 'r1', 'finetune_nb.feedback.rating': 'down'},
             {'gen_ai.response.id': 'r2', 'finetune_nb.feedback.rating': 'down', 'finetune_nb.feedback.correction': 'Better 2'}, {'gen_ai.response.id': 'r9', 'finetune_nb.feedback.rating': 'up'},
             asked(4, **{'finetune_nb.metadata': {'purpose': 'certificate'}})]
    (tmp_path / 'requests.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    found = check_file(tmp_path / 'requests.jsonl')
    assert [(row['messages'][-1]['content'], row['feedback']) for row in found.rows] == [('Answer 1', 'down'), ('Better 2', 'corrected'), ('Answer 3', 'up')]
    assert [(p.line, p.rule) for p in found.problems] == [(6, 'format.feedback'), (7, 'format.rehearsal')]
