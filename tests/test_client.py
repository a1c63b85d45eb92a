"The client on its worst days: real servers that fail, hang, lie and echo keys; and our own server."
import json
import os
import random
import subprocess
import sys
import threading
import time

import pytest

from finetune_nb.core.files import BadInput
from finetune_nb.model.client import Endpoint, Request, open_client
from finetune_nb.model.scripted import Raw, completion, scripted
from finetune_nb.model.wire import GIVE_UP, Server

KEY = 'hunter2-0123456789'


def ask(text, **more): return Request([{'role': 'user', 'content': text}], **more)


def last(body): return body['messages'][-1]['content']


def quick(url, **more): return Server(url, 'm', backoff=.005, **more)


def test_every_fault_passes_and_every_answer_lands_in_its_place():
    "Each question fails twice, each time differently, before it is answered."
    faults = [Raw(429, b'{"error": {"message": "slow down"}}', {'Retry-After': '0.01'}), Raw(500), Raw(503, b'busy'), Raw(200, b'<html>'),
              Raw(200, b'{"choices": [{"mess'), Raw(200, b'[]'), Raw(200, b'{"choices": []}'), Raw(502, b'\xff\xfe'), Raw(delay=2)]
    tries, lock = {}, threading.Lock()

    def server(body):
        with lock: n = tries[last(body)] = tries.get(last(body), 0) + 1
        return random.Random(f'{last(body)} {n}').choice(faults) if n <= 2 else f'answer to {last(body)}'

    with scripted(server) as url:
        client = Endpoint(quick(url, timeout=1.5, retries=6), concurrency=8)
        replies = client.chat([ask(f'q{n}') for n in range(40)])
    bad = [r.why_not for r in replies if not r.ok]
    assert bad == [] and [r.text for r in replies] == [f'answer to q{n}' for n in range(40)]
    assert client.usage.calls == 40 and client.usage.failed == 0 and min(tries.values()) == 3


def test_one_bad_request_does_not_end_the_batch():
    with scripted(lambda body: Raw(400, b'{"error": {"message": "too long"}}') if 'bad' in last(body) else 'ok') as url:
        replies = Endpoint(quick(url)).chat([ask('bad 1'), ask('good'), ask('bad 2'), ask('also good')])
    assert [r.ok for r in replies] == [False, True, False, True]
    assert replies[0].why_not == 'HTTP 400: too long'


def test_no_more_threads_than_asked_for():
    now, most, lock = [0], [0], threading.Lock()

    def server(body):
        with lock: now[0] += 1; most[0] = max(most[0], now[0])
        time.sleep(.02)
        with lock: now[0] -= 1
        return 'ok'

    with scripted(server) as url: Endpoint(quick(url), concurrency=3).chat([ask(str(n)) for n in range(30)])
    assert 2 <= most[0] <= 3


@pytest.mark.parametrize('status, body', [(401, b'{"error": {"message": "Incorrect API key provided: KEY"}}'), (403, b'no'), (404, b'{"error": "model m not found"}')])
def test_a_server_that_cannot_be_used_is_told_at_the_start(status, body, monkeypatch):
    monkeypatch.setenv('TEST_KEY', KEY)
    seen = []
    with scripted(lambda _: Raw(status, body.replace(b'KEY', KEY.encode())), seen) as url:
        client = open_client({'url': url, 'model': 'm', 'key_env': 'TEST_KEY'})
        with pytest.raises(BadInput) as error: client.chat([ask(str(n)) for n in range(50)])
    assert url in str(error.value) and 'TEST_KEY' in str(error.value) and KEY not in str(error.value)
    assert len(seen) == 1


def test_nobody_there():
    with pytest.raises(BadInput, match=r'http://127\.0\.0\.1:9/v1: m: cannot be reached.*key_env'):
        open_client({'url': 'http://127.0.0.1:9', 'model': 'm'}).chat([ask('x')])


def test_a_server_that_dies_is_given_up():
    seen, alive = [], iter(range(10_000))

    def server(body): return 'ok' if next(alive) < 5 else Raw(503)

    with scripted(server, seen) as url:
        replies = Endpoint(quick(url, retries=1), concurrency=2).chat([ask(str(n)) for n in range(300)])
    assert sum(r.ok for r in replies) == 5 and len(seen) < 5 + 2 * (GIVE_UP + 4)
    assert replies[-1].why_not.startswith('not sent')


def test_the_key_is_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv('TEST_KEY', KEY)
    seen = []
    with scripted(lambda body: f'you sent {body["messages"]}' if len(seen) < 3 else Raw(400, f'{{"error": {{"message": "bad {KEY}"}}}}'.encode()), seen) as url:
        client = open_client({'url': url, 'model': 'm', 'key_env': 'TEST_KEY'}, cache=tmp_path / 'cache.jsonl')
        replies = client.chat([ask(str(n)) for n in range(6)])
    assert {headers['Authorization'] for _, headers, _ in seen} == {f'Bearer {KEY}'}
    written = (tmp_path / 'cache.jsonl').read_text() + repr(client) + repr(vars(client)) + repr(replies) + client.name
    assert KEY not in written and any('[key]' in r.why_not for r in replies)


def test_url_forms_reach_the_same_path():
    seen = []
    with scripted(lambda body: 'ok', seen) as url:
        for form in (url, url.removesuffix('/v1'), url + '/', url + '/chat/completions'):
            assert open_client({'url': form, 'model': 'm'}).chat([ask('x')])[0].ok
    assert {path for path, *_ in seen} == {'/v1/chat/completions'} and len(seen) == 4


def test_an_old_server_is_asked_only_for_what_it_knows():
    "It refuses logprobs, response_format, seed and max_tokens, one after the other."
    def server(body):
        for name in ('max_tokens', 'seed', 'response_format', 'logprobs'):
            if name in body: return Raw(400, json.dumps({'error': {'message': f'unknown parameter {name}', 'param': name}}).encode())
        return 'no' if body['max_completion_tokens'] else None

    seen = []
    with scripted(server, seen) as url:
        client = Endpoint(quick(url))
        first = client.chat([ask('a', labels=('yes', 'no'), seed=1, schema={'type': 'string'})])
        learned = len(seen)
        rest = client.chat([ask(str(n), labels=('yes', 'no'), seed=1, schema={'type': 'string'}) for n in range(5)])
    assert first[0].text == 'no' and learned == 5 and all(r.ok for r in rest) and len(seen) == learned + 5
    assert client.can_logprobs is False


def test_a_refusal_about_something_else_teaches_nothing():
    "A prompt that is too long must not cost the judge its probabilities."
    server = lambda body: Raw(400, b'{"error": {"message": "context length exceeded"}}') if 'long' in last(body) else completion('1', {'1': -.1, '2': -2.5})
    with scripted(server) as url:
        client = Endpoint(quick(url))
        replies = client.chat([ask('long', labels=('1', '2')), ask('a', labels=('1', '2')), ask('long too', labels=('1', '2')), ask('b', labels=('1', '2'))])
    assert [r.ok for r in replies] == [False, True, False, True]
    assert client.can_logprobs and replies[3].label_probs['1'] > .9


def test_temperature_is_never_left_out():
    with scripted(lambda body: Raw(400, b'{"error": {"message": "temperature: only 0"}}') if body['temperature'] else 'ok') as url:
        replies = Endpoint(quick(url)).chat([ask('a', temperature=.8), ask('b')])
    assert [r.ok for r in replies] == [False, True] and 'temperature' in replies[0].why_not


def test_killed_in_the_middle_nothing_paid_for_is_lost(tmp_path):
    "A process that is killed leaves its replies; the next one asks for the rest alone."
    seen = []

    def server(body):
        time.sleep(.01)
        return f'answer {last(body)}'

    code = ('import sys; from finetune_nb.model.client import *; from finetune_nb.model.reply_cache import Request\n'
            'open_client({"url": sys.argv[1], "model": "m"}, cache=sys.argv[2], concurrency=2).chat([Request([{"role": "user", "content": str(n)}]) for n in range(400)])')
    with scripted(server, seen) as url:
        child = subprocess.Popen([sys.executable, '-c', code, url, str(tmp_path / 'cache.jsonl')])
        until = time.monotonic() + 60
        while len(seen) < 50 and time.monotonic() < until: time.sleep(.01)
        child.kill()
        child.wait()
        with open(tmp_path / 'cache.jsonl', 'ab') as file: file.write(b'{"client": "torn')
        time.sleep(.2)
        paid = len(seen)
        client = open_client({'url': url, 'model': 'm'}, cache=tmp_path / 'cache.jsonl')
        replies = client.chat([ask(str(n)) for n in range(400)])
        assert [r.text for r in replies] == [f'answer {n}' for n in range(400)]
        assert client.usage.cached >= paid - 4 and len(seen) - paid == client.usage.calls   # at most what was under way is asked again
        again = open_client({'url': url, 'model': 'm'}, cache=tmp_path / 'cache.jsonl')
        assert again.chat([ask(str(n)) for n in range(400)]) == replies and again.usage.calls == 0


def test_threads_share_a_client(tmp_path):
    with scripted(lambda body: last(body) * 2) as url:
        client = Endpoint(quick(url), cache=tmp_path / 'c.jsonl', concurrency=4)
        out = {}
        work = [threading.Thread(target=lambda k=k: out.update({k: client.chat([ask(f'{k}-{n}') for n in range(20)])})) for k in range(4)]
        for t in work: t.start()
        for t in work: t.join()
    assert all(out[k][n].text == f'{k}-{n}' * 2 for k in range(4) for n in range(20))
    assert len((tmp_path / 'c.jsonl').read_text().splitlines()) == 80


def test_hostile_text_travels_whole():
    texts = ['\ud800 lone', 'NUL \x00', '😀 ' * 10, '"quotes" \\ and \u2028 lines', '<|im_start|>system']
    seen = []
    with scripted(lambda body: last(body)[:5], seen) as url: replies = Endpoint(quick(url)).chat([ask(text) for text in texts])
    assert all(r.ok for r in replies) and {last(body) for *_, body in seen} == set(texts)


def test_our_own_server(tiny_model, tmp_path):
    "It knows no probabilities and no temperature, and says so; the client understands."
    from finetune_nb.deployment.serve import make_app, running
    from finetune_nb.model.loading import load_model
    with running(make_app(load_model(str(tiny_model)), name='tiny', max_new_tokens=8)) as url:
        client = open_client({'url': url, 'model': 'tiny'}, cache=tmp_path / 'c.jsonl')
        plain, sampled, label = client.chat([ask('Hello', max_tokens=8), ask('Hello', temperature=.8, max_tokens=8), ask('Rate it', labels=('1', '2'))])
    assert plain.ok and plain.completion_tokens and not sampled.ok and 'greedy' in sampled.why_not
    assert not label.ok and 'not one of 1, 2' in label.why_not and client.can_logprobs is False


def test_a_model_that_writes_rubbish_is_refused_with_reasons(tiny_model, tmp_path):
    from finetune_nb.core.rows import make_row
    from finetune_nb.curation.synthesise import from_documents, from_seeds
    rows = [make_row([{'role': 'user', 'content': f'Where is parcel {n}?'}, {'role': 'assistant', 'content': f'{{"parcel": {n}}}'}], category='mail') for n in range(5)]
    (tmp_path / 'handbook.txt').write_text('A refund is paid within 14 days of the return.')
    client = open_client(str(tiny_model), cache=tmp_path / 'c.jsonl')
    made, read = from_seeds(client, rows, 4, max_tokens=12), from_documents(client, ['handbook.txt'], folder=tmp_path, max_tokens=12)
    assert (made.rows, read.rows) == ([], []) and len(made.rejected) == 8 and len(read.rejected) == 3
    assert all(one.reason and one.detail for one in made.rejected + read.rejected)
    assert '4 fewer than asked for' in made.sentence
    again = open_client(str(tiny_model), cache=tmp_path / 'c.jsonl')
    assert from_seeds(again, rows, 4, max_tokens=12) == made and again.usage.calls == 0


def test_nothing_heavy_is_imported_for_a_server():
    code = ('import sys; from finetune_nb.model.client import open_client; import finetune_nb.curation.synthesise\n'
            'open_client({"url": "http://127.0.0.1:9", "model": "m"}); print(sorted({"torch", "transformers", "datasets"} & set(sys.modules)))')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == '[]'
